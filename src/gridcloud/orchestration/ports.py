"""What orchestration needs of other rooms; the site hands in what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from gridcloud.model.job import Ending, Event, Job, JobState
from gridcloud.model.lease import Lease
from gridcloud.model.offer import Offer


class JobKeeper(Protocol):
    """The memory of jobs."""

    async def add(self, new: Sequence[Job], message: str) -> None:
        """Keep new jobs, all or none."""
        ...

    async def save(self, job: Job, message: str = "") -> None:
        """Keep a job's new value, with an event if there is a message; an ended one stays."""
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
        self, states: Sequence[JobState] | None = None, *, first: int | None = None
    ) -> list[Job]:
        """Return the jobs in these states, oldest first; the ``first`` so many."""
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

    async def release(self, lease: Lease, reason: str) -> None:
        """Give the lease up, here and at its owner. Idempotent."""
        ...


class Workplaces(Protocol):
    """Opens the place of a lease for one job."""

    def open(self, job: Job, lease: Lease) -> Workplace:
        """Return the job's place; nothing is contacted yet."""
        ...
