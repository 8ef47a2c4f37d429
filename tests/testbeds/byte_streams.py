"""Pairs of byte streams in memory, and a grid made of them; for tests of what uses streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from gridcloud.errors import Unavailable
from gridcloud.grid.transport import ByteStream


class _Flow:
    """Bytes one way: at most ``limit`` are under way."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = bytearray()
        self.ended = False
        self.broken = False
        self.changed = asyncio.Condition()

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def break_off(self) -> None:
        self.broken = True
        asyncio.ensure_future(self.notify())  # noqa: RUF006  (one turn of the loop)


class MemoryStream:
    """One end; see `gridcloud.grid.transport.ByteStream`. ``written`` counts what was taken."""

    def __init__(self, inward: _Flow, outward: _Flow) -> None:
        self._inward = inward
        self._outward = outward
        self.written = 0
        self.closed = False

    async def read(self, limit: int) -> bytes:
        flow = self._inward
        async with flow.changed:
            await flow.changed.wait_for(lambda: flow.held or flow.ended or flow.broken)
            if not flow.held and not flow.ended:
                raise Unavailable("The stream broke.")
            data = bytes(flow.held[:limit])
            del flow.held[:limit]
            flow.changed.notify_all()
            return data

    async def write(self, data: bytes) -> None:
        flow = self._outward
        for start in range(0, len(data), flow.limit):
            chunk = data[start : start + flow.limit]
            async with flow.changed:
                await flow.changed.wait_for(lambda: not flow.held or flow.broken)
                if flow.broken or flow.ended:
                    raise Unavailable("The stream broke.")
                flow.held += chunk
                self.written += len(chunk)
                flow.changed.notify_all()

    async def write_eof(self) -> None:
        self._outward.ended = True
        await self._outward.notify()

    def close(self) -> None:
        self.closed = True
        self._inward.break_off()
        if not self._outward.ended:
            self._outward.held.clear()
            self._outward.break_off()


def stream_pair(limit: int = 64 * 1024) -> tuple[MemoryStream, MemoryStream]:
    """Return the two ends of a stream."""
    one, other = _Flow(limit), _Flow(limit)
    return MemoryStream(one, other), MemoryStream(other, one)


class MemoryOverlay:
    """What the borrower ``key`` opens streams by: everything it opens goes to ``acceptor``."""

    def __init__(self, key: str, acceptor: Callable[[str, ByteStream], Awaitable[None]]) -> None:
        self._key = key
        self._acceptor = acceptor
        self.opened: list[tuple[str, str]] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def open_stream(self, peer: str, service: str, timeout: float) -> ByteStream:
        ours, theirs = stream_pair()
        self.opened.append((peer, service))
        task = asyncio.ensure_future(self._acceptor(self._key, theirs))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return ours
