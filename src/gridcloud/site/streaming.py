"""Joins a stream of the overlay to a socket, for programs that speak over sockets."""

from __future__ import annotations

import asyncio
import socket

from gridcloud.errors import GridcloudError
from gridcloud.grid.transport import ByteStream

#: How long one direction goes on once the other has ended: whoever keeps a connection half open
#: for ever would otherwise hold what carries it.
LINGER_SECONDS = 10.0
_CHUNK_BYTES = 64 * 1024


async def splice(
    stream: ByteStream, link: socket.socket, *, linger_seconds: float = LINGER_SECONDS
) -> None:
    """Carry bytes both ways between a stream and a connected socket until both directions ended.

    Takes over both and closes them. Who reads slowly slows down who writes: at most some chunks
    are held here. The end of a direction is passed on alone, and the other one then has
    ``linger_seconds``. When one side breaks, the other is broken as well. Cancelling breaks both.
    """
    try:
        reader, writer = await asyncio.open_connection(sock=link)
    except BaseException:
        link.close()
        stream.close()
        raise
    outward = asyncio.create_task(_outward(reader, stream))
    inward = asyncio.create_task(_inward(stream, writer))
    whole = False
    try:
        done, left = await asyncio.wait((outward, inward), return_when=asyncio.FIRST_COMPLETED)
        if all(task.result() for task in done):
            done, left = await asyncio.wait(left or done, timeout=linger_seconds)
            whole = not left and all(task.result() for task in done)
    finally:
        for task in (outward, inward):
            task.cancel()
        await asyncio.gather(outward, inward, return_exceptions=True)
        stream.close()
        if whole:
            writer.close()  # what is still to be sent is sent
        else:
            writer.transport.abort()


async def _outward(reader: asyncio.StreamReader, stream: ByteStream) -> bool:
    """Carry from the socket to the stream; return whether that went to its end."""
    try:
        while data := await reader.read(_CHUNK_BYTES):
            await stream.write(data)
        await stream.write_eof()
    except (OSError, GridcloudError):
        return False
    return True


async def _inward(stream: ByteStream, writer: asyncio.StreamWriter) -> bool:
    """Carry from the stream to the socket; return whether that went to its end."""
    try:
        while data := await stream.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except (OSError, GridcloudError):
        return False
    return True
