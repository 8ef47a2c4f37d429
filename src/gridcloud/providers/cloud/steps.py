"""The steps of one launch, carried out at a cloud; `launching` says which, and when again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from gridcloud.errors import Conflict, GridcloudError, InvalidSpec, NotFound, Unavailable
from gridcloud.model.lease import Endpoint, Lease, Machine
from gridcloud.model.machine import LaunchStep
from gridcloud.model.need import Resources
from gridcloud.model.quantities import format_bytes
from gridcloud.model.shape import Shape
from gridcloud.model.things import KEPT, Tags
from gridcloud.providers.base import FirstBoot, Making
from gridcloud.providers.cloud.catalogue import Catalogue
from gridcloud.providers.cloud.clouds import Build, Cloud, Condition, Image
from gridcloud.providers.cloud.pace import Pace
from gridcloud.providers.cloud.section import CloudSection
from gridcloud.providers.cloud.watching import Watch

T = TypeVar("T")

_SSH_PORT = 22
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.25, 3.0
_LOOK_WHILE_BOOTING_SECONDS = 5.0
_KNOCK_SECONDS = 0.25
_LOOK_WHILE_READYING_SECONDS = 10.0
#: How long a call that makes something is waited for after it was no longer wanted.
_GRACE_SECONDS = 10.0
_NAME_DIGITS = 40


@dataclass
class Shared:
    """What all launches of one provider have in common."""

    cloud: Cloud
    pace: Pace
    catalogue: Catalogue
    section: CloudSection
    site_key: str
    reach: Callable[[str, int], Awaitable[None]]
    #: The first launch in a place makes the network; the others wait for that, then go on at once.
    networks: dict[str, str] = field(default_factory=dict)
    network_locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    #: Which launch is about to use a volume.
    volumes: dict[str, str] = field(default_factory=dict)


class Steps:
    """Carries out the steps of one lease's launch, and remembers what they gave."""

    def __init__(self, shared: Shared, lease: Lease, making: Making) -> None:
        self._shared, self._lease, self._making = shared, lease, making
        self._cloud, self._call = shared.cloud, shared.pace.call
        self._tags = Tags.of(shared.site_key, lease.id, lease.ends_at)
        self._shape: Shape | None = None
        self._resources = Resources()
        self._image: Image | None = None
        self._first_boot: FirstBoot | None = None
        self._network = ""
        self._volumes: dict[str, str] = {}
        #: Volumes that were made here and that no machine has seen yet, by name.
        self._blank: dict[str, str] = {}
        self._watch: Watch | None = None
        self._looked_at = float("-inf")
        self._address = ""
        self._id = ""
        self._told = ""
        self._created = False
        #: What the step in hand is waiting for, in words for when it takes too long.
        self.waiting_for = ""
        self.places: tuple[str, ...] = ()
        self.found: Condition | None = None

    async def carry_out(self, step: LaunchStep, place: str) -> None:
        """Carry out one step; raises as `Cloud` and `Making` do."""
        self.waiting_for = ""
        match step:
            case LaunchStep.IMAGE:
                await self._find_image()
            case LaunchStep.SHAPE:
                await self._check_shape()
            case LaunchStep.PLACE:
                await self._find_places()
            case LaunchStep.NETWORK:
                await self._prepare_network(place)
            case LaunchStep.VOLUMES:
                await self._prepare_volumes(place)
            case LaunchStep.CREATE:
                await self._create(place)
            case LaunchStep.REACHABLE:
                await self._reach()
            case LaunchStep.READY:
                await self._await_ready()
            case LaunchStep.SETUP:
                await self._set_up()

    async def look(self) -> bool:
        """Return whether the cloud shows the machine."""
        return await self._call(partial(self._cloud.server, self._lease.id)) is not None

    async def remove(self) -> bool:
        """Begin to remove all that was made, volumes that are still blank too; return whether
        nothing is left. To be called again until that is so."""
        if not await self._call(partial(self._cloud.remove, self._lease.id)):
            return False
        while self._blank:
            name, volume = next(iter(self._blank.items()))
            await self._call(partial(self._cloud.remove_volume, volume))
            del self._blank[name]
        self._watch, self._address, self._volumes, self._created = None, "", {}, False
        return True

    def machine(self, provider: str) -> Machine:
        """Return what was made, once every step was carried out."""
        shape = self._known(self._shape)
        return Machine(
            lease_id=self._lease.id,
            provider=provider,
            folder=f".gridcloud/{self._shared.site_key[:16]}",
            endpoint=self._endpoint(),
            certified=True,
            id=self._id,
            shape=shape.name,
            region=shape.region,
        )

    def let_go(self) -> None:
        """Let other launches use the volumes; to be called when this one is over."""
        for name, lease_id in list(self._shared.volumes.items()):
            if lease_id == self._lease.id:
                del self._shared.volumes[name]

    async def _find_image(self) -> None:
        self._shape, self._resources = await self._shared.catalogue.shape(self._lease)
        wanted = self._lease.order.image or self._shared.section.image
        shape = self._shape
        self._image = await self._call(partial(self._cloud.image, wanted, shape))

    async def _check_shape(self) -> None:
        """See that the image fits, and prepare the first boot: nothing was paid for yet."""
        shape, image = self._known(self._shape), self._known(self._image)
        if image.architecture != shape.architecture:
            raise InvalidSpec(
                f"The image {image.name} is for {image.architecture}, and the shape {shape.name} "
                f"is {shape.architecture}.",
                hint="Name another image with --image.",
            )
        for what, least, has in (
            ("disk", image.disk_bytes, shape.disk_bytes or image.disk_bytes),
            ("memory", image.memory_bytes, self._resources.memory_bytes),
        ):
            if least > has:
                raise InvalidSpec(
                    f"The image {image.name} needs {format_bytes(least)} of {what}, and the shape "
                    f"{shape.name} has {format_bytes(has)}.",
                    hint="Name another image with --image, or ask for more.",
                )
        self._first_boot = await self._making.first_boot(
            self._lease, self._user(), self._cloud.user_data_limit
        )
        await self._note(LaunchStep.SHAPE, f"{shape} for {self._lease.need}")

    async def _find_places(self) -> None:
        shape = self._known(self._shape)
        places, server = await asyncio.gather(
            self._call(partial(self._cloud.places, shape)),
            self._call(partial(self._cloud.server, self._lease.id)),
        )
        self.places = await self._beside_volumes(places)
        self.found = server.condition if server else None
        if server and server.condition is not Condition.FAILED:
            await self._note(LaunchStep.PLACE, f"{server.id} is there already; going on with it")

    async def _beside_volumes(self, places: tuple[str, ...]) -> tuple[str, ...]:
        """Return the places where all volumes of the order are, if they are somewhere already."""
        wanted = {mount.name for mount in self._lease.order.volumes}
        if not wanted:
            return places
        there = {v.name: v for v in await self._call(self._cloud.volumes) if v.name in wanted}
        held = {volume.place for volume in there.values() if volume.place}
        beside = tuple(place for place in places if held <= {place})
        if not beside:
            where = ", ".join(f"{v.name} in {v.place}" for v in there.values() if v.place)
            raise Conflict(
                f"No place of this shape has all its volumes: {where}.",
                hint="Choose another region or shape, or other volumes.",
            )
        return beside

    async def _prepare_network(self, place: str) -> None:
        shared, named = self._shared, self._lease.order.network
        if named:
            self._network = await self._whole(
                self._call(partial(self._cloud.named_network, named, place))
            )
            return
        lock = shared.network_locks.setdefault(place, asyncio.Lock())
        if place not in shared.networks:
            async with lock:
                if place not in shared.networks:
                    shared.networks[place] = await self._ask_network(place)
                    self._network = shared.networks[place]
                    return
        # Asked all the same: it may have been removed with the last machine in it.
        self._network = await self._ask_network(place)

    async def _ask_network(self, place: str) -> str:
        return await self._whole(self._call(partial(self._cloud.network, self._tags, place)))

    async def _prepare_volumes(self, place: str) -> None:
        mounts = self._lease.order.volumes
        if not mounts:
            return
        for mount in mounts:
            holder = self._shared.volumes.setdefault(mount.name, self._lease.id)
            if holder != self._lease.id:
                raise Conflict(
                    f"The volume {mount.name} is about to be used by another machine.",
                    hint="Wait until that has ended, or name another volume.",
                )
        there = {volume.name for volume in await self._call(self._cloud.volumes)}
        tags = Tags.of(self._shared.site_key, KEPT)
        for mount in mounts:
            made = await self._whole(
                self._call(partial(self._cloud.volume, tags, mount.name, mount.size_bytes, place))
            )
            self._volumes[mount.name] = made
            if mount.name not in there:
                self._blank[mount.name] = made
                size = format_bytes(mount.size_bytes)
                await self._note(LaunchStep.VOLUMES, f"made the volume {mount.name} of {size}")

    async def _create(self, place: str) -> None:
        shape, image = self._known(self._shape), self._known(self._image)
        lease, named = self._lease, self._lease.order.name or "gridcloud"
        build = Build(
            tags=self._tags,
            name=f"{named[: _NAME_DIGITS - 1].rstrip('-')}-{lease.id}",
            token=f"{lease.id}-{hashlib.sha256(place.encode()).hexdigest()[:8]}",
            shape=shape,
            resources=self._resources,
            place=place,
            image=image,
            network=self._network,
            named_network=bool(lease.order.network),
            user_data=self._known(self._first_boot).user_data,
            volumes=tuple(self._volumes.values()),
            spot=lease.order.spot,
        )
        if not self._created:
            where = place or shape.region
            inside = f" in {where}" if where else ""
            await self._note(LaunchStep.CREATE, f"creating {shape.name}{inside} from {image.name}")
            self._created = True
        await self._whole(self._call(partial(self._cloud.create, build)))

    async def _reach(self) -> None:
        now = asyncio.get_running_loop().time
        pause = _FIRST_LOOK_SECONDS
        while True:
            if now() - self._looked_at >= (_LOOK_WHILE_BOOTING_SECONDS if self._address else pause):
                await self._look_after()
                pause = min(_LONGEST_LOOK_SECONDS, pause * 1.25)
            if self._address:
                try:
                    await self._shared.reach(self._address, _SSH_PORT)
                    break
                except Unavailable as error:
                    self.waiting_for = (
                        f"It is running, but no SSH server answers at {self._address}: "
                        f"{error.message.rstrip('.')}."
                    )
            await asyncio.sleep(_KNOCK_SECONDS if self._address else pause)
        await self._note(LaunchStep.REACHABLE, f"an SSH server answers at {self._address}")

    async def _await_ready(self) -> None:
        self.waiting_for = "Its first boot is not over, or nobody can log in."
        try:
            facts = await self._making.await_ready(self._lease, self._endpoint())
        except Unavailable as error:
            self.waiting_for = error.message
            since = asyncio.get_running_loop().time() - self._looked_at
            if since >= _LOOK_WHILE_READYING_SECONDS:
                await self._look_after()
            raise
        await self._note(LaunchStep.READY, f"{facts.hostname} is ready, with Python {facts.python}")

    async def _set_up(self) -> None:
        order = self._lease.order
        if not order.volumes and not order.playbooks:
            return
        devices = {}
        if order.volumes and not self._volumes:
            known = {volume.name: volume.id for volume in await self._call(self._cloud.volumes)}
            self._volumes = {m.name: known[m.name] for m in order.volumes if m.name in known}
        for mount in order.volumes:
            if mount.name not in self._volumes:
                raise NotFound(f"The volume {mount.name} is gone.", hint="Start again with it.")
            self._blank.pop(mount.name, None)
            devices[mount.name] = await self._whole(
                self._call(partial(self._cloud.attach, self._lease.id, self._volumes[mount.name]))
            )
            await self._note(LaunchStep.SETUP, f"attached the volume {mount.name}")
        await self._making.set_up(self._lease, self._endpoint(), devices)

    async def _look_after(self) -> None:
        """Look how the cloud shows the machine; raises if it will never be ready."""
        now = asyncio.get_running_loop().time
        self._watch = self._watch or Watch(now())
        self._looked_at = now()
        server = await self._call(partial(self._cloud.server, self._lease.id))
        self._address = self._watch.seen(server, now())
        self._id = server.id if server else self._id
        shown = f"the cloud shows it {server.condition}" if server else "the cloud does not show it"
        shown += f", at {self._address}" if self._address else ""
        self.waiting_for = self.waiting_for or f"{shown[0].upper()}{shown[1:]}."
        if shown != self._told:
            self._told = shown
            await self._note(LaunchStep.REACHABLE, shown)

    async def _whole(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a call that makes something. If it is cut off, it is waited for a little all the
        same: what it makes must be there before it is looked for and removed."""
        task = asyncio.ensure_future(call)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                await asyncio.wait({task}, timeout=_GRACE_SECONDS)
            finally:
                task.cancel()
            raise

    async def _note(self, step: LaunchStep, message: str) -> None:
        await self._making.note(self._lease.id, step, message)

    def _endpoint(self) -> Endpoint:
        keys = self._known(self._first_boot).host_keys
        return Endpoint(host=self._address, port=_SSH_PORT, user=self._user(), host_keys=keys)

    def _user(self) -> str:
        return self._shared.section.user or self._known(self._image).user

    @staticmethod
    def _known(value: T | None) -> T:
        if value is None:
            raise GridcloudError("A step of a launch was carried out before its turn.")
        return value
