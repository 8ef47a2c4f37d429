"""An account at Oracle Cloud: where each question goes, and in what order things are made and
removed."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from gridcloud.errors import NotFound, Unavailable
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import MACHINE, SHARED, Tags, Thing, Volume
from gridcloud.providers.cloud.clouds import Build, Cloud, Condition, Image, Server
from gridcloud.providers.oci import images, servers, shapes, volumes
from gridcloud.providers.oci.asking import Region, Regions
from gridcloud.providers.oci.networks import Networks
from gridcloud.providers.oci.section import OCISection
from gridcloud.providers.oci.tagging import gone, leaving, of_site

_REMEMBERED = 10_000


class OCICloud(Cloud):
    """See `Cloud`. A place is ``REGION/AVAILABILITY-DOMAIN``, and a volume's id ``REGION/OCID``.

    Besides connections it keeps only what saves questions: nothing that is not at OCI.
    """

    #: OCI takes 32 000 bytes of metadata in all, of which this is the part before base64.
    user_data_limit: ClassVar[int] = 23 * 1024
    shows_late_seconds: ClassVar[float] = 5.0

    def __init__(self, section: OCISection, site_key: str) -> None:
        self._section = section
        self._site = Tags.of(site_key, "").site
        self._regions = Regions(section)
        self._networks: dict[str, Networks] = {}
        #: The addresses of machines, which do not change.
        self._addresses: dict[str, str] = {}
        #: Tokens that OCI does not take again.
        self._spent: set[str] = set()

    async def shapes(self) -> tuple[Shape, ...]:
        """See `Cloud`. A region that is down is left out, if another one answers."""
        regions = await self._regions.all()
        answers = await asyncio.gather(
            *(shapes.shapes(region, self._section) for region in regions), return_exceptions=True
        )
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failures:
            if not isinstance(failure, Unavailable) or len(failures) == len(answers):
                raise failure
        return tuple(
            shape for found in answers if not isinstance(found, BaseException) for shape in found
        )

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
            self._network_of(region).outdated()
            raise

    async def server(self, lease_id: str) -> Server | None:
        """See `Cloud`. One that ended, as spot capacity that was taken back, is not shown."""
        for region, found in await self._of_lease(lease_id):
            for machine in servers.alive(found):
                condition = servers.condition(machine)
                where = ""
                if condition is Condition.RUNNING:
                    where = await self._address(region, machine)
                return Server(id=str(machine.id), condition=condition, address=where)
        return None

    async def boot_log(self, lease_id: str) -> str:
        """See `Cloud`. OCI copies the console for each question, which takes some seconds."""
        for region, found in await self._of_lease(lease_id):
            for machine in servers.alive(found):
                return await servers.boot_log(
                    region, machine, Tags(site=self._site, lease=lease_id)
                )
        return ""

    async def remove(self, lease_id: str) -> bool:
        """See `Cloud`."""
        regions = await self._regions.all()
        done = await asyncio.gather(*(self._remove(region, lease_id) for region in regions))
        return all(done)

    async def remove_others(self, lease_id: str) -> None:
        """See `Cloud`. A launch that was moved to another place may have left one there."""
        alive = [
            (region, machine)
            for region, found in await self._of_lease(lease_id)
            for machine in servers.alive(found)
        ]
        for region, machine in alive[1:]:
            await servers.remove(region, [machine])

    async def things(self) -> list[Thing]:
        """See `Cloud`. All regions must answer: a list with a hole would hide what is in it."""
        regions = await self._regions.all()
        found = await asyncio.gather(*(self._things(region) for region in regions))
        return [thing for things in found for thing in things]

    async def extended(self, tags: Tags) -> None:
        """See `Cloud`."""
        for region, found in await self._of_lease(tags.lease):
            await servers.note_end(region, servers.alive(found), tags)

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

    async def attach(self, lease_id: str, volume: str) -> str:
        """See `Cloud`."""
        for region, found in await self._of_lease(lease_id):
            for machine in servers.alive(found):
                return await volumes.attach(region, machine, volume.rpartition("/")[2])
        raise NotFound("The machine is gone.", hint="Start it again with its volume.")

    async def remove_volume(self, volume: str) -> None:
        """See `Cloud`."""
        name, _, one = volume.rpartition("/")
        await volumes.remove(await self._regions.named(name), one)

    async def close(self) -> None:
        """See `Cloud`."""
        self._regions.close()

    async def _at(self, place: str) -> tuple[Region, str]:
        name, _, domain = place.partition("/")
        return await self._regions.named(name), domain

    def _network_of(self, region: Region) -> Networks:
        if region.name not in self._networks:
            self._networks[region.name] = Networks(region, self._section, self._site)
        return self._networks[region.name]

    async def _of_lease(self, lease_id: str) -> list[tuple[Region, list[tuple[Any, Tags]]]]:
        regions = await self._regions.all()
        found = await asyncio.gather(
            *(servers.of_lease(region, self._site, lease_id) for region in regions)
        )
        return list(zip(regions, found, strict=True))

    async def _address(self, region: Region, machine: Any) -> str:
        known = self._addresses.get(str(machine.id), "")
        if not known:
            known = await servers.address(region, machine, self._section.address)
        if known:
            if len(self._addresses) >= _REMEMBERED:
                self._addresses.clear()
            self._addresses[str(machine.id)] = known
        return known

    async def _remove(self, region: Region, lease_id: str) -> bool:
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

    async def _things(self, region: Region) -> list[Thing]:
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
