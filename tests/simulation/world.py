"""A whole grid in one process: sites, hosts and the network between them, from one seed."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gridcloud.errors import GridcloudError, NotFound, Unavailable
from gridcloud.grid.broker import Broker
from gridcloud.grid.identity import Identity
from gridcloud.grid.memory_transport import MemoryNetwork
from gridcloud.model.job import Job, JobSpec
from gridcloud.model.lease import Lease, LeaseRole
from gridcloud.model.need import GIB, Need
from gridcloud.settings import GridSettings, LendingSettings, SiteSettings
from gridcloud.site.lending import Lending
from gridcloud.site.site import Site
from simulation.crashing import PROCESS, CrashingLoop, Process
from simulation.hosts import HOSTS, Host
from simulation.ledger import Ledger
from simulation.light import Disk, LightSite
from simulation.seams import FIRST_PORT, Attached, Guests, blank_disk, wipe
from simulation.virtual_time import EPOCH

T = TypeVar("T")
COMMUNITY = "foam"
LENDER = ("provider", "consumer")
_CALL_SECONDS = 60.0
#: Where a site would listen, were there sockets.
_LISTEN = "10.0.0.1:4433"


@dataclass
class Place:
    """One organisation: what stays of it (host, disk, key, clock) and what runs at the moment."""

    name: str
    identity: Identity
    host: Host
    disk: Any
    settings: SiteSettings
    state: Path
    clock_off: float = 0.0
    process: Process | None = None
    processes: list[Process] = field(default_factory=list)
    site: Any = None
    guests: Guests | None = None
    context: Context = field(default_factory=copy_context)
    #: Whether it is to be a member: it founded or joined, and neither left nor was removed.
    member: bool = False
    #: Whether that is not sure: who asked for a change never learned what came of it.
    doubtful: bool = False
    #: Whether it went down for good.
    vanished: bool = False
    #: When its site was last started, in virtual seconds.
    started_at: float = 0.0

    @property
    def up(self) -> bool:
        """Whether its site runs."""
        return self.process is not None and not self.process.dead

    @property
    def key(self) -> str:
        """Its key."""
        return self.identity.key


class World:
    """Sites ``s0``, ``s1``, … on a network. All chance is one generator's.

    They are whole sites, or with ``light`` brokers that lend; see `gridcloud`'s
    ``docs/explanation/simulation.md``.
    """

    def __init__(self, loop: CrashingLoop, seed: int, folder: Path, *, light: bool) -> None:
        self.loop = loop
        self.seed = seed
        self.light = light
        self.chance = random.Random(seed)
        self.folder = folder
        self.network = MemoryNetwork(seed)
        self.places: dict[str, Place] = {}
        self.by_key: dict[str, str] = {}
        self.ledger = Ledger(loop.time, HOSTS)
        #: The last messages sent, to be played again: who sent them, to whom. Apart from the
        #: others those that ask for a deed, such as a loan.
        self.heard: deque[tuple[str, str, bytes]] = deque(maxlen=300)
        self.deeds: deque[tuple[str, str, bytes]] = deque(maxlen=300)
        self.messages = 0
        self.bytes = 0
        HOSTS.clear()

    # What the seams ask.

    def identity(self, site: str) -> Identity:
        """See `Scene`."""
        return self.places[site].identity

    def disk(self, folder: str) -> Any:
        """See `Scene`."""
        return self.places[folder].disk

    def attach(self, identity: Identity) -> Any:
        """See `Scene`."""
        return Attached(self.network.node(identity.key), PROCESS.get(), self._count)

    def opened(self, port: int, guests: Guests) -> None:
        """See `Scene`."""
        self.places[f"s{port - FIRST_PORT}"].guests = guests

    def fault(self, what: str) -> None:
        """See `Scene`."""
        process = PROCESS.get()
        self.ledger.violated("a fault", process.site if process else "world", what)

    def way(self, site: str, lease: Lease) -> Host:
        """See `Ways`."""
        if lease.role is not LeaseRole.BORROWED:
            return self.places[site].host
        assert lease.machine and lease.machine.endpoint
        lender = self.places[f"s{lease.machine.endpoint.port - FIRST_PORT}"]
        joined = self.network._joined(self.places[site].key, lender.key)
        if not lender.up or lender.guests is None or not joined:
            raise Unavailable(f"{lender.name} does not answer.")
        guest = lender.context.copy().run(lender.guests.find, lease.id)
        placed = lender.host.placed.get(lease.id)
        if guest is None or placed is None or placed.ended:
            raise NotFound(placed.ended if placed and placed.ended else "The lease has ended.")
        return lender.host

    def took(self, site: str, job: Job) -> None:
        """See `Ways`."""
        self.ledger.took(site, job)

    def _count(self, source: str, target: str, message: bytes, *, asked: bool) -> None:
        self.messages += 1
        if asked:
            talk = b'"kind":"probe' in message[:200] or b'"kind":"sync"' in message[:200]
            (self.heard if talk else self.deeds).append((source, target, message))
        self.bytes += len(message)
        self.ledger.note("message", self.by_key[source], self.by_key[target], len(message))

    # Sites.

    def add(self, cpus: int, lending: LendingSettings, clock_off: float = 0.0) -> Place:
        """Make an organisation that runs nothing yet."""
        name = f"s{len(self.places)}"
        secret = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        identity = Identity(Ed25519PrivateKey.from_private_bytes(secret))

        def clock() -> Any:
            return EPOCH + timedelta(seconds=self.loop.time() + place.clock_off)

        host = Host(name, cpus, clock, lambda what, about: self.ledger.on_host(host, what, about))
        HOSTS[name] = host
        settings = SiteSettings(name=name, lending=lending, grid=GridSettings(listen=_LISTEN))
        disk = Disk() if self.light else blank_disk()
        place = Place(name, identity, host, disk, settings, self.folder / name, clock_off)
        self.places[name] = place
        self.by_key[identity.key] = name
        return place

    def set_clock(self, place: Place, off: float) -> None:
        """Set the clock of a site and its host, so many seconds off."""
        self.ledger.note("clock", place.name, round(off))
        place.clock_off = off
        if place.process is not None:
            place.process.clock_off = off

    async def start(self, place: Place) -> None:
        """Start an organisation's site, for the first time or again."""
        place.process = process = Process(place.name, place.clock_off)
        place.processes.append(process)
        place.started_at = self.loop.time()
        context = copy_context()
        context.run(PROCESS.set, process)
        place.guests = None
        place.context = context
        if self.light:
            place.site = context.run(LightSite, self, place)
        else:
            file = place.state / "settings.toml"
            place.site = context.run(Site, place.settings, file, place.state)
        self.ledger.note("start", place.name)
        await self.on(place, lambda site: site.start())

    def crash(self, place: Place, *, power: bool = False) -> None:
        """Kill a site's process, or cut its host's power: nothing is said, nothing finishes."""
        if place.process is None:
            return
        self.ledger.note("crash", place.name, power)
        place.process.kill()
        node = self.network.node(place.key)
        node.up = False
        node._handling.clear()
        if power:
            place.host.cut_power()

    async def stop(self, place: Place) -> None:
        """Stop a site in good order."""
        self.ledger.note("stop", place.name)
        await self.on(place, lambda site: site.stop())
        self.crash(place)

    async def on(self, place: Place, act: Callable[[Any], Awaitable[T]]) -> T:
        """Do something at a site, as its user would; raises `Unavailable` if it crashes."""
        if not place.up or place.site is None:
            raise Unavailable(f"{place.name} does not run.")
        site = place.site

        async def acting() -> T:
            return await act(site)

        task = self.loop.create_task(acting(), context=place.context.copy())
        assert place.process
        ways_to_end = {task, place.process.death(self.loop)}
        await asyncio.wait(ways_to_end, timeout=_CALL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Unavailable(f"{place.name} crashed, or took too long.")
        return task.result()

    # What people do there.

    def broker(self, place: Place) -> Broker:
        """Return the broker of a site that runs."""
        found = place.site.broker if self.light else place.site.peers._broker
        assert isinstance(found, Broker)
        return found

    async def found(self, place: Place) -> None:
        """Found the community."""
        if self.light:
            await self.on(place, lambda site: site.broker.create_community(COMMUNITY, place.name))
        else:
            await self.on(place, lambda site: site.peers.create_community(COMMUNITY))
        place.member = True

    async def join(self, place: Place, inviter: Place, roles: tuple[str, ...] = LENDER) -> None:
        """Have a site join by an invitation; raises what hinders it."""
        invitation = await self.on(
            inviter, lambda _: self.broker(inviter).invite(COMMUNITY, roles, timedelta(days=1))
        )
        code = invitation.code
        place.doubtful = True  # from now on it may be one, whatever its user learns of it
        if self.light:
            await self.on(place, lambda site: site.broker.join(code, place.name))
        else:
            await self.on(place, lambda site: site.peers.join(code, place.name))
        place.member, place.doubtful = True, False

    async def leave(self, place: Place) -> None:
        """Have a site leave the community; raises what hinders it."""
        if self.light:
            await self.on(place, lambda site: site.leave())
        else:
            await self.on(place, lambda site: site.leave_community(COMMUNITY))

    def lending(self, place: Place) -> Lending:
        """Return the lending part of a site that runs."""
        found = place.site.lending if self.light else place.site._lending
        assert isinstance(found, Lending)
        return found

    async def submit(self, place: Place, spec: JobSpec) -> None:
        """Submit a job; what is refused is no job."""
        try:
            jobs = await self.on(place, lambda site: site.submit(spec))
        except GridcloudError as error:
            self.ledger.note("not submitted", place.name, error.code)
        else:
            self.ledger.submits(place.name, jobs)

    async def jobs(self, place: Place) -> list[Job]:
        """Return all jobs of a site."""
        if self.light:
            return [errand.job for errand in place.disk.errands.values()]
        jobs: list[Job] = await self.on(place, lambda site: site.jobs.listed())
        return jobs

    async def live_leases(self, place: Place) -> list[Lease]:
        """Return the leases that hold capacity, by a site's own books."""
        if self.light:
            live: list[Lease] = await place.disk.leases.live()
        else:
            live = await self.on(place, lambda site: site._leases.live())
        return live

    def processes(self) -> list[Process]:
        """Return all runs of all sites."""
        return [process for place in self.places.values() for process in place.processes]

    def close(self) -> None:
        """Give the disks back."""
        if not self.light:
            for place in self.places.values():
                wipe(place.disk)
        HOSTS.clear()


def watch_lending(world: World) -> dict[str, Any]:
    """Return the methods of `Lending` with the ledger looking over their shoulder."""
    grant = Lending.grant

    async def watched(self: Lending, request: Any) -> Any:
        made = await grant(self, request)
        process = PROCESS.get()
        assert process
        world.ledger.granted(process.site, made)
        return made

    return {"grant": watched}


def work(cpus: int, seconds: float, limit: float | None, name: str = "") -> JobSpec:
    """Return a job that runs so long."""
    time = timedelta(seconds=limit) if limit else None
    need = Need(cpus=cpus, memory_bytes=GIB, time=time)
    return JobSpec(command=("work", f"{seconds:.2f}"), need=need, name=name)
