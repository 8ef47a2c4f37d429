"""Joining a command in a container to descriptors of this site.

What comes from the engine is in frames of 8 bytes of head (stream, 3 zeros, length) and data, as
in https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator

from gridcloud.errors import Unavailable

_CHUNK_BYTES = 64 * 1024
_FRAME_LIMIT_BYTES = 16 * 1024 * 1024
_STDOUT, _STDERR = 1, 2


async def join(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    descriptors: tuple[int, int, int],
) -> None:
    """Carry input and output until the command has closed its output. Blocks nothing.

    The descriptors are stdin, stdout and stderr; they stay open here. One that nobody reads any
    more loses what is written to it, as with a broken pipe. Raises `Unavailable` for a connection
    that was cut, or whose frames make no sense.
    """
    feeding = asyncio.create_task(_feed(descriptors[0], writer))
    try:
        async with _Target(descriptors[1]) as out, _Target(descriptors[2]) as errors:
            targets = {_STDOUT: out, _STDERR: errors}
            while head := await _head(reader):
                length = int.from_bytes(head[4:], "big")
                if head[0] not in targets or length > _FRAME_LIMIT_BYTES:
                    raise Unavailable("The container engine sent a stream that makes no sense.")
                while length:
                    data = await reader.read(min(length, _CHUNK_BYTES))
                    if not data:
                        raise _cut()
                    length -= len(data)
                    await targets[head[0]].write(data)
    except OSError as error:
        raise _cut() from error
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        writer.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readexactly(8)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise _cut() from error
        return b""


def _cut() -> Unavailable:
    return Unavailable("The connection to the container engine was cut.")


async def _feed(descriptor: int, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # the command is gone, or reads no more
        async for data in _read(descriptor):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def _waits(descriptor: int) -> bool:
    """Whether the loop can wait for it: a file and /dev/null are always ready instead."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


async def _read(descriptor: int) -> AsyncIterator[bytes]:
    if not _waits(descriptor):
        while data := await asyncio.to_thread(os.read, descriptor, _CHUNK_BYTES):
            yield data
        return
    stream = asyncio.StreamReader(limit=_CHUNK_BYTES)
    # A copy: the transport closes what it is given.
    file = os.fdopen(os.dup(descriptor), "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), file
    )
    try:
        while data := await stream.read(_CHUNK_BYTES):
            yield data
    finally:
        transport.close()


class _Target(asyncio.BaseProtocol):
    """A descriptor that is written to, no faster than it is read."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._transport: asyncio.WriteTransport | None = None
        self._ready = asyncio.Event()
        self._ready.set()
        self._gone = asyncio.Event()
        self._waits = _waits(descriptor)

    async def __aenter__(self) -> _Target:
        if self._waits:
            file = os.fdopen(os.dup(self._descriptor), "wb", buffering=0)
            await asyncio.get_running_loop().connect_write_pipe(lambda: self, file)
        return self

    async def __aexit__(self, failed: object, *_: object) -> None:
        if self._transport is None:
            return
        closing = self._transport.is_closing()
        if not failed:
            if not closing:
                self._transport.close()
            await self._gone.wait()  # until all is written, or nobody reads any more
        elif not closing or self._transport.get_write_buffer_size():
            self._transport.abort()  # which would end one twice that is as good as closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def pause_writing(self) -> None:
        self._ready.clear()

    def resume_writing(self) -> None:
        self._ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._ready.set()
        self._gone.set()

    async def write(self, data: bytes) -> None:
        """Write, or drop what nobody reads any more."""
        if not self._waits:
            await asyncio.to_thread(os.write, self._descriptor, data)
        elif self._transport is not None:
            self._transport.write(data)
            await self._ready.wait()
