"""An account at EC2: where each question goes, and in what order things are made and removed."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from gridcloud.errors import Unavailable
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import SHARED, Network, Tags, Thing, Volume
from gridcloud.providers.cloud.clouds import Build, Image, Server
from gridcloud.providers.cloud.regional import RegionalCloud
from gridcloud.providers.libcloud import (
    images,
    instance_types,
    named_networks,
    servers,
    volumes,
)
from gridcloud.providers.libcloud.asking import Json, Region, Regions
from gridcloud.providers.libcloud.named_networks import NamedNetwork
from gridcloud.providers.libcloud.networks import Networks
from gridcloud.providers.libcloud.section import EC2Section
from gridcloud.providers.libcloud.tagging import sites

_REMEMBERED = 10_000


class EC2Cloud(RegionalCloud[Region]):
    """See `Cloud`.

    Besides connections it keeps only what saves questions: nothing that is not at EC2.
    """

    user_data_limit: ClassVar[int] = 16 * 1024
    deletes_what_is_off: ClassVar[bool] = True
    names_networks: ClassVar[bool] = True
    shows_late_seconds: ClassVar[float] = 5.0

    def __init__(self, section: EC2Section, site_key: str) -> None:
        super().__init__(Regions(section))
        self._section = section
        self._site = Tags.of(site_key, "").site
        self._networks: dict[str, Networks] = {}
        self._named: dict[tuple[str, str], NamedNetwork] = {}
        self._images: dict[str, Json] = {}
        #: Machines that EC2 ended by itself and that were cleared away; it shows them for an hour.
        self._dismissed: set[str] = set()

    async def headroom(self, region: str) -> Headroom:
        """See `Cloud`. EC2 tells its quotas elsewhere; they show when a machine is made."""
        await self._regions.named(region)
        return Headroom()

    async def places(self, shape: Shape) -> tuple[str, ...]:
        """See `Cloud`. The zones that have the type."""
        region = await self._regions.named(shape.region)
        zones = await instance_types.zones(region, shape, self._section)
        return tuple(f"{region.name}/{zone}" for zone in zones)

    async def image(self, wanted: str, shape: Shape) -> Image:
        """See `Cloud`."""
        region = await self._regions.named(shape.region)
        found = await images.found(region, wanted or self._section.image, shape.architecture)
        self._remember(found)
        return images.read(found)

    async def network(self, tags: Tags, place: str) -> str:
        """See `Cloud`. One VPC serves all machines of this site in a region."""
        region, zone = await self._at(place)
        return await self._network_of(region).ready(tags.lease, zone)

    async def create(self, build: Build) -> str:
        """See `Cloud`."""
        region, _ = await self._at(build.place)
        if build.image.id not in self._images:
            self._remember(await images.found(region, build.image.id, build.image.architecture))
        public = self._section.address == "public"
        try:
            image = self._images[build.image.id]
            return await servers.create(region, build, image, public=public)
        except Unavailable:
            for network in (self._network_of(region), *self._named.values()):
                network.outdated()
            raise

    async def server(self, lease_id: str) -> Server | None:
        """See `Cloud`. One that EC2 ended by itself is shown as failed, until it is removed."""
        found = await self._of_lease(lease_id)
        for _, machine in found:
            if servers.alive([machine]):
                return servers.read(machine, self._section.address)
        for _, machine in found:
            failed = servers.failure(machine)
            if failed and failed.id not in self._dismissed:
                return failed
        return None

    async def boot_log(self, lease_id: str) -> str:
        """See `Cloud`. Also of one that has ended, while EC2 keeps it."""
        for region, machine in reversed(await self._of_lease(lease_id)):
            return await servers.boot_log(region, str(machine["instanceId"]))
        return ""

    async def volumes(self) -> list[Volume]:
        """See `Cloud`."""
        listed = []
        for region in await self._regions.all():
            kept = await volumes.of_site(region, self._site, "kept")
            leases = {}
            if any(volumes.holder(one) for one, _ in kept):
                machines = await servers.of_site(region, self._site)
                leases = {str(one["instanceId"]): tags.lease for one, tags in machines}
            listed += [volumes.read(one, region.name, leases) for one, _ in kept]
        return listed

    async def volume(self, tags: Tags, name: str, size_bytes: int, place: str) -> str:
        """See `Cloud`."""
        region, zone = await self._at(place)
        made = await volumes.ready(region, self._section, tags, name, size_bytes, zone)
        return f"{region.name}/{made}"

    async def networks(self) -> list[Network]:
        """See `Cloud`."""
        found = await self._of_each(lambda region: named_networks.vpcs(region, self._site))
        return [named_networks.read(one, region.name) for region, vpcs in found for one in vpcs]

    async def make_network(self, tags: Tags, name: str, cidr: str, region: str) -> None:
        """See `Cloud`. A VPC of its own."""
        where = await self._regions.named(region) if region else (await self._regions.all())[0]
        await self._named_of(where, name).make(cidr)

    async def named_network(self, name: str, place: str) -> str:
        """See `Cloud`."""
        region, zone = await self._at(place)
        return await self._named_of(region, name).ready("", zone)

    async def remove_network(self, name: str) -> bool:
        """See `Cloud`."""
        gone = await self._of_each(lambda region: self._named_of(region, name).remove())
        return all(left for _, left in gone)

    def _named_of(self, region: Region, name: str) -> NamedNetwork:
        key = region.name, name
        if key not in self._named:
            if len(self._named) >= _REMEMBERED:
                self._named.clear()
            self._named[key] = NamedNetwork(region, self._section, self._site, name)
        return self._named[key]

    def _network_of(self, region: Region) -> Networks:
        if region.name not in self._networks:
            self._networks[region.name] = Networks(region, self._section, self._site)
        return self._networks[region.name]

    def _remember(self, image: Json) -> None:
        if len(self._images) >= _REMEMBERED:
            self._images.clear()
        self._images[str(image["imageId"])] = image

    async def _of_lease(self, lease_id: str) -> list[tuple[Region, Json]]:
        """Return the machines of a lease, those that have ended, too."""
        found = await self._of_each(lambda region: servers.of_lease(region, self._site, lease_id))
        return [(region, machine) for region, machines in found for machine in machines]

    async def _shapes_of(self, region: Region) -> list[Shape]:
        return await instance_types.shapes(region, self._section)

    async def _alive_of(self, region: Region, lease_id: str) -> list[Any]:
        return servers.alive(await servers.of_lease(region, self._site, lease_id))

    async def _end_of(self, region: Region, machine: Any) -> None:
        await servers.remove(region, [machine])

    async def _note_end_of(self, region: Region, machine: Any, tags: Tags) -> None:
        await servers.note_end(region, [machine], tags)

    async def _attach_of(self, region: Region, machine: Any, volume: str) -> str:
        """See `Cloud.attach`. The device is that of types on Nitro."""
        return await volumes.attach(region, machine, volume)

    async def _remove_volume_of(self, region: Region, volume: str) -> None:
        await volumes.remove(region, volume)

    async def _sites_of(self, region: Region) -> set[str]:
        return await sites(region)

    async def _remove_of(self, region: Region, lease_id: str) -> bool:
        network = self._network_of(region)
        found = await servers.of_lease(region, self._site, lease_id)
        await servers.remove(region, found)
        self._dismissed |= {str(one["instanceId"]) for one in found if servers.failure(one)}
        if servers.there(found):
            return False
        if not await volumes.remove_disks(region, self._site, lease_id):
            return False
        network.not_used_by(lease_id)
        machines = bool(await servers.of_site(region, self._site))
        return await network.tidy(machines, asked=lease_id == SHARED)

    async def _things_of(self, region: Region) -> list[Thing]:
        machines, disks, networks = await asyncio.gather(
            servers.of_site(region, self._site),
            volumes.of_site(region, self._site),
            self._network_of(region).things(),
        )
        return [
            *(servers.thing(one, tags) for one, tags in machines),
            *(volumes.thing(one, tags) for one, tags in disks),
            *networks,
        ]
