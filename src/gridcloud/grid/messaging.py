"""Messages over links: each is a stream of its own, one message there and one back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import structlog

from gridcloud.errors import Unavailable
from gridcloud.grid.identity import short
from gridcloud.grid.links import Link, LinkDown
from gridcloud.grid.streams import open_on, read_to_end
from gridcloud.grid.transport import MAX_MESSAGE_BYTES, ByteStream, Handler, check_size

log = structlog.get_logger()

SERVICE = "message"
_READ_TIMEOUT = 30.0
_WRITE_TIMEOUT = 10.0
#: What somebody who is no member may say at once; a newcomer needs a few documents.
MAX_STRANGER_BYTES = 128 * 1024
_MAX_HANDLERS = 128
_MAX_HANDLERS_PER_PEER = 16
_MAX_HANDLERS_FOR_STRANGERS = 32


class Answering:
    """Answers messages by the handler. One peer, or all strangers, cannot take all the room."""

    def __init__(self, handler: Handler, knows: Callable[[str], bool]) -> None:
        self._handler = handler
        self._knows = knows
        self._all = asyncio.Semaphore(_MAX_HANDLERS)
        self._strangers = asyncio.Semaphore(_MAX_HANDLERS_FOR_STRANGERS)
        self._peers: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def accept(self, key: str, stream: ByteStream) -> None:
        """See `gridcloud.grid.transport.Acceptor`."""
        # Read outside of it: a peer that sends slowly holds up nobody's place.
        most = MAX_MESSAGE_BYTES if self._knows(key) else MAX_STRANGER_BYTES
        async with asyncio.timeout(_READ_TIMEOUT):
            message = await read_to_end(stream, most, key)
        async with self._place(key):
            try:
                reply = await self._handler(key, message)
                check_size(reply)
            except Exception:  # the handler's fault; it costs one request, not the connection
                log.exception("request failed", peer=short(key))
                return
            async with asyncio.timeout(_WRITE_TIMEOUT):
                await stream.write(reply)
                await stream.write_eof()

    @contextlib.asynccontextmanager
    async def _place(self, key: str) -> AsyncIterator[None]:
        own, users = self._peers.get(key, (asyncio.Semaphore(_MAX_HANDLERS_PER_PEER), 0))
        self._peers[key] = (own, users + 1)
        try:
            async with own:
                if self._knows(key):
                    async with self._all:
                        yield
                else:
                    async with self._strangers, self._all:
                        yield
        finally:
            own, users = self._peers.pop(key)
            if users > 1:
                self._peers[key] = (own, users - 1)


async def exchange(link: Link, message: bytes, silence: float | None = None) -> bytes:
    """Send a message and return its reply.

    With ``silence``, that many seconds in which nothing arrives from the start show that the link
    is dead. Raises `LinkDown` if the link is no good (the message may have arrived or not), and
    `Unavailable` if the peer dropped this one message.
    """
    talking = asyncio.create_task(_converse(link, message))
    try:
        if silence is not None:
            before = link.received()
            await asyncio.wait([talking], timeout=silence / 2)
            if not talking.done() and link.received() == before:
                link.nudge()
                await asyncio.wait([talking], timeout=silence / 2)
                if not talking.done() and link.received() == before:
                    raise LinkDown("it fell silent")
        return await talking
    except Unavailable as error:
        if not link.alive:
            raise LinkDown(error.message) from error
        raise
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)


async def _converse(link: Link, message: bytes) -> bytes:
    stream = await open_on(link, SERVICE, message)
    try:
        await stream.write_eof()
        return await read_to_end(stream, MAX_MESSAGE_BYTES, link.key)
    finally:
        stream.close()
