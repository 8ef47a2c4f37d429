"""The provider: one container for each lease, entered as often as is wanted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import structlog

from gridcloud.errors import Conflict, GridcloudError, NoCapacity, NotFound
from gridcloud.model.asking import Question
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.machine import LaunchStep
from gridcloud.model.need import Need, Resources
from gridcloud.model.things import Tags, Volume
from gridcloud.providers.base import (
    Capacity,
    Lender,
    Neighbourly,
    Provider,
    ProviderContext,
    VolumeKeeper,
    read_section,
)
from gridcloud.providers.containers import recipe
from gridcloud.providers.containers.finding import find_engine
from gridcloud.providers.containers.folders import Facts, Folder, folders
from gridcloud.providers.containers.keeping import Keeping
from gridcloud.providers.containers.making import NEEDS_PYTHON, Containers
from gridcloud.providers.containers.recipe import ContainersSection, image_name
from gridcloud.providers.containers.seccomp import guest_profile
from gridcloud.providers.local.bubblewrap import FIRST_HOST_ID, HOST_IDS

log = structlog.get_logger()
FOLDER, JOBS = "containers", "jobs"
_TRUST_A_LOOK_FOR_SECONDS, _LOOK_AGAIN_AFTER_SECONDS = 15.0, 5.0
_START_SECONDS, _REMOVE_SECONDS = 20.0, 60.0
_POLL_SECONDS = 0.02
_TELL_PULL_EVERY_SECONDS = 5.0
_PULL_TRIES = 3


class ContainersProvider(Provider, Lender, VolumeKeeper, Neighbourly):
    """Containers on this host. An own lease's job sees its home at the path it has on the host; a
    guest's is ``/home/guest``. Its `Machine` is a ``sandbox``: it is entered, never used bare."""

    kind: ClassVar[str] = "containers"
    isolation: ClassVar[str] = "container"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        super().__init__(name, section, context)
        self.section = read_section(ContainersSection, name, section)
        self._root = context.state_folder / FOLDER
        self._containers = Containers(context.site_key, self.section.engine)
        self._seen: tuple[float, Capacity] | None = None
        self._looking = asyncio.Lock()
        self._choosing_gpus = asyncio.Lock()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._keeping = Keeping(self._root, self.section.lingers, self._containers.remove)

    @classmethod
    def questions(cls) -> tuple[Question, ...]:
        """See `Provider`. The engine is asked for only where none is found."""
        image = Question(
            setting="image",
            text="The image that jobs run in, with Python 3.8 or newer",
            default="docker.io/library/python:3.12-slim",
            needed=True,
        )
        try:
            find_engine("")
        except GridcloudError:
            address = "The address of the container engine, as unix:///run/podman/podman.sock"
            return (image, Question(setting="engine", text=address, needed=True))
        return (image,)

    async def capacity(self) -> Capacity:
        """Return what the host has, or the part the settings give, as seen a moment ago."""
        async with self._looking:
            if self._seen is None or monotonic() >= self._seen[0]:
                found = await self._look()
                trust = _LOOK_AGAIN_AFTER_SECONDS if found.problem else _TRUST_A_LOOK_FOR_SECONDS
                self._seen = (monotonic() + trust, found)
            return self._seen[1]

    async def check(self) -> Capacity:
        """Start a container, run a command in it, and remove it."""
        self._seen = None
        capacity = await self.capacity()
        if capacity.problem:
            return capacity
        now = datetime.now(UTC)
        need = Need(memory_bytes=min(capacity.resources.memory_bytes, 2**28))
        lease = Lease(
            id=f"check-{new_id(16)}".lower(),
            role=LeaseRole.OWN,
            state=LeaseState.INTENT,
            provider=self.name,
            need=need,
            created_at=now,
            ends_at=now + self.section.pull_time + timedelta(minutes=5),
        )
        problem = ""
        try:
            await self.launch(lease)
            null = os.open(os.devnull, os.O_RDWR)
            try:
                if await self.enter(lease.id, "command -v python3", (null,) * 3, {}):
                    problem = (
                        f"The image {self.section.image} has no python3, by which jobs are "
                        f"started. {NEEDS_PYTHON}"
                    )
            finally:
                os.close(null)
        except GridcloudError as error:
            problem = str(error)
        finally:
            await asyncio.shield(self._discard(lease.id))
        return capacity.model_copy(update={"problem": problem})

    async def launch(self, lease: Lease) -> Machine:
        """Start the lease's container; fetches its image first if it is not here.

        Raises `NotFound` for an image that cannot be had, `InvalidSpec` for one that has no shell
        or for volumes that are not there, `NoCapacity` for GPUs that are taken.
        """
        async with self._lock(lease.id):
            folder = Folder(self._root, lease.id)
            try:
                facts = await self._make(lease, folder)
            except BaseException:  # whatever it was, also a launch that was called off
                await asyncio.shield(self._discard(lease.id))
                raise
        self._keeping.begin()
        return Machine(
            lease_id=lease.id, provider=self.name, folder=f"{facts.home}/{JOBS}", sandbox=True
        )

    async def terminate(self, lease_id: str) -> None:
        """Kill the lease's container and remove it with its home; volumes stay."""
        folder = Folder(self._root, lease_id)
        await self._containers.remove(lease_id)
        await asyncio.to_thread(folder.remove)

    async def made(self) -> list[str]:
        """Return the leases of all containers with this site's label, and of folders here."""
        self._keeping.begin()
        here = await asyncio.to_thread(lambda: {each.lease_id for each in folders(self._root)})
        return sorted(here | {tags.lease for tags, _ in await self._containers.ours()})

    async def lengthen(self, lease: Lease) -> None:
        """Move the end of an own lease's container."""
        if lease.ends_at:
            await self.extend(lease.id, lease.ends_at)

    async def close(self) -> None:
        """Let go of the engine; containers go on. Idempotent."""
        await self._keeping.close()
        await self._containers.close()

    async def volumes(self) -> list[Volume]:
        """See `VolumeKeeper`. The size is what was asked for; the engine does not bound it."""
        return await self._containers.volumes.listed()

    async def make_volume(self, name: str, size_bytes: int) -> None:
        """See `VolumeKeeper`."""
        if any(volume.name == name for volume in await self.volumes()):
            raise Conflict(f"There is a volume {name!r} already.", hint="Choose another name.")
        await self._containers.volumes.make(name, size_bytes)

    async def remove_volume(self, name: str) -> None:
        """See `VolumeKeeper`."""
        await self._containers.volumes.remove(name)

    async def sites(self) -> set[str]:
        """See `Neighbourly`."""
        return await self._containers.sites()

    async def lending_problem(self) -> str:
        """See `Lender`: the engine must answer, and the image be here."""
        capacity = await self.capacity()
        if capacity.problem:
            return capacity.problem
        image = image_name(self.section.image)
        try:
            if await self._containers.has_image(image, tries=1):
                return ""
        except GridcloudError as error:
            return str(error)
        return (
            f"The image {image} of {self.name} is not here yet. "
            f"Run 'gridcloud provider check {self.name}', which fetches it."
        )

    async def enter(
        self,
        lease_id: str,
        command: str,
        descriptors: tuple[int, int, int],
        env: Mapping[str, str],
    ) -> int:
        """See `Enterable`. Being cancelled it lets go; the command goes on."""
        folder = Folder(self._root, lease_id)
        facts, why = await asyncio.to_thread(lambda: (folder.facts(), folder.ended()))
        if why:
            raise NotFound(f"The container has ended: {why}")
        user, home = facts.user, facts.home
        try:
            return await self._containers.enter(lease_id, command, descriptors, env, user, home)
        except GridcloudError as error:
            if why := await self.ended(lease_id):
                raise NotFound(f"The container has ended: {why}") from error
            raise

    async def ended(self, lease_id: str) -> str:
        """See `Enterable`."""
        folder = Folder(self._root, lease_id)
        if why := await asyncio.to_thread(folder.ended):
            return why
        try:
            state = await self._containers.state(lease_id)
        except GridcloudError:
            return ""  # nobody knows now
        if state is not None and state.get("Running"):
            return ""
        end = folder.end()
        if end is not None and datetime.now(UTC) >= end:
            return "The lease has come to its end."
        return "Its container is gone: somebody removed it, or the host was restarted."

    async def overrun(self, lease_id: str) -> str:
        """See `Enterable`: whether the kernel killed something in it for want of memory."""
        try:
            state = await self._containers.state(lease_id)
        except GridcloudError:
            return ""
        pid = (state or {}).get("Pid")
        if isinstance(pid, int) and pid > 0 and await asyncio.to_thread(_killed_for_memory, pid):
            return "It used more memory than its lease has, and was killed for that."
        return ""

    def home(self, lease_id: str) -> Path:
        """See `Enterable`."""
        return Folder(self._root, lease_id).home

    def shown_as(self, lease_id: str) -> str:
        """See `Enterable`."""
        return Folder(self._root, lease_id).facts().home

    async def extend(self, lease_id: str, ends_at: datetime) -> None:
        """See `Enterable`; the container follows within two seconds."""
        await asyncio.to_thread(Folder(self._root, lease_id).move_end, ends_at)

    async def _make(self, lease: Lease, folder: Folder) -> Facts:
        host, _ = await self._containers.learn()
        number = zlib.crc32(lease.id.encode()) % HOST_IDS + FIRST_HOST_ID
        who = recipe.users(host, lease.role, (number, number))
        now = datetime.now(UTC)
        lent = lease.role is LeaseRole.LENT
        facts = Facts(
            user=who.commands,
            home=recipe.home_inside(lease, folder.home),
            role=lease.role,
            open=lease.ends_at is None,
            disk_bytes=lease.terms.disk_bytes if lent and lease.terms else 0,
        )
        ends_at = lease.ends_at or self._keeping.open_end(now)
        await asyncio.to_thread(folder.prepare, facts, ends_at, who.files)
        if lent and host.podman:
            await asyncio.to_thread(folder.write_seccomp, guest_profile())
        image = image_name(lease.order.image or self.section.image)
        tags = Tags.of(self.context.site_key, lease.id, lease.ends_at)
        for volume in lease.order.volumes:
            await self._containers.have_volume(tags, volume)

        async def create(gpus: tuple[str, ...]) -> None:
            request = recipe.create_request(
                lease, self.section, host, who, tags, folder.path, gpus, image
            )
            try:
                await self._containers.create(lease.id, request)
            except NotFound:
                if await self._containers.has_image(image):
                    raise  # something else is missing
                await self._fetch(lease.id, image)
                await self._containers.create(lease.id, request)

        if lease.need.gpus:
            async with self._choosing_gpus:
                await create(await self._free_gpus(lease))
        else:
            await create(())
        await self._containers.start(lease.id, image)
        return facts

    async def _fetch(self, lease_id: str, image: str) -> None:
        if not self.section.pull:
            raise NotFound(
                f"The image {image} is not here, and none are fetched.",
                hint=f"Fetch it by hand, or set pull = true under [providers.{self.name}].",
            )
        making, said = self.context.making, 0.0
        notes: list[asyncio.Task[None]] = []

        def tell(words: str) -> None:
            nonlocal said
            if making is not None and (not notes or monotonic() - said > _TELL_PULL_EVERY_SECONDS):
                said = monotonic()
                text = f"fetching {image}: {words}"
                notes.append(asyncio.create_task(making.note(lease_id, LaunchStep.IMAGE, text)))

        log.info("fetching an image", image=image, lease=lease_id)
        try:
            await self._containers.fetch(image, self.section.pull_time.total_seconds(), tell)
        finally:
            await asyncio.gather(*notes, return_exceptions=True)

    async def _free_gpus(self, lease: Lease) -> tuple[str, ...]:
        taken = {
            gpu
            for tags, labels in await self._containers.ours()
            if tags.lease != lease.id
            for gpu in labels.get(recipe.GPUS_LABEL, "").split(",")
        }
        free = tuple(gpu for gpu in self.section.gpus if gpu not in taken)
        if len(free) < lease.need.gpus:
            raise NoCapacity(
                f"{self.name} has {len(free)} of {lease.need.gpus} GPUs free.",
                hint="It is tried again.",
            )
        return free[: lease.need.gpus]

    async def _discard(self, lease_id: str) -> None:
        """Remove what a launch made before it failed; what resists is listed by `made`."""
        with contextlib.suppress(GridcloudError):
            await self.terminate(lease_id)

    async def _look(self) -> Capacity:
        section = self.section
        try:
            address, info = await self._containers.look()
            have = Resources(cpus=int(info["NCPU"]), memory_bytes=int(info["MemTotal"]))
        except GridcloudError as error:
            return _nothing(section, str(error))
        except (LookupError, TypeError, ValueError) as error:
            return _nothing(section, f"The engine describes itself in an odd way: {error!r}.")
        unbound = [
            name
            for name, key in (("CPUs", "CpuCfsQuota"), ("memory", "MemoryLimit"))
            if not info.get(key, True)
        ]
        return Capacity(
            resources=Resources(
                cpus=section.cpus or have.cpus,
                memory_bytes=section.memory or have.memory_bytes,
                gpus=len(section.gpus),
            ),
            detail=f"engine {info.get('ServerVersion')} at {address}, {section.image}",
            isolation=self.isolation,
            problem=f"The engine cannot bound the {' and '.join(unbound)} of a container. "
            "Delegate these cgroup controllers to this user, or use the system's engine."
            if unbound
            else "",
        )

    def _lock(self, lease_id: str) -> asyncio.Lock:
        return self._locks.setdefault(lease_id, asyncio.Lock())


def _nothing(section: ContainersSection, problem: str) -> Capacity:
    have = Resources(cpus=section.cpus or 0, memory_bytes=section.memory or 0)
    return Capacity(resources=have, known=False, problem=problem)


def _killed_for_memory(pid: int) -> bool:
    """Whether the kernel killed something of a process's control group for memory (cgroups(7))."""
    places = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                places.append(Path(f"/sys/fs/cgroup{path}/memory.events"))
            elif "memory" in controllers.split(","):
                places.append(Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control"))
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            for line in place.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value) > 0
    return False
