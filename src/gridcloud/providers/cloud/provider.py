"""The provider of every cloud: launches, removes and lists machines, whatever cloud it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import assert_never

from gridcloud.errors import Conflict, GridcloudError, NotFound, TimedOut, Unavailable
from gridcloud.model.lease import Lease, Machine
from gridcloud.model.machine import LaunchStep
from gridcloud.model.things import KEPT, NETWORK, SHARED, Network, Tags, Thing, Volume
from gridcloud.providers.base import (
    Capacity,
    MachineMaker,
    Making,
    Neighbourly,
    NetworkKeeper,
    Provider,
    ProviderContext,
)
from gridcloud.providers.cloud.catalogue import Catalogue
from gridcloud.providers.cloud.clouds import Cloud, Condition
from gridcloud.providers.cloud.launching import (
    Clear,
    Do,
    Finished,
    GiveUp,
    Launching,
    Look,
    Pause,
)
from gridcloud.providers.cloud.pace import Pace
from gridcloud.providers.cloud.removing import remove_all
from gridcloud.providers.cloud.section import CloudSection
from gridcloud.providers.cloud.steps import Shared, Steps
from gridcloud.providers.cloud.tidying import Tidying
from gridcloud.providers.cloud.watching import plain, ssh_answers

#: Where the machine's console tells more than its cloud.
_BOOTING = frozenset({LaunchStep.REACHABLE, LaunchStep.READY})
_LOG_LINES_TOLD, _LOG_CHARACTERS_TOLD = 20, 2000
_BOOT_LOG_SECONDS, _CHECK_SECONDS = 20.0, 60.0
_LONGEST_LOG = 64 * 1024


class CloudProvider(Provider, MachineMaker, NetworkKeeper, Neighbourly):
    """Makes machines at ``cloud``. A cloud's own provider reads its section and hands both on:

        class MyProvider(CloudProvider):
            kind = "my"

            def __init__(self, name, section, context):
                own = read_section(MySection, name, section)      # MySection inherits CloudSection
                super().__init__(name, own, context, MyCloud(own, context.site_key))

    It keeps nothing but caches: what was launched is known by its tags alone.
    """

    def __init__(
        self,
        name: str,
        section: CloudSection,
        context: ProviderContext,
        cloud: Cloud,
        *,
        reach: Callable[[str, int], Awaitable[None]] = ssh_answers,
    ) -> None:
        super().__init__(name, {}, context)
        self._cloud, self._patience = cloud, section.patience
        self._pace = Pace(section.calls_per_second)
        self._catalogue = Catalogue(cloud, self._pace)
        self._shared = Shared(cloud, self._pace, self._catalogue, section, context.site_key, reach)
        self._room = asyncio.Semaphore(section.at_once)
        self._launches: dict[str, asyncio.Task[Machine]] = {}
        self._tidying = Tidying()

    async def capacity(self) -> Capacity:
        """See `Provider`. Shapes and quota are as last asked, in the background."""
        return await self._catalogue.capacity()

    async def check(self) -> Capacity:
        """Ask for all that a launch needs to know; ``problem`` says what is missing."""
        capacity = await self._catalogue.asked_anew()
        if capacity.problem:
            return capacity
        shape = min(
            capacity.shapes, key=lambda one: (one.resources.cpus, one.resources.memory_bytes)
        )
        asks: tuple[Callable[[], Awaitable[object]], ...] = (
            partial(self._cloud.image, self._shared.section.image, shape),
            partial(self._cloud.places, shape),
            self._cloud.things,
            self._cloud.volumes,
        )
        problems = []
        for ask in asks:
            try:
                async with asyncio.timeout(_CHECK_SECONDS):
                    await self._pace.call(ask)
            except TimeoutError:
                problems.append("No answer came in time.")
            except GridcloudError as error:
                problems.append(str(error))
        return capacity.model_copy(update={"problem": " ".join(dict.fromkeys(problems))})

    async def launch(self, lease: Lease) -> Machine:
        """See `Provider`. It can take as long as the patience of all its steps.

        A second call for a lease joins the first. Cancelled, it leaves what there is to
        `terminate`, or to a later `launch` that goes on with it.
        """
        task = self._launches.get(lease.id)
        if task is None:
            task = asyncio.create_task(self._launch(lease), name=f"launch {lease.id}")
            self._launches[lease.id] = task
            task.add_done_callback(lambda _: self._launches.pop(lease.id, None))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if task.cancelled() and not (caller and caller.cancelling()):
                raise Conflict("The launch was ended by giving back its lease.") from None
            await self._end_launch(lease.id)
            raise

    async def terminate(self, lease_id: str) -> None:
        """See `Provider`. It ends a launch that is under way, and waits until the cloud shows
        nothing any more; raises `Unavailable` if that takes too long."""
        await self._end_launch(lease_id)
        await self._clear(partial(self._pace.call, partial(self._cloud.remove, lease_id)))

    async def made(self) -> list[str]:
        """See `Provider`. Volumes that are kept, and networks with names, belong to no lease.

        What leases shared goes with the last of them; if it was left behind it is listed under
        `SHARED`, so that it is removed as any other stray. A lease's second machine, and what is
        left of one whose machine was deleted by hand, is removed on the way.
        """
        mine = Tags.of(self.context.site_key, "").site
        things = [thing for thing in await self.things() if thing.tags.site == mine]
        await self._tidy(things)
        found = {thing.tags.lease for thing in things}
        leases = found - {KEPT, SHARED, NETWORK}
        unused = not leases and not self._launches
        return sorted(leases) or sorted(found & {SHARED} if unused else ())

    async def lengthen(self, lease: Lease) -> None:
        """See `Provider`. The machine is told first: its own switch is what would end it."""
        if lease.machine and lease.machine.endpoint:
            await self._making().move_end(lease, lease.machine.endpoint)
        tags = Tags.of(self.context.site_key, lease.id, lease.ends_at)
        await self._pace.call(partial(self._cloud.extended, tags))

    async def things(self) -> list[Thing]:
        """See `MachineMaker`."""
        return await self._pace.call(self._cloud.things)

    async def sites(self) -> set[str]:
        """See `Neighbourly`."""
        return await self._pace.call(self._cloud.sites)

    async def boot_log(self, lease_id: str) -> str:
        """See `MachineMaker`. What could steer a terminal is left out."""
        log = await self._pace.call(partial(self._cloud.boot_log, lease_id))
        return plain(log[-_LONGEST_LOG:])

    async def volumes(self) -> list[Volume]:
        """See `MachineMaker`."""
        return await self._pace.call(self._cloud.volumes)

    async def make_volume(self, name: str, size_bytes: int) -> None:
        """See `MachineMaker`. It is made in the first place of the first shape."""
        if any(volume.name == name for volume in await self.volumes()):
            raise Conflict(f"There is a volume {name!r} already.", hint="Choose another name.")
        shapes = (await self._catalogue.capacity()).shapes
        places = await self._pace.call(partial(self._cloud.places, shapes[0])) if shapes else ("",)
        tags = Tags.of(self.context.site_key, KEPT)
        await self._pace.call(partial(self._cloud.volume, tags, name, size_bytes, places[0]))

    async def remove_volume(self, name: str) -> None:
        """See `MachineMaker`."""
        there = {volume.name: volume for volume in await self.volumes()}
        if name not in there:
            near = ", ".join(sorted(there)) or "none"
            raise NotFound(f"There is no volume {name!r} here.", hint=f"There are: {near}.")
        await self._pace.call(partial(self._cloud.remove_volume, there[name].id))

    @property
    def names_networks(self) -> bool:
        """See `NetworkKeeper`."""
        return self._cloud.names_networks

    async def networks(self) -> list[Network]:
        """See `NetworkKeeper`."""
        return await self._pace.call(self._cloud.networks)

    async def make_network(self, name: str, cidr: str, region: str) -> None:
        """See `NetworkKeeper`."""
        for there in await self.networks():
            if there.name == name and (there.cidr != cidr or region not in {"", there.region}):
                where = f" in {there.region}" if there.region else ""
                raise Conflict(
                    f"There is a network {name!r} already: {there.cidr}{where}.",
                    hint="Bring its stack down first, or choose another name.",
                )
        tags = Tags.of(self.context.site_key, NETWORK)
        await self._pace.call(partial(self._cloud.make_network, tags, name, cidr, region))

    async def remove_network(self, name: str) -> None:
        """See `NetworkKeeper`."""
        await self._clear(partial(self._pace.call, partial(self._cloud.remove_network, name)))

    async def close(self) -> None:
        """See `Provider`. Launches that are under way stop where they are."""
        await asyncio.gather(*(self._end_launch(lease_id) for lease_id in list(self._launches)))
        await self._catalogue.close()
        await self._cloud.close()

    async def _launch(self, lease: Lease) -> Machine:
        steps = Steps(self._shared, lease, self._making())
        try:
            async with self._room:
                return await self._carried_out(lease, steps)
        finally:
            steps.let_go()
            self._catalogue.outdated()

    async def _carried_out(self, lease: Lease, steps: Steps) -> Machine:
        now = asyncio.get_running_loop().time
        state = Launching.begin(self._patience, lease.id, now())
        told = ""
        while True:
            match state.decide(now()):
                case Do(step, place, seconds):
                    state = await self._do(state, lease, steps, step, place, seconds)
                case Look(seconds):
                    state = await self._look(state, steps, seconds)
                case Pause(seconds, because):
                    if because and because != told:
                        told = because
                        await self._making().note(lease.id, state.step, f"trying on: {because}")
                    await asyncio.sleep(seconds)
                case Clear():
                    state = await self._cleared(state, lease, steps)
                case GiveUp(error, step):
                    await self._making().note(lease.id, step, f"given up: {error}")
                    raise error
                case Finished():
                    return steps.machine(self.name)
                case never:
                    assert_never(never)

    async def _do(
        self,
        state: Launching,
        lease: Lease,
        steps: Steps,
        step: LaunchStep,
        place: str,
        seconds: float,
    ) -> Launching:
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(seconds):
                await steps.carry_out(step, place)
        except TimeoutError:
            failure: GridcloudError = TimedOut(steps.waiting_for or "No answer came in time.")
            after = state.failed(failure, now())
        except GridcloudError as error:
            after = state.failed(error, now())
        else:
            if step is not LaunchStep.PLACE:
                return state.succeeded(now())
            there, broken = steps.found is not None, steps.found is Condition.FAILED
            return state.placed(steps.places, now(), there=there, broken=broken)
        if after.error and step in _BOOTING:
            return replace(after, error=await self._with_boot_log(after.error, lease))
        return after

    async def _look(self, state: Launching, steps: Steps, seconds: float) -> Launching:
        now = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(seconds):
                return state.looked(now(), there=await steps.look())
        except TimeoutError:
            return state.failed(TimedOut("No answer came in time."), now())
        except GridcloudError as error:
            return state.failed(error, now())

    async def _cleared(self, state: Launching, lease: Lease, steps: Steps) -> Launching:
        now = asyncio.get_running_loop().time
        why = state.error.message if state.error else state.refusals[-1] if state.refusals else ""
        await self._making().note(lease.id, state.step, f"removing what was made: {why}")
        try:
            await self._clear(steps.remove)
        except GridcloudError as error:
            return state.failed(error, now())
        return state.cleared(now())

    async def _clear(self, remove: Callable[[], Awaitable[bool]]) -> None:
        within, settled = self._patience.removal.total_seconds(), self._cloud.shows_late_seconds
        await remove_all(remove, within, settled)
        self._shared.networks.clear()  # the last machine of a network takes it along
        self._catalogue.outdated()

    async def _with_boot_log(self, error: GridcloudError, lease: Lease) -> GridcloudError:
        """Return the error with the end of the boot log in its hint, where there is one."""
        try:
            async with asyncio.timeout(_BOOT_LOG_SECONDS):
                log = await self.boot_log(lease.id)
        except (GridcloudError, TimeoutError):
            return error  # it would only have told more
        end = "\n".join(log.strip().splitlines()[-_LOG_LINES_TOLD:])[-_LOG_CHARACTERS_TOLD:]
        said = f"The end of its boot log:\n{end}" if end else "It has no boot log."
        hint = error.hint or "Its image needs cloud-init and an SSH server that it starts."
        error.hint = f"{hint} {said}"
        return error

    async def _tidy(self, things: list[Thing]) -> None:
        """Begin to remove what is of no use to the leases that live."""
        now = asyncio.get_running_loop().time()
        doubled, bereft = self._tidying.judge(things, self._launches, now)
        for lease_id in doubled:
            with contextlib.suppress(GridcloudError):  # it is found again the next time
                await self._pace.call(partial(self._cloud.remove_others, lease_id))
        for lease_id in bereft:
            with contextlib.suppress(GridcloudError):
                if await self._pace.call(partial(self._cloud.server, lease_id)) is None:
                    await self._pace.call(partial(self._cloud.remove, lease_id))

    async def _end_launch(self, lease_id: str) -> None:
        task = self._launches.get(lease_id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _making(self) -> Making:
        if self.context.making is None:
            raise Unavailable(
                "Nothing here can prepare a machine.", hint="Machines are made by a running site."
            )
        return self.context.making
