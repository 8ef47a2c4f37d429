"""A complete cloud in memory, which can be as bad as real ones: late, wrong, slow, full, forgetful.

`World` is the cloud itself: it outlives the objects that speak to it. `MemoryCloud` is the thin
shell around its "SDK", written as one for a real cloud would be: it makes several requests for
some calls, and each can be hurt. In virtual time hours pass in a moment; everything follows from
the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from gridcloud.errors import Conflict, NoCapacity, NotFound, Throttled, TimedOut, Unavailable
from gridcloud.model.need import GIB, Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import NETWORK, SHARED, Network, Tags, Thing, Volume
from gridcloud.providers.cloud.clouds import Build, Cloud, Condition, Image, Server

T = TypeVar("T")


@dataclass(frozen=True)
class Badness:
    """How a cloud misbehaves. Chances are parts of 1 for each request; times are in seconds.

    ``late`` is a request that is carried out only after its time-out; ``shows_late_seconds`` is
    for how long lists may lack what was made, or still hold what is gone.
    """

    error_before: float = 0.0
    error_after: float = 0.0
    withheld: float = 0.0
    late: float = 0.0
    throttled: float = 0.0
    duplicated: float = 0.0
    no_capacity: float = 0.0
    build_fails: float = 0.0
    deleted_by_hand: float = 0.0
    latency_seconds: tuple[float, float] = (0.0, 0.0)
    shows_late_seconds: float = 0.0
    boot_seconds: tuple[float, float] = (0.0, 0.0)
    removal_seconds: tuple[float, float] = (0.0, 0.0)
    timeout_seconds: float = 20.0


KIND = Badness()
BAD = Badness(
    error_before=0.05,
    error_after=0.05,
    withheld=0.03,
    late=0.02,
    throttled=0.05,
    duplicated=0.05,
    no_capacity=0.10,
    build_fails=0.10,
    deleted_by_hand=0.05,
    latency_seconds=(0.02, 1.5),
    shows_late_seconds=4.0,
    boot_seconds=(1.0, 60.0),
    removal_seconds=(0.0, 10.0),
)


@dataclass(eq=False)
class _Entry:
    """Something in the cloud: shown from ``shown_at`` on, gone from ``gone_at`` on (still shown
    for a while by lists)."""

    kind: str
    id: str
    tags: Tags
    shown_at: float
    build: Build | None = None
    boots_at: float = 0.0
    fails: bool = False
    gone_at: float = float("inf")
    hidden_at: float = float("inf")
    name: str = ""
    size_bytes: int = 0
    place: str = ""
    attached_to: str = ""
    off: bool = False


@dataclass(eq=False)
class World:
    """The cloud, with its ``places``, and room for so many machines in each (``quota`` in all).

    With ``most_per_second``, more requests than that in any second are answered 429.
    """

    seed: int = 0
    badness: Badness = KIND
    places: tuple[str, ...] = ("north", "south")
    room: int = 1000
    quota: int = 1000
    knows_tokens: bool = True
    shares_networks: bool = False
    down: bool = False
    most_per_second: int = 0
    refused: int = 0
    calls: list[tuple[float, str]] = field(default_factory=list)
    entries: list[_Entry] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def between(self, bounds: tuple[float, float]) -> float:
        """Draw a time."""
        return self.chance.uniform(*bounds)

    def happens(self, kind: str) -> bool:
        """Draw whether something of the badness happens now."""
        return self.chance.random() < getattr(self.badness, kind)

    def refuse(self) -> None:
        """Raise what a request meets before anything is done, if it meets something."""
        if self.down:
            raise Unavailable("The API is away.", hint="Wait.")
        lately = [at for at, _ in self.calls[-self.most_per_second - 1 :] if at > _now() - 1]
        if self.most_per_second and len(lately) > self.most_per_second:
            self.refused += 1
            raise Throttled("Too many requests.", hint="Wait.", after_seconds=1.0)
        if self.happens("throttled"):
            raise Throttled("Too many requests.", hint="Wait.", after_seconds=self.between((0, 5)))
        if self.happens("error_before"):
            raise Unavailable("503 before anything was done.", hint="Wait.")

    def truly_there(self) -> list[_Entry]:
        """Return what exists, whether it is shown or not."""
        return [entry for entry in self.entries if _now() < entry.gone_at]

    def shown(self, kind: str = "") -> list[_Entry]:
        """Return what lists show now."""
        there = [e for e in self.entries if e.shown_at <= _now() < e.hidden_at]
        return [entry for entry in there if kind in {"", entry.kind}]

    def add(self, kind: str, tags: Tags, **more: Any) -> _Entry:
        """Make something."""
        self._count += 1
        shown_at = _now() + self.between((0.0, self.badness.shows_late_seconds))
        entry = _Entry(kind, f"{kind}-{self._count:04}", tags, shown_at, **more)
        self.entries.append(entry)
        return entry

    def delete(self, entry: _Entry) -> None:
        """Begin to remove something; it takes its time."""
        if entry.gone_at == float("inf"):
            entry.gone_at = _now() + self.between(self.badness.removal_seconds)
            late = self.between((0.0, self.badness.shows_late_seconds))
            entry.hidden_at = entry.gone_at + late
        if entry.kind == "machine" and not self.standing(entry.tags.lease):
            for volume in self.entries:
                if volume.attached_to == entry.tags.lease:
                    volume.attached_to = ""

    def standing(self, lease_id: str) -> list[_Entry]:
        """Return the machines of a lease that nobody has begun to delete."""
        return [
            entry
            for entry in self.entries
            if (entry.kind, entry.tags.lease) == ("machine", lease_id)
            and entry.gone_at == float("inf")
        ]

    def calm(self) -> None:
        """Let all be well from now on; what is late stays late."""
        self.badness = replace(KIND, shows_late_seconds=self.badness.shows_late_seconds)
        self.down = False

    def make_machine(self, build: Build) -> _Entry:
        """Make a machine, as one request of the API does."""
        known = [e for e in self.truly_there() if e.build and e.build.token == build.token]
        if self.knows_tokens and known:
            return known[0]
        machines = [entry for entry in self.truly_there() if entry.kind == "machine"]
        if len(machines) >= self.quota:
            raise NoCapacity("The quota of machines is reached.", hint="Ask for a larger quota.")
        here = [entry for entry in machines if entry.place == build.place]
        if len(here) >= self.room or self.happens("no_capacity"):
            raise NoCapacity(f"There is no host with room in {build.place}.", hint="Wait.")
        networks = {entry.id for entry in self.truly_there() if entry.kind == "network"}
        if build.network not in networks:
            raise Unavailable("The network is gone.", hint="It is made again.")
        boots_at = _now() + self.between(self.badness.boot_seconds)
        fails = self.happens("build_fails")
        made = self.add(
            "machine", build.tags, build=build, boots_at=boots_at, fails=fails, place=build.place
        )
        if self.happens("deleted_by_hand"):
            after = self.between((0.0, 60.0))
            asyncio.get_running_loop().call_later(after, self.delete, made)
        return made


def _now() -> float:
    return asyncio.get_running_loop().time()


SHAPES = (
    Shape(
        name="small",
        region="here",
        resources=Resources(cpus=2, memory_bytes=4 * GIB),
        disk_bytes=20 * GIB,
        price=0.05,
        currency="EUR",
    ),
    Shape(
        name="large",
        region="here",
        resources=Resources(cpus=8, memory_bytes=32 * GIB),
        disk_bytes=80 * GIB,
        price=0.4,
        currency="EUR",
    ),
)


class MemoryCloud(Cloud):
    """One account at a `World`."""

    shows_late_seconds: ClassVar[float] = 0.0
    names_networks: ClassVar[bool] = True

    def __init__(self, world: World, site_key: str) -> None:
        self._world = world
        self._site = Tags.of(site_key, "").site
        self._killed = False

    def kill(self) -> None:
        """End it as ``kill -9`` does: no request leaves it any more, those on their way may."""
        self._killed = True

    async def shapes(self) -> tuple[Shape, ...]:
        """Return two."""
        return await self._ask("shapes", lambda: SHAPES)

    async def headroom(self, region: str) -> Headroom:
        """Return what the quota leaves."""

        def left() -> Headroom:
            machines = [e for e in self._world.truly_there() if e.kind == "machine"]
            return Headroom(machines=max(0, self._world.quota - len(machines)))

        return await self._ask("headroom", left)

    async def places(self, shape: Shape) -> tuple[str, ...]:
        """Return the world's places."""
        return await self._ask("places", lambda: self._world.places)

    async def image(self, wanted: str, shape: Shape) -> Image:
        """Find the one image there is."""
        if wanted not in {"", "debian"}:
            raise NotFound(f"There is no image {wanted!r}.", hint="There is for instance: debian.")
        return await self._ask("image", lambda: Image(id="i1", name="debian", user="debian"))

    async def network(self, tags: Tags, place: str) -> str:
        """Return the lease's network, or the one that all share."""
        world = self._world
        lease = SHARED if world.shares_networks else tags.lease
        mine = tags.model_copy(update={"lease": lease, "ends_at": tags.ends_at})

        def found() -> list[_Entry]:
            return [n for n in self._shown("network", lease) if n.gone_at == float("inf")]

        if there := await self._ask("list networks", found):
            return there[0].id
        return (await self._ask("make network", lambda: world.add("network", mine))).id

    async def create(self, build: Build) -> str:
        """Make a machine with an address; remove a second one that an overlapping attempt made."""
        world, lease = self._world, build.tags.lease
        if there := await self._ask("list machines", lambda: self._shown("machine", lease)):
            return there[0].id
        made = await self._ask("make machine", lambda: world.make_machine(build))
        await self._ask("make address", lambda: self._address(build))
        first, *others = sorted(
            {*await self._ask("list machines", lambda: self._shown("machine", lease)), made},
            key=lambda entry: entry.id,
        )
        for other in others:
            await self._ask("delete machine", lambda other=other: world.delete(other))
        return first.id

    def _address(self, build: Build) -> None:
        if not self._shown("address", build.tags.lease):
            self._world.add("address", build.tags)

    async def server(self, lease_id: str) -> Server | None:
        """Return the oldest machine of a lease that is shown."""
        there = await self._ask("list machines", lambda: self._shown("machine", lease_id))
        if not there:
            return None
        entry = there[0]
        if entry.fails:
            return Server(id=entry.id, condition=Condition.FAILED, reason="No valid host was found")
        if entry.off:
            return Server(id=entry.id, condition=Condition.STOPPED)
        if _now() < entry.boots_at:
            return Server(id=entry.id, condition=Condition.BUILDING)
        return Server(id=entry.id, condition=Condition.RUNNING, address="10.0.0.5")

    async def boot_log(self, lease_id: str) -> str:
        """Return two lines, the second with what a hostile machine writes."""
        there = await self._ask("list machines", lambda: self._shown("machine", lease_id))
        return "Linux booted\r\n\x1b[2Jno sshd here\r\n" if there else ""

    async def remove(self, lease_id: str) -> bool:
        """Remove machines, then addresses and networks; what is shared with the last of them."""
        world = self._world
        for kind in ("machine", "address", "network"):
            there = await self._ask(f"list {kind}", lambda kind=kind: self._shown(kind, lease_id))
            if there and kind == "network" and lease_id == SHARED and self._shown("machine"):
                return True
            for entry in there:
                await self._ask(f"delete {kind}", lambda entry=entry: self._delete(entry))
            if there:
                return False
        if world.shares_networks and lease_id != SHARED and not self._shown("machine"):
            return await self.remove(SHARED)
        return True

    def _delete(self, entry: _Entry) -> None:
        self._world.delete(entry)

    async def remove_others(self, lease_id: str) -> None:
        """Remove all but the oldest."""
        there = await self._ask("list machines", lambda: self._shown("machine", lease_id))
        for entry in there[1:]:
            await self._ask("delete machine", lambda entry=entry: self._delete(entry))

    async def things(self) -> list[Thing]:
        """Return everything of this site that is shown."""
        there = await self._ask("list things", lambda: self._shown())
        return [
            Thing(kind=entry.kind, id=entry.id, tags=entry.tags, name=entry.name) for entry in there
        ]

    async def sites(self) -> set[str]:
        """Return whose things are shown, this site's or not."""
        return await self._ask(
            "list things", lambda: {entry.tags.site for entry in self._world.shown()}
        )

    async def networks(self) -> list[Network]:
        """Return those that are shown."""
        there = await self._ask("list network", lambda: self._shown("network", NETWORK))
        return [Network(id=one.id, name=one.name, cidr=one.place) for one in there]

    async def make_network(self, tags: Tags, name: str, cidr: str, region: str) -> None:
        """Make one; two of one name are never made."""
        world = self._world

        def make() -> None:
            if not self._named(name):
                world.add("network", tags, name=name, place=cidr)

        await self._ask("make network", make)

    async def named_network(self, name: str, place: str) -> str:
        """Find one."""
        there = await self._ask("list network", lambda: self._named(name))
        if not there:
            raise NotFound(f"There is no network {name!r} here.", hint="Make it.")
        return there[0].id

    async def remove_network(self, name: str) -> bool:
        """Remove one that no machine is in."""
        there = await self._ask("list network", lambda: self._named(name))
        machines = [e for e in self._world.truly_there() if e.build]
        for one in there:
            if any(machine.build.network == one.id for machine in machines):
                return False
            await self._ask("delete network", lambda one=one: self._delete(one))
        return not there

    def _named(self, name: str) -> list[_Entry]:
        there = [n for n in self._world.truly_there() if n.kind == "network" and n.name == name]
        return [n for n in there if n.tags.site == self._site and n.gone_at == float("inf")]

    async def extended(self, tags: Tags) -> None:
        """Change the tags of a lease's things."""

        def change() -> None:
            for entry in self._shown("", tags.lease):
                entry.tags = tags

        await self._ask("tag", change)

    async def volumes(self) -> list[Volume]:
        """Return those that are shown."""
        return [
            Volume(
                id=entry.id,
                name=entry.name,
                size_bytes=entry.size_bytes,
                attached_to=entry.attached_to,
                place=entry.place,
            )
            for entry in await self._ask("list volumes", lambda: self._shown("volume"))
        ]

    async def volume(self, tags: Tags, name: str, size_bytes: int, place: str) -> str:
        """Find a volume by its name, or make it; two of one name are never made."""
        world = self._world
        named = [v for v in world.truly_there() if v.kind == "volume" and v.name == name]
        if named and named[0].place != place:
            raise Conflict(f"{name} is in {named[0].place}.", hint="Go there.")
        if named and named[0].attached_to:
            raise Conflict(f"{name} is in use.", hint="Wait.")
        if not named and not size_bytes:
            raise NotFound(f"There is no volume {name}.", hint="Give it a size.")

        def make() -> _Entry:
            again = [v for v in world.truly_there() if v.kind == "volume" and v.name == name]
            if again:
                return again[0]
            return world.add("volume", tags, name=name, size_bytes=size_bytes, place=place)

        return (await self._ask("make volume", make)).id

    async def attach(self, lease_id: str, volume: str) -> str:
        """Note whose it is."""

        def attach() -> str:
            entry = next((e for e in self._world.truly_there() if e.id == volume), None)
            if entry is None or not self._world.standing(lease_id):
                raise Unavailable("The machine or the volume is not there.", hint="Wait.")
            if entry.attached_to not in {"", lease_id}:
                raise Conflict("It is in use.", hint="Wait.")
            entry.attached_to = lease_id
            return "/dev/vdb"

        return await self._ask("attach", attach)

    async def remove_volume(self, volume: str) -> None:
        """Remove it unless it is in use."""

        def remove() -> None:
            for entry in self._world.truly_there():
                if entry.id == volume and entry.attached_to:
                    raise Conflict("It is in use.", hint="Detach it.")
                if entry.id == volume:
                    self._world.delete(entry)

        await self._ask("delete volume", remove)

    async def close(self) -> None:
        """Do nothing: there is no connection."""

    def _shown(self, kind: str = "", lease_id: str = "") -> list[_Entry]:
        there = [e for e in self._world.shown(kind) if e.tags.site == self._site]
        return [entry for entry in there if lease_id in {"", entry.tags.lease}]

    async def _ask(self, what: str, action: Callable[[], T]) -> T:
        """Make one request: it takes its time, and what may happen to it happens."""
        world, loop = self._world, asyncio.get_running_loop()
        bad = world.badness
        if self._killed:
            await loop.create_future()  # nobody is there to ask
        world.calls.append((loop.time(), what))
        world.refuse()
        try:
            await asyncio.sleep(world.between(bad.latency_seconds))
        except asyncio.CancelledError:
            if world.chance.random() < 0.5:  # it was on its way
                loop.call_later(world.between((0.0, 5.0)), _quietly(action))
            raise
        if self._killed:
            if world.chance.random() < 0.5:
                _quietly(action)()
            await loop.create_future()
        if world.happens("late"):
            loop.call_later(world.between((0.0, bad.timeout_seconds)), _quietly(action))
            await asyncio.sleep(bad.timeout_seconds)
            raise TimedOut(f"No answer to {what}.", hint="Wait.")
        if world.happens("duplicated"):
            action()
        result = action()
        if world.happens("error_after"):
            raise Unavailable("503 after it was done.", hint="Wait.")
        if world.happens("withheld"):
            await asyncio.sleep(bad.timeout_seconds)
            raise TimedOut(f"No answer to {what}.", hint="Wait.")
        return result


def _quietly(action: Callable[[], object]) -> Callable[[], None]:
    """Return an action whose result nobody hears of."""

    def act() -> None:
        with contextlib.suppress(NoCapacity, Conflict, Unavailable):
            action()

    return act


class LateMemoryCloud(MemoryCloud):
    """The same, where lists may be seconds behind."""

    shows_late_seconds: ClassVar[float] = BAD.shows_late_seconds
