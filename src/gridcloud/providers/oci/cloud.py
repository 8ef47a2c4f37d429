"""An account at Oracle Cloud: where each question goes, and in what order things are made and
removed."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from gridcloud.errors import Unavailable
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import MACHINE, SHARED, Network, Tags, Thing, Volume
from gridcloud.providers.cloud.clouds import Build, Condition, Image, Server
from gridcloud.providers.cloud.regional import RegionalCloud
from gridcloud.providers.oci import images, named_networks, servers, shapes, volumes
from gridcloud.providers.oci.asking import Region, Regions
from gridcloud.providers.oci.named_networks import NamedNetwork
from gridcloud.providers.oci.networks import Networks
from gridcloud.providers.oci.section import OCISection
from gridcloud.providers.oci.tagging import gone, leaving, of, of_site

_REMEMBERED = 10_000


class OCICloud(RegionalCloud[Region]):
    """See `Cloud`. A place is ``REGION/AVAILABILITY-DOMAIN``, and a volume's id ``REGION/OCID``.

    Besides connections it keeps only what saves questions: nothing that is not at OCI.
    """

    #: OCI takes 32 000 bytes of metadata in all, of which this is the part before base64.
    user_data_limit: ClassVar[int] = 23 * 1024
    shows_late_seconds: ClassVar[float] = 5.0
    names_networks: ClassVar[bool] = True

    def __init__(self, section: OCISection, site_key: str) -> None:
        super().__init__(Regions(section))
        self._section = section
        self._site = Tags.of(site_key, "").site
        self._networks: dict[str, Networks] = {}
        self._named: dict[tuple[str, str], NamedNetwork] = {}
        #: The addresses of machines, which do not change.
        self._addresses: dict[str, str] = {}
        #: Tokens that OCI does not take again.
        self._spent: set[str] = set()

    async def headroom(self, region: str) -> Headroom:
        """See `Cloud`."""
        return await shapes.headroom(await self._regions.named(region), self._section)

    async def places(self, shape: Shape) -> tuple[str, ...]:
        """See `Cloud`. The availability domains that have the shape."""
        region = await self._regions.named(shape.region)
        domains = await shapes.places(region, shape, self._section)
        return tuple(f"{region.name}/{domain}" for domain in domains)

    async def image(self, wanted: str, shape: Shape) -> Image:
        """See `Cloud`."""
        region = await self._regions.named(shape.region)
        return await images.found(region, wanted or self._section.image, shape)

    async def network(self, tags: Tags, place: str) -> str:
        """See `Cloud`. One VCN serves all machines of this site in a region."""
        region, _ = await self._at(place)
        return await self._network_of(region).ready(tags.lease)

    async def create(self, build: Build) -> str:
        """See `Cloud`."""
        region, _ = await self._at(build.place)
        if len(self._spent) >= _REMEMBERED:
            self._spent.clear()
        try:
            public = self._section.address == "public"
            return await servers.create(region, build, self._spent, public=public)
        except Unavailable:
            for network in (self._network_of(region), *self._named.values()):
                network.outdated()
            raise

    async def server(self, lease_id: str) -> Server | None:
        """See `Cloud`. One that ended, as spot capacity that was taken back, is not shown."""
        for region, machine in await self._alive(lease_id):
            condition = servers.condition(machine)
            where = ""
            if condition is Condition.RUNNING:
                where = await self._address(region, machine)
            return Server(id=str(machine.id), condition=condition, address=where)
        return None

    async def boot_log(self, lease_id: str) -> str:
        """See `Cloud`. OCI copies the console for each question, which takes some seconds."""
        for region, machine in await self._alive(lease_id):
            return await servers.boot_log(region, machine, Tags(site=self._site, lease=lease_id))
        return ""

    async def volumes(self) -> list[Volume]:
        """See `Cloud`."""
        listed = []
        for region in await self._regions.all():
            kept = await volumes.of_region(region, self._site)
            holders = await volumes.holders(region) if kept else {}
            leases: dict[str, str] = {}
            if any(str(one.id) in holders for one, _ in kept):
                machines = await servers.of_lease(region, self._site)
                leases = {str(one.id): tags.lease for one, tags in machines}
            for one, _ in kept:
                machine = holders.get(str(one.id), "")
                listed.append(volumes.read(one, region.name, leases.get(machine, machine)))
        return listed

    async def volume(self, tags: Tags, name: str, size_bytes: int, place: str) -> str:
        """See `Cloud`. OCI makes none below 50 GiB."""
        region, domain = await self._at(place)
        made = await volumes.ready(region, self._section, tags, name, size_bytes, domain)
        return f"{region.name}/{made}"

    async def networks(self) -> list[Network]:
        """See `Cloud`."""
        found = await self._of_each(lambda region: named_networks.networks(region, self._site))
        return [one for _, networks in found for one in networks]

    async def make_network(self, tags: Tags, name: str, cidr: str, region: str) -> None:
        """See `Cloud`. A VCN of its own."""
        where = await self._regions.named(region) if region else (await self._regions.all())[0]
        await self._named_of(where, name).make(cidr)

    async def named_network(self, name: str, place: str) -> str:
        """See `Cloud`."""
        region, _ = await self._at(place)
        return await self._named_of(region, name).ready("")

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

    async def _address(self, region: Region, machine: Any) -> str:
        known = self._addresses.get(str(machine.id), "")
        if not known:
            known = await servers.address(region, machine, self._section.address)
        if known:
            if len(self._addresses) >= _REMEMBERED:
                self._addresses.clear()
            self._addresses[str(machine.id)] = known
        return known

    async def _shapes_of(self, region: Region) -> list[Shape]:
        return await shapes.shapes(region, self._section)

    async def _alive_of(self, region: Region, lease_id: str) -> list[Any]:
        return servers.alive(await servers.of_lease(region, self._site, lease_id))

    async def _end_of(self, region: Region, machine: Any) -> None:
        await servers.remove(region, [machine])

    async def _note_end_of(self, region: Region, machine: Any, tags: Tags) -> None:
        await servers.note_end(region, [machine], tags)

    async def _attach_of(self, region: Region, machine: Any, volume: str) -> str:
        return await volumes.attach(region, machine, volume)

    async def _remove_volume_of(self, region: Region, volume: str) -> None:
        await volumes.remove(region, volume)

    async def _sites_of(self, region: Region) -> set[str]:
        """Return those of machines, volumes and networks: of what else there is, one of these is
        the reason."""
        there = region.compartment
        lists = await asyncio.gather(
            region.listed("compute", "list_instances", there),
            region.listed("disks", "list_volumes", compartment_id=there),
            region.listed("network", "list_vcns", there),
        )
        return {
            tags.site for found in lists for one in found if (tags := of(one)) and not gone(one)
        }

    async def _remove_of(self, region: Region, lease_id: str) -> bool:
        network = self._network_of(region)
        machines = await servers.of_lease(region, self._site)
        own = [(one, tags) for one, tags in machines if tags.lease == lease_id]
        await servers.remove(region, servers.alive(own))
        if servers.there(own):
            return False
        for one, _ in await self._histories(region, lease_id):
            await region.delete("compute", "delete_console_history", one.id)
        network.not_used_by(lease_id)
        return await network.tidy(bool(servers.there(machines)), asked=lease_id == SHARED)

    async def _histories(self, region: Region, lease_id: str = "") -> list[tuple[Any, Tags]]:
        found = await region.listed("compute", "list_console_histories", region.compartment)
        return [one for one in of_site(found, self._site, lease_id) if not leaving(one[0])]

    async def _things_of(self, region: Region) -> list[Thing]:
        machines, disks, histories, networks = await asyncio.gather(
            servers.of_lease(region, self._site),
            volumes.of_region(region, self._site),
            self._histories(region),
            self._network_of(region).things(),
        )
        kinds = {MACHINE: machines, "volume": disks, "console history": histories}
        return [
            *(
                Thing(kind=kind, id=str(one.id), tags=tags, costs=kind != "console history")
                for kind, found in kinds.items()
                for one, tags in found
                if not gone(one)
            ),
            *networks,
        ]
