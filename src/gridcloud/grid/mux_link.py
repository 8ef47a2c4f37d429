"""Links over one private channel: the thin half of `gridcloud.grid.mux`, with signs of life."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Literal

import structlog

from gridcloud.errors import Unavailable
from gridcloud.grid.links import LinkDown, broken
from gridcloud.grid.mux import SMALL_PAYLOAD, BadFrame, Flow, Mux
from gridcloud.grid.tls_channel import TlsChannel
from gridcloud.grid.transport import Path

log = structlog.get_logger()

#: A peer from which nothing came for so long is asked for a sign of life, and then given up.
_QUIET_SECONDS = 25.0
_ANSWER_SECONDS = 10.0
#: Streams wait with more while so much waits to be sent.
_ENOUGH = 64 * 1024
#: A peer that takes nothing, and yet asks on, is given up.
_TOO_MUCH = 4 * 1024 * 1024


class MuxStream:
    """See `gridcloud.grid.transport.ByteStream`."""

    def __init__(self, link: MuxLink, flow: Flow) -> None:
        self._link = link
        self._flow = flow
        self._closed = False

    async def read(self, limit: int) -> bytes:
        """See `ByteStream`."""
        flow = self._flow
        while not flow.unread:
            self._check_open()
            if flow.got_eof:
                return b""
            if flow.broken:
                raise broken(self._link.key, self._link.cause or "it let go of the stream")
            await self._link.stirred(flow)
        self._check_open()
        data = self._link.mux.read(flow, limit)
        self._link.flush()
        return data

    async def write(self, data: bytes) -> None:
        """See `ByteStream`."""
        left = memoryview(data)
        while left:
            self._check_writable()
            if self._flow.may_send and self._link.mux.waiting < _ENOUGH:
                left = left[self._link.mux.send(self._flow, left) :]
                self._link.flush()
            else:
                await self._link.stirred(self._flow)

    async def write_eof(self) -> None:
        """See `ByteStream`."""
        if self._flow.sent_eof:
            return
        self._check_writable()
        self._link.mux.send_eof(self._flow)
        self._link.flush()

    def close(self) -> None:
        """See `ByteStream`."""
        if not self._closed:
            self._closed = True
            self._link.mux.reset(self._flow)
            self._link.stir(self._flow)
            self._link.flush()

    def _check_open(self) -> None:
        if self._closed:
            raise broken(self._link.key, "the stream was closed here")

    def _check_writable(self) -> None:
        self._check_open()
        if self._flow.broken:
            raise broken(self._link.key, self._link.cause or "it let go of the stream")
        if self._flow.sent_eof:
            raise Unavailable("This end of the stream has said that no more comes.")


class MuxLink:
    """See `gridcloud.grid.links.Link`."""

    def __init__(
        self,
        channel: TlsChannel,
        key: str,
        *,
        dialled: bool,
        how: Literal["tls", "relayed"],
        via: str | None = None,
    ) -> None:
        self.key = key
        self.dialled = dialled
        self.mux = Mux(dialled=dialled)
        #: Why it is down; empty while it is not.
        self.cause = ""
        self._how: Literal["tls", "relayed"] = how
        self._via = via
        self._channel = channel
        self._received = 0
        self._rtt: float | None = None
        self._toll: Callable[[int], float] = lambda frames: 0.0
        self._asked: tuple[bytes, float] | None = None
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}
        self._to_send = asyncio.Event()
        self._changed = asyncio.Event()
        self._running = asyncio.create_task(self._run(), name="link")
        self.nudge()

    async def open(self) -> MuxStream:
        """See `Link`."""
        while True:
            if self.cause:
                raise LinkDown(self.cause)
            if self.mux.may_open:
                break
            self._changed.clear()
            await self._changed.wait()
        try:
            flow = self.mux.open()
        except BadFrame as error:
            self._fail(str(error))
            raise LinkDown(str(error)) from error
        self.flush()
        return MuxStream(self, flow)

    async def accept(self) -> MuxStream:
        """See `Link`."""
        while not self.mux.opened:
            if self.cause:
                raise LinkDown(self.cause)
            self._changed.clear()
            await self._changed.wait()
        return MuxStream(self, self.mux.opened.popleft())

    @property
    def alive(self) -> bool:
        """See `Link`."""
        return not self.cause

    def received(self) -> int:
        """See `Link`."""
        return self._received

    def nudge(self) -> None:
        """See `Link`."""
        if self._asked is None and not self.cause:
            token = secrets.token_bytes(8)
            self._asked = (token, time.monotonic())
            self.mux.ping(token)
            self.flush()

    def meter(self, toll: Callable[[int], float]) -> None:
        """See `Link`."""
        self._toll = toll

    def path(self) -> Path:
        """See `Link`."""
        return Path(how=self._how, via=self._via, rtt_seconds=self._rtt)

    def observed(self) -> str:
        """See `Link`; a TCP connection comes from a port where nobody listens."""
        return ""

    def close(self) -> None:
        """See `Link`."""
        self._fail("it was closed here")

    async def closed(self) -> None:
        """Wait until it is down."""
        await asyncio.wait([self._running])

    async def stirred(self, flow: Flow) -> None:
        """Wait until something about a stream may have changed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(flow.number, [])
        waiting.append(future)
        try:
            await future
        finally:
            if future.cancelled():
                waiting.remove(future)
                if not waiting and self._waiting.get(flow.number) is waiting:
                    del self._waiting[flow.number]

    def stir(self, flow: Flow) -> None:
        """Wake those who wait for a stream to change."""
        for future in self._waiting.pop(flow.number, []):
            if not future.done():
                future.set_result(None)

    def flush(self) -> None:
        """Have what waits sent."""
        self._to_send.set()
        self._changed.set()

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive())
                group.create_task(self._send())
                group.create_task(self._watch())
        except* LinkDown as down:
            self._fail(str(down.exceptions[0]))
        except* BadFrame as bad:
            log.info("peer breaks the rules", peer=self.key[:8], cause=str(bad.exceptions[0]))
            self._fail(f"it broke the rules: {bad.exceptions[0]}")
        finally:
            self._fail("it was closed here")

    async def _receive(self) -> None:
        while True:
            data = await self._channel.read()
            self._received += len(data)
            counted = self.mux.small
            changed = self.mux.receive(data)
            if self._asked is not None and self.mux.answered == self._asked[0]:
                self._rtt = time.monotonic() - self._asked[1]
                self._asked = None
            if self.mux.waiting > _TOO_MUCH:
                raise BadFrame("it asks on and takes nothing")
            for flow in changed:
                self.stir(flow)
            self.flush()
            # A record with next to nothing in it costs as much as a frame.
            frames = self.mux.small - counted + (len(data) < SMALL_PAYLOAD)
            if frames and (pause := self._toll(frames)) > 0:
                await asyncio.sleep(pause)

    async def _send(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            while data := self.mux.take():
                await self._channel.write(data)
                for number in list(self._waiting):  # writers go on by turns
                    for future in self._waiting.pop(number):
                        if not future.done():
                            future.set_result(None)

    async def _watch(self) -> None:
        while True:
            before = self._received
            await asyncio.sleep(_QUIET_SECONDS)
            if self._received == before:
                self._asked = None
                self.nudge()
                await asyncio.sleep(_ANSWER_SECONDS)
                if self._received == before:
                    raise LinkDown("it fell silent")

    def _fail(self, cause: str) -> None:
        if self.cause:
            return
        self.cause = cause
        for flow in self.mux.fail():
            self.stir(flow)
        self.mux.opened.clear()
        self._channel.close()
        self._changed.set()
        self._running.cancel()
