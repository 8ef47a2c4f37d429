"""One project of one LXD as a cloud."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from gridcloud.errors import Conflict, Forbidden, InvalidSpec, NoCapacity, NotFound, Unavailable
from gridcloud.model.need import Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import Network, Tags, Thing, Volume
from gridcloud.providers.cloud.clouds import Build, Cloud, Image, Server
from gridcloud.providers.lxd import images, instances
from gridcloud.providers.lxd.api import API
from gridcloud.providers.lxd.connecting import Remotes
from gridcloud.providers.lxd.instances import name_of, path_of
from gridcloud.providers.lxd.networks import Networks
from gridcloud.providers.lxd.section import LXDSection
from gridcloud.providers.lxd.volumes import Volumes

_LOG_BYTES = 64 * 1024
_MEMORY_STEP = 2**27
#: What a host lets a machine have at most, unless shapes are told: a half of it.
_PARTS = {"small": 8, "medium": 4, "large": 2}


class LXDCloud(Cloud):
    """Makes instances that LXD removes when they power themselves off.

    The instance of a lease is called by the lease, so there are never two. It is made and then
    started, which are two requests; one that was never started is not shown as a machine, so that
    the next attempt starts it.
    """

    user_data_limit: ClassVar[int] = 256 * 1024
    deletes_what_is_off: ClassVar[bool] = True
    names_networks: ClassVar[bool] = True
    # LXD shows at once what it made; but one may still be about to take in a request.
    shows_late_seconds: ClassVar[float] = 0.5

    def __init__(self, section: LXDSection, site_key: str, remotes: Remotes | None = None) -> None:
        self._section, self._remotes = section, remotes or Remotes()
        self._site = Tags.of(site_key, "").site
        self._api = API(lambda: self._remotes.way(section.remote, section.socket), section.project)
        self._volumes = Volumes(self._api, section, self._site)
        self._networks = Networks(self._api, self._site)

    async def shapes(self) -> tuple[Shape, ...]:
        """See `Cloud`. Those of the settings, else three parts of the host."""
        told = await self._api.get("")
        if told.get("auth") == "untrusted":
            raise Forbidden(
                "LXD does not trust this user's certificate.",
                hint="Add it there: `lxc config trust add`, or `lxc remote add` with a token.",
            )
        architecture = told["environment"].get("kernel_architecture", "x86_64")
        if self._section.shapes:
            return tuple(
                Shape(
                    name=name,
                    resources=Resources(cpus=one.cpus, memory_bytes=one.memory, gpus=one.gpus),
                    disk_bytes=one.disk,
                    price=one.price,
                    currency=one.currency,
                    architecture=architecture,
                )
                for name, one in self._section.shapes.items()
            )
        host = await self._api.get("/resources")
        cpus, memory = int(host["cpu"]["total"]), int(host["memory"]["total"])
        return tuple(
            Shape(
                name=name,
                resources=Resources(
                    cpus=max(1, cpus // part),
                    memory_bytes=max(_MEMORY_STEP, memory // part // _MEMORY_STEP * _MEMORY_STEP),
                ),
                architecture=architecture,
            )
            for name, part in _PARTS.items()
        )

    async def headroom(self, region: str) -> Headroom:
        """See `Cloud`. The limits of the project, if it has some."""
        told = await self._api.get(f"/projects/{self._api.project}/state")
        left = {}
        for name, one in (told.get("resources") or {}).items():
            limit = int(one.get("Limit", one.get("limit", -1)))
            if limit >= 0:
                left[name] = max(0, limit - int(one.get("Usage", one.get("usage", 0))))
        kind = "containers" if self._section.type.value == "container" else "virtual-machines"
        machines = [left[name] for name in ("instances", kind) if name in left]
        return Headroom(
            cpus=left.get("cpu"),
            memory_bytes=left.get("memory"),
            machines=min(machines, default=None),
        )

    async def places(self, shape: Shape) -> tuple[str, ...]:
        """See `Cloud`. The members of a cluster that work, in the order of the settings."""
        told = await self._api.get("")
        if not told["environment"].get("server_clustered"):
            return ("",)
        members = await self._api.get("/cluster/members", recursion="1")
        online = [one["server_name"] for one in members if one["status"] == "Online"]
        wanted = self._section.targets or tuple(sorted(online))
        if places := tuple(name for name in wanted if name in online):
            return places
        raise NoCapacity(
            "No member of the LXD cluster that may be used is online.",
            hint=f"Online are: {', '.join(online) or 'none'}. Look at `targets`.",
        )

    async def image(self, wanted: str, shape: Shape) -> Image:
        """See `Cloud`. Also ``REMOTE:ALIAS``, which LXD fetches when the machine is made."""
        wanted = wanted or self._section.image
        known = await self._api.get("/images", recursion="1")
        if ":" in wanted:
            return images.fetched(self._remotes, wanted, shape.architecture)
        return images.found(known or [], wanted, self._section.type)

    async def network(self, tags: Tags, place: str) -> str:
        """See `Cloud`. Nothing is made: it is the settings' own, or that of the profiles."""
        if self._section.network:
            await self._api.get(f"/networks/{self._section.network}")
            return self._section.network
        for profile in reversed(self._section.profiles):
            devices = (await self._api.get(f"/profiles/{profile}"))["devices"] or {}
            for device in devices.values():
                if device.get("type") == "nic":
                    return str(device.get("network") or device.get("parent") or "")
        raise InvalidSpec(
            f"The profile {', '.join(self._section.profiles) or '(none)'} has no network.",
            hint="Name one in the settings: `network`, as `lxc network list` shows it.",
        )

    async def create(self, build: Build) -> str:
        """See `Cloud`. Waits until it is made, since only then it can be started."""
        name = name_of(build.tags.lease)
        told = await self._shown(name)
        if told is None:
            told = await self._made(name, build)
        if told["status"] != "Running" or not instances.started_before(told):
            await self._start(name)
        return name

    async def server(self, lease_id: str) -> Server | None:
        """See `Cloud`."""
        told = await self._shown(name_of(lease_id))
        if told is None or not instances.started_before(told):
            return None
        return instances.server_of(told)

    async def boot_log(self, lease_id: str) -> str:
        """See `Cloud`. What its console showed."""
        name = name_of(lease_id)
        if await self._shown(name) is None:
            return ""
        return await self._api.text(f"{path_of(name)}/console", _LOG_BYTES)

    async def remove(self, lease_id: str) -> bool:
        """See `Cloud`. What LXD still works on is left until that is over."""
        name = name_of(lease_id)
        told = await self._shown(name, of_any_site=True)
        if told is not None and not self._mine(told):
            return True
        try:
            if told is None or told["status"] != "Stopped":
                await self._stop(name)
            begun = await self._api.ask("DELETE", path_of(name))
            if begun.operation:
                await self._api.wait(begun.operation)
        except NotFound:
            # It may be that LXD has taken in the order for it, and not begun with it.
            return not await self._api.running(name)
        except (Conflict, InvalidSpec):
            return False  # it is being made, started or stopped
        return True

    async def things(self) -> list[Thing]:
        """See `Cloud`."""
        told, volumes, networks = await asyncio.gather(
            self._api.get("/instances", recursion="1"),
            self._volumes.things(),
            self._networks.things(),
        )
        found = []
        for one in told or []:
            tags = instances.tags_of(one)
            if tags is not None and tags.site == self._site:
                found.append(Thing(kind="machine", id=one["name"], tags=tags))
        return [*found, *volumes, *networks]

    async def sites(self) -> set[str]:
        """See `Cloud`."""
        told, *sites = await asyncio.gather(
            self._api.get("/instances", recursion="1"),
            self._volumes.sites(),
            self._networks.sites(),
        )
        machines = {tags.site for one in told or [] if (tags := instances.tags_of(one))}
        return machines.union(*sites)

    async def extended(self, tags: Tags) -> None:
        """See `Cloud`."""
        name = name_of(tags.lease)
        if await self._shown(name) is not None:
            begun = await self._api.ask(
                "PATCH", path_of(name), {"config": instances.user_keys(tags)}
            )
            if begun.operation:
                await self._api.wait(begun.operation)

    async def volumes(self) -> list[Volume]:
        """See `Cloud`."""
        return await self._volumes.listed()

    async def volume(self, tags: Tags, name: str, size_bytes: int, place: str) -> str:
        """See `Cloud`."""
        return await self._volumes.made(tags, name, size_bytes, place)

    async def attach(self, lease_id: str, volume: str) -> str:
        """See `Cloud`. A container is given a folder, a virtual machine a disk."""
        return await self._volumes.attach(name_of(lease_id), volume)

    async def remove_volume(self, volume: str) -> None:
        """See `Cloud`."""
        await self._volumes.remove(volume)

    async def networks(self) -> list[Network]:
        """See `Cloud`."""
        return await self._networks.listed()

    async def make_network(self, tags: Tags, name: str, cidr: str, region: str) -> None:
        """See `Cloud`. A bridge, which this host reaches as any other of LXD."""
        if region:
            raise InvalidSpec("LXD has no regions.", hint="Leave the network's region out.")
        await self._networks.make(tags, name, cidr)

    async def named_network(self, name: str, place: str) -> str:
        """See `Cloud`."""
        return await self._networks.ready(name)

    async def remove_network(self, name: str) -> bool:
        """See `Cloud`."""
        return await self._networks.remove(name)

    async def close(self) -> None:
        """See `Cloud`."""
        await self._api.close()

    def _mine(self, told: dict[str, Any]) -> bool:
        tags = instances.tags_of(told)
        return tags is not None and tags.site == self._site

    async def _shown(self, name: str, *, of_any_site: bool = False) -> dict[str, Any] | None:
        try:
            told: dict[str, Any] = await self._api.get(path_of(name), recursion="1")
        except NotFound:
            return None
        return told if of_any_site or self._mine(told) else None

    async def _made(self, name: str, build: Build) -> dict[str, Any]:
        body = instances.request(build, self._section, images.source(self._remotes, build.image))
        query = {"target": build.place} if build.place else None
        try:
            begun = await self._api.ask("POST", "/instances", body, query=query)
            await self._api.wait(begun.operation)
        except Conflict:
            pass  # another attempt made it, or is about to
        for operation in await self._api.running(name):
            await self._api.wait(operation)
        told = await self._shown(name, of_any_site=True)
        if told is None:
            raise Unavailable("LXD made the machine, and does not show it.", hint="Look there.")
        if not self._mine(told):
            raise Conflict(
                f"Another site has an instance {name} in this project.", hint="Start it again."
            )
        return told

    async def _start(self, name: str) -> None:
        try:
            await self._change(name, {"action": "start", "timeout": 30})
        except (Conflict, InvalidSpec):
            told = await self._shown(name)  # another attempt may have been faster
            if told is None or not instances.started_before(told):
                raise

    async def _stop(self, name: str) -> None:
        try:
            await self._change(name, {"action": "stop", "force": True, "timeout": 30})
        except (Conflict, InvalidSpec):
            return  # it is off, or on its way

    async def _change(self, name: str, state: dict[str, Any]) -> None:
        begun = await self._api.ask("PUT", f"{path_of(name)}/state", state)
        await self._api.wait(begun.operation)
