"""A site that gets its turn late waits longer before it thinks ill of its peers."""

import asyncio
import time

from gridcloud.grid.lag import Lag


async def test_who_is_on_time_waits_no_longer():
    """Nothing changes on a host that has time."""
    loop = asyncio.get_running_loop()
    # The best of several: whatever runs these tests may be late itself.
    assert min([await Lag().slowness(loop.time() + 10) for _ in range(50)]) < 1.5


async def test_who_wakes_late_waits_longer_and_forgets_it_soon():
    """Being late counts, up to a bound, and less with every second on time."""
    loop, lag = asyncio.get_running_loop(), Lag()
    assert 6 <= await lag.slowness(loop.time() - 0.5) <= 10
    assert await Lag().slowness(loop.time() - 60) == 10
    assert await lag.slowness(loop.time() + 1) > 4
    forgotten = []
    for _ in range(50):
        lag._at -= 20  # as if so much time had passed
        forgotten.append(await lag.slowness(loop.time() + 1))
    assert min(forgotten) < 1.5


async def test_a_full_round_of_the_loop_counts_as_late():
    """What keeps the loop is noticed though the caller itself was woken in time."""
    loop = asyncio.get_running_loop()
    loop.call_soon(time.sleep, 0.3)
    assert await Lag().slowness(loop.time() + 1) >= 3
