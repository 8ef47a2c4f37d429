"""The site's one SSH port: entrance to leased sandboxes, and jump host to leased machines.

A user name is a lease id. Who logs in holds a certificate by this site's user CA that names that
very lease, and the lease must live: at each authentication, at each new channel, and as long as
the connection stands. Commands are run by the guest's own sandbox; files are served confined to
its home; the only place to go on to is the lease's own machine.

Over 400 lines, so that who may enter and what then runs are read, and reviewed, together.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import asyncssh

from gridcloud.access.certificates import UserCA
from gridcloud.access.keys import load_or_create, public_line
from gridcloud.access.sftp_server import ConfinedSFTPServer
from gridcloud.errors import GridcloudError, Unavailable
from gridcloud.model.lease import PLACE_GONE_STATUS, Endpoint

LOGIN_SECONDS = 20
PENDING_LOGINS_LIMIT = 64
CONNECTIONS_PER_LEASE_LIMIT = 8
SESSIONS_PER_CONNECTION_LIMIT = 32
# Each session may hold two windows of input nobody reads, so it is smaller than a client's.
_WINDOW_BYTES = 8 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
# A lease may be renewed or given back early, and clocks are set: how long that goes unnoticed
# when nobody calls `Gateway.cut`.
_LOOK_AGAIN_SECONDS = 30.0
_LEASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Only what changes how text is shown, and our own: the environment may pass through a program
# outside the sandbox, which must not meet an LD_PRELOAD.
_ENV_NAME = re.compile(r"LANG|LC_[A-Z]+|TZ|TERM|GRIDCLOUD_[A-Z0-9_]+")
_REFUSED = 255


class Guest(Protocol):
    """What a lease gives its holder here."""

    @property
    def ends_at(self) -> datetime | None:
        """When the lease ends; may be moved while connections stand."""
        ...

    @property
    def home(self) -> Path | None:
        """The sandbox's home on this host, served over SFTP; None: no files are served."""
        ...

    @property
    def shown_as(self) -> str:
        """The absolute path that the home has inside the sandbox."""
        ...

    @property
    def machine(self) -> tuple[str, int] | None:
        """Host and port of the leased machine behind the gateway, if there is one."""
        ...

    async def run(
        self,
        command: str,
        stdin_fd: int,
        stdout_fd: int,
        stderr_fd: int,
        env: Mapping[str, str],
    ) -> int:
        """Run a command line by ``/bin/sh -c`` in the sandbox; return its exit status.

        A negative number is the signal that ended it. The three descriptors are ends of pipes
        that become the command's own: run only passes them on; the gateway closes them.
        Being cancelled it ends the command. May raise `GridcloudError`, whose text is shown.
        """
        ...


class Guests(Protocol):
    """The leases that live now."""

    def find(self, lease_id: str) -> Guest | None:
        """Return the guest of a live lease. Quick: it is asked at every channel."""
        ...


class Gateway:
    """An SSH server for the holders of leases."""

    def __init__(
        self,
        host_key: Path | asyncssh.SSHKey,
        user_ca: UserCA,
        guests: Guests,
        *,
        host: str = "",
        port: int = 0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._host_key = load_or_create(host_key) if isinstance(host_key, Path) else host_key
        self.host_key_line = public_line(self._host_key)
        self.user_ca = user_ca
        self.port = port
        self.pending = 0
        self.standing: set[_Connection] = set()
        self._host = host
        self._guests = guests
        self._now = now
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """Listen; return the port. Raises `Unavailable` when the address cannot be had."""
        try:
            self._acceptor = await asyncssh.create_server(
                lambda: _Connection(self),
                self._host,
                self.port,
                **self._options(),
            )
        except OSError as error:
            raise Unavailable(
                f"The gateway cannot listen on {self._host or '*'}:{self.port}: {error.strerror}.",
                hint="Choose another address in the settings, under [gateway].",
            ) from error
        self.port = self._acceptor.get_port()
        return self.port

    async def serve(self, link: socket.socket, admits: Callable[[str], bool]) -> None:
        """Serve one client over a connected socket, which is taken over, until it is gone.

        It may log in to leases that ``admits`` says, of those that live. Such clients are not
        counted among the pending ones: the caller knows them, and bounds how many there are.
        """
        if self._acceptor is None:
            link.close()
            return
        try:
            connection = await asyncssh.run_server(
                link,
                server_factory=lambda: _Connection(self, admits),
                **self._options(),
            )
        except BaseException as error:  # whatever it was: it may not have been taken over yet
            link.close()
            if isinstance(error, OSError | asyncssh.Error):
                return
            raise
        try:
            await connection.wait_closed()
        finally:
            connection.abort()

    async def close(self) -> None:
        """Stop listening, cut all connections and wait for what ran over them. Idempotent."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is None:
            return
        acceptor.close()
        await self._end(list(self.standing))
        if self._tasks:
            await asyncio.wait(self._tasks)
        await acceptor.wait_closed()

    async def cut(self, lease_id: str) -> None:
        """End a lease's connections now, and wait until what ran over them is ended. Idempotent.

        Take the lease out of ``guests`` first, or its holder may come right back.
        """
        await self._end([one for one in self.standing if one.lease_id == lease_id])

    def endpoint(self, lease_id: str, host: str) -> Endpoint:
        """Return how the holder of a lease reaches it, given this site's public host name."""
        return Endpoint(host=host, port=self.port, user=lease_id, host_keys=(self.host_key_line,))

    def live(self, lease_id: str) -> Guest | None:
        """Return the guest of a lease that lives and has not reached its end."""
        guest = self._guests.find(lease_id) if _LEASE_ID.fullmatch(lease_id) else None
        return None if guest is None or self.seconds_left(guest) <= 0 else guest

    def seconds_left(self, guest: Guest) -> float:
        """Return how long a lease has to go, or infinity."""
        if guest.ends_at is None:
            return float("inf")
        return (guest.ends_at - self._now()).total_seconds()

    def keep(self, task: asyncio.Task[None]) -> None:
        """Hold on to a task until it ends, so that `close` can wait for it."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _options(self) -> dict[str, Any]:
        return {
            "server_host_keys": [self._host_key],
            "server_version": "gridcloud",
            "config": None,
            "encoding": None,
            "login_timeout": LOGIN_SECONDS,
            "keepalive_interval": 15,
            "keepalive_count_max": 3,
            "window": _WINDOW_BYTES,
            "compression_algs": ["none"],
            "password_auth": False,
            "kbdint_auth": False,
            "host_based_auth": False,
            "gss_kex": False,
            "gss_auth": False,
            "allow_pty": False,
            "line_editor": False,
            "agent_forwarding": False,
            "x11_forwarding": False,
            "allow_scp": False,
        }

    async def _end(self, connections: list[_Connection]) -> None:
        tasks = [task for connection in connections for task in connection.tasks]
        for connection in connections:
            connection.cut()
        if tasks:
            await asyncio.wait(tasks)


class _Connection(asyncssh.SSHServer):
    """One client: pending until authenticated, then bound to one lease."""

    def __init__(self, gateway: Gateway, admits: Callable[[str], bool] | None = None) -> None:
        self.gateway = gateway
        self._admits = admits
        self._connection: asyncssh.SSHServerConnection | None = None
        self._pending = False
        self._timer: asyncio.TimerHandle | None = None
        self.lease_id = ""
        self.sessions = 0
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self.gateway.standing.add(self)
        if self._admits is not None:
            return
        if self.gateway.pending >= PENDING_LOGINS_LIMIT:
            conn.abort()
            return
        self.gateway.pending += 1
        self._pending = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_longer_pending()
        if self._timer is not None:
            self._timer.cancel()
        self.gateway.standing.discard(self)
        self._connection = None

    def begin_auth(self, username: str) -> bool:
        # The line demands the principal, where asyncssh by itself would take a certificate that
        # names nobody for one that is good for everybody. An unknown lease is not told apart.
        admitted = self._admits is None or self._admits(username)
        if admitted and self._connection is not None and self.gateway.live(username) is not None:
            line = self.gateway.user_ca.trusted_line(username)
            self._connection.set_authorized_keys(asyncssh.import_authorized_keys(line))
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def auth_completed(self) -> None:
        assert self._connection is not None
        self._no_longer_pending()
        self.lease_id = self._connection.get_extra_info("username")
        fellows = sum(one.lease_id == self.lease_id for one in self.gateway.standing)
        if fellows > CONNECTIONS_PER_LEASE_LIMIT:
            self._disconnect(
                asyncssh.DISC_TOO_MANY_CONNECTIONS, "The lease has too many connections."
            )
            return
        self._watch()

    def session_requested(self) -> _Session:
        self._live_guest()
        if self.sessions >= SESSIONS_PER_CONNECTION_LIMIT:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE, "Too many sessions on one connection"
            )
        return _Session(self)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool:
        if self._live_guest().machine != (dest_host, dest_port):
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED,
                "The lease has no such machine behind this gateway",
            )
        return True

    def guest(self) -> Guest | None:
        """Return what the lease gives, None once it has ended."""
        return self.gateway.live(self.lease_id)

    def cut(self) -> None:
        """End the connection and everything that runs over it."""
        self._disconnect(asyncssh.DISC_BY_APPLICATION, "The lease has ended.")
        for task in self.tasks:
            task.cancel()

    def _live_guest(self) -> Guest:
        guest = self.guest()
        if guest is None:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, "The lease has ended"
            )
        return guest

    def _watch(self) -> None:
        guest = self.guest()
        if guest is None:
            self.cut()
            return
        delay = min(self.gateway.seconds_left(guest), _LOOK_AGAIN_SECONDS)
        self._timer = asyncio.get_running_loop().call_later(delay, self._watch)

    def _disconnect(self, code: int, reason: str) -> None:
        if self._connection is not None:
            self._connection.disconnect(code, reason)

    def _no_longer_pending(self) -> None:
        if self._pending:
            self._pending = False
            self.gateway.pending -= 1


class _Session(asyncssh.SSHServerProcess[bytes]):
    """One channel: a command, a shell, or SFTP."""

    def __init__(self, connection: _Connection) -> None:
        super().__init__(self._start, self._sftp, 3, False)
        self._connection = connection
        self._lost = asyncio.Event()
        self._server: ConfinedSFTPServer | None = None
        connection.sessions += 1

    def subsystem_requested(self, subsystem: str) -> bool:
        """Only SFTP, and only where there are files."""
        guest = self._connection.guest()
        if subsystem != "sftp" or guest is None or guest.home is None:
            return False
        drained = asyncssh.SSHWriter(self, self._chan).drain
        try:
            self._server = ConfinedSFTPServer(self._chan, guest.home, guest.shown_as, drained)
        except (OSError, GridcloudError) as error:
            self.logger.warning("SFTP cannot be served: %s", error)
            return False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The channel is gone."""
        super().connection_lost(exc)
        self._connection.sessions -= 1
        self._lost.set()
        if self._server is not None:
            self._server.exit()

    def _sftp(self, _channel: object) -> ConfinedSFTPServer:
        assert self._server is not None
        return self._server

    def _start(self, _process: asyncssh.SSHServerProcess[bytes]) -> None:
        # A task of ours, not of the connection: it is waited for when the lease is cut.
        task = asyncio.get_running_loop().create_task(self._serve())
        self._connection.tasks.add(task)
        task.add_done_callback(self._connection.tasks.discard)
        self._connection.gateway.keep(task)

    async def _serve(self) -> None:
        guest = self._connection.guest()
        if guest is None:
            self._refuse("The lease has ended.", PLACE_GONE_STATUS)
            return
        command = self.command if self.command is not None else "exec /bin/sh"
        if "\0" in command:
            self._refuse("A command cannot hold a NUL character.")
            return
        try:
            status = await self._run(guest, command)
        except GridcloudError as error:
            self._refuse(str(error), _REFUSED if error.retryable else PLACE_GONE_STATUS)
        except OSError as error:
            self._refuse(f"The command could not be started: {error.strerror}.")
        else:
            self._exit(status)

    async def _run(self, guest: Guest, command: str) -> int:
        """Run a command joined to the channel until it ended and its output is through."""
        env = {name: value for name, value in self.env.items() if _ENV_NAME.fullmatch(name)}
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            stdin_fd, sink = await _pipe_in(ours, theirs)
            stdout_fd, output = await _pipe_out(ours, theirs)
            stderr_fd, errors = await _pipe_out(ours, theirs)
            lost = asyncio.create_task(self._lost.wait())
            run = asyncio.create_task(guest.run(command, stdin_fd, stdout_fd, stderr_fd, env))
            carried = asyncio.gather(_carry(output, self.stdout), _carry(errors, self.stderr))
            parts = (lost, run, carried, asyncio.create_task(_feed(self.stdin, sink)))
            try:
                await asyncio.wait((run, lost), return_when=asyncio.FIRST_COMPLETED)
                theirs.close()
                if run.done():
                    # As sshd does: what it left behind may still be writing.
                    await asyncio.wait((carried, lost), return_when=asyncio.FIRST_COMPLETED)
                    return run.result()
                return _REFUSED
            finally:
                for part in parts:
                    part.cancel()
                await asyncio.gather(*parts, return_exceptions=True)

    def _exit(self, status: int) -> None:
        if self._lost.is_set():
            return
        try:
            name = signal.Signals(-status).name if status < 0 else ""
        except ValueError:
            name, status = "", 128 - status
        if name:
            self.exit_with_signal(name.removeprefix("SIG"))
        else:
            self.exit(status)

    def _refuse(self, reason: str, status: int = _REFUSED) -> None:
        if not self._lost.is_set():
            self.stderr.write(f"gridcloud: {reason}\n".encode())
            self.exit(status)


class _Sink(asyncio.BaseProtocol):
    """The end of a pipe that is written to, no faster than it is read."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self._ready = asyncio.Event()
        self._ready.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport

    def pause_writing(self) -> None:
        self._ready.clear()

    def resume_writing(self) -> None:
        self._ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._ready.set()

    async def write(self, data: bytes) -> None:
        """Write, or drop what nobody reads any more."""
        if self.transport is not None:
            self.transport.write(data)
            await self._ready.wait()

    def end(self) -> None:
        """Close once everything is written."""
        if self.transport is not None:
            self.transport.close()

    def drop(self) -> None:
        """Close now, whatever is still to be written."""
        # abort() after a close that has nothing left to write would end the transport twice.
        transport = self.transport
        if transport is not None and (
            not transport.is_closing() or transport.get_write_buffer_size()
        ):
            transport.abort()


async def _pipe_in(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[int, _Sink]:
    """Return a descriptor to be read by a command, and what writes to it."""
    reading, writing = os.pipe()
    theirs.callback(os.close, reading)
    file = ours.enter_context(os.fdopen(writing, "wb", buffering=0))
    _, sink = await asyncio.get_running_loop().connect_write_pipe(_Sink, file)
    ours.callback(sink.drop)
    return reading, sink


async def _pipe_out(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[int, asyncio.StreamReader]:
    """Return a descriptor to be written by a command, and what reads from it."""
    reading, writing = os.pipe()
    theirs.callback(os.close, writing)
    file = ours.enter_context(os.fdopen(reading, "rb", buffering=0))
    reader = asyncio.StreamReader(limit=_CHUNK_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), file
    )
    ours.callback(transport.close)
    return writing, reader


async def _feed(source: asyncssh.SSHReader[bytes], sink: _Sink) -> None:
    while True:
        try:
            data = await source.read(_CHUNK_BYTES)
        except (asyncssh.SignalReceived, asyncssh.BreakReceived, asyncssh.TerminalSizeChanged):
            continue  # none of them means anything to a command without a terminal
        except (OSError, asyncssh.Error):
            return
        if not data:
            sink.end()
            return
        await sink.write(data)


async def _carry(source: asyncio.StreamReader, target: asyncssh.SSHWriter[bytes]) -> None:
    with contextlib.suppress(OSError, asyncssh.Error):
        while data := await source.read(_CHUNK_BYTES):
            target.write(data)
            await target.drain()
