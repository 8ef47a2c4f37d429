"""An account at an OpenStack cloud: where each question goes, and in what order things are made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from gridcloud.errors import InvalidSpec, NotFound, Unavailable
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import SHARED, Network, Tags, Thing, Volume
from gridcloud.providers.cloud.clouds import Build, Cloud, Image, Server
from gridcloud.providers.openstack import flavors, images, servers, volumes
from gridcloud.providers.openstack.named_networks import NamedNetwork, named
from gridcloud.providers.openstack.networks import Networks
from gridcloud.providers.openstack.regions import Region, Regions
from gridcloud.providers.openstack.section import OpenStackSection

T = TypeVar("T")

_REMEMBERED = 10_000


@dataclass
class _Part:
    """What is kept of one region: nothing that is not at the cloud."""

    region: Region
    networks: Networks
    zones: tuple[str, ...] = ()
    flavors: dict[str, str] = field(default_factory=dict)
    named: dict[str, NamedNetwork] = field(default_factory=dict)


class OpenStackCloud(Cloud):
    """See `Cloud`. A place is ``REGION/ZONE``, and a volume's id ``REGION/ID``.

    Nova knows no client tokens: a machine's name and metadata hold its lease, and of two that were
    made at once the later is removed. A machine that is off stays, and counts, until it is removed.
    """

    names_networks: ClassVar[bool] = True
    #: Nova takes 65535 characters of base64.
    user_data_limit = 65535 // 4 * 3

    def __init__(self, section: OpenStackSection, site_key: str) -> None:
        self._section = section
        self._site = Tags.of(site_key, "").site
        self._regions = Regions(section)
        self._parts: dict[str, _Part] = {}
        #: Where the machines of leases were seen last; it saves asking all regions.
        self._where: dict[str, _Part] = {}

    async def shapes(self) -> tuple[Shape, ...]:
        """See `Cloud`. A region that is down is left out, if another one answers."""
        parts = await self._all()
        found = await self._of_each(parts, lambda p: flavors.shapes(p.region, self._section))
        return tuple(shape for shapes in found for shape in shapes)

    async def headroom(self, region: str) -> Headroom:
        """See `Cloud`. OpenStack's quotas do not count GPUs."""
        return await flavors.headroom((await self._part(region)).region)

    async def places(self, shape: Shape) -> tuple[str, ...]:
        """See `Cloud`: the zones that are up; those of the settings, in their order."""
        part = await self._part(shape.region)
        there = part.zones = await flavors.zones(part.region)
        wanted = self._section.zones
        if wanted and not set(wanted) & set(there):
            raise InvalidSpec(
                f"None of the zones {', '.join(wanted)} is up in {part.region.name}.",
                hint=f"There are: {', '.join(there) or 'none'}. Correct zones in the settings.",
            )
        zones = tuple(zone for zone in wanted if zone in there) if wanted else there
        return tuple(f"{part.region.name}/{zone}" for zone in zones or ("",))

    async def image(self, wanted: str, shape: Shape) -> Image:
        """See `Cloud`. An ``OWNER`` is a project's id, or ``public``, ``community``, ..."""
        part = await self._part(shape.region)
        return await images.image(part.region, wanted or self._section.image)

    async def network(self, tags: Tags, place: str) -> str:
        """See `Cloud`. One network serves all machines of this site in a region."""
        part, _ = await self._at(place)
        return await part.networks.ready(tags.lease)

    async def networks(self) -> list[Network]:
        """See `Cloud`. All regions must answer."""
        parts = await self._all()
        found = await asyncio.gather(*(named(part.region, self._site) for part in parts))
        return [network for networks in found for network in networks]

    async def make_network(self, tags: Tags, name: str, cidr: str, region: str) -> None:
        """See `Cloud`. Refused where the settings name a network for all machines."""
        part = await self._part(region) if region else (await self._all())[0]
        await self._named(part, name).make(cidr)

    async def named_network(self, name: str, place: str) -> str:
        """See `Cloud`."""
        part, _ = await self._at(place)
        return await self._named(part, name).found()

    async def remove_network(self, name: str) -> bool:
        """See `Cloud`."""
        parts = await self._all()
        gone = await asyncio.gather(*(self._named(part, name).remove_all() for part in parts))
        return all(gone)

    async def create(self, build: Build) -> str:
        """See `Cloud`. With a floating address, that and its port are made before the machine."""
        part, zone = await self._at(build.place)
        self._remember(build.tags.lease, part)
        flavor = await self._flavor(part, build.shape.name)
        network, _, group = build.network.partition("/")
        attached = {"uuid": network}
        if self._section.floating:
            attached = {"port": await part.networks.port(build.tags, build.name, network, group)}
        groups = [group] if group else list(self._section.security_groups)
        return await servers.create(part.region, build, flavor, zone, attached, groups)

    async def server(self, lease_id: str) -> Server | None:
        """See `Cloud`."""
        part = self._where.get(lease_id)
        for one in [part] if part else await self._all():
            found = await servers.of_lease(one.region, self._site, lease_id)
            if found:
                self._remember(lease_id, one)
                return servers.read(found[0], floating=self._section.floating)
        return None

    async def boot_log(self, lease_id: str) -> str:
        """See `Cloud`."""
        part, server = await self._machine(lease_id)
        return await servers.boot_log(part.region, server) if part else ""

    async def remove(self, lease_id: str) -> bool:
        """See `Cloud`."""
        parts = await self._all()
        gone = await asyncio.gather(*(self._remove(part, lease_id) for part in parts))
        if all(gone):
            self._where.pop(lease_id, None)
        return all(gone)

    async def things(self) -> list[Thing]:
        """See `Cloud`. All regions must answer: a list with a hole would hide what is in it."""
        parts = await self._all()
        found = await asyncio.gather(*(self._things(part, self._site) for part in parts))
        return [thing for things in found for thing in things]

    async def sites(self) -> set[str]:
        """See `Cloud`."""
        found = await asyncio.gather(*(self._things(part, "") for part in await self._all()))
        return {thing.tags.site for things in found for thing in things}

    async def extended(self, tags: Tags) -> None:
        """See `Cloud`."""
        part, server = await self._machine(tags.lease)
        if part:
            await servers.note_end(part.region, server, tags)

    async def volumes(self) -> list[Volume]:
        """See `Cloud`."""
        listed: list[Volume] = []
        for part in await self._all():
            found = await volumes.of_site(part.region, self._site)
            holders = [volumes.holder(one) for one, _ in found]
            leases: dict[str, str] = {}
            if any(holders):
                machines = await servers.of_site(part.region, self._site)
                leases = {machine.id: machine.tags.lease for machine in machines}
            if found and not part.zones:
                part.zones = await flavors.zones(part.region)
            listed += [
                volumes.read(one, part.region.name, part.zones, leases.get(at, at))
                for (one, _), at in zip(found, holders, strict=True)
            ]
        return listed

    async def volume(self, tags: Tags, name: str, size_bytes: int, place: str) -> str:
        """See `Cloud`."""
        part, zone = await self._at(place)
        made = await volumes.ready(part.region, self._section, tags, name, size_bytes, zone)
        return f"{part.region.name}/{made}"

    async def attach(self, lease_id: str, volume: str) -> str:
        """See `Cloud`."""
        part, server = await self._machine(lease_id)
        if part is None:
            raise NotFound("The machine is gone.", hint="Start it again with its volume.")
        return await volumes.attach(part.region, server, volume.rpartition("/")[2])

    async def remove_volume(self, volume: str) -> None:
        """See `Cloud`."""
        region, _, one = volume.rpartition("/")
        await volumes.remove((await self._part(region)).region, one)

    async def close(self) -> None:
        """See `Cloud`."""
        self._regions.close()

    async def _all(self) -> list[_Part]:
        return [self._kept(region) for region in await self._regions.all()]

    async def _part(self, region: str) -> _Part:
        return self._kept(await self._regions.named(region))

    def _kept(self, region: Region) -> _Part:
        if region.name not in self._parts:
            networks = Networks(region, self._section, self._site)
            self._parts[region.name] = _Part(region, networks)
        return self._parts[region.name]

    def _named(self, part: _Part, name: str) -> NamedNetwork:
        if name not in part.named:
            part.named[name] = NamedNetwork(part.region, self._section, self._site, name)
        return part.named[name]

    async def _at(self, place: str) -> tuple[_Part, str]:
        region, _, zone = place.partition("/")
        return await self._part(region), zone

    async def _of_each(self, parts: list[_Part], ask: Callable[[_Part], Awaitable[T]]) -> list[T]:
        """Return what the regions answer that are up; raises if none is, or for any other error."""
        answers = await asyncio.gather(*(ask(part) for part in parts), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failures:
            if not isinstance(failure, Unavailable) or len(failures) == len(parts):
                raise failure
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _flavor(self, part: _Part, name: str) -> str:
        if name not in part.flavors:
            part.flavors = await flavors.ids(part.region)
        if name not in part.flavors:
            raise NotFound(
                f"The flavor {name} is gone from {part.region.name}.", hint="Try another shape."
            )
        return part.flavors[name]

    async def _machine(self, lease_id: str) -> tuple[_Part | None, str]:
        server = await self.server(lease_id)
        return (self._where[lease_id], server.id) if server else (None, "")

    async def _remove(self, part: _Part, lease_id: str) -> bool:
        if lease_id != SHARED:
            # A port goes after its machine: nova would look for it.
            if not await servers.remove(part.region, self._site, lease_id):
                return False
            if not await part.networks.remove(lease_id):
                return False
            part.networks.not_used_by(lease_id)
        if await servers.of_site(part.region, self._site):
            return True  # they use it
        return await part.networks.tidy(asked=lease_id == SHARED)

    async def _things(self, part: _Part, site: str) -> list[Thing]:
        machines, others, disks = await asyncio.gather(
            servers.of_site(part.region, site),
            part.networks.things(site),
            volumes.of_site(part.region, site),
        )
        return [*machines, *others, *(volumes.thing(one, tags) for one, tags in disks)]

    def _remember(self, lease_id: str, part: _Part) -> None:
        if len(self._where) > _REMEMBERED:
            self._where.clear()
        self._where[lease_id] = part
