"""What is served over links: a stream begins with the name of the service it is meant for.

Here is what one peer can take from the others: how many streams it may open, how fast, and how
long it may be silent before it has said what it wants.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from gridcloud.errors import Conflict, GridcloudError, InvalidSpec, Unavailable
from gridcloud.grid.identity import short
from gridcloud.grid.links import MAX_LINKS_OF_STRANGERS, Link, LinkDown, LinkTable, broken
from gridcloud.grid.rates import Buckets, TokenBucket
from gridcloud.grid.transport import Acceptor, ByteStream

log = structlog.get_logger()

_NAME_BYTES = 15
_NAME = re.compile(r"^[a-z0-9-]{1,15}$")
#: Whether the opener waits to hear that the service is there, before all else that comes.
_QUIET, _ASKS = b"\0", b"\x01"
_SERVED, _NOT_SERVED = b"\x01", b"\0"
_HEADER_TIMEOUT = 10.0
_STREAMS_PER_SECOND = 500.0
_STREAMS_AT_ONCE = 1000.0
#: Small frames cost as much as large ones: so many are taken of one peer, and of all strangers.
_FRAMES_PER_SECOND, _FRAMES_AT_ONCE = 10_000.0, 20_000.0
_STRANGERS_FRAMES_PER_SECOND, _STRANGERS_FRAMES_AT_ONCE = 2000.0, 6000.0
#: What all strangers may open together.
_STRANGERS_PER_SECOND, _STRANGERS_AT_ONCE = 100.0, 300.0
_MAX_STREAMS_PER_PEER = 128
#: So few that those who hold all the links of strangers leave room for who gets one in the end:
#: twice as many, since what was open on a link that was dropped ends a little later.
_MAX_STREAMS_PER_STRANGER = 4
_MAX_STREAMS_OF_STRANGERS = 2 * _MAX_STREAMS_PER_STRANGER * MAX_LINKS_OF_STRANGERS
_MAX_STREAMS = 2048


class Services:
    """The services of this site, and the links they are offered on."""

    def __init__(self, links: LinkTable, knows: Callable[[str], bool]) -> None:
        self._links = links
        self._knows = knows
        self._acceptors: dict[str, Callable[[Link, ByteStream], Awaitable[None]]] = {}
        self._rates = Buckets(_STREAMS_PER_SECOND, _STREAMS_AT_ONCE)
        self._frames = Buckets(_FRAMES_PER_SECOND, _FRAMES_AT_ONCE)
        now = time.monotonic()
        self._of_strangers = TokenBucket(_STRANGERS_PER_SECOND, _STRANGERS_AT_ONCE, now)
        self._strangers_frames = TokenBucket(
            _STRANGERS_FRAMES_PER_SECOND, _STRANGERS_FRAMES_AT_ONCE, now
        )
        self._open: Counter[str] = Counter()
        self._running: set[asyncio.Task[None]] = set()

    def serve(self, service: str, acceptor: Acceptor) -> None:
        """See `gridcloud.grid.transport.Streams`."""

        async def accept(link: Link, stream: ByteStream) -> None:
            with self._links.using(link):
                await acceptor(link.key, stream)

        self.serve_lasting(service, accept)

    def serve_lasting(
        self, service: str, acceptor: Callable[[Link, ByteStream], Awaitable[None]]
    ) -> None:
        """Serve streams that stay open though nothing goes on, and so keep no link in use."""
        header(service)
        if service in self._acceptors:
            raise Conflict(f"The service {service!r} is served already.")
        self._acceptors[service] = acceptor

    def attach(self, link: Link) -> bool:
        """Keep a link and serve what is opened on it; close it if there is no room. Say which."""
        if not self._links.add(link):
            log.debug("no room for a link", peer=short(link.key))
            link.close()
            return False
        link.meter(lambda frames: self._pause_for(link.key, frames))
        task = asyncio.create_task(self._serve(link), name="serve")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True

    async def close(self) -> None:
        """End all that is served."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _serve(self, link: Link) -> None:
        try:
            async with asyncio.TaskGroup() as answering:
                while True:
                    if (pause := self.pause(link.key)) > 0:
                        await asyncio.sleep(pause)
                    try:
                        stream = await link.accept()
                    except LinkDown:
                        break
                    if self._has_room(link.key):
                        # Counted at once: many may come before the first of their tasks begins.
                        self._open[link.key] += 1
                        task = answering.create_task(self._answer(link, stream))
                        task.add_done_callback(partial(self._forget, link.key))
                    else:
                        stream.close()
        finally:
            self._links.drop(link)

    def pause(self, key: str) -> float:
        """Count a stream or message that is about to be taken; return for how long to wait."""
        now = time.monotonic()
        pause = self._rates.of(key, now).take(1, now)
        return pause if self._knows(key) else max(pause, self._of_strangers.take(1, now))

    def _pause_for(self, key: str, frames: int) -> float:
        now = time.monotonic()
        bucket = self._frames.of(key, now) if self._knows(key) else self._strangers_frames
        return bucket.take(frames, now)

    def _has_room(self, key: str) -> bool:
        if self._open[key] >= _MAX_STREAMS_PER_PEER or self._open.total() >= _MAX_STREAMS:
            return False
        if self._knows(key):
            return True
        if self._open[key] >= _MAX_STREAMS_PER_STRANGER:
            return False
        strangers = sum(count for other, count in self._open.items() if not self._knows(other))
        return strangers < _MAX_STREAMS_OF_STRANGERS

    async def _answer(self, link: Link, stream: ByteStream) -> None:
        """Hand one stream to its service; whatever is wrong with it stays in here."""
        key = link.key
        try:
            with self._links.using(link):
                async with asyncio.timeout(_HEADER_TIMEOUT):
                    said = await read_exactly(stream, _NAME_BYTES + 1, key)
                    name = said[:-1].rstrip(b"\0").decode("ascii", "replace")
                    acceptor = self._acceptors.get(name)
                    if said[-1:] == _ASKS:
                        await stream.write(_NOT_SERVED if acceptor is None else _SERVED)
                        if acceptor is None:
                            await stream.write_eof()
            if acceptor is not None:
                await acceptor(link, stream)
        except (GridcloudError, TimeoutError) as error:
            log.debug("stream dropped", peer=short(key), error=str(error))
        except Exception:  # the service's fault; it costs one stream, not the link
            log.exception("stream failed", peer=short(key))
        finally:
            stream.close()

    def _forget(self, key: str, _task: asyncio.Task[None]) -> None:
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]


class HeldStream:
    """A `ByteStream` whose link counts as in use until the stream is closed."""

    def __init__(self, stream: ByteStream, links: LinkTable, link: Link) -> None:
        self._stream = stream
        self._held = contextlib.ExitStack()
        self._held.enter_context(links.using(link))

    async def read(self, limit: int) -> bytes:
        """See `ByteStream`."""
        return await self._stream.read(limit)

    async def write(self, data: bytes) -> None:
        """See `ByteStream`."""
        await self._stream.write(data)

    async def write_eof(self) -> None:
        """See `ByteStream`."""
        await self._stream.write_eof()

    def close(self) -> None:
        """See `ByteStream`."""
        self._held.close()
        self._stream.close()


def header(service: str, *, asks: bool = False) -> bytes:
    """Return the bytes that a stream to this service begins with; raises `InvalidSpec`.

    With ``asks`` the first byte that comes back says whether the service is there.
    """
    if not _NAME.fullmatch(service):
        raise InvalidSpec(
            f"{service!r} is no name for a service.", hint="Use 1 to 15 of a-z, 0-9 and '-'."
        )
    return service.encode().ljust(_NAME_BYTES, b"\0") + (_ASKS if asks else _QUIET)


async def open_on(
    link: Link, service: str, first: bytes = b"", *, asks: bool = False
) -> ByteStream:
    """Open a stream to a service on a link, with its first bytes.

    With ``asks``, wait to hear that the service is there. Raises `LinkDown` if the link is no good,
    `Unavailable` if only the stream is.
    """
    stream = await link.open()
    try:
        await stream.write(header(service, asks=asks) + first)
        if asks and await read_exactly(stream, 1, link.key) != _SERVED:
            raise broken(link.key, f"it does not serve {service!r}")
    except Unavailable as error:
        stream.close()
        if not link.alive:
            raise LinkDown(error.message) from error
        raise
    except BaseException:
        stream.close()
        raise
    return stream


async def read_exactly(stream: ByteStream, size: int, key: str) -> bytes:
    """Return that many bytes; raises `Unavailable` if the stream ends before."""
    found = await stream.read(size)
    while 0 < len(found) < size:
        more = await stream.read(size - len(found))
        if not more:
            break
        found += more
    if len(found) < size:
        raise broken(key, "it said too little")
    return found


async def read_to_end(stream: ByteStream, most: int, key: str) -> bytes:
    """Return all that comes until the end; raises `Unavailable` if that is more than ``most``."""
    found = bytearray()
    while data := await stream.read(64 * 1024):
        found += data
        if len(found) > most:
            raise broken(key, "it said too much")
    return bytes(found)
