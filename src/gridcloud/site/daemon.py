"""A site as a process: one per state folder, an API on a unix socket, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn

from gridcloud.errors import Conflict, InvalidSpec, Unavailable
from gridcloud.settings import SiteSettings
from gridcloud.site.api import make_app
from gridcloud.site.site import Site

log = structlog.get_logger()


def serve(settings: SiteSettings, settings_file: Path, state: Path, *, ephemeral: bool) -> None:
    """Run the site until it is told to stop; blocks.

    With ``ephemeral`` it also stops when its standard input ends, and then cancels its jobs and
    takes back what it lent: nothing outlives the program that started it. Raises `Conflict` when
    another daemon serves the state folder.
    """
    prepare_folder(state)
    with _sole_owner(state / "lock"), contextlib.ExitStack() as sockets:
        listening = [sockets.enter_context(_unix_socket(state / "api.sock"))]
        token = None
        if settings.api.listen:
            listening.append(sockets.enter_context(_tcp_socket(settings.api.listen)))
            token = _token(settings.api.token_file or state / "api.token")
        asyncio.run(_serve(settings, settings_file, state, listening, token, ephemeral=ephemeral))


async def _serve(
    settings: SiteSettings,
    settings_file: Path,
    state: Path,
    listening: list[socket.socket],
    token: str | None,
    *,
    ephemeral: bool,
) -> None:
    site = Site(settings, settings_file, state)
    servers: list[_Server] = []

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    # A token guards TCP; on the unix socket the file system already says who may come in.
    for index, listener in enumerate(listening):
        app = make_app(site, stop, token if index else None)
        servers.append(_Server(_config(app), [listener]))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if ephemeral:
        loop.add_reader(sys.stdin.fileno(), _stop_at_end_of_input, loop, stop)
    await site.start()
    log.info("site is up", name=settings.name, pid=os.getpid())
    try:
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(server.run_until_told())
    finally:
        if ephemeral:
            await site.drain()
        await site.stop()
        log.info("site is down", name=settings.name)


def _config(app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # an ASGI application; uvicorn types it narrowly
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        http="h11",
        ws="none",
    )


class _Server(uvicorn.Server):
    """uvicorn on sockets that are open already, leaving signals to the site."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config)
        self._sockets = sockets

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until_told(self) -> None:
        await self.serve(self._sockets)


def _stop_at_end_of_input(loop: asyncio.AbstractEventLoop, stop: object) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        loop.remove_reader(sys.stdin.fileno())
        assert callable(stop)
        stop()


def prepare_folder(state: Path) -> None:
    """Make the state folder, for its owner alone. Raises `Unavailable` when that fails."""
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = state.stat()
        if owner.st_uid != os.getuid():
            raise Conflict(f"The state folder {state} belongs to another user.")
        if owner.st_mode & 0o077:
            state.chmod(0o700)
    except OSError as error:
        raise Unavailable(
            f"The state folder {state} cannot be used: {error.strerror}.",
            hint="Choose another with GRIDCLOUD_STATE.",
        ) from error


@contextlib.contextmanager
def _sole_owner(lock: Path) -> Iterator[None]:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise Conflict(
                f"Another gridcloud daemon (process {holder}) serves {lock.parent}.",
                hint="Use it, stop it with 'gridcloud site stop', or set GRIDCLOUD_STATE.",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    """Listen on ``path``. Whoever holds the lock may remove the socket a dead daemon left."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    umask = os.umask(0o177)
    try:
        # By way of the folder's descriptor, since a socket's path may have 107 bytes at most.
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.umask(umask)
        os.close(folder)
    try:
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _tcp_socket(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not host:
        raise InvalidSpec(f"api.listen: {address!r} is not an address.", hint="Write HOST:PORT.")
    try:
        listener = socket.create_server((host.strip("[]"), int(port)))
    except OSError as error:
        cause = "is in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
        raise Unavailable(f"The API address {address} {cause}.") from error
    with listener:
        yield listener


def _token(path: Path) -> str:
    """Return the token in ``path``, made at first use and readable by its owner alone."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    if path.stat().st_mode & 0o077:
        raise InvalidSpec(f"The token file {path} can be read by others.", hint="chmod 600 it.")
    token = path.read_text().strip()
    if len(token) < 16:
        raise InvalidSpec(f"The token in {path} is too short.", hint="Remove the file.")
    return token
