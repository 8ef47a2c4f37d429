"""SSH connections to one machine, shared by everything that talks to it and renewed when lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import asyncssh

from gridcloud.access.connect import WINDOW_BYTES
from gridcloud.errors import GridcloudError, Unavailable

T = TypeVar("T")
#: Commands and file transfers at once on one connection: sshd's MaxSessions is 10 unless changed.
CHANNELS_EACH = 8
_GONE = (asyncssh.DisconnectError, asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection)


@dataclass(eq=False)
class _Link:
    """A connection, how many channels of it are in use, and how many its server may allow."""

    connection: asyncssh.SSHClientConnection
    channels: int = 0
    most: int = CHANNELS_EACH


class SSHSession:
    """Lazily made connections to a machine: one, and more while many things go on there.

    ``dial`` makes a new one, raising `GridcloudError` if it cannot.
    """

    def __init__(self, dial: Callable[[], Awaitable[asyncssh.SSHClientConnection]]) -> None:
        self._dial = dial
        self._links: list[_Link] = []
        self._dialling = asyncio.Lock()
        self._sftp: tuple[_Link, asyncssh.SFTPClient] | None = None
        self._sftp_users = 0
        self._sftp_opening = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def process(self, command: str) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
        """Run a command with binary streams; leaving the context closes its channel.

        Raises `Unavailable` when the machine cannot be reached or allows no more sessions.
        """
        link, process = await self._open(
            lambda connection: connection.create_process(
                command, encoding=None, window=WINDOW_BYTES
            )
        )
        try:
            yield process
        finally:
            process.close()
            self._give_up(link)

    @contextlib.asynccontextmanager
    async def sftp(self) -> AsyncIterator[asyncssh.SFTPClient]:
        """Give an SFTP client, one for all who want one at a time.

        Raises `Unavailable` when the machine serves no SFTP, or stops to.
        """
        async with self._sftp_opening:
            if self._sftp is None or self._sftp[0].connection.is_closed():
                self._sftp, self._sftp_users = await self._start_sftp(), 0
            mine = self._sftp
            self._sftp_users += 1
        try:
            yield mine[1]
        except (*_GONE, ConnectionError) as error:
            if self._sftp is mine:
                self._drop_sftp()
            raise Unavailable(f"Copying by SFTP broke off: {error}.") from error
        finally:
            if self._sftp is mine:
                self._sftp_users -= 1
                if self._sftp_users == 0:
                    self._drop_sftp()

    async def close(self) -> None:
        """Close the connections; the next use dials again. Idempotent."""
        links, self._links, self._sftp = self._links, [], None
        for link in links:
            link.connection.abort()
        for link in links:
            await link.connection.wait_closed()

    async def _start_sftp(self) -> tuple[_Link, asyncssh.SFTPClient]:
        try:
            # The channel takes the window size that the connection was made with.
            return await self._open(
                lambda connection: connection.start_sftp_client(path_errors="surrogateescape")
            )
        except Unavailable as error:
            raise Unavailable(
                f"Files cannot be copied by SFTP. {error.message}",
                hint="If commands can be run there, enable sshd's sftp subsystem.",
            ) from error

    def _drop_sftp(self) -> None:
        if self._sftp is not None:
            (link, client), self._sftp = self._sftp, None
            client.exit()
            self._give_up(link)

    async def _open(
        self, make: Callable[[asyncssh.SSHClientConnection], Awaitable[T]]
    ) -> tuple[_Link, T]:
        """Open a channel on a connection with room for it."""
        while True:
            link = await self._link()
            try:
                return link, await make(link.connection)
            except asyncssh.ChannelOpenError as error:
                self._give_up(link)
                if link.channels == 0 or link.connection.is_closed():
                    raise _broken(error) from error
                link.most = link.channels  # this server allows fewer than most do
            except (asyncssh.Error, OSError) as error:
                self._give_up(link)
                raise _broken(error) from error
            except BaseException:
                self._give_up(link)
                raise

    async def _link(self) -> _Link:
        async with self._dialling:
            self._links = [link for link in self._links if not link.connection.is_closed()]
            for link in self._links:
                if link.channels < link.most:
                    break
            else:
                link = _Link(await self._dial())
                self._links.append(link)
            link.channels += 1
            return link

    def _give_up(self, link: _Link) -> None:
        link.channels -= 1
        spare = link in self._links[1:]
        if link.channels == 0 and spare:
            self._links.remove(link)  # at once: while it closes nobody may choose it
            link.connection.close()


def _broken(error: Exception) -> GridcloudError:
    return Unavailable(
        f"The SSH connection broke: {error or type(error).__name__}.",
        hint="It is made anew at the next try.",
    )
