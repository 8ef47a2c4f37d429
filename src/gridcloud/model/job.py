"""A job: what to run, where it stands, and the only ways it may move on (states as in PSI/J)."""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import Field, field_validator

from gridcloud.errors import Conflict
from gridcloud.model.choice import Constraints, Strategy
from gridcloud.model.frozen import Frozen
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import Need

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TASK_PLACEHOLDER = "{task}"


class JobState(StrEnum):
    """Where a job stands."""

    NEW = "NEW"
    QUEUED = "QUEUED"
    STAGE_IN = "STAGE_IN"
    ACTIVE = "ACTIVE"
    STAGE_OUT = "STAGE_OUT"
    CLEANUP = "CLEANUP"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"

    @property
    def final(self) -> bool:
        """Whether the job will never change again."""
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELED)


_ENDS = {JobState.CLEANUP, JobState.FAILED, JobState.CANCELED}
#: From each state, the states a job may enter next. STAGE_IN and ACTIVE may fall back to QUEUED:
#: that is a job placed anew after its place was lost. Once its command ended by itself it is not.
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.NEW: frozenset({JobState.QUEUED} | _ENDS),
    JobState.QUEUED: frozenset({JobState.STAGE_IN} | _ENDS),
    JobState.STAGE_IN: frozenset({JobState.ACTIVE, JobState.QUEUED} | _ENDS),
    JobState.ACTIVE: frozenset({JobState.STAGE_OUT, JobState.QUEUED} | _ENDS),
    JobState.STAGE_OUT: frozenset(_ENDS),
    JobState.CLEANUP: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELED: frozenset(),
}


class JobSpec(Frozen):
    """What a person asks to be run.

    ``inputs`` are absolute paths on the site's host, copied into the job folder under their own
    names. ``outputs`` are patterns relative to the job folder; what they match is copied into the
    absolute folder ``into``. ``env`` is set wherever the job runs; ``shell_env`` only where it
    runs on this machine under the user's own account, so that ``python`` means the same program
    as in the shell it came from. ``site`` pins the job to one site by name, ``constraints`` say
    where else it may not run, ``strategy`` which place is best (None: the site's own). When its
    place is lost it goes back in line up to ``resubmit`` times (None: as the site has it).
    ``machine`` is asked of the machine where one is made for it.
    """

    command: Annotated[tuple[Annotated[str, Field(max_length=131072)], ...], Field(min_length=1)]
    name: Annotated[str, Field(max_length=128)] = ""
    need: Need = Need()
    env: dict[str, str] = {}
    shell_env: dict[str, str] = {}
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    into: str = ""
    site: str | None = None
    constraints: Constraints = Constraints()
    strategy: Strategy | None = None
    resubmit: Annotated[int, Field(ge=0, le=100)] | None = None
    machine: MachineOrder = MachineOrder()
    tasks: Annotated[tuple[int, ...], Field(max_length=100_000)] = ()

    @field_validator("command", "inputs", "outputs")
    @classmethod
    def _no_nul(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if any("\0" in value or not value for value in values):
            raise ValueError("may hold neither an empty text nor a NUL character")
        return values

    @field_validator("env", "shell_env")
    @classmethod
    def _env_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not _ENV_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a name for an environment variable")
            if "\0" in value:
                raise ValueError(f"the value of {name} holds a NUL character")
        return env

    @field_validator("outputs")
    @classmethod
    def _outputs_stay_inside(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            path = PurePosixPath(pattern)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(
                    f"{pattern!r} leaves the job folder; an output pattern is relative to it"
                )
        return patterns

    @field_validator("inputs")
    @classmethod
    def _inputs_are_absolute_and_distinct(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        names: set[str] = set()
        for path in paths:
            if not PurePosixPath(path).is_absolute():
                raise ValueError(f"{path!r} is not an absolute path")
            name = PurePosixPath(path).name
            if name in names:
                raise ValueError(f"two inputs would both be called {name!r} in the job folder")
            names.add(name)
        return paths

    @property
    def title(self) -> str:
        """Its name, or else the start of its command line."""
        return self.name or " ".join(self.command)[:40]

    def for_task(self, task: int) -> JobSpec:
        """Return the job of one task: the number replaces ``{task}``, and GRIDCLOUD_TASK is set."""

        def put(text: str) -> str:
            return text.replace(TASK_PLACEHOLDER, str(task))

        return JobSpec(
            command=tuple(map(put, self.command)),
            name=put(self.name),
            need=self.need,
            env={name: put(value) for name, value in self.env.items()}
            | {"GRIDCLOUD_TASK": str(task)},
            shell_env=self.shell_env,
            inputs=tuple(map(put, self.inputs)),
            outputs=tuple(map(put, self.outputs)),
            into=put(self.into),
            site=self.site,
            constraints=self.constraints,
            strategy=self.strategy,
            resubmit=self.resubmit,
            machine=self.machine,
        )


class Outcome(Frozen):
    """How a command ended: by itself with a status, by a signal, or ended for a reason."""

    exit_code: int | None = None
    signal: int | None = None
    reason: str = ""
    message: str = ""
    cpu_seconds: float = 0.0
    max_rss_bytes: int = 0

    @property
    def succeeded(self) -> bool:
        """Whether the command ended by itself with status 0."""
        return self.exit_code == 0 and not self.reason

    @property
    def exit_status(self) -> int:
        """The status a shell would show: its own, 128 + signal, or 124 for a limit reached."""
        if self.reason in ("time-limit", "lease-end"):
            return 124
        if self.exit_code is not None:
            return self.exit_code
        return 128 + self.signal if self.signal else 1


class Ending(Frozen):
    """How a command ended and what it left: regular files beneath its work folder with sizes.

    ``unmatched`` are output patterns that matched nothing, ``escaping`` paths that lead out of
    the work folder and were therefore left alone.
    """

    outcome: Outcome
    outputs: tuple[tuple[str, int], ...] = ()
    unmatched: tuple[str, ...] = ()
    escaping: tuple[str, ...] = ()


class Job(Frozen):
    """A job as its site knows it. ``site`` and ``provider`` say who serves it, once placed.

    ``attempts`` counts leases asked for; with ``lease_id`` it is the fencing token: an attempt
    that is not the job's current one changes nothing any more. ``resubmitted`` counts the places
    that were lost; to the offers in ``lost_at``, named as by `Offer.key`, it does not go again.
    ``input_bytes`` is the size of its inputs, where that matters to the choice of a place.
    """

    id: str
    spec: JobSpec
    state: JobState = JobState.NEW
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    array_id: str | None = None
    task: int | None = None
    site: str | None = None
    provider: str | None = None
    lease_id: str | None = None
    attempts: int = 0
    resubmitted: int = 0
    lost_at: tuple[str, ...] = ()
    input_bytes: int = 0
    cancel_requested: bool = False
    outcome: Outcome | None = None
    message: str = ""

    def advanced(self, state: JobState, **changes: object) -> Job:
        """Return this job in ``state``; raises `Conflict` for a step that makes no sense."""
        if state not in TRANSITIONS[self.state]:
            raise Conflict(f"Job {self.id} is {self.state} and cannot become {state}.")
        return self.model_copy(update={"state": state, **changes})

    def held_by(self, other: Job) -> bool:
        """Whether ``other`` is of this job's current attempt, so that what it says counts."""
        mine, theirs = (self.attempts, self.lease_id), (other.attempts, other.lease_id)
        return not self.state.final and mine == theirs

    @property
    def folder_name(self) -> str:
        """The name of its folder where it runs: unique to the attempt, so none is mistaken."""
        return f"{self.id}-{self.attempts}"


class Event(Frozen):
    """Something that happened to a job, in words for its owner."""

    job_id: str
    at: datetime
    kind: str
    message: str
