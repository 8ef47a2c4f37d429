"""Block volumes at Oracle Cloud: made once for each name, attached, removed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from oci.core.models import AttachParavirtualizedVolumeDetails, CreateVolumeDetails

from gridcloud.errors import Conflict, InvalidSpec, NotFound, Unavailable
from gridcloud.model.need import GIB
from gridcloud.model.things import KEPT, Tags, Volume
from gridcloud.providers.oci.asking import Region
from gridcloud.providers.oci.section import OCISection
from gridcloud.providers.oci.tagging import leaving, of_site

_READY_SECONDS, _LOOK_SECONDS = 40.0, 0.5
_NAME_TAG = "gridcloud-name"
#: OCI makes none smaller.
_LEAST_GIB = 50


async def of_region(region: Region, site: str) -> list[tuple[Any, Tags]]:
    """Return the volumes of a site, the oldest first."""
    found = await region.listed("disks", "list_volumes", compartment_id=region.compartment)
    return [(one, tags) for one, tags in of_site(found, site) if not leaving(one)]


async def holders(region: Region) -> dict[str, str]:
    """Return the machine that each attached volume is at, by their ids."""
    found = await region.listed("compute", "list_volume_attachments", region.compartment)
    return {str(one.volume_id): str(one.instance_id) for one in found if not _detached(one)}


def read(found: Any, region: str, holder: str) -> Volume:
    """Return how OCI shows a volume; ``holder`` is the lease of the machine that it is at."""
    return Volume(
        id=f"{region}/{found.id}",
        name=(found.freeform_tags or {}).get(_NAME_TAG) or str(found.display_name or found.id),
        size_bytes=int(found.size_in_gbs or 0) * GIB,
        created_at=found.time_created,
        attached_to=holder,
        place=f"{region}/{found.availability_domain}",
    )


async def ready(
    region: Region, section: OCISection, tags: Tags, name: str, size_bytes: int, domain: str
) -> str:
    """Return the id of the volume of a name, made if it is not there, once it can be attached."""
    there = await _named(region, tags.site, name)
    if not there and not size_bytes:
        raise NotFound(
            f"There is no volume {name!r} in {region.name}.",
            hint="Say a size to have it made, as in NAME:50G:/mount.",
        )
    if not there:
        made = await _make(region, section, tags, name, size_bytes, domain)
        there = await _named(region, tags.site, name) or [made]
        for other in there[1:]:  # made at the same time; nothing can be on them yet
            await region.delete("disks", "delete_volume", other.id)
    found = there[0]
    if str(found.availability_domain) != domain:
        raise Conflict(
            f"The volume {name} is in {found.availability_domain}.", hint="Make the machine there."
        )
    if str(found.id) in await holders(region):
        raise Conflict(
            f"The volume {name} is attached to another machine.",
            hint="End that machine first, or name another volume.",
        )
    until = asyncio.get_running_loop().time() + _READY_SECONDS
    while (state := str(found.lifecycle_state)) != "AVAILABLE":
        if state == "FAULTY" or asyncio.get_running_loop().time() > until:
            raise Unavailable(
                f"The volume {name} is {state.lower()}.", hint="Remove it if that does not pass."
            )
        await asyncio.sleep(_LOOK_SECONDS)
        found = await region.ask("disks", "get_volume", found.id)
    return str(found.id)


async def attach(region: Region, machine: Any, volume: str) -> str:
    """Attach a volume to a machine and wait until it is; return its device. Idempotent.

    The device's name is asked for, so that it is the same whatever else is attached; images that
    know no such names show the volume under one of the kernel's, which is unknown here.
    """
    until = asyncio.get_running_loop().time() + _READY_SECONDS
    asked = False
    while True:
        found = await _attachment(region, volume)
        if found is not None and str(found.instance_id) != str(machine.id):
            raise Conflict("The volume is attached to another machine.", hint="End that first.")
        if found is not None and str(found.lifecycle_state) == "ATTACHED":
            return str(found.device or "")
        if found is None and not asked:
            details = AttachParavirtualizedVolumeDetails(
                instance_id=machine.id,
                volume_id=volume,
                device=await _device(region, machine),
                display_name="gridcloud",
            )
            await region.ask("compute", "attach_volume", details)
            asked = True
        if asyncio.get_running_loop().time() > until:
            raise Unavailable("The volume is not attached yet.", hint="It is tried again.")
        await asyncio.sleep(_LOOK_SECONDS)


async def remove(region: Region, volume: str) -> None:
    """Remove a volume; raises `Conflict` while it is attached. Idempotent."""
    if volume in await holders(region):
        raise Conflict(
            "The volume is attached to a machine.", hint="End that machine, then remove it."
        )
    try:
        found = await region.ask("disks", "get_volume", volume)
    except NotFound:
        return
    if not leaving(found):
        await region.delete("disks", "delete_volume", volume)


async def _named(region: Region, site: str, name: str) -> list[Any]:
    mine = await of_region(region, site)
    return [one for one, _ in mine if (one.freeform_tags or {}).get(_NAME_TAG) == name]


async def _make(
    region: Region, section: OCISection, tags: Tags, name: str, size_bytes: int, domain: str
) -> Any:
    kept: Mapping[str, str] = tags.model_copy(update={"lease": KEPT}).written()
    details = CreateVolumeDetails(
        availability_domain=domain,
        compartment_id=region.compartment,
        display_name=f"gridcloud-{name}",
        size_in_gbs=max(_LEAST_GIB, -(-size_bytes // GIB)),
        vpus_per_gb=section.volume_performance,
        freeform_tags={**kept, _NAME_TAG: name},
    )
    return await region.ask("disks", "create_volume", details)


async def _attachment(region: Region, volume: str) -> Any:
    found = await region.listed(
        "compute", "list_volume_attachments", region.compartment, volume_id=volume
    )
    return next((one for one in found if not _detached(one)), None)


async def _device(region: Region, machine: Any) -> str | None:
    """Return a free device of a machine; None for an image that has no consistent names."""
    try:
        free = await region.listed(
            "compute", "list_instance_devices", machine.id, is_available=True
        )
    except InvalidSpec:
        return None
    return min((str(one.name) for one in free), default=None)


def _detached(attachment: Any) -> bool:
    return str(attachment.lifecycle_state) == "DETACHED"
