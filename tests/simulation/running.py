"""Runs one seed in a loop of its own, with all seams in place, and reports what came of it."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from gridcloud.errors import GridcloudError
from gridcloud.grid.swim import Swim
from gridcloud.site.lending import Lending
from simulation.contention import Contention, Scramble
from simulation.crashing import CrashingLoop, let_go
from simulation.scenario import Scenario, Setting
from simulation.seams import installed
from simulation.world import World, watch_lending


@dataclass
class Report:
    """What came of a run. ``cpu_seconds`` are this process's own."""

    seed: int
    trace: str = ""
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    messages: int = 0
    bytes: int = 0
    longest_wait: float = 0.0
    agreed_after: float | None = None


def simulate(seed: int, setting: Setting | Contention) -> Report:
    """Run one seed to its end; the same seed and setting always give the same trace.

    In another process they do if both were started with the same PYTHONHASHSEED.
    """
    folder = Path(tempfile.mkdtemp(prefix="gridcloud-simulation-"))
    began = time.process_time()
    loop = CrashingLoop()
    world = World(loop, seed, folder, light=setting.light)
    gc.collect()
    gc.disable()  # a collection at a moment of its own choosing would change the order of things
    try:
        with ExitStack() as stack:
            stack.enter_context(installed(world))
            for name, method in watch_lending(world).items():
                stack.enter_context(patch.object(Lending, name, method))
            stack.enter_context(patch.object(Swim, "period", setting.probe_every))
            loop.set_exception_handler(lambda _, context: unheard(world, context))
            try:
                loop.run_until_complete(_driver(world, setting).run())
            except Exception as error:
                world.ledger.violated("the scenario failed", repr(error))
            seconds = loop.time()
            world.ledger.close()
            let_go(loop, world.processes())
    finally:
        world.close()
        gc.enable()
        shutil.rmtree(folder)
    ledger = world.ledger
    return Report(
        seed=seed,
        trace=ledger.trace,
        violations=ledger.violations,
        counts=ledger.counts,
        seconds=seconds,
        cpu_seconds=time.process_time() - began,
        messages=world.messages,
        bytes=world.bytes,
        longest_wait=max(ledger.waits.values(), default=0.0),
        agreed_after=ledger.agreed_after,
    )


def _driver(world: World, setting: Setting | Contention) -> Scenario | Scramble:
    if isinstance(setting, Contention):
        return Scramble(world, setting)
    return Scenario(world, setting)


def unheard(world: World, context: dict[str, object]) -> None:
    """Take an exception that nobody waited for as what it is."""
    error = context.get("exception")
    if error is not None and not isinstance(error, GridcloudError):
        world.ledger.violated("an exception nobody heard", repr(error))
