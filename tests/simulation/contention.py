"""Several sites that always want more than one lender has: who gets how much of it?

All borrowers are equals but for what they ask: some have more waiting than others, some want the
whole lender at once. Nobody may starve, and those who ask for the same get about the same.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from datetime import timedelta

from gridcloud.model.job import JobState
from gridcloud.settings import LendingSettings
from simulation.scenario import WEATHER
from simulation.virtual_time import now
from simulation.world import Place, World, work

#: How many times the share of the least served equal the most served may have.
MOST_UNEQUAL = 1.6
#: For how long a borrower that keeps asking may be given nothing, as a multiple of a full round:
#: every borrower served once with what it asks.
LONGEST_ROUNDS = 4.0


@dataclass(frozen=True)
class Contention:
    """What a run is made of. Times in virtual seconds."""

    borrowers: int = 5
    cpus: int = 8
    usual: int = 2
    job: float = 10.0
    seconds: float = 600.0
    probe_every: float = 2.0
    light: bool = True


class Scramble:
    """Drives a world with one lender, and checks what each borrower got of it."""

    def __init__(self, world: World, setting: Contention) -> None:
        self.world = world
        self.setting = setting
        self.chance = random.Random(world.chance.getrandbits(64))
        self._at = 0.0
        self._given: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._gaps: dict[str, float] = {}

    async def run(self) -> None:
        """Let them scramble."""
        world, setting = self.world, self.setting
        world.network.set_link(WEATHER)
        longest = timedelta(minutes=1)
        lender = world.add(
            setting.cpus,
            LendingSettings(enabled=True, max_time=longest),
            self.chance.uniform(-5, 5),
        )
        await world.start(lender)
        await world.found(lender)
        borrowers: dict[str, tuple[Place, int, int]] = {}
        for number in range(setting.borrowers):
            place = world.add(1, LendingSettings(), self.chance.uniform(-5, 5))
            await world.start(place)
            await world.join(place, lender)
            size = (
                setting.cpus if number == 0 else setting.usual
            )  # one wants all of the lender at a time
            borrowers[place.name] = place, size, self.chance.randint(2, 8)
        await asyncio.sleep(5)
        self._at = now()
        for name in borrowers:
            self._last[name] = now()
        until = now() + setting.seconds
        while now() < until:
            lender.host.tick()
            self._look(lender)
            for place, size, many in borrowers.values():
                await self._keep_asking(place, size, many)
            await asyncio.sleep(1.0)
        self._check(borrowers)

    async def _keep_asking(self, place: Place, size: int, many: int) -> None:
        waiting = [job for job in await self.world.jobs(place) if job.state is JobState.QUEUED]
        for _ in range(many - len(waiting)):
            await self.world.submit(place, work(size, self.setting.job, self.setting.job + 5))

    def _look(self, lender: Place) -> None:
        """Count a second of what each has."""
        whose = self.world.ledger.submitted
        borrower_of = {run.lease_id: whose.get(run.job_id) for run in lender.host.runs.values()}
        for placed in lender.host.placed.values():
            if name := borrower_of.get(placed.lease_id):
                self._given[name] = self._given.get(name, 0.0) + placed.cpus * (now() - self._at)
                self._last[name] = now()
        self._at = now()
        for name, last in self._last.items():
            self._gaps[name] = max(self._gaps.get(name, 0.0), now() - last)

    def _check(self, borrowers: dict[str, tuple[Place, int, int]]) -> None:
        ledger, setting = self.world.ledger, self.setting
        usual = setting.usual
        equals = [self._given.get(n, 0.0) for n, (_, s, _) in borrowers.items() if s == usual]
        ledger.note("given", *sorted(self._given.items()))
        ledger.counts["unequal in percent"] = round(100 * max(equals) / max(1.0, min(equals)))
        if max(equals) > MOST_UNEQUAL * min(equals):
            ledger.violated("equals got unequal shares", self._given)
        a_round = (setting.job + 5) * (1 + (setting.borrowers - 1) * usual / setting.cpus)
        for name, gap in self._gaps.items():
            if gap > LONGEST_ROUNDS * a_round:
                ledger.violated("a borrower that kept asking got nothing for long", name, gap)
