"""Where simulated jobs run, as a site reaches it: its own host, or a peer's through its gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from gridcloud.errors import NotFound, Unavailable
from gridcloud.model.job import Ending, Job, Outcome
from gridcloud.model.lease import Lease
from simulation.hosts import Host, Run
from simulation.virtual_time import now

_LOOK_EVERY = 1.0
_COPYING_TAKES = 0.3


class Ways(Protocol):
    """How hosts are reached: the world answers."""

    def way(self, site: str, lease: Lease) -> Host:
        """Return the host of a lease's machine as ``site`` reaches it now.

        Raises `Unavailable` if nobody answers, `NotFound` once the place is gone for good.
        """
        ...

    def took(self, site: str, job: Job) -> None:
        """Take note that the results of a job's attempt were brought back."""
        ...


class SimulatedPlace:
    """See `gridcloud.orchestration.ports.Workplace`."""

    def __init__(self, ways: Ways, site: str, job: Job, lease: Lease) -> None:
        self._ways = ways
        self._site = site
        self._job = job
        self._lease = lease

    async def state(self) -> str | None:
        """See `Workplace`."""
        run = (await self._reach()).runs.get(self._job.folder_name)
        if run is None:
            return None
        return "running" if run.outcome is None and now() < run.ends else "ended"

    async def stage_in(self, job: Job) -> None:
        """See `Workplace`."""
        await self._reach()
        await asyncio.sleep(_COPYING_TAKES)
        await self._reach()

    async def run(self, job: Job, lease: Lease, started: Callable[[], None]) -> Ending:
        """See `Workplace`."""
        host = await self._reach()
        run = host.start(job, lease, now(), float(job.spec.command[1]))
        started()
        return await self._follow(run)

    async def watch(self, job: Job) -> Ending:
        """See `Workplace`."""
        run = (await self._reach()).runs.get(job.folder_name)
        if run is None:
            raise NotFound("There is no such job folder.")
        return await self._follow(run)

    async def stage_out(self, job: Job, ending: Ending) -> None:
        """See `Workplace`."""
        await self._reach()
        await asyncio.sleep(_COPYING_TAKES)
        await self._reach()
        if ending.outcome.succeeded:
            self._ways.took(self._site, job)

    async def cancel(self, grace_seconds: float) -> None:
        """See `Workplace`."""
        run = (await self._reach()).runs.get(self._job.folder_name)
        if run is not None and run.outcome is None:
            run.outcome = Outcome(reason="canceled")

    async def remove(self, job: Job) -> None:
        """See `Workplace`."""
        if self._lease.peer is None:
            await self._reach()

    async def close(self) -> None:
        """See `Workplace`."""

    async def _reach(self) -> Host:
        return self._ways.way(self._site, self._lease)

    async def _follow(self, run: Run) -> Ending:
        while True:
            host = await self._reach()
            if outcome := host.settle(run, now()):
                return Ending(outcome=outcome)
            await asyncio.sleep(_LOOK_EVERY)


class SimulatedPlaces:
    """See `gridcloud.site.places.Places`."""

    def __init__(self, ways: Ways, site: str) -> None:
        self._ways = ways
        self._site = site

    def open(self, job: Job, lease: Lease) -> SimulatedPlace:
        """Return the job's place."""
        return SimulatedPlace(self._ways, self._site, job, lease)

    def executor(self, lease: Lease) -> None:
        """Nobody needs one: no simulated machine is reached by SSH by its own site."""
        raise Unavailable(f"{lease.id} is no machine behind SSH.")

    async def close(self) -> None:
        """Nothing is open."""
