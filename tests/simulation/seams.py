"""Puts simulated things where a site meets the world: clock, chance, disk, keys, network, hosts.

Everything between these seams is the real thing: `gridcloud.site.site.Site` with its scheduler,
drivers, lending, membership, broker and stores. The seams are module attributes and methods,
replaced while a simulation runs and put back after it; a simulation has its process to itself.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import pkgutil
import random
import secrets
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Protocol, TypeVar
from unittest.mock import patch

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.pool import StaticPool

import gridcloud
from gridcloud.grid.identity import Identity
from gridcloud.grid.transport import Handler, PeerAddress, Transport
from gridcloud.store.schema import metadata
from simulation.crashing import PROCESS, Process
from simulation.hosts import HostProvider
from simulation.places import SimulatedPlaces, Ways
from simulation.virtual_time import EPOCH

T = TypeVar("T")
_COMMIT_TAKES, _ANSWER_TAKES = 0.003, 0.002
#: Rooms that a simulated site is made of; the rest of the package is never run here.
_ROOMS = ("grid", "site", "orchestration", "store", "model")
_CERTIFICATE = "ssh-ed25519-cert-v01@openssh.com AAAA"
PUBLIC_KEY = (
    Ed25519PrivateKey.from_private_bytes(bytes(32))
    .public_key()
    .public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    .decode()
)
#: The site ``sN`` is reached, where it lends, at this port and N.
FIRST_PORT = 20000
_EPOCH_SECONDS = EPOCH.timestamp()


class Guests(Protocol):
    """Who may enter by a gateway."""

    def find(self, lease_id: str) -> object | None:
        """Return the guest of a live loan."""
        ...


class Scene(Ways, Protocol):
    """What the seams need of a world."""

    chance: random.Random

    def identity(self, site: str) -> Identity:
        """Return a site's key."""
        ...

    def attach(self, identity: Identity) -> Transport:
        """Return the end of the network that belongs to the running process."""
        ...

    def disk(self, folder: str) -> Engine:
        """Return the database on a site's disk."""
        ...

    def opened(self, port: int, guests: Guests) -> None:
        """Take note of who may enter by a gateway that was opened."""
        ...

    def fault(self, what: str) -> None:
        """Take note of something that must never happen."""
        ...


def off() -> float:
    """Return by how many seconds the clock of the running process is off."""
    process = PROCESS.get()
    return process.clock_off if process else 0.0


def wall_clock() -> datetime:
    """Return the time as the running process sees it."""
    return EPOCH + timedelta(seconds=asyncio.get_running_loop().time() + off())


class _AnyDatetime(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, datetime)


class VirtualDatetime(datetime, metaclass=_AnyDatetime):
    """Stands for `datetime` in the modules of the package: knows what time it is in there."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        """Return the virtual time."""
        return wall_clock().astimezone(tz)


def _virtual_time() -> types.ModuleType:
    module = types.ModuleType("time")
    module.time = lambda: _EPOCH_SECONDS + asyncio.get_running_loop().time() + off()  # type: ignore[attr-defined]
    module.monotonic = lambda: asyncio.get_running_loop().time()  # type: ignore[attr-defined]
    module.perf_counter = module.monotonic  # type: ignore[attr-defined]
    return module


class SimulatedDatabase:
    """A site's store on its simulated disk: the real tables, no thread. A write takes a moment
    before it is kept, and another before its caller knows."""

    scene: Scene

    def __init__(self, path: Path) -> None:
        self._engine = self.scene.disk(path.parent.name)
        self._changes = -1
        self._read: dict[object, Any] = {}

    async def open(self) -> None:
        """The tables are there."""

    async def close(self) -> None:
        """Nothing is open."""

    async def run(self, work: Callable[[Connection], T]) -> T:
        """See `gridcloud.store.database.Database`."""
        await asyncio.sleep(_COMMIT_TAKES)
        value = self._done(work)
        await asyncio.sleep(_ANSWER_TAKES)
        return value

    def _done(self, work: Callable[[Connection], T]) -> T:
        """Do it, or return a copy of what it returned before, if nothing was written since.

        Most work only reads, and building its SQL costs more than all the rest of a simulation.
        """
        cells = tuple(cell.cell_contents for cell in work.__closure__ or ())
        what = (work.__code__, cells)
        try:
            if what in self._read:
                return copy.copy(self._read[what])  # type: ignore[no-any-return]
        except TypeError:  # it closes over a list or such
            what = None
        with self._engine.begin() as connection:
            value = work(connection)
            changes = connection.connection.driver_connection.total_changes  # type: ignore[union-attr]
        if changes != self._changes:
            self._changes = changes
            self._read.clear()
        elif what is not None:
            self._read[what] = copy.copy(value)
        return value


_BLANK_DISKS: list[Engine] = []


def blank_disk() -> Engine:
    """Return an empty database in memory; give it back by `wipe`."""
    if _BLANK_DISKS:
        return _BLANK_DISKS.pop()
    engine = create_engine(
        "sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    metadata.create_all(engine)
    return engine


def wipe(engine: Engine) -> None:
    """Empty a database, for the next simulation: making one takes long."""
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
        counted = text("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_sequence'")
        if connection.execute(counted).scalar():
            connection.execute(text("DELETE FROM sqlite_sequence"))
    _BLANK_DISKS.append(engine)


class SimulatedKeyring:
    """The secrets of a site. What is signed for SSH is never used here, and so only stands in."""

    scene: Scene
    gateway_host_key = PUBLIC_KEY

    def __init__(self, folder: Path) -> None:
        self.identity = self.scene.identity(folder.parent.name)
        self.user_ca = self

    @classmethod
    def of(cls, identity: Identity) -> SimulatedKeyring:
        """Return the secrets of a site known by its key."""
        keyring = cls.__new__(cls)
        keyring.identity, keyring.user_ca = identity, keyring
        return keyring

    def issue(self, *_: object, **__: object) -> str:
        """Stands for a signed certificate."""
        return _CERTIFICATE

    def machine_certificate(self, lease_id: str, public_key_line: str) -> str:
        """Nobody logs in to machines here."""
        return _CERTIFICATE

    def trusted_line(self) -> str:
        """Stands for the authority's line."""
        return PUBLIC_KEY

    def new_loan_key(self, lease_id: str) -> str:
        """Stands for a fresh key's public line."""
        return PUBLIC_KEY

    def put_certificate(self, lease_id: str, certificate: str) -> None:
        """Nobody logs in with it."""

    def forget_loan(self, lease_id: str) -> None:
        """Nothing was kept."""


class SimulatedPorts:
    """Each site has ports of its own."""

    def choose(self, purpose: str, host: str, port: int, kind: object) -> int:
        """Return the port told, or the one that is the site's."""
        process = PROCESS.get()
        assert process
        return port or FIRST_PORT + int(process.site[1:])


class SimulatedGateway:
    """The place of the SSH gateway: whoever comes is let in by the site's own guest list."""

    scene: Scene

    def __init__(self, _host_key: object, _user_ca: object, guests: Guests, **where: Any) -> None:
        self.guests = guests
        self._port: int = where["port"]

    async def start(self) -> int:
        """Open; return the port."""
        self.scene.opened(self._port, self.guests)
        return self._port

    async def close(self) -> None:
        """Whoever is inside notices at its next look."""

    async def cut(self, lease_id: str) -> None:
        """Likewise."""


class Attached:
    """A process's end of the network: what it answers, it answers as itself."""

    def __init__(self, transport: Any, process: Process | None, count: Callable[..., None]) -> None:
        self._transport = transport
        self._process = process
        self._count = count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def settle(self, neighbourhood: object) -> None:
        """Nobody helps in reaching others: the simulated network knows no firewalls."""

    def serve(self, service: str, acceptor: object) -> None:
        """Streams are not simulated: places are reached by `Ways`."""

    async def start(self, handler: Handler) -> None:
        """See `Transport`."""

        async def answer(key: str, message: bytes) -> bytes:
            if self._process:
                self._process.enter()
            reply = await handler(key, message)
            self._count(self._transport.address().key, key, reply, asked=False)
            return reply

        await self._transport.start(answer)

    async def request(self, peer: PeerAddress, message: bytes, timeout: float) -> bytes:
        """See `Transport`."""
        self._count(self._transport.address().key, peer.key, message, asked=True)
        reply: bytes = await self._transport.request(peer, message, timeout)
        return reply


@contextmanager
def installed(scene: Scene) -> Iterator[None]:
    """Have the package run in ``scene`` until the end of the block."""
    modules = _loaded()
    with ExitStack() as stack:

        def put(target: object, name: str, value: object) -> None:
            stack.enter_context(patch.object(target, name, value))

        virtual_time = _virtual_time()
        for module in modules:
            if getattr(module, "datetime", None) is datetime:
                put(module, "datetime", VirtualDatetime)
            if isinstance(clock := getattr(module, "time", None), types.ModuleType) and (
                clock.__name__ == "time"
            ):
                put(module, "time", virtual_time)
        _put_chance(put, scene.chance)
        _put_parts(put, modules, scene)
        stack.enter_context(_watched_logs(scene))
        yield


def _put_chance(put: Callable[[object, str, object], None], chance: random.Random) -> None:
    class Seeded(random.Random):
        """One made without a seed takes it from the simulation."""

        def __init__(self, seed: object = None) -> None:
            super().__init__(chance.getrandbits(64) if seed is None else seed)  # type: ignore[arg-type]

    put(random, "Random", Seeded)
    put(random, "SystemRandom", Seeded)
    put(secrets, "token_hex", lambda n=32: chance.randbytes(n).hex())
    put(secrets, "token_bytes", lambda n=32: chance.randbytes(n))
    put(secrets, "randbits", chance.getrandbits)
    put(secrets, "choice", chance.choice)
    random.seed(chance.getrandbits(64))


def _put_parts(
    put: Callable[[object, str, object], None], modules: list[types.ModuleType], scene: Scene
) -> None:
    def transport(identity: Identity, *_: object, **__: object) -> Transport:
        return scene.attach(identity)

    def places(*_: object, **__: object) -> SimulatedPlaces:
        process = PROCESS.get()
        assert process
        return SimulatedPlaces(scene, process.site)

    parts = {
        "Database": type("Database", (SimulatedDatabase,), {"scene": scene}),
        "Keyring": type("Keyring", (SimulatedKeyring,), {"scene": scene}),
        "Gateway": type("Gateway", (SimulatedGateway,), {"scene": scene}),
        "Places": places,
        "OverlayTransport": transport,
        "Ports": lambda *_: SimulatedPorts(),
        "public_line": str,
        "parse_certificate": lambda _: types.SimpleNamespace(key=PUBLIC_KEY),
    }
    for module in modules:
        for name, part in parts.items():
            if name in vars(module):
                put(module, name, part)
    registry = sys.modules["gridcloud.providers.registry"]
    put(registry, "make", lambda name, kind, section, context: HostProvider(name, section, context))


@functools.cache
def _loaded() -> list[types.ModuleType]:
    """Return all modules of the rooms in use, so that none is first imported, unchanged, later."""
    for room in _ROOMS:
        package = importlib.import_module(f"{gridcloud.__name__}.{room}")
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__") and "migrations" not in info.name:
                importlib.import_module(info.name)
    wanted = tuple(f"{gridcloud.__name__}.{room}." for room in _ROOMS)
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(wanted)]


@contextmanager
def _watched_logs(scene: Scene) -> Iterator[None]:
    """Keep the log quiet, but take an unexpected exception for the fault it is."""

    def look(_: object, method: str, entry: dict[str, Any]) -> Any:
        if entry.get("exc_info") or method == "critical":
            error = sys.exc_info()[1]
            scene.fault(f"logged: {entry.get('event')}: {error!r}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[look], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)
