"""One SSH connection to a machine, shared by everything that talks to it and renewed when lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncssh

from gridcloud.access.connect import WINDOW_BYTES
from gridcloud.errors import Unavailable

_BROKEN = (asyncssh.ConnectionLost, asyncssh.ChannelOpenError, ConnectionError, BrokenPipeError)


class SSHSession:
    """A lazily made connection. ``dial`` makes a new one, raising `GridcloudError` if it cannot."""

    def __init__(self, dial: Callable[[], Awaitable[asyncssh.SSHClientConnection]]) -> None:
        self._dial = dial
        self._connection: asyncssh.SSHClientConnection | None = None
        self._dialling = asyncio.Lock()

    async def connection(self) -> asyncssh.SSHClientConnection:
        """Return the live connection, dialling if there is none."""
        async with self._dialling:
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._dial()
            return self._connection

    async def start(self, command: str) -> asyncssh.SSHClientProcess[bytes]:
        """Start a command with binary streams. Raises `Unavailable` when the connection broke."""
        connection = await self.connection()
        try:
            return await connection.create_process(command, encoding=None, window=WINDOW_BYTES)
        except _BROKEN as error:
            await self.close()
            raise Unavailable(f"The SSH connection broke: {error}.") from error

    @contextlib.asynccontextmanager
    async def sftp(self) -> AsyncIterator[asyncssh.SFTPClient]:
        """Open an SFTP client on the connection. Raises `Unavailable` when that is not offered."""
        connection = await self.connection()
        try:
            client = await connection.start_sftp_client(path_errors="surrogateescape")
        except (*_BROKEN, asyncssh.SFTPError) as error:
            raise Unavailable(
                f"The machine serves no SFTP: {error}.", hint="Enable sshd's sftp subsystem."
            ) from error
        async with client:
            yield client

    async def close(self) -> None:
        """Close the connection; the next use dials again. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
            await connection.wait_closed()
