"""Keeps house: every few seconds leases, jobs and what providers have are brought into agreement.

What should be done is decided by `gridcloud.orchestration.reconciler`. A provider that does not
answer is left alone for growing pauses, and nothing of it is forgotten meanwhile. Clouds may take
minutes, so what is done there is done beside this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from gridcloud.errors import GridcloudError
from gridcloud.model.job import JobState
from gridcloud.model.lease import Lease, LeaseRole
from gridcloud.orchestration.reconciler import absences, reconcile
from gridcloud.orchestration.scheduler import Scheduler
from gridcloud.orchestration.troubles import Troubles
from gridcloud.providers.base import MachineMaker, Provider
from gridcloud.site.leasing import SiteLeasing
from gridcloud.site.lending import Lending
from gridcloud.site.machines import MachineDesk
from gridcloud.site.places import Places
from gridcloud.store.jobs import JobStore
from gridcloud.store.leases import LeaseStore

log = structlog.get_logger()
_EVERY_SECONDS = 15.0
#: How long a provider may take to tell what it has: at the start of a site, which others wait for,
#: and later.
_PATIENCE_STARTING_SECONDS, _PATIENCE_SECONDS = 5.0, 120.0
_NOT_ENDED = tuple(state for state in JobState if not state.final)


class HostKeys(Protocol):
    """What is kept for machines that are there: `gridcloud.site.booting.Booting`."""

    def kept(self) -> set[str]:
        """Return the leases for whose machines something is kept."""
        ...

    def forget(self, lease_id: str) -> None:
        """Remove what is kept for a machine that is gone. Idempotent."""
        ...


class Mending:
    """The house-keeping of one site. Call `once` at its start, then `start`; `stop` in the end."""

    def __init__(
        self,
        providers: Mapping[str, Provider],
        leases: LeaseStore,
        jobs: JobStore,
        leasing: SiteLeasing,
        lending: Lending,
        desk: MachineDesk,
        places: Places,
        scheduler: Scheduler,
        keys: HostKeys,
    ) -> None:
        self._providers = providers
        self._leases = leases
        self._jobs = jobs
        self._leasing = leasing
        self._lending = lending
        self._desk = desk
        self._places = places
        self._scheduler = scheduler
        self._keys = keys
        self._troubles = Troubles()
        self._absent: dict[str, datetime] = {}
        self._beside: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look again and again."""
        self._loop = asyncio.create_task(self._keep_house(), name="housekeeping")

    async def stop(self) -> None:
        """Let go of everything. Idempotent."""
        tasks = [*self._beside.values(), *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def problems(self, now: datetime) -> list[str]:
        """Return which providers cannot be asked, since when and why."""
        return [f"provider {trouble}" for trouble in self._troubles.told(now)]

    async def once(self, *, starting: bool) -> None:
        """Bring leases, jobs and what providers have into agreement."""
        kept = (
            self._keys.kept()
        )  # before the leases are read: what is made from now on is not of it
        made = await self._made(_PATIENCE_STARTING_SECONDS if starting else _PATIENCE_SECONDS)
        jobs = {
            # A job in line that nobody looks after names what it was to have before a failure.
            job.id: job.lease_id
            if job.state is not JobState.QUEUED or self._scheduler.attends(job.id)
            else None
            for job in await self._jobs.listed(_NOT_ENDED)
        }
        leases, now = await self._leases.live(), datetime.now(UTC)
        for lease_id in kept - {lease.id for lease in leases}:
            self._keys.forget(lease_id)
        self._absent = absences(self._absent, leases, made, now)
        mending = reconcile(leases, jobs, made, now, starting=starting, absent=self._absent)
        await self._desk.resume()
        await asyncio.gather(*(self._give_up(*each) for each in mending.release))
        for lease, reason in mending.lost:
            log.info("mending: place lost", lease=lease.id, reason=reason)
            self._scheduler.lost(lease.id, reason)
        await self._lending.keep_house()
        for name, lease_id in mending.terminate:
            known = await self._leases.find(lease_id)  # granted since the leases were read?
            if known is None or not known.live:
                work = self._remove_stray(name, lease_id)
                if isinstance(self._providers.get(name), MachineMaker):
                    self._spawn(f"{name} {lease_id}", work)
                else:
                    await work

    async def _made(self, patience_seconds: float) -> dict[str, list[str]]:
        """Return what each provider has that is ours; those that cannot say are left out."""
        now = datetime.now(UTC)
        names = [name for name in self._providers if self._troubles.due(name, now)]
        found = await asyncio.gather(*(self._ask(name, patience_seconds) for name in names))
        return {name: ids for name, ids in zip(names, found, strict=True) if ids is not None}

    async def _ask(self, name: str, patience_seconds: float) -> list[str] | None:
        try:
            async with asyncio.timeout(patience_seconds):
                made = await self._providers[name].made()
        except (GridcloudError, TimeoutError) as error:
            why = str(error) or f"it did not answer within {patience_seconds:g} s"
            log.warning("provider cannot be asked", provider=name, error=why)
            self._troubles.failed(name, why, datetime.now(UTC))
            return None
        self._troubles.worked(name)
        return made

    async def _give_up(self, lease: Lease, reason: str) -> None:
        log.info("mending: lease given up", lease=lease.id, role=lease.role, reason=reason)
        if lease.for_a_machine:
            if self._troubles.due(lease.provider, datetime.now(UTC)):
                await self._desk.end(lease, reason)
        elif lease.role is LeaseRole.OWN and lease.shape:
            self._spawn(lease.id, self._noted(lease, lambda: self._leasing.release(lease, reason)))
        elif lease.role is LeaseRole.LENT:
            await self._noted(lease, lambda: self._lending.end(lease, reason))
        else:
            await self._noted(lease, lambda: self._give_back(lease, reason))

    async def _give_back(self, lease: Lease, reason: str) -> None:
        machine = lease.machine if lease.role is LeaseRole.OWN else None
        if machine and machine.endpoint and not machine.certified:
            # What a job left on a machine that was out of reach when it ended.
            await self._places.executor(lease).remove(lease.request_id)
        await self._leasing.release(lease, reason)

    async def _noted(self, lease: Lease, give_up: Callable[[], Awaitable[None]]) -> None:
        try:
            await give_up()
        except GridcloudError as error:
            log.info("mending: not yet", lease=lease.id, cause=error.message)

    async def _remove_stray(self, provider: str, lease_id: str) -> None:
        log.info("mending: stray removed", provider=provider, lease=lease_id)
        try:
            await self._leasing.provider(provider).terminate(lease_id)
        except GridcloudError as error:
            log.info("mending: not yet", lease=lease_id, cause=error.message)

    def _spawn(self, key: str, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside this, unless it is being done already."""
        if key in self._beside:
            return work.close()
        task = asyncio.create_task(_looked_after(work), name=f"mending {key}")
        self._beside[key] = task
        return task.add_done_callback(lambda _: self._beside.pop(key, None) and None)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            try:
                await self.once(starting=False)
                await self._desk.prune(datetime.now(UTC))
            except Exception:  # whatever it was, the house is kept again next time
                log.exception("housekeeping failed")


async def _looked_after(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:  # whatever it was, it is looked at again next time
        log.exception("mending failed")
