"""What joins streams to sockets: nothing is lost, piled up, or left open."""

import asyncio
import os
import socket

import pytest

from gridcloud.errors import Unavailable
from gridcloud.site.streaming import splice
from testbeds.byte_streams import stream_pair

MUCH = 20 * 2**20


class Joined:
    """A stream whose one end is spliced to a socket: ``far`` and ``link`` are the outer ends."""

    def __init__(self, **options):
        self.far, self._near = stream_pair()
        ours, self._theirs = socket.socketpair()
        self.task = asyncio.create_task(splice(self._near, ours, **options))

    async def open(self):
        self.link, self.out = await asyncio.open_connection(sock=self._theirs)
        return self

    async def ended(self):
        await asyncio.wait_for(self.task, 20)
        assert self._near.closed


@pytest.fixture
async def join():
    """Return a function that makes joined pairs."""
    made = []

    async def make(**options):
        made.append(await Joined(**options).open())
        return made[-1]

    yield make
    for one in made:
        one.task.cancel()
        one.out.close()
        await asyncio.gather(one.task, return_exceptions=True)


async def drain(stream):
    """Return all that comes until the end."""
    parts = []
    while data := await stream.read(2**16):
        parts.append(data)
    return b"".join(parts)


async def at_rest(counter):
    """Return what a counter says once it no longer moves."""
    seen, turns = counter(), 0
    while turns < 300:
        await asyncio.sleep(0)
        turns = turns + 1 if counter() == seen else 0
        seen = counter()
    return seen


async def test_bytes_pass_both_ways_at_once(join):
    """All of them, unharmed, and both ends are told when that was all."""
    pair = await join()
    there, back = os.urandom(3 * 2**20), os.urandom(2**20)

    async def send_back():
        await pair.far.write(back)
        await pair.far.write_eof()

    pair.out.write(there)
    pair.out.write_eof()
    _, sent, got = await asyncio.gather(send_back(), drain(pair.far), pair.link.read())
    assert (sent, got) == (there, back)
    await pair.ended()


async def test_one_direction_ends_alone(join):
    """After the end of what is asked, the answer still comes; in either direction."""
    pair = await join()
    pair.out.write(b"question")
    pair.out.write_eof()
    assert await drain(pair.far) == b"question"
    await pair.far.write(b"answer")
    await pair.far.write_eof()
    assert await pair.link.read() == b"answer"
    await pair.ended()
    pair = await join()
    await pair.far.write(b"question")
    await pair.far.write_eof()
    assert await pair.link.read() == b"question"
    pair.out.write(b"answer")
    pair.out.write_eof()
    assert await drain(pair.far) == b"answer"
    await pair.ended()


async def test_who_does_not_read_the_socket_holds_the_stream_back(join):
    """Little is held in between, and nothing is lost of it."""
    pair = await join()
    data = os.urandom(MUCH)
    writing = asyncio.create_task(pair.far.write(data))
    assert 0 < await at_rest(lambda: pair.far.written) < 2 * 2**20
    await asyncio.gather(writing, reader := asyncio.create_task(pair.link.readexactly(MUCH)))
    assert reader.result() == data


async def test_who_does_not_read_the_stream_holds_the_socket_back(join):
    """The other way round."""
    pair = await join()
    data = os.urandom(MUCH)
    pair.out.write(data)
    held = pair.out.transport.get_write_buffer_size
    assert await at_rest(held) > MUCH - 2 * 2**20
    pair.out.write_eof()
    assert await drain(pair.far) == data


async def test_a_broken_stream_breaks_the_socket(join):
    """Who uses the socket is not left waiting."""
    pair = await join()
    pair.far.close()
    await pair.ended()
    assert await pair.link.read() == b""


async def test_a_socket_that_breaks_breaks_the_stream(join):
    """A part is never taken for the whole: the other end sees a broken stream, not an end."""
    pair = await join()
    writing = asyncio.create_task(pair.far.write(bytes(MUCH)))
    await at_rest(lambda: pair.far.written)
    pair.out.transport.abort()
    for broken in (writing, drain(pair.far)):
        with pytest.raises(Unavailable):
            await broken
    await pair.ended()


async def test_half_open_does_not_last(join):
    """Who never ends its own direction does not hold the stream for ever."""
    pair = await join(linger_seconds=0.05)
    pair.out.write_eof()
    assert await drain(pair.far) == b""
    await pair.ended()
    with pytest.raises(Unavailable):
        await pair.far.write(b"still here")


async def test_cancelled_both_break(join):
    """A site that stops leaves nobody waiting."""
    pair = await join()
    await pair.far.write(b"x")
    assert await pair.link.read(1) == b"x"
    pair.task.cancel()
    await asyncio.gather(pair.task, return_exceptions=True)
    assert await pair.link.read() == b""
    with pytest.raises(Unavailable):
        await pair.far.read(1)
