"""The desk for machines without a job: plans, starts, shows, lengthens and stops them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta

from gridcloud.errors import (
    Conflict,
    InvalidSpec,
    NotFound,
)
from gridcloud.model.choice import Strategy
from gridcloud.model.fleet import (
    STOPPED,
    LaunchNews,
    MachineInfo,
    MachineLogin,
    MachinePlan,
    MachineRequest,
    MachineStart,
    MachineState,
)
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Lease, LeaseState
from gridcloud.model.machine import LaunchStep, MachineOrder
from gridcloud.model.quantities import format_duration
from gridcloud.providers.base import MachineMaker
from gridcloud.site.machine_choice import MachineChoice, Source
from gridcloud.site.machine_starts import MachineStarts
from gridcloud.store.launches import LaunchStore
from gridcloud.store.leases import LeaseStore

#: How long before its end a machine is told of among the site's problems.
_WARN_BEFORE = timedelta(minutes=10)
_EVENTS_KEPT = timedelta(days=30)
_LONGEST = timedelta(days=365)


class MachineDesk:
    """Machines of one site. `resume` it after the store is open, `close` it in the end.

    ``certify`` signs a public key line for a lease; ``strategy`` is the site's; ``deciding`` is
    held while capacity is given away.
    """

    def __init__(
        self,
        leases: LeaseStore,
        launches: LaunchStore,
        source: Source,
        certify: Callable[[str, str], str],
        strategy: Callable[[], Strategy],
        deciding: asyncio.Lock,
    ) -> None:
        self._leases = leases
        self._launches = launches
        self._source = source
        self._certify = certify
        self._choice = MachineChoice(source, strategy)
        self._naming = asyncio.Lock()
        self._news = asyncio.Event()
        self._starts = MachineStarts(
            leases, launches, source.provider, self._choice.choose, deciding, self._tell
        )
        #: Goes on with what a stopped site left; `MachineStarts.resume`.
        self.resume = self._starts.resume
        self.close = self._starts.close
        #: Looks through what is asked of a machine before anything is planned; see `Booting.check`.
        self.check: Callable[[MachineOrder], Awaitable[object]] = _unchecked

    async def note(self, lease_id: str, step: LaunchStep, message: str) -> None:
        """Keep an event of a launch; see `gridcloud.providers.base.Making`."""
        await self._launches.note(lease_id, step, message)
        self._tell()

    async def plan(self, request: MachineRequest) -> MachinePlan:
        """Judge where the first of the machines would be made; changes nothing.

        Raises `InvalidSpec` for an order that cannot be carried out, and if no provider here could
        ever make such a machine.
        """
        await self.check(request.order)
        await self._choice.ready(request)
        plan = await self._choice.judge(request, lambda offer: True)
        best = plan.winners[0] if plan.winners else None
        hourly = best.hourly(request.need.resources) if best else None
        hours = request.count * (request.time / timedelta(hours=1))
        return MachinePlan(
            request=request,
            plan=plan,
            ends_at=datetime.now(UTC) + request.time,
            total=None if hourly is None else hourly * hours,
            currency=best.currency if best else "",
        )

    async def start(self, request: MachineRequest) -> list[MachineInfo]:
        """Take in a request, and return its machines as they are being made.

        Raises `Conflict` for a name that is in use, `InvalidSpec` if no provider here could ever
        make such a machine, `NoCapacity` if none can now.
        """
        await self.check(request.order)
        await self._choice.ready(request)
        await self._choice.choose(request, lambda offer: True)
        async with self._naming:
            names = _names(request)
            used = {lease.order.name for lease in await self._leases.machines(ended=False)}
            used |= {n for start in await self._launches.pending() for n in _open(start)}
            if taken := sorted(used & set(names)):
                raise Conflict(
                    f"There is a machine {taken[0]!r} already.",
                    hint="Stop it first, or choose another --name.",
                )
            now = datetime.now(UTC)
            start = MachineStart(id=new_id(), at=now, request=request, names=names)
            await self._launches.begin(start)
        await self._starts.begin(start)
        return [MachineInfo.to_be(start, name) for name in names]

    async def machines(self, *, ended: bool = False) -> list[MachineInfo]:
        """Return those that are there or being made, the oldest first; with ``ended`` all others
        too. Their user-data is left out."""
        now = datetime.now(UTC)
        newest: dict[str, Lease] = {}
        shown: list[MachineInfo] = []
        for lease in await self._leases.machines(ended=ended):
            newest[lease.order.name] = lease
            shown.append(MachineInfo.of(lease, now))
        for start in await self._launches.pending():
            shown += [
                MachineInfo.to_be(start, name)
                for name in _open(start)
                if name not in newest or not newest[name].live or newest[name].reason
            ]
        return [_without_user_data(info) for info in shown]

    async def machine(self, name: str, wait_seconds: float = 0) -> MachineInfo:
        """Return a machine by its name or lease, the newest of that name; wait so long until it is
        ready, or over. Raises `NotFound`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                while True:
                    news = self._news
                    if (info := await self._look(name)).state.settled:
                        return info
                    await news.wait()
        return await self._look(name)

    async def events(self, name: str, after: int = 0, wait_seconds: float = 0) -> list[LaunchNews]:
        """Return what was said while a machine was made, events after number ``after``; wait so
        long for the first, unless it is ready, or over, already."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                while True:
                    news = self._news
                    found = await self._events(name, after)
                    if found or (await self._look(name)).state.settled:
                        return found
                    await news.wait()
        return await self._events(name, after)

    async def stop(self, name: str) -> MachineInfo:
        """Begin to give a machine back; what is on it is lost. Idempotent."""
        lease, start = await self._find(name)
        there = lease is not None and lease.live and not lease.reason
        if start is not None and not there:
            await self._starts.give_up_name(start, name, STOPPED)
        if lease is not None and lease.live:
            await self._starts.give_up(lease, STOPPED)
        return await self._look(name)

    async def end(self, lease: Lease, reason: str) -> None:
        """Begin to give a machine back for a reason of the site's. Idempotent."""
        await self._starts.give_up(lease, reason)

    async def end_all(self, reason: str, wait_seconds: float) -> None:
        """Give every machine back; wait so long until they are gone."""
        for start in await self._launches.pending():
            for name in _open(start):
                await self._starts.give_up_name(start, name, reason)
        for lease in await self._leases.machines(ended=False):
            await self._starts.give_up(lease, reason)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                while True:
                    news = self._news
                    if not await self._leases.machines(ended=False):
                        return
                    await news.wait()

    async def extend(self, name: str, by: timedelta) -> MachineInfo:
        """Let a machine last longer than it would, and tell that to the machine itself.

        Raises `Conflict` unless it is ready, `Unavailable` if it cannot be told.
        """
        lease = await self._ready(name)
        if not timedelta(0) < by <= _LONGEST:
            raise InvalidSpec("A machine is lengthened by a time above zero, a year at most.")
        assert lease.ends_at
        until = lease.ends_at + by
        renewed = lease.renewed(until)
        # The machine first: one that lasts longer than its lease is ended by the site in time.
        await self._source.provider(lease.provider).lengthen(renewed)

        def later(kept: Lease) -> Lease:
            return kept if kept.reason else kept.renewed(until)

        kept = await self._leases.change(lease.id, later)
        if kept is None or kept.reason:
            raise Conflict(f"The machine {name} ended meanwhile.", hint="Start another one.")
        await self.note(lease.id, LaunchStep.SETUP, f"lengthened by {format_duration(by)}")
        return await self._look(name)

    async def login(self, name: str, public_key: str) -> MachineLogin:
        """Return how to log in to a machine with the key of that public line.

        Raises `Conflict` unless it is ready, `InvalidSpec` for what is no public key.
        """
        lease = await self._ready(name)
        endpoint = lease.machine.endpoint if lease.machine else None
        if endpoint is None:
            raise InvalidSpec(f"The machine {name} is not reached by SSH.")
        return MachineLogin(endpoint=endpoint, certificate=self._certify(lease.id, public_key))

    async def boot_log(self, name: str) -> str:
        """Return the end of what a machine wrote to its console; empty if there is none."""
        lease, _ = await self._find(name)
        if lease is None or not lease.live:
            raise Conflict(f"There is no machine {name!r} at present.", hint="See its events.")
        provider = self._source.provider(lease.provider)
        return await provider.boot_log(lease.id) if isinstance(provider, MachineMaker) else ""

    async def problems(self, now: datetime) -> list[str]:
        """Return what a person should know: machines whose end is near, and those that nobody can
        give back."""
        providers = {provider.name for provider in self._source.providers()}
        told = []
        for lease in await self._leases.machines(ended=False):
            name, end = lease.order.name, lease.ends_at
            if lease.provider not in providers:
                told.append(
                    f"machine {name} cannot be given back: the provider {lease.provider} is not in "
                    "the settings any more, or does not load"
                )
                continue
            ready = lease.state is LeaseState.ACTIVE and not lease.reason
            if ready and end and timedelta(0) < end - now <= _WARN_BEFORE:
                told.append(
                    f"machine {name} ends in {format_duration(end - now)}; "
                    f"'gridcloud machine extend {name} 1h' lengthens it"
                )
        return told

    async def prune(self, now: datetime) -> None:
        """Forget events of machines that are long over."""
        await self._launches.prune(now - _EVENTS_KEPT)

    async def _look(self, name: str) -> MachineInfo:
        lease, start = await self._find(name)
        if lease is None:
            assert start is not None
            return MachineInfo.to_be(start, name)
        info = MachineInfo.of(lease, datetime.now(UTC))
        going_on = start is not None and name not in start.given_up
        if going_on and (lease.reason or not lease.live) and not lease.ended_at:
            return info.model_copy(update={"state": MachineState.LAUNCHING, "reason": ""})
        if start is not None and info.state is MachineState.FAILED:
            return info.model_copy(update={"reason": start.given_up.get(name, info.reason)})
        return info

    async def _find(self, name: str) -> tuple[Lease | None, MachineStart | None]:
        """Return the newest lease of a machine, and its start as long as that is kept.

        Either may be None, not both. Raises `NotFound`.
        """
        found = await self._leases.machines(name)
        lease = found[-1] if found else await self._leases.find(name)
        if lease is not None and not (lease.for_a_machine and lease.order.name):
            lease = None  # a job's: that has verbs of its own
        start = await self._launches.start_of(lease.order.name if lease else name)
        if lease is None and start is None:
            raise NotFound(
                f"There is no machine {name!r}.", hint="See 'gridcloud machine list --all'."
            )
        if lease and start and lease.request_id != start.id:
            if name != lease.id and lease.created_at < start.at:
                return None, start
            return lease, None
        return lease, start

    async def _ready(self, name: str) -> Lease:
        lease, _ = await self._find(name)
        if lease is None or lease.state is not LeaseState.ACTIVE or lease.reason:
            state = (await self._look(name)).state.value
            raise Conflict(
                f"The machine {name} is {state}, not ready.",
                hint=f"See 'gridcloud machine show {name}'.",
            )
        return lease

    async def _events(self, name: str, after: int) -> list[LaunchNews]:
        lease, start = await self._find(name)
        which = start.id if start else lease.request_id if lease else ""
        called = lease.order.name if lease else name
        ids = [each.id for each in await self._leases.machines(called) if each.request_id == which]
        return await self._launches.events(ids, after)

    def _tell(self) -> None:
        """Wake whoever waits for something to change."""
        self._news.set()
        self._news = asyncio.Event()


def _names(request: MachineRequest) -> tuple[str, ...]:
    base = request.order.name or f"m-{new_id(5)}"
    if request.count == 1:
        return (base,)
    width = len(str(request.count))
    names = tuple(f"{base}-{number:0{width}}" for number in range(1, request.count + 1))
    try:
        MachineOrder(name=names[-1])
    except ValueError as error:
        raise InvalidSpec(
            f"{names[-1]!r} is too long for a name.", hint="Choose a shorter --name."
        ) from error
    return names


def _open(start: MachineStart) -> Iterable[str]:
    return (name for name in start.names if name not in start.given_up)


def _without_user_data(info: MachineInfo) -> MachineInfo:
    order = info.order.model_copy(update={"user_data": ""})
    return info.model_copy(update={"order": order})


async def _unchecked(_: MachineOrder) -> None:
    return
