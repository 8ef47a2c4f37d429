"""How fast a cloud's API is called."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcloud.errors import Throttled, Unavailable
from gridcloud.providers.cloud.pace import Bucket, Pace
from simulation.virtual_time import now, run


def taken(bucket, begin, end):
    """Take as many calls as the bucket lets; return when each was made."""
    at, made = begin, []
    while at < end:
        if wait := bucket.wait_seconds(at):
            at += wait
        else:
            bucket.take(at)
            made.append(at)
    return made


@settings(deadline=None)
@given(st.floats(0.1, 40), st.lists(st.tuples(st.floats(0, 5), st.floats(0, 10)), max_size=8))
def test_never_faster_than_told(rate, complaints):
    """Over any time there are at most so many calls as the rate and one burst allow."""
    bucket, at, made = Bucket(rate), 0.0, []
    for after, quiet in complaints:
        made += taken(bucket, at, at + after)
        at = max(at + after, made[-1] if made else 0.0)
        bucket.throttled(at, quiet)
        assert bucket.wait_seconds(at) >= quiet - 1e-9
    made += taken(bucket, at, at + 10)
    burst = max(1.0, rate * 5)
    for i in range(0, len(made), 7):
        for j in range(i, len(made), 11):
            assert j - i + 1 <= burst + rate * (made[j] - made[i]) + 1e-3 * (j - i) + 1


def test_a_complaint_halves_the_rate_and_it_comes_back():
    """Right after it calls are half as many; two minutes later they are as many as before."""
    bucket = Bucket(10.0)
    bucket.throttled(0.0, 3.0)
    assert bucket.wait_seconds(0.0) == 3.0
    assert bucket.rate == 5.0
    slowly = taken(bucket, 3.0, 8.0)
    assert 25 <= len(slowly) <= 30
    assert bucket.wait_seconds(200.0) == 0.0
    assert bucket.rate == 10.0


def test_complaints_that_come_together_count_once():
    """Fifty calls that were under way do not bring the rate to nothing."""
    bucket = Bucket(10.0)
    for i in range(50):
        bucket.throttled(i / 100, 0.0)
    assert 5.0 <= bucket.rate < 5.1


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e4), max_size=300))
def test_complaints_without_end_never_stop_it(times):
    """However often the cloud complains, a call is let through in a bounded time."""
    bucket = Bucket(1.0)
    for at in sorted(times):
        bucket.throttled(at, 0.0)
    end = max(times, default=0.0)
    assert bucket.wait_seconds(end) <= 256 * 2


def test_calls_go_in_the_order_they_came():
    """Nobody overtakes, and the rate holds for all together."""

    async def main():
        pace, order = Pace(10.0), []

        async def one(number):
            async def call():
                order.append((number, now()))

            await pace.call(call)

        await asyncio.gather(*(one(number) for number in range(100)))
        assert [number for number, _ in order] == list(range(100))
        assert 5.0 <= order[-1][1] <= 5.2  # fifty at once, then ten a second

    run(main)


def test_errors_pass_and_only_complaints_slow_it():
    """What a call raises is raised; a wish to be left alone is heeded by the next."""

    async def main():
        pace = Pace(1000.0)

        async def fail(error):
            raise error

        with pytest.raises(Unavailable):
            await pace.call(lambda: fail(Unavailable("503.")))
        assert now() == 0.0
        with pytest.raises(Throttled):
            await pace.call(lambda: fail(Throttled("429.", after_seconds=7.0)))

        async def look():
            return now()

        assert 7.0 <= await pace.call(look) < 7.1

    run(main)
