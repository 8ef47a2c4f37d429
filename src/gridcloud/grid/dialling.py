"""In which order a peer is tried to be reached, and trying several ways one behind the other."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum

from gridcloud.errors import Unavailable
from gridcloud.grid.links import Link, LinkDown

#: How long the better way is tried alone. A UDP port that is dropped does not say so.
_HEAD_START = 1.0
_REMEMBERED = 4096


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
