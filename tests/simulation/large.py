"""Grids of up to thousands of sites: what they cost, and how soon they are of one mind again.

The members are known to one another from the beginning (a grid of 5000 forms over months, not in a
minute); then they are looked at in peace, under churn, and after a part was cut off.
"""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import shutil
import sys
import tempfile
import time
import types
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from gridcloud.errors import GridcloudError
from gridcloud.grid.community_store import Shelf
from gridcloud.grid.credentials import make_credential
from gridcloud.grid.documents import sign
from gridcloud.grid.membership import Directory
from gridcloud.grid.memory_transport import MemoryNetwork
from gridcloud.grid.messages import MemberRecord
from gridcloud.grid.papers import CommunityPaper, Membership, Presence, Role, community_id
from gridcloud.grid.roster import Roster
from gridcloud.grid.swim import PeerState
from gridcloud.settings import LendingSettings
from gridcloud.site.lending import Lending
from simulation.crashing import CrashingLoop, let_go
from simulation.running import unheard
from simulation.scenario import WEATHER
from simulation.seams import installed
from simulation.shared import SharedRoster
from simulation.virtual_time import EPOCH
from simulation.world import COMMUNITY, LENDER, Place, World, watch_lending, work

_LENDERS_AT_MOST = 100
_COLLECT_EVERY = 10
_BEFORE = EPOCH - timedelta(days=30)


@dataclass(frozen=True)
class Stay:
    """How long each part takes, in virtual seconds; ``churn_per_minute`` is a part of all sites
    that crash in a minute."""

    warm_up: float = 20.0
    peace: float = 30.0
    churn: float = 40.0
    parted: float = 15.0
    patience: float = 120.0
    churn_per_minute: float = 0.2


@dataclass
class Survey:
    """What one large run showed."""

    sites: int
    seed: int
    trace: str = ""
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peace_messages: float = 0.0
    peace_bytes: float = 0.0
    churn_messages: float = 0.0
    churn_bytes: float = 0.0
    agreed_after: float | None = None
    back_after: float | None = None
    healed_after: float | None = None
    known_after: float | None = None
    process_bytes_each: float = 0.0
    alone_bytes: int = 0


class Large:
    """Drives one large world."""

    def __init__(self, world: World, sites: int, stay: Stay, survey: Survey) -> None:
        self.world = world
        self.sites = sites
        self.stay = stay
        self.survey = survey
        self.chance = random.Random(world.chance.getrandbits(64))
        self.first: Place
        self.base: Roster
        self._tasks: list[asyncio.Task[None]] = []
        self.gone: set[str] = set()

    async def run(self) -> None:
        """Go through all of it."""
        world, stay, survey = self.world, self.stay, self.survey
        self._found()
        gc.collect()
        gc.freeze()
        world.network.set_link(WEATHER)
        clockwork = asyncio.create_task(self._clockwork())
        for place in list(world.places.values()):
            await world.start(place)
        self._plan_jobs()
        await asyncio.sleep(stay.warm_up)
        survey.peace_messages, survey.peace_bytes = await self._measured(stay.peace)
        self._plan_churn()
        survey.churn_messages, survey.churn_bytes = await self._measured(stay.churn)
        for task in self._tasks:
            await task
        world.ledger.note("healed")
        survey.agreed_after, survey.back_after = await self._both()
        await self._part()
        survey.healed_after = (await self._both())[1]
        survey.known_after = await self._tell_all()
        self._check()
        clockwork.cancel()
        survey.alone_bytes = size_alone(self.first.site.broker)

    # The grid

    def _found(self) -> None:
        """Make the sites, and their community as it was formed a month ago."""
        places = [self._add(number) for number in range(self.sites)]
        self.first = places[0]
        community = community_id(COMMUNITY, self.first.key)
        founding = sign(
            self.first.identity,
            CommunityPaper(name=COMMUNITY, founder=self.first.key, created_at=_BEFORE),
        )
        self.base = Roster(community, lambda: EPOCH)
        self.founding = founding
        self.presences: dict[str, tuple[Presence, str]] = {}
        for place in places:
            membership = Membership(
                community=community,
                member=place.key,
                site_name=place.name,
                roles=tuple(Role) if place is self.first else tuple(map(Role, LENDER)),
                issued_at=_BEFORE,
                issuer=self.first.key,
            )
            credential = make_credential(sign(self.first.identity, membership), "", by_founder=True)
            address = self.world.network.node(place.key).address()
            presence = Presence(
                site=place.key, addresses=address.addresses, issued_at=EPOCH - timedelta(minutes=2)
            )
            document = sign(place.identity, presence)
            self.presences[place.key] = presence, document
            self.base.add(MemberRecord(credential=credential, presence=document))
            place.member = True
            place.disk.papers._communities[community] = founding
        self.base.digest()

    def _add(self, number: int) -> Place:
        lenders = min(_LENDERS_AT_MOST, max(2, self.sites // 10))
        lending = LendingSettings(enabled=number < lenders, cpus=4, max_time=timedelta(minutes=2))
        return self.world.add(4, lending, self.chance.uniform(-10, 10))

    # What happens

    async def _clockwork(self) -> None:
        seconds = 0
        while True:
            await asyncio.sleep(1.0)
            seconds += 1
            if seconds % _COLLECT_EVERY == 0:
                gc.collect()  # at a time that is the same in every run
            for place in self.world.places.values():
                if place.host.placed:
                    place.host.tick()

    def _later(self, seconds: float, act: Callable[[], Any]) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds)
            try:
                await act()
            except GridcloudError as error:
                self.world.ledger.note("came to nothing", error.code)

        self._tasks.append(asyncio.create_task(later()))

    def _plan_jobs(self) -> None:
        """A few dozen sites borrow, in all phases."""
        stay = self.stay
        for place in self.chance.sample(list(self.world.places.values()), min(50, self.sites)):
            for _ in range(2):
                spec = work(1, self.chance.uniform(2, 20), 30.0)
                at = self.chance.uniform(0, stay.warm_up + stay.peace)
                self._later(at, lambda place=place, spec=spec: self.world.submit(place, spec))

    def _plan_churn(self) -> None:
        """Sites crash and come back; some are new, one leaves, one is removed."""
        world, stay = self.world, self.stay
        many = round(self.sites * stay.churn_per_minute * stay.churn / 60)
        others = [place for place in world.places.values() if place is not self.first]
        for place in self.chance.sample(others, min(many, len(others))):
            self._later(
                self.chance.uniform(0, stay.churn * 0.7), lambda p=place: self._crash_and_return(p)
            )
        for number in range(min(10, max(1, many // 10))):
            at = self.chance.uniform(0, stay.churn * 0.7)
            self._later(at, lambda n=number: self._join(self.sites + n))
        leaver, removed = self.chance.sample(others, 2)
        self._later(self.chance.uniform(0, stay.churn * 0.5), lambda: self._leave(leaver))
        self._later(self.chance.uniform(0, stay.churn * 0.5), lambda: self._remove(removed))

    async def _crash_and_return(self, place: Place) -> None:
        if place.up:
            self.world.crash(place)
            await asyncio.sleep(self.chance.uniform(2, self.stay.churn * 0.3))
            await self.world.start(place)

    async def _join(self, number: int) -> None:
        place = self._add(number)
        await self.world.start(place)
        await self.world.join(place, self.first)

    async def _leave(self, place: Place) -> None:
        await self.world.leave(place)
        place.member = False

    async def _remove(self, place: Place) -> None:
        place.member = False
        self.gone.add(place.key)
        broker = self.world.broker(self.first)
        await self.world.on(self.first, lambda _: broker.remove(COMMUNITY, place.key, "simulated"))

    async def _part(self) -> None:
        """Cut three in ten off for a while."""
        keys = [place.key for place in self.world.places.values()]
        self.world.network.partition(self.chance.sample(keys, max(1, len(keys) * 3 // 10)))
        await asyncio.sleep(self.stay.parted)
        self.world.network.heal()
        self.world.ledger.note("healed")

    # What is looked at

    async def _measured(self, seconds: float) -> tuple[float, float]:
        """Return messages and bytes that a site sends in a second, over so many seconds."""
        messages, size = self.world.messages, self.world.bytes
        await asyncio.sleep(seconds)
        each = sum(place.up for place in self.world.places.values()) * seconds
        return (self.world.messages - messages) / each, (self.world.bytes - size) / each

    async def _both(self) -> tuple[float | None, float | None]:
        """Return after how long all members hold one roster, and after how long nobody thinks
        that a site which is there is not; None for what did not come about in time."""
        began = self.world.loop.time()
        agreed = back = None
        while self.world.loop.time() - began < self.stay.patience:
            if agreed is None and self._one_roster():
                agreed = self.world.loop.time() - began
            if back is None and not self._wrongly_dead():
                back = self.world.loop.time() - began
            if agreed is not None and back is not None:
                break
            await asyncio.sleep(0.5)
        return agreed, back

    async def _tell_all(self) -> float | None:
        """Remove a member; return after how long all that run know it."""
        last = next(place for place in reversed(self._members()) if place is not self.first)
        began = self.world.loop.time()
        await self._remove(last)
        while self.world.loop.time() - began < self.stay.patience:
            rosters = [self._roster(place) for place in self._members()]
            if all(roster is not None and last.key not in roster.members for roster in rosters):
                return self.world.loop.time() - began
            await asyncio.sleep(0.25)
        return None

    def _members(self) -> list[Place]:
        return [place for place in self.world.places.values() if place.member and place.up]

    def _roster(self, place: Place) -> Roster | None:
        directory = self.world.broker(place)._directory
        return directory._rosters.get(self.base.community)

    def _one_roster(self) -> bool:
        digests = set()
        for place in self._members():
            roster = self._roster(place)
            digests.add(roster.digest() if roster else "")
        return len(digests) == 1

    def _wrongly_dead(self) -> bool:
        up = {place.key for place in self._members()}
        for place in self._members():
            swim = self.world.broker(place)._gossip.swim
            if any(swim.seen(key).state is PeerState.DEAD for key in swim._dead if key in up):
                return True
        return False

    def _check(self) -> None:
        ledger, survey = self.world.ledger, self.survey
        if survey.agreed_after is None or survey.known_after is None:
            ledger.violated("members do not agree on who is one")
        if survey.back_after is None or survey.healed_after is None:
            ledger.violated("sites that are there are thought dead")
        must = {place.key for place in self.world.places.values() if place.member}
        for place in self._members():
            roster = self._roster(place)
            keys = set(roster.members) if roster else set()
            if must - keys:
                ledger.violated("a member is not known", place.name, len(must - keys))
            if keys & self.gone:
                ledger.violated("who was removed is a member", place.name)


def survey(sites: int, seed: int, stay: Stay) -> Survey:
    """Simulate a grid of so many sites and say what it showed."""
    folder = Path(tempfile.mkdtemp(prefix="gridcloud-simulation-"))
    found = Survey(sites, seed)
    began = time.process_time()
    loop = CrashingLoop()
    world = World(loop, seed, folder, light=True)
    world.heard = deque(maxlen=1)
    large = Large(world, sites, stay, found)
    gc.disable()
    try:
        with ExitStack() as stack:
            before = _resident_bytes()
            stack.enter_context(installed(world))
            for name, method in watch_lending(world).items():
                stack.enter_context(patch.object(Lending, name, method))
            stack.enter_context(patch.object(Directory, "_read", _read_shared(large)))
            loop.set_exception_handler(lambda _, context: unheard(world, context))
            loop.run_until_complete(large.run())
            found.seconds = loop.time()
            found.process_bytes_each = (_resident_bytes() - before) / sites
            world.ledger.close()
            let_go(loop, world.processes())
    finally:
        world.close()
        gc.enable()
        shutil.rmtree(folder)
    found.trace, found.violations = world.ledger.trace, world.ledger.violations
    found.counts = world.ledger.counts
    found.cpu_seconds = time.process_time() - began
    return found


def _read_shared(large: Large) -> Any:
    """Return a `Directory._read` by which members of old begin with what all of them share."""
    read = Directory._read

    async def shared(self: Directory, community: str) -> Roster:
        key = self.identity.key
        if key not in large.presences or community != large.base.community:
            return await read(self, community)
        roster = SharedRoster(large.base, self._clock)
        for credential, presence in (await self._store.read(Shelf.MEMBER, community)).values():
            roster.restore(MemberRecord(credential=credential, presence=presence))
        if self._presence is None:
            self._presence = large.presences[key]
        return roster

    return shared


def size_alone(root: object) -> int:
    """Return how many bytes hang from an object, were it alone: what it shares with others is
    counted in full, but not modules, classes, code, the network and the loop."""
    seen: set[int] = set()
    left: list[object] = [root]
    total = 0
    beyond = (
        type,
        types.ModuleType,
        types.FunctionType,
        types.CodeType,
        MemoryNetwork,
        World,
        Large,
        asyncio.AbstractEventLoop,
    )
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, beyond):
            continue
        seen.add(id(each))
        total += sys.getsizeof(each)
        left.extend(gc.get_referents(each))
    return total


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
