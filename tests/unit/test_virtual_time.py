"""The virtual clock of the simulation: jumps, keeps order, repeats itself, and never waits."""

import asyncio
import random
import time
from datetime import timedelta

import pytest

from simulation.virtual_time import EPOCH, Stalled, VirtualTimeLoop, now, run


def test_a_day_passes_in_no_time():
    """Sleeping moves the clock by just what was asked, and costs nothing."""

    async def main():
        await asyncio.sleep(86400)
        return now()

    began = time.monotonic()
    assert run(main) == pytest.approx(86400)
    assert time.monotonic() - began < 5


def test_timers_fire_in_order_and_at_their_time():
    """Whoever sleeps shorter wakes first, whatever the order of starting."""
    woken = []

    async def sleeper(seconds):
        await asyncio.sleep(seconds)
        woken.append((seconds, round(now(), 6)))

    async def main():
        await asyncio.gather(*(sleeper(seconds) for seconds in (3, 1, 2, 0.5)))

    run(main)
    assert woken == [(0.5, 0.5), (1, 1), (2, 2), (3, 3)]


def test_time_limits_are_virtual_too():
    """`asyncio.timeout` ends a wait at its virtual moment."""

    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.Event().wait()
        return now()

    assert run(main) == pytest.approx(10)


def test_the_same_program_runs_the_same_twice():
    """Order and times of a thousand random waits are the same for one seed."""

    def trace():
        seen = []
        chance = random.Random(7)

        async def wander(name):
            for _ in range(20):
                await asyncio.sleep(chance.random())
                seen.append((name, now()))

        async def main():
            await asyncio.gather(*(wander(name) for name in range(50)))

        run(main)
        return seen

    assert trace() == trace()


def test_waiting_for_ever_is_an_error():
    """A deadlock ends the run instead of hanging it."""

    async def main():
        await asyncio.Event().wait()

    with pytest.raises(Stalled):
        run(main)


def test_threads_and_sockets_are_refused():
    """What would bring real time in raises at once."""

    async def threads():
        await asyncio.to_thread(time.sleep, 0)

    async def sockets():
        await asyncio.open_connection("127.0.0.1", 9)

    for main in (threads, sockets):
        with pytest.raises(RuntimeError, match="in virtual time"):
            run(main)


def test_clocks_of_sites_may_be_off_and_drift():
    """One loop, many wall clocks."""
    loop = VirtualTimeLoop()
    right, late, fast = (
        loop.clock(),
        loop.clock(off=timedelta(hours=-1)),
        loop.clock(drift=0.01),
    )
    loop.run_until_complete(asyncio.sleep(100))
    loop.close()
    assert right() - EPOCH == timedelta(seconds=100)
    assert right() - late() == timedelta(hours=1)
    assert fast() - right() == timedelta(seconds=1)
