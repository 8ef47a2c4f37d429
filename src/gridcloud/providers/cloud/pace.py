"""How fast a cloud's API is called: a token bucket that adapts, and the one door through it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from gridcloud.errors import Throttled

T = TypeVar("T")

#: A burst is what a bucket of the full rate gathers in so many seconds.
_BURST_SECONDS = 5.0
#: How long it takes, without another complaint, from nothing back to the full rate.
_RECOVERY_SECONDS = 120.0
_SLOWEST_PART = 1 / 256
#: Complaints that come together are about the same calls: they halve the rate once.
_SAME_COMPLAINT_SECONDS = 1.0
_CALLS_AT_ONCE = 64
#: A cloud that asks for more is asked again after this.
_LONGEST_QUIET_SECONDS = 300.0


@dataclass
class Bucket:
    """A token bucket: ``full_rate`` calls a second, less after complaints. Pure; instants are
    seconds of one clock.

    A complaint halves the rate and empties the bucket; until the time that the cloud asked for
    nothing is called at all. Then the rate grows again, a little every second.
    """

    full_rate: float
    at: float = 0.0
    rate: float = field(init=False)
    tokens: float = field(init=False)
    _quiet_until: float = field(init=False, default=float("-inf"))
    _complained_at: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        self.rate = self.full_rate
        self.tokens = self._burst

    @property
    def _burst(self) -> float:
        return max(1.0, self.full_rate * _BURST_SECONDS)

    def wait_seconds(self, now: float) -> float:
        """Return how long to wait until the next call may be made; 0 if it may now."""
        self._advance(now)
        if now < self._quiet_until:
            return self._quiet_until - now
        # A rounding error must not ask for a wait too short to change anything.
        return 0.0 if self.tokens >= 1 - 1e-9 else max(1e-6, (1 - self.tokens) / self.rate)

    def take(self, now: float) -> None:
        """Count a call that is made now."""
        self._advance(now)
        self.tokens -= 1

    def throttled(self, now: float, after_seconds: float) -> None:
        """Learn that the cloud complained, and for how long it wants to be left alone."""
        self._advance(now)
        if now - self._complained_at >= _SAME_COMPLAINT_SECONDS:
            self.rate = max(self.full_rate * _SLOWEST_PART, self.rate / 2)
            self._complained_at = now
        self.tokens = min(self.tokens, 0.0)
        quiet = min(after_seconds, _LONGEST_QUIET_SECONDS) if after_seconds > 0 else 0.0
        self._quiet_until = max(self._quiet_until, now + quiet)

    def _advance(self, now: float) -> None:
        passed = max(0.0, now - max(self.at, self._quiet_until))  # quiet time gathers no burst
        self.at = max(now, self.at)
        self.tokens = min(self._burst, self.tokens + passed * self.rate)
        self.rate = min(self.full_rate, self.rate + passed * self.full_rate / _RECOVERY_SECONDS)


class Pace:
    """The door to one cloud: calls go through in the order they came, as fast as its bucket lets
    them, and some number of them at once."""

    def __init__(self, calls_per_second: float) -> None:
        self._bucket = Bucket(calls_per_second)
        self._line = asyncio.Lock()
        self._room = asyncio.Semaphore(_CALLS_AT_ONCE)

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Return what ``function`` returns, called when its turn has come; raises what it raises.

        A `Throttled` slows all that come after; it is not called again here.
        """
        now = asyncio.get_running_loop().time
        async with self._room:
            async with self._line:
                while wait := self._bucket.wait_seconds(now()):  # noqa: ASYNC110 - a clock is
                    await asyncio.sleep(wait)  # waited for; a complaint may make it longer
                self._bucket.take(now())
            try:
                return await function()
            except Throttled as complaint:
                self._bucket.throttled(now(), complaint.after_seconds)
                raise
