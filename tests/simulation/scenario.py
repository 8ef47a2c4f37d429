"""What happens in one run: a grid forms, works, is hurt, heals, comes to rest; then the books are
checked. All of it follows from the seed.

Over 400 lines, so that what can happen and what is checked are read together.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from gridcloud.errors import GridcloudError
from gridcloud.grid.memory_transport import Link
from gridcloud.model.job import Job
from gridcloud.model.lease import Lease, LeaseState
from gridcloud.settings import LendingRule, LendingSettings
from simulation.hosts import Placed
from simulation.world import COMMUNITY, LENDER, Place, World, work

#: What links always do, and what they do in a storm.
WEATHER = Link(loss=0.01, duplicate=0.03, delay_min=0.005, delay_max=0.08)
STORM = Link(loss=0.3, duplicate=0.2, delay_min=0.01, delay_max=1.5)
_MANAGER = (*LENDER, "manager")
#: How long whoever comes late may have to try, at most: managers crash, too.
_JOINED_AFTER = 120.0
#: How long a loan may be on its host after its end, while its owner's site runs: the site looks
#: every quarter of a minute.
_OUTLIVES = 40.0
#: How far clocks are off, in seconds, that nobody calls wrong.
_CLOCK_OFF = 10.0


@dataclass(frozen=True)
class Setting:
    """What a run is made of. Times in virtual seconds; ``faults`` and ``jobs_each`` are how many
    to expect."""

    light: bool = True
    sites: int = 10
    latecomers: int = 1
    forming: float = 5.0
    trouble: float = 30.0
    rest: float = 300.0
    jobs_each: float = 1.5
    faults: float = 8.0
    longest_lease: float = 60.0
    probe_every: float = 3.0


class Scenario:
    """Drives a world through a `Setting`."""

    def __init__(self, world: World, setting: Setting) -> None:
        self.world = world
        self.setting = setting
        self.chance = random.Random(world.chance.getrandbits(64))
        self._tasks: list[asyncio.Task[None]] = []
        #: Since when loans that are over are still on their hosts, while their owners run.
        self._over_since: dict[str, float] = {}
        #: The founder, and a manager: they invite and remove.
        self._managers: list[Place] = []

    async def run(self) -> None:
        """Go through all of it."""
        self.world.network.set_link(WEATHER)
        for _ in range(self.setting.sites):
            self._add()
        clockwork = asyncio.create_task(self._clockwork())
        await self._form()
        self._plan_jobs()
        self._plan_faults()
        for _ in range(self.setting.latecomers):
            self._at(self.chance.uniform(0, self.setting.trouble), self._come_late)
        await asyncio.sleep(self.setting.trouble)
        for task in self._tasks:  # what began before the end is ended
            await task
        await self._heal()
        self._replay()
        await self._rest()
        await self._check()
        clockwork.cancel()

    # The grid

    def _add(self) -> Place:
        chance, longest = self.chance, timedelta(seconds=self.setting.longest_lease)
        rules: tuple[LendingRule, ...] = ()
        if chance.random() < 0.4:  # own users first: these owners recall what they lent
            rules = (LendingRule(notice=timedelta(seconds=5)),)
        lending = LendingSettings(
            enabled=chance.random() < 0.8 or not self.world.places,
            cpus=chance.randint(1, 4),
            max_time=longest,
            rules=rules,
        )
        return self.world.add(
            chance.randint(2, 4), lending, chance.uniform(-_CLOCK_OFF, _CLOCK_OFF)
        )

    async def _form(self) -> None:
        first, second, *others = self.world.places.values()
        self._managers = [first]
        await self.world.start(first)
        await self.world.found(first)
        await self._join(second, _MANAGER)
        self._managers.append(second)

        async def join(place: Place) -> None:
            await asyncio.sleep(self.chance.uniform(0, self.setting.forming))
            await self._join(place, LENDER)

        await asyncio.gather(*(join(place) for place in others))

    async def _join(self, place: Place, roles: tuple[str, ...]) -> None:
        while True:
            if place.vanished:
                return
            manager = self.chance.choice(self._managers)
            try:
                if not place.up:
                    await self.world.start(place)
                await self.world.join(place, manager, roles)
                return
            except GridcloudError as error:
                self.world.ledger.note("not joined", place.name, error.code)
                if error.code == "conflict" and await self._in(place):
                    place.member = True
                    return
            await asyncio.sleep(self.chance.uniform(1, 3))

    async def _in(self, place: Place) -> bool:
        """Return whether a site takes itself for a member."""
        try:
            known = await self.world.on(place, lambda _: self.world.broker(place).communities())
        except GridcloudError:
            return False
        return any(not each.waiting for each in known)

    # Hosts' clockwork and what is planned

    async def _clockwork(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for place in self.world.places.values():
                place.host.tick()
                for placed in place.host.placed.values():
                    self._check_end(place, placed)

    def _check_end(self, place: Place, placed: Placed) -> None:
        """A loan does not outlive its end, however its borrower fares."""
        over = placed.ends_at is not None and place.host.clock() >= placed.ends_at
        if not over or not place.up:
            self._over_since.pop(placed.lease_id, None)
            return
        since = self._over_since.setdefault(placed.lease_id, self.world.loop.time())
        if self.world.loop.time() - since > _OUTLIVES:
            self._over_since[placed.lease_id] = math.inf  # told once
            self.world.ledger.violated("a loan outlives its end", place.name, placed)

    def _at(self, seconds: float, act: Callable[[], object]) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds)
            try:
                result = act()
                if asyncio.iscoroutine(result):
                    await result
            except GridcloudError as error:  # such as at a site that is down at the moment
                self.world.ledger.note("came to nothing", error.code)

        self._tasks.append(asyncio.create_task(later()))

    def _plan_jobs(self) -> None:
        setting, chance = self.setting, self.chance
        for place in self.world.places.values():
            at = 0.0
            while True:
                at += chance.expovariate(setting.jobs_each / setting.trouble)
                if at > setting.trouble:
                    break
                seconds = chance.uniform(1, setting.longest_lease / 3)
                long = chance.random() < 0.2  # has its loan renewed as it goes
                limit = seconds + 5 if chance.random() < 0.7 and not long else None
                spec = work(chance.randint(1, 2), seconds, limit, "long" if long else "")
                for _ in range(chance.choice((1, 1, 1, 3))):
                    self._at(at, lambda place=place, spec=spec: self.world.submit(place, spec))

    def _plan_faults(self) -> None:
        faults: list[tuple[Callable[[], object], int]] = [
            (self._crash, 4),
            (self._power, 2),
            (self._restart, 2),
            (self._vanish, 1),
            (self._part, 3),
            (self._storm, 2),
            (self._one_way, 2),
            (self._wrong_clock, 1),
            (self._remove, 2),
            (self._leave, 1),
            (self._recall, 3),
            (self._echo, 8),
        ]
        kinds, weights = zip(*faults, strict=True)
        at = 0.0
        while True:
            at += self.chance.expovariate(self.setting.faults / self.setting.trouble)
            if at > self.setting.trouble:
                break
            self._at(at, self.chance.choices(kinds, weights)[0])

    def _all(self) -> list[Place]:
        return list(self.world.places.values())

    def _any(self) -> Place:
        return self.chance.choice(self._all())

    def _here(self) -> list[Place]:
        return [place for place in self._all() if not place.vanished]

    # Faults

    async def _crash(self, *, power: bool = False) -> None:
        place = self._any()
        if place.up:
            self.world.crash(place, power=power)
            await asyncio.sleep(self.chance.choice((0.5, 3.0, 10.0, 40.0)))
            if not place.up and not place.vanished:
                await self.world.start(place)

    def _vanish(self) -> None:
        """A site goes down and never comes back; it stays a member, for all that others know."""
        place = self._any()
        if place.up and place not in self._managers and sum(p.vanished for p in self._all()) < 2:
            place.vanished = True
            self.world.crash(place, power=True)
            place.host.placed.clear()

    async def _power(self) -> None:
        await self._crash(power=True)

    async def _restart(self) -> None:
        place = self._any()
        if place.up:
            try:
                await self.world.stop(place)
            except GridcloudError:
                self.world.crash(place)
            await asyncio.sleep(self.chance.uniform(0.5, 5.0))
            if not place.up and not place.vanished:
                await self.world.start(place)

    async def _part(self) -> None:
        keys = [place.key for place in self.world.places.values()]
        group = self.chance.sample(keys, self.chance.randint(1, max(1, len(keys) // 2)))
        self.world.ledger.note("part", len(group))
        self.world.network.partition(group)
        await asyncio.sleep(self.chance.uniform(2, 30))
        self.world.network.heal()

    async def _storm(self) -> None:
        self.world.ledger.note("storm")
        self.world.network.set_link(STORM)
        await asyncio.sleep(self.chance.uniform(2, 15))
        self.world.network.set_link(WEATHER)

    async def _one_way(self) -> None:
        """One direction between two sites fails."""
        one, other = self._any().key, self._any().key
        self.world.ledger.note("one way")
        self.world.network.set_link(Link(loss=1.0), one, other)
        await asyncio.sleep(self.chance.uniform(2, 20))
        self.world.network.set_link(WEATHER, one, other)

    async def _wrong_clock(self) -> None:
        """A clock is an hour off, until somebody sets it."""
        place = self._any()
        right = place.clock_off
        if abs(right) > _CLOCK_OFF:
            return
        self.world.set_clock(place, right + self.chance.choice((-3600.0, 3600.0)))
        await asyncio.sleep(self.chance.uniform(3, 20))
        self.world.set_clock(place, right)

    async def _come_late(self) -> None:
        place = self._add()
        try:
            async with asyncio.timeout(_JOINED_AFTER):
                await self._join(place, LENDER)
        except TimeoutError:
            self.world.ledger.violated("nobody lets it join", place.name)

    async def _remove(self) -> None:
        """A manager removes a plain member for good."""
        manager = self.chance.choice(self._managers)
        plain = [
            place
            for place in self.world.places.values()
            if place.member and place not in self._managers
        ]
        if len(plain) < 3:
            return
        place = self.chance.choice(plain)
        place.member, place.doubtful = False, True
        self.world.ledger.note("remove", place.name)
        broker = self.world.broker(manager)
        await self.world.on(manager, lambda _: broker.remove(COMMUNITY, place.key, "simulated"))
        place.doubtful = False

    async def _leave(self) -> None:
        place = self._any()
        if place in self._managers or not place.member:
            return
        self.world.ledger.note("leave", place.name)
        place.member, place.doubtful = False, True
        try:
            await self.world.leave(place)
            place.doubtful = False
        except GridcloudError:
            place.member = await self._in(place)
            raise

    async def _recall(self) -> None:
        """An owner wants back what it lent."""
        place = self._any()
        placed = [each.lease_id for each in place.host.placed.values() if each.lent]
        if placed and place.up:
            lease = self.chance.choice(placed)
            lending = self.world.lending(place)
            await self.world.on(place, lambda _: lending.recall(lease, "simulated"))

    def _echo(self) -> None:
        """An old message arrives once more."""
        among = self.world.heard if self.chance.random() < 0.2 else self.world.deeds
        if among:
            self._deliver(*self.chance.choice(list(among)))

    def _deliver(self, source: str, target: str, message: bytes) -> None:
        node = self.world.network.node(target)
        if node.up:
            self.world.ledger.note("echo", self.world.by_key[target])
            node.handle(source, message)

    # The end

    async def _heal(self) -> None:
        self.world.network.heal()
        self.world.network.set_link(WEATHER)
        self.world.network._links.clear()
        self.world.ledger.note("healed")
        self.world.ledger.healed_at = self.world.loop.time()
        for place in self._here():
            if not place.up:
                await self.world.start(place)

    def _replay(self) -> None:
        """Whoever is a member no more says again what it said before, to everybody; and old
        requests of all others arrive once more."""
        gone = {place.key for place in self.world.places.values() if not place.member}
        for source, _, message in [*self.world.heard, *self.world.deeds]:
            if source in gone:
                self._deliver(source, self._any().key, message)
        for late in list(self.world.deeds)[::3]:
            self._deliver(*late)

    async def _rest(self) -> None:
        """Wait until all is quiet: jobs ended, leases given back, everybody of one mind."""
        until = self.world.loop.time() + self.setting.rest
        while self.world.loop.time() < until:
            if self.world.ledger.agreed_after is None:
                if await self._agreed():
                    self.world.ledger.agreed()
                await asyncio.sleep(0.5)
            elif await self._quiet():
                return
            else:
                await asyncio.sleep(2)

    async def _agreed(self) -> bool:
        digests = set()
        for place in self._here():
            if place.member:
                digests.add(await self._digest(place))
        return len(digests) == 1

    async def _digest(self, place: Place) -> str:
        directory = self.world.broker(place)._directory
        community = f"{COMMUNITY}.{self._managers[0].key}"
        try:
            return (await directory.roster(community)).digest()
        except GridcloudError as error:
            return f"{place.name} {error.code}"

    async def _quiet(self) -> bool:
        for place in self._here():
            if place.host.placed or await self._held(place):
                return False
            if any(not job.state.final for job in await self._due(place)):
                return False
        return True

    async def _held(self, place: Place) -> list[Lease]:
        """Return the live leases of a site, but for what it asked of one that went for good and
        never answered: that is given up after ten minutes."""
        gone = {each.key for each in self._all() if each.vanished}
        return [
            lease
            for lease in await self.world.live_leases(place)
            if lease.peer not in gone or lease.state is not LeaseState.INTENT
        ]

    async def _due(self, place: Place) -> list[Job]:
        """Return the jobs of a site that have to end: a light one outside has nowhere to run."""
        stranded = self.world.light and not place.member
        return [] if stranded else await self.world.jobs(place)

    async def _check(self) -> None:
        world, ledger = self.world, self.world.ledger
        for place in self._here():
            for placed in place.host.placed.values():
                ledger.violated("a lease leaked on the host", place.name, placed)
            for lease in await self._held(place):
                ledger.violated("a lease leaked in the books", place.name, lease.id)
            known = {job.id for job in await world.jobs(place)}
            for job_id, site in ledger.submitted.items():
                if site == place.name and job_id not in known:
                    ledger.violated("a job was lost", site, job_id)
            for job in await self._due(place):
                ledger.final(place.name, job)
        if ledger.agreed_after is None:
            ledger.violated("members do not agree on who is one")
        await self._check_members()

    async def _check_members(self) -> None:
        world, ledger = self.world, self.world.ledger
        must = {place.key for place in world.places.values() if place.member}
        may = must | {place.key for place in world.places.values() if place.doubtful}
        for place in self._here():
            if not place.member:
                continue
            known = await world.on(place, lambda _, p=place: world.broker(p).members(COMMUNITY))
            keys = {member.key for member in known}
            lost, extra = must - keys, keys - may
            if lost:
                names = sorted(world.by_key[key] for key in lost)
                ledger.violated("a member is not known", place.name, names)
            if extra:
                names = sorted(world.by_key[key] for key in extra)
                ledger.violated("who was removed, or left, is a member", place.name, names)
