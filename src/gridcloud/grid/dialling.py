"""In which order a peer is tried to be reached, and trying several ways one behind the other."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum

from gridcloud.errors import Unavailable
from gridcloud.grid.links import Link, LinkDown

#: How long the better way is tried alone. A UDP port that is dropped does not say so.
_HEAD_START = 1.0
_REMEMBERED = 4096
#: A way that is not straight is looked at again so soon, then after twice as long each time.
_REVIEW_AFTER, _REVIEW_EVERY = 5.0, 300.0


class Way(StrEnum):
    """The ways to reach a peer, the best first."""

    UDP = "udp"
    TLS = "tls"
    HELPED = "helped"


class Memory:
    """Which way led to a peer last."""

    def __init__(self) -> None:
        self._ways: OrderedDict[str, Way] = OrderedDict()
        self._latest: Way | None = None

    def note(self, key: str, way: Way) -> None:
        """Remember a success; of many peers those that succeeded last are remembered."""
        self._latest = way
        self._ways[key] = way
        self._ways.move_to_end(key)
        if len(self._ways) > _REMEMBERED:
            self._ways.popitem(last=False)

    def plan(self, key: str, possible: Sequence[Way]) -> list[tuple[float, Way]]:
        """Return the ways to try, each with the seconds after which it begins at the latest.

        They begin a head start apart, the best first, but what worked last begins at once. With a
        peer not met yet that is TLS, if it was what worked last with another: no UDP may pass here.
        """
        last = self._ways.get(key, Way.TLS if self._latest is Way.TLS else None)
        plan = [
            (0.0 if way is last else number * _HEAD_START, way)
            for number, way in enumerate(way for way in Way if way in possible)
        ]
        return sorted(plan, key=lambda entry: entry[0])


class Reviews:
    """When to look for a better way to a peer than the one that is used."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def due(self, key: str) -> bool:
        """Say whether it is time; of a peer asked about for the first time it is a little later."""
        if key not in self._due:
            self._put_off(key, _REVIEW_AFTER, _REVIEW_AFTER)
        return self._clock() >= self._due[key][0]

    def done(self, key: str, *, straight: bool) -> None:
        """Take note of a look: a straight way is left alone for long, others less and less."""
        _, pause = self._due.get(key, (0.0, _REVIEW_AFTER))
        if straight:
            self._put_off(key, _REVIEW_EVERY, _REVIEW_AFTER)
        else:
            later = min(2 * pause, _REVIEW_EVERY)
            self._put_off(key, later, later)

    def _put_off(self, key: str, wait: float, pause: float) -> None:
        self._due[key] = self._clock() + wait, pause
        self._due.move_to_end(key)
        if len(self._due) > _REMEMBERED:
            self._due.popitem(last=False)


#: A way to try, and after how many seconds.
Attempt = tuple[float, Callable[[], Awaitable[Link]]]


async def first_of(attempts: Sequence[Attempt], arrival: Awaitable[Link] | None = None) -> Link:
    """Return the first link that an attempt brings, or that arrives; the rest is given up.

    Each begins after its seconds, or as soon as all before it have failed. Raises `Unavailable`
    with all causes when all failed.
    """
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    left = list(attempts)
    running: list[asyncio.Future[Link]] = []
    beside = [asyncio.ensure_future(arrival)] if arrival is not None else []
    problems: list[str] = []
    hint = ""
    try:
        while left or running:
            pause = left[0][0] - (loop.time() - started_at) if left else None
            if left and pause is not None and (pause <= 0 or not running):
                running.append(asyncio.ensure_future(left.pop(0)[1]()))
                continue
            done, _ = await asyncio.wait(
                [*running, *beside], timeout=pause, return_when=asyncio.FIRST_COMPLETED
            )
            ended = [attempt for attempt in [*running, *beside] if attempt in done]
            running = [attempt for attempt in running if attempt not in done]
            for attempt in ended:
                _look_at(attempt)
            for attempt in ended:
                try:
                    return attempt.result()
                except (Unavailable, LinkDown) as error:
                    problems.append(error.message if isinstance(error, Unavailable) else str(error))
                    hint = hint or getattr(error, "hint", "")
    finally:
        for attempt in [*running, *beside]:
            attempt.cancel()
        await asyncio.gather(*running, *beside, return_exceptions=True)
    raise Unavailable(" ".join(dict.fromkeys(problems)) or "There is no way.", hint=hint)


def _look_at(attempt: asyncio.Future[Link]) -> None:
    """Take note of how it ended: another may decide before its turn comes."""
    if not attempt.cancelled():
        attempt.exception()
