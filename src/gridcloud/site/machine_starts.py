"""Carries out the starts of machines: finds each a place, has it made, gives back what fails.

Whatever is decided is in the store before it is done, so that a site which is killed at any moment
goes on with it: a start with the names that were given up, and a lease for each attempt. A lease
with a reason is being given back, and is no machine's any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog

from gridcloud.errors import Conflict, GridcloudError, InvalidSpec, NoCapacity, TimedOut
from gridcloud.model.fleet import MachineRequest, MachineStart
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.machine import LaunchStep
from gridcloud.model.offer import Offer
from gridcloud.providers.base import Provider
from gridcloud.store.launches import LaunchStore
from gridcloud.store.leases import LeaseStore

log = structlog.get_logger()
_CHECKED = "it was made to prove that it can be made"
#: What a release is noted as.
_END = LaunchStep.SETUP
Choose = Callable[[MachineRequest, Callable[[Offer], bool]], Awaitable[Offer]]


class MachineStarts:
    """The machines that are being made and given back. ``choose`` returns the best offer for a
    request among those that a filter admits, or raises why there is none; ``deciding`` is held
    while capacity is given away; ``changed`` is called after each change."""

    def __init__(
        self,
        leases: LeaseStore,
        launches: LaunchStore,
        provider: Callable[[str], Provider],
        choose: Choose,
        deciding: asyncio.Lock,
        changed: Callable[[], None],
    ) -> None:
        self._leases = leases
        self._launches = launches
        self._provider = provider
        self._choose = choose
        self._deciding = deciding
        self._changed = changed
        self._making: dict[str, asyncio.Task[None]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Let go of everything without ending it; the next start of the site goes on."""
        tasks = [*self._making.values(), *self._ending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def begin(self, start: MachineStart) -> None:
        """Take in a start that is in the store; what is going on already is left alone."""
        for name in start.names:
            if name not in start.given_up and name not in self._making:
                self._spawn(self._making, name, partial(self._make, start, name))

    async def resume(self) -> None:
        """Go on with every start that is not settled. Idempotent."""
        for start in await self._launches.pending():
            for name, why in start.given_up.items():
                if (lease := await self._attempt(start, name)) and lease.live:
                    await self._abandon(lease, why)
            await self._settle(start.id)
            await self.begin(start)

    async def give_up(self, lease: Lease, reason: str) -> None:
        """Begin to give a machine back, for good; return once that is written down. Idempotent.

        It is given back beside this; what fails is tried again by the next call. One that is being
        given back, as an attempt that failed, says nothing of those that come after it.
        """
        if lease.reason:
            return await self._abandon(lease, lease.reason)
        await self._give_up_names(lease.request_id, {lease.order.name: reason})
        making = self._making.get(lease.order.name)
        if making:
            making.cancel()
        return await self._abandon(lease, reason, after=making)

    async def give_up_name(self, start: MachineStart, name: str, reason: str) -> None:
        """Give up a machine that has no lease at the moment. Idempotent."""
        await self._give_up_names(start.id, {name: reason})
        if making := self._making.get(name):
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
        if (lease := await self._attempt(start, name)) and lease.live:
            await self._abandon(lease, reason)
        await self._settle(start.id)

    async def _make(self, start: MachineStart, name: str) -> None:
        """Have one machine made, wherever that can be done; say in the end why not."""
        try:
            await self._find_place(start, name)
        except GridcloudError as error:
            await self._failed(start, name, str(error))
        except Exception:  # a fault of ours: nothing is left with nobody to look after it
            log.exception("machine not made by a fault of gridcloud", machine=name)
            await self._failed(start, name, "a fault in gridcloud; the site's log has the details")
        await self._settle(start.id)

    async def _find_place(self, start: MachineStart, name: str) -> None:
        shunned: set[tuple[str, str, str]] = set()
        why: GridcloudError | None = None
        while True:
            lease = await self._attempt(start, name)
            if lease is None:
                try:
                    lease = await self._intend(start, name, shunned)
                except GridcloudError as error:
                    raise why or error from error  # what a cloud said tells more than that
            elif lease.state is not LeaseState.INTENT:
                return None
            try:
                return await self._launch(start, lease)
            except GridcloudError as error:
                await self._abandon(lease, str(error))
                if isinstance(error, InvalidSpec):
                    raise
                why = error
                narrow = isinstance(error, NoCapacity | TimedOut)
                shunned.add(
                    (lease.provider, lease.region, lease.shape)
                    if narrow
                    else (lease.provider, "", "")
                )

    async def _attempt(self, start: MachineStart, name: str) -> Lease | None:
        """Return the lease that this machine has, or had, if any; not one given back unused."""
        for lease in reversed(await self._leases.machines(name)):
            if lease.request_id == start.id and (
                lease.ended_at or (lease.live and not lease.reason)
            ):
                return lease
        return None

    async def _intend(
        self, start: MachineStart, name: str, shunned: set[tuple[str, str, str]]
    ) -> Lease:
        now = datetime.now(UTC)
        if now >= start.ends_at:
            raise Conflict("Its time was over before it could be made.", hint="Ask for more time.")

        def admitted(offer: Offer) -> bool:
            whole, one = (offer.provider, "", ""), (offer.provider, offer.region, offer.shape)
            return whole not in shunned and one not in shunned

        async with self._deciding:
            offer = await self._choose(start.request, admitted)
            lease = Lease(
                id=new_id(16),
                role=LeaseRole.OWN,
                state=LeaseState.INTENT,
                provider=offer.provider,
                need=start.request.need,
                created_at=now,
                ends_at=start.ends_at,
                request_id=start.id,
                shape=offer.shape,
                region=offer.region,
                cost=offer.hourly(start.request.need.resources),
                currency=offer.currency,
                order=start.order(name),
            )
            await self._leases.save(lease)
        await self._note(lease, LaunchStep.SHAPE, f"chosen: {offer.label}")
        return lease

    async def _launch(self, start: MachineStart, lease: Lease) -> None:
        machine = await self._provider(lease.provider).launch(lease)

        def ready(kept: Lease) -> Lease:
            given_up = kept.reason or kept.state is not LeaseState.INTENT
            return kept if given_up else kept.activated(machine)

        active = await self._leases.change(lease.id, ready)
        if active is None or active.reason:
            return
        await self._note(lease, LaunchStep.SETUP, f"ready: {_where(machine)}")
        if start.request.check:
            await self._give_up_names(start.id, {lease.order.name: _CHECKED})
            await self._abandon(active, _CHECKED)

    async def _failed(self, start: MachineStart, name: str, why: str) -> None:
        if not start.request.all_or_nothing or len(start.names) == 1:
            return await self._give_up_names(start.id, {name: why})
        others = f"{name} could not be had, and it was to be all or none: {why}"
        await self._give_up_names(
            start.id, {each: why if each == name else others for each in start.names}
        )
        if start.id not in self._ending:
            self._spawn(self._ending, start.id, partial(self._give_all_back, start, others))
        return None

    async def _give_all_back(self, start: MachineStart, reason: str) -> None:
        tasks = [self._making[name] for name in start.names if name in self._making]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lease in await self._leases.machines(ended=False):
            if lease.request_id == start.id:
                await self._abandon(lease, reason)
        await self._settle(start.id)

    async def _give_up_names(self, start_id: str, why: dict[str, str]) -> None:
        def without(start: MachineStart) -> MachineStart:
            for name, reason in why.items():
                start = start.without(name, reason)
            return start

        await self._launches.change(start_id, without)
        self._changed()

    async def _settle(self, start_id: str) -> None:
        """Take note if nothing of a start is left to be made."""
        start = next((s for s in await self._launches.pending() if s.id == start_id), None)
        if start is None:
            return
        for name in start.names:
            had = await self._attempt(start, name)
            if name in start.given_up:
                open_still = had is not None and had.live
            else:
                open_still = had is None or had.state is LeaseState.INTENT
            if open_still:
                return
        await self._launches.settled(start_id)
        self._changed()

    async def _abandon(
        self, lease: Lease, reason: str, *, after: asyncio.Task[None] | None = None
    ) -> None:
        """Write down that a lease is being given back, and begin to, once a task has ended."""
        marked = await self._leases.change(
            lease.id, lambda kept: kept.model_copy(update={"reason": kept.reason or reason})
        )
        if marked is not None and lease.id not in self._ending:
            self._spawn(self._ending, lease.id, partial(self._give_back, marked, after))
        self._changed()

    async def _give_back(self, lease: Lease, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.gather(after, return_exceptions=True)
        try:
            await self._provider(lease.provider).terminate(lease.id)
        except GridcloudError as error:
            log.info("machine not given back yet", lease=lease.id, cause=error.message)
            return await self._note(lease, _END, f"not removed yet; it is tried again: {error}")
        now = datetime.now(UTC)
        await self._leases.change(lease.id, lambda kept: kept.released(kept.reason, now))
        log.info("machine given back", lease=lease.id, reason=lease.reason)
        await self._note(lease, _END, f"removed: {lease.reason}")
        return await self._settle(lease.request_id)

    async def _note(self, lease: Lease, step: LaunchStep, message: str) -> None:
        await self._launches.note(lease.id, step, message)
        self._changed()

    def _spawn(
        self,
        where: dict[str, asyncio.Task[None]],
        key: str,
        work: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        task = asyncio.create_task(_looked_after(work), name=f"machine {key}")
        where[key] = task

        def over(done: asyncio.Task[None]) -> None:
            if where.get(key) is done:
                del where[key]

        task.add_done_callback(over)


async def _looked_after(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    try:
        await work()
    except Exception:  # the store fails, say: what is written down is gone on with later
        log.exception("machine left for later")


def _where(machine: Machine) -> str:
    if machine.endpoint is None:
        return machine.id or machine.lease_id
    return f"{machine.endpoint.user}@{machine.endpoint.host}"
