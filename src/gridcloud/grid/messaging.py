"""Messages over links: one stream each way carries many, so that a message costs two writes.

A message goes as a frame: its number and its length (four bytes each, big-endian), then itself.
The answer is a frame of the same number, in whatever order answers are ready; a length of
2**32 - 1 says that the request was dropped. Whoever asks opens the stream, which then stays as
long as the link.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Iterator

import structlog

from gridcloud.errors import GridcloudError, Unavailable
from gridcloud.grid.identity import short
from gridcloud.grid.links import Link, LinkDown, LinkTable, broken
from gridcloud.grid.streams import open_on
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
_HEAD = struct.Struct(">II")
_DROPPED = 2**32 - 1
_CHUNK = 64 * 1024
#: So many answers are waited for over one link; nobody asks so much who hears answers.
_MAX_WAITING = 4096


class _Frames:
    """Reads frames from a stream."""

    def __init__(self, stream: ByteStream, key: str) -> None:
        self._stream = stream
        self._key = key
        self._held = bytearray()

    async def head(self) -> tuple[int, int] | None:
        """Return number and length of the next frame; None at the end of the stream."""
        if not await self._hold(_HEAD.size):
            if self._held:
                raise broken(self._key, "it stopped within a message")
            return None
        number, length = _HEAD.unpack_from(self._held)
        del self._held[: _HEAD.size]
        return number, length

    async def body(self, length: int) -> bytes:
        """Return what follows a head."""
        if not await self._hold(length):
            raise broken(self._key, "it stopped within a message")
        found = bytes(self._held[:length])
        del self._held[:length]
        return found

    async def _hold(self, size: int) -> bool:
        while len(self._held) < size:
            data = await self._stream.read(_CHUNK)
            if not data:
                return False
            self._held += data
        return True


def _frame(number: int, message: bytes | None) -> bytes:
    length = _DROPPED if message is None else len(message)
    return _HEAD.pack(number, length) + (message or b"")


class Answering:
    """Answers messages by the handler. One peer, or all strangers, cannot take all the room.

    ``pace`` counts a message of a peer, and says for how many seconds to take no other.
    """

    def __init__(
        self,
        handler: Handler,
        knows: Callable[[str], bool],
        links: LinkTable,
        pace: Callable[[str], float],
    ) -> None:
        self._handler = handler
        self._knows = knows
        self._links = links
        self._pace = pace
        self._all = asyncio.Semaphore(_MAX_HANDLERS)
        self._strangers = asyncio.Semaphore(_MAX_HANDLERS_FOR_STRANGERS)
        self._peers: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def accept(self, link: Link, stream: ByteStream) -> None:
        """Answer what comes on a stream, many messages at a time, until it ends."""
        answering: set[asyncio.Task[None]] = set()
        with self._places_of(link.key) as places:
            try:
                await self._take_all(link, stream, places, answering)
            except asyncio.CancelledError:
                for task in answering:
                    task.cancel()
                raise
            finally:
                # What was asked is carried out also where nobody waits for the answer any more.
                await asyncio.gather(*answering, return_exceptions=True)

    async def _take_all(
        self,
        link: Link,
        stream: ByteStream,
        places: asyncio.Semaphore,
        answering: set[asyncio.Task[None]],
    ) -> None:
        key, frames, sending = link.key, _Frames(stream, link.key), asyncio.Lock()
        while (head := await frames.head()) is not None:
            number, length = head
            if length > (MAX_MESSAGE_BYTES if self._knows(key) else MAX_STRANGER_BYTES):
                raise broken(key, "it said too much")
            if (pause := self._pace(key)) > 0:
                await asyncio.sleep(pause)
            # Of its own places only: a peer that sends slowly holds up nobody else.
            await places.acquire()
            try:
                async with asyncio.timeout(_READ_TIMEOUT):
                    message = await frames.body(length)
            except BaseException:
                places.release()
                raise
            task = asyncio.create_task(self._answer(link, number, message, stream, sending))
            answering.add(task)
            task.add_done_callback(answering.discard)
            task.add_done_callback(lambda _task: places.release())

    async def _answer(
        self, link: Link, number: int, message: bytes, stream: ByteStream, sending: asyncio.Lock
    ) -> None:
        key, reply = link.key, None
        with self._links.using(link):
            async with self._room(key):
                try:
                    reply = await self._handler(key, message)
                    check_size(reply)
                except Exception:  # the handler's fault; it costs one request, not the connection
                    log.exception("request failed", peer=short(key))
                    reply = None
            try:
                async with asyncio.timeout(_WRITE_TIMEOUT), sending:
                    await stream.write(_frame(number, reply))
            except (GridcloudError, TimeoutError) as error:
                log.debug("no answer taken", peer=short(key), error=str(error))
                stream.close()  # it may hold half an answer

    @contextlib.asynccontextmanager
    async def _room(self, key: str) -> AsyncIterator[None]:
        if self._knows(key):
            async with self._all:
                yield
        else:
            async with self._strangers, self._all:
                yield

    @contextlib.contextmanager
    def _places_of(self, key: str) -> Iterator[asyncio.Semaphore]:
        own, users = self._peers.get(key, (asyncio.Semaphore(_MAX_HANDLERS_PER_PEER), 0))
        self._peers[key] = (own, users + 1)
        try:
            yield own
        finally:
            own, users = self._peers.pop(key)
            if users > 1:
                self._peers[key] = (own, users - 1)


class Channel:
    """Asks one peer over one stream of a link, opened with the first message."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._stream: ByteStream | None = None
        self._number = 0
        self._outbox: list[bytes] = []
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._sending: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        #: Whether it cannot be used any more.
        self.broken = False
        #: Whether an answer ever came.
        self.proved = False

    def ask(self, message: bytes) -> asyncio.Future[bytes]:
        """Send a message; what is returned brings the answer, `LinkDown` or `Unavailable`.

        Who waits no longer cancels it.
        """
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._number = (self._number + 1) % 2**32
        if len(self._waiting) >= _MAX_WAITING:
            self._break(broken(self._link.key, "it does not answer"))
            answer.set_exception(broken(self._link.key, "it does not answer"))
            return answer
        self._waiting[self._number] = answer
        self._outbox.append(_frame(self._number, message))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(), name="ask")
        return answer

    def close(self) -> None:
        """Give up what is under way. Idempotent."""
        self._break(LinkDown("the link was closed"))
        for task in (self._sending, self._reading):
            if task is not None:
                task.cancel()

    async def _send(self) -> None:
        try:
            while self._outbox and not self.broken:
                data = b"".join(self._outbox)
                self._outbox.clear()
                if self._stream is None:
                    self._stream = await open_on(self._link, SERVICE, data)
                    self._reading = asyncio.create_task(self._read(self._stream), name="answers")
                else:
                    await self._stream.write(data)
        except (LinkDown, Unavailable) as error:
            self._break(error)
        finally:
            self._sending = None
            if self.broken and self._stream is not None:
                self._stream.close()  # it may have been opened after all was given up

    async def _read(self, stream: ByteStream) -> None:
        key, frames = self._link.key, _Frames(stream, self._link.key)
        try:
            while (head := await frames.head()) is not None:
                number, length = head
                answer = self._waiting.get(number)
                if answer is None:
                    raise broken(key, "it answered what it was not asked")
                if MAX_MESSAGE_BYTES < length != _DROPPED:
                    raise broken(key, "it said too much")
                message = None if length == _DROPPED else await frames.body(length)
                self.proved = True
                del self._waiting[number]
                if answer.done():
                    continue
                if message is None:
                    answer.set_exception(broken(key, "it could not answer"))
                else:
                    answer.set_result(message)
            raise broken(key, "it ended the stream")
        except (LinkDown, Unavailable) as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        self.broken = True
        if self._stream is not None:
            self._stream.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)
        self._waiting.clear()


class Channels:
    """The channels of all links."""

    def __init__(self) -> None:
        self._channels: dict[Link, Channel] = {}

    async def exchange(self, link: Link, message: bytes, silence: float | None = None) -> bytes:
        """Send a message and return its reply.

        With ``silence``, that many seconds in which nothing arrives from the start show that the
        link is dead. Raises `LinkDown` if the link is no good (the message may have arrived or
        not), and `Unavailable` if the peer dropped this one message.
        """
        channel = self._of(link)
        again = channel.proved
        answer = channel.ask(message)
        try:
            if silence is not None:
                await _wait(link, answer, silence)
            return await answer
        except Unavailable as error:
            if not link.alive:
                raise LinkDown(error.message) from error
            if not (again and channel.broken):
                raise
        finally:
            answer.cancel()
        # The stream had served its time; the link may be as good as ever.
        answer = self._of(link).ask(message)
        try:
            return await answer
        finally:
            answer.cancel()

    def close(self) -> None:
        """Give up all that is under way."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _of(self, link: Link) -> Channel:
        channel = self._channels.get(link)
        if channel is None or channel.broken:
            for other in [other for other in self._channels if not other.alive]:
                self._channels.pop(other).close()
            channel = self._channels[link] = Channel(link)
        return channel


async def _wait(link: Link, answer: asyncio.Future[bytes], silence: float) -> None:
    before = link.received()
    await asyncio.wait([answer], timeout=silence / 2)
    if not answer.done() and link.received() == before:
        link.nudge()
        await asyncio.wait([answer], timeout=silence / 2)
        if not answer.done() and link.received() == before:
            raise LinkDown("it fell silent")
