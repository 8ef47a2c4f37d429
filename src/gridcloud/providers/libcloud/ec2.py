"""An account at EC2: where each question goes, and in what order things are made and removed."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from gridcloud.errors import NotFound, Unavailable
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import SHARED, Tags, Thing, Volume
from gridcloud.providers.cloud.clouds import Build, Cloud, Image, Server
from gridcloud.providers.libcloud import images, instance_types, servers, volumes
from gridcloud.providers.libcloud.asking import Json, Region, Regions
from gridcloud.providers.libcloud.networks import Networks
from gridcloud.providers.libcloud.section import EC2Section

_REMEMBERED = 10_000


class EC2Cloud(Cloud):
    """See `Cloud`. A place is ``REGION/ZONE``, and a volume's id ``REGION/ID``.

    Besides connections it keeps only what saves questions: nothing that is not at EC2.
    """

    user_data_limit: ClassVar[int] = 16 * 1024
    deletes_what_is_off: ClassVar[bool] = True
    shows_late_seconds: ClassVar[float] = 5.0

    def __init__(self, section: EC2Section, site_key: str) -> None:
        self._section = section
        self._site = Tags.of(site_key, "").site
        self._regions = Regions(section)
        self._networks: dict[str, Networks] = {}
        self._images: dict[str, Json] = {}
        #: Machines that EC2 ended by itself and that were cleared away; it shows them for an hour.
        self._dismissed: set[str] = set()

    async def shapes(self) -> tuple[Shape, ...]:
        """See `Cloud`. A region that is down is left out, if another one answers."""
        regions = await self._regions.all()
        answers = await asyncio.gather(
            *(instance_types.shapes(region, self._section) for region in regions),
            return_exceptions=True,
        )
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failures:
            if not isinstance(failure, Unavailable) or len(failures) == len(answers):
                raise failure
        return tuple(
            shape for found in answers if not isinstance(found, BaseException) for shape in found
        )

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
            self._network_of(region).outdated()
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

    async def remove(self, lease_id: str) -> bool:
        """See `Cloud`."""
        regions = await self._regions.all()
        gone = await asyncio.gather(*(self._remove(region, lease_id) for region in regions))
        return all(gone)

    async def remove_others(self, lease_id: str) -> None:
        """See `Cloud`. A launch that was moved to another place may have left one there."""
        alive = [(r, m) for r, m in await self._of_lease(lease_id) if servers.alive([m])]
        for region, machine in alive[1:]:
            await servers.remove(region, [machine])

    async def things(self) -> list[Thing]:
        """See `Cloud`. All regions must answer: a list with a hole would hide what is in it."""
        regions = await self._regions.all()
        found = await asyncio.gather(*(self._things(region) for region in regions))
        return [thing for things in found for thing in things]

    async def extended(self, tags: Tags) -> None:
        """See `Cloud`."""
        for region, machine in await self._of_lease(tags.lease):
            await servers.note_end(region, servers.alive([machine]), tags)

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

    async def attach(self, lease_id: str, volume: str) -> str:
        """See `Cloud`. The device is that of types on Nitro."""
        for region, machine in await self._of_lease(lease_id):
            if servers.alive([machine]):
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
        name, _, zone = place.partition("/")
        return await self._regions.named(name), zone

    def _network_of(self, region: Region) -> Networks:
        if region.name not in self._networks:
            self._networks[region.name] = Networks(region, self._section, self._site)
        return self._networks[region.name]

    def _remember(self, image: Json) -> None:
        if len(self._images) >= _REMEMBERED:
            self._images.clear()
        self._images[str(image["imageId"])] = image

    async def _of_lease(self, lease_id: str) -> list[tuple[Region, Json]]:
        regions = await self._regions.all()
        found = await asyncio.gather(
            *(servers.of_lease(region, self._site, lease_id) for region in regions)
        )
        return [
            (region, machine)
            for region, machines in zip(regions, found, strict=True)
            for machine in machines
        ]

    async def _remove(self, region: Region, lease_id: str) -> bool:
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

    async def _things(self, region: Region) -> list[Thing]:
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
