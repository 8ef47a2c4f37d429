"""What a simulation must never see. Told of every event as it happens, it keeps its own books."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gridcloud.grid.papers import LeaseGrant
from gridcloud.model.job import Job, JobState
from simulation.hosts import Host


class Violated(AssertionError):
    """Something happened that must never happen."""


@dataclass
class Ledger:
    """The books of one run. ``hosts`` are looked at, ``now`` is virtual seconds."""

    now: Callable[[], float]
    hosts: dict[str, Host]
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    submitted: dict[str, str] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)
    healed_at: float = 0.0
    #: Seconds from healing until all members agreed on who is one; None while they do not.
    agreed_after: float | None = None

    def __post_init__(self) -> None:
        self._trace = hashlib.blake2b(digest_size=16)
        self._closed = False
        self._grants: dict[tuple[str, str], LeaseGrant] = {}
        self._over: set[tuple[str, str]] = set()
        self._taken: dict[str, int] = {}
        self._submitted_at: dict[str, float] = {}
        self._began: dict[str, set[int]] = {}

    @property
    def trace(self) -> str:
        """A hash over everything that happened, in its order, at its time."""
        return self._trace.hexdigest()

    def close(self) -> None:
        """Take note of nothing more."""
        self._closed = True

    def note(self, what: str, *about: object) -> None:
        """Make an event part of the trace, and count it."""
        if self._closed:
            return
        self.counts[what] = self.counts.get(what, 0) + 1
        self._trace.update(f"{self.now():.6f} {what} {about}\n".encode())

    def violated(self, rule: str, *about: object) -> None:
        """Take note of what must never happen."""
        if self._closed:
            return
        self.note("violated", rule, *about)
        words = ", ".join(str(each) for each in about)
        self.violations.append(f"{self.now():.2f} s: {rule}: {words}")

    def agreed(self) -> None:
        """All members hold the same roster."""
        self.agreed_after = self.now() - self.healed_at
        self.note("agreed")

    # What hosts tell.

    def on_host(self, host: Host, what: str, about: dict[str, Any]) -> None:
        """Check what happens on a host: its capacity is never given twice."""
        self.note(what, host.name, *sorted(about.items()))
        if what == "placed":
            if host.taken() > host.cpus:
                self.violated("capacity lent twice", host.name, host.taken(), host.cpus)
            if about["again"]:
                self.violated("a lease that was over came back", host.name, about["lease"])
        elif what == "removed":
            self._over.add((host.name, about["lease"]))
        elif what == "started":
            job, attempt = about["job"], about["attempt"]
            self.waits.setdefault(job, self.now() - self._submitted_at.get(job, self.now()))
            self._began.setdefault(job, set()).add(attempt)
            if about["lease"] not in host.placed:
                self.violated("a command began without a lease", host.name, job)

    # What owners grant.

    def granted(self, site: str, grant: LeaseGrant) -> None:
        """Check that one lease is always the same lease."""
        which = (site, grant.lease_id)
        known = self._grants.get(which)
        self.note("granted", site, grant.lease_id)
        if which in self._over:
            self.violated("a lease was granted after its end", *which)
        if known is not None and _fixed(known) != _fixed(grant):
            self.violated("one lease was granted twice, differently", *which)
        self._grants[which] = grant

    # What users see.

    def submits(self, site: str, jobs: list[Job]) -> None:
        """Jobs were accepted."""
        for job in jobs:
            self.note("submitted", site, job.id)
            self.submitted[job.id] = site
            self._submitted_at[job.id] = self.now()

    def took(self, site: str, job: Job) -> None:
        """Results of an attempt were brought to the user's folder."""
        self.note("took", site, job.folder_name)
        before = self._taken.setdefault(job.id, job.attempts)
        if before != job.attempts:
            self.violated("results of two attempts were taken", job.id, before, job.attempts)

    def final(self, site: str, job: Job) -> None:
        """Check the end of a job as its site tells it."""
        if not job.state.final:
            self.violated("a job was never ended", site, job.id, job.state, job.message)
        elif job.state is JobState.COMPLETED and self._taken.get(job.id) != job.attempts:
            self.violated("a job is done without its results", site, job.folder_name)
        outcome = job.outcome.reason if job.outcome else ""
        self.note("final", site, job.id, job.state.value, outcome)
        self.counts[f"job {job.state.value} {outcome}".strip()] = (
            self.counts.get(f"job {job.state.value} {outcome}".strip(), 0) + 1
        )


def _fixed(grant: LeaseGrant) -> tuple[object, ...]:
    """Return what may never change in a lease: renewals and recalls move its end alone."""
    return (grant.community, grant.lender, grant.borrower, grant.person, grant.need)
