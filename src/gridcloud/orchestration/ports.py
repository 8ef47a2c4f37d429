"""What orchestration needs of other rooms; the site hands in what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Protocol

from gridcloud.model.job import Ending, Event, Job, JobState
from gridcloud.model.lease import Lease
from gridcloud.model.offer import Offer


class JobKeeper(Protocol):
    """The memory of jobs."""

    async def add(self, new: Sequence[Job], message: str) -> None:
        """Keep new jobs, all or none."""
        ...

    async def save(self, job: Job, message: str = "", *, held_by: Job | None = None) -> bool:
        """Keep a job's new value, with an event if there is a message; return whether it was kept.

        An ended job stays as it is; and with ``held_by`` so does one of which that is no longer
        the current attempt. Both are looked at in the same transaction that writes.
        """
        ...

    async def holds(self, job: Job) -> bool:
        """Return whether this is still the job's current attempt."""
        ...

    async def request_cancel(self, job_id: str) -> None:
        """Remember that a job is to end, in whatever state it is by now."""
        ...

    async def note(self, job: Job, kind: str, message: str) -> None:
        """Add an event."""
        ...

    async def get(self, job_id: str) -> Job:
        """Return one job."""
        ...

    async def resolve(self, job_id: str) -> list[Job]:
        """Return the job, or all tasks of the array."""
        ...

    async def listed(
        self,
        states: Sequence[JobState] | None = None,
        *,
        first: int | None = None,
        latest: int | None = None,
    ) -> list[Job]:
        """Return the jobs in these states, oldest first; the ``first`` so many, or the latest."""
        ...

    async def events(self, job_ids: Sequence[str], after: int = 0) -> list[tuple[int, Event]]:
        """Return numbered events."""
        ...


class Workplace(Protocol):
    """Where one job runs: one attempt's folder on one machine. All methods are idempotent and
    raise a retryable error when the machine cannot be reached at the moment."""

    async def state(self) -> str | None:
        """Return prepared, running, ended or lost; None when there is no such folder."""
        ...

    async def stage_in(self, job: Job) -> None:
        """Make the folder and copy the inputs into it."""
        ...

    async def run(self, job: Job, lease: Lease, started: Callable[[], None]) -> Ending:
        """Start the command unless it was started before; stay to its end."""
        ...

    async def watch(self, job: Job) -> Ending:
        """Stay with a command started before to its end."""
        ...

    async def stage_out(self, job: Job, ending: Ending) -> None:
        """Copy what the ending names to where the job wants it."""
        ...

    async def cancel(self, grace_seconds: float) -> None:
        """End the command and all it started."""
        ...

    async def remove(self, job: Job) -> None:
        """Remove the folder, keeping the logs at the site."""
        ...

    async def close(self) -> None:
        """Give up the connection."""
        ...


class Leasing(Protocol):
    """How capacity is had and given back."""

    async def offers(self) -> list[Offer]:
        """Return what the site itself and its peers offer now."""
        ...

    async def intend(self, job: Job, offer: Offer) -> Lease:
        """Write down the intent to lease for the job; from now on it takes up capacity."""
        ...

    async def fulfil(self, lease: Lease, offer: Offer) -> Lease:
        """Have an intended lease granted; return it active. Idempotent by the lease's id."""
        ...

    async def find(self, lease_id: str) -> Lease | None:
        """Return a lease this site knows."""
        ...

    async def renew(self, lease: Lease, until: datetime) -> Lease:
        """Have a loan end no earlier than ``until``; return it as it is then.

        Raises what its owner answered; the loan is then as it was.
        """
        ...

    async def release(self, lease: Lease, reason: str) -> None:
        """Give the lease up, here and at its owner. Idempotent."""
        ...


class Recourse(Protocol):
    """What a driver may do when its place does not last."""

    @property
    def patience(self) -> timedelta:
        """For how long a machine may be out of reach before it counts as lost."""
        ...

    async def refusal(self, job: Job) -> str:
        """Return why a job may not go back in line; empty if it may.

        ``job.lost_at`` names the places that it lost, the last one among them.
        """
        ...

    async def renew(self, lease: Lease, until: datetime) -> Lease:
        """See `Leasing.renew`."""
        ...


class Workplaces(Protocol):
    """Opens the place of a lease for one job."""

    def open(self, job: Job, lease: Lease) -> Workplace:
        """Return the job's place; nothing is contacted yet."""
        ...
