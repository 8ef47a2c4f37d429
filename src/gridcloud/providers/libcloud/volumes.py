"""Volumes at EC2: made once for each name, attached, removed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from gridcloud.errors import Conflict, NotFound, Unavailable
from gridcloud.model.need import GIB
from gridcloud.model.things import KEPT, Tags, Thing, Volume
from gridcloud.providers.libcloud.asking import Json, Region, items
from gridcloud.providers.libcloud.errors import not_understood
from gridcloud.providers.libcloud.section import EC2Section
from gridcloud.providers.libcloud.tagging import carrying, of, specified, words

_READY_SECONDS, _LOOK_SECONDS = 40.0, 0.5
_NAME_TAG = "gridcloud-name"
_ENDED = frozenset({"deleting", "deleted"})
#: What EC2 recommends for volumes that are attached later; Nitro shows all under their ids.
_DEVICES = tuple(f"/dev/sd{letter}" for letter in "fghijklmnop")
_BY_ID = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_"


async def of_site(region: Region, site: str, lease_id: str = "") -> list[tuple[Json, Tags]]:
    """Return the volumes of a site, or of a lease of it, root disks too; the oldest first."""
    found = await region.listed("DescribeVolumes", "volumeSet", Filter=carrying(site, lease_id))
    mine = [
        (one, tags)
        for one in found
        if (tags := of(one)) and tags.site == site and one.get("status") not in _ENDED
    ]
    return sorted(mine, key=lambda pair: (str(pair[0].get("createTime")), pair[0]["volumeId"]))


def thing(found: Json, tags: Tags) -> Thing:
    """Return a volume as a thing."""
    kind = "volume" if tags.lease == KEPT else "disk"
    return Thing(kind=kind, id=str(found["volumeId"]), tags=tags)


def read(found: Mapping[str, Any], region: str, leases: Mapping[str, str]) -> Volume:
    """Return how EC2 shows a volume; ``leases`` are those of machines by their ids."""
    machine, size = holder(found), str(found.get("size") or "0")
    return Volume(
        id=f"{region}/{found['volumeId']}",
        name=words(found).get(_NAME_TAG) or str(found["volumeId"]),
        size_bytes=(int(size) if size.isdigit() else 0) * GIB,
        created_at=_time(found.get("createTime")),
        attached_to=leases.get(machine, machine),
        place=f"{region}/{found.get('availabilityZone')}",
    )


def holder(found: Mapping[str, Any]) -> str:
    """Return the id of the machine that a volume is attached to, if it is."""
    attached = [one for one in items(found, "attachmentSet") if one.get("status") != "detached"]
    return str(attached[0].get("instanceId") or "") if attached else ""


async def ready(
    region: Region, section: EC2Section, tags: Tags, name: str, size_bytes: int, zone: str
) -> str:
    """Return the id of the volume of a name, made if it is not there, once it can be attached."""
    there = await _named(region, tags.site, name)
    if not there and not size_bytes:
        raise NotFound(
            f"There is no volume {name!r} in {region.name}.",
            hint="Say a size to have it made, as in NAME:10G:/mount.",
        )
    made = None
    if not there:
        made = await _make(region, section, tags, name, size_bytes, zone)
        there = await _named(region, tags.site, name) or [made]
        for other in there[1:]:  # made at the same time; nothing can be on them yet
            await region.delete("DeleteVolume", VolumeId=str(other["volumeId"]))
    found = there[0]
    if found.get("availabilityZone") != zone:
        raise Conflict(
            f"The volume {name} is in {found.get('availabilityZone')}.",
            hint="Make the machine there.",
        )
    volume = str(found["volumeId"])
    until = asyncio.get_running_loop().time() + _READY_SECONDS
    while (status := str(found.get("status"))) != "available":
        if status == "in-use":
            raise Conflict(
                f"The volume {name} is attached to another machine.",
                hint="End that machine first, or name another volume.",
            )
        if status == "error" or asyncio.get_running_loop().time() > until:
            raise Unavailable(
                f"The volume {name} is {status}.", hint="Remove it if that does not pass."
            )
        await asyncio.sleep(_LOOK_SECONDS)
        found = await _shown(region, volume)
    return volume


async def attach(region: Region, machine: Json, volume: str) -> str:
    """Attach a volume to a machine and wait until it is; return its device. Idempotent."""
    own, until = str(machine["instanceId"]), asyncio.get_running_loop().time() + _READY_SECONDS
    asked = False
    while True:
        found = await _shown(region, volume)
        at = holder(found)
        if at not in {"", own}:
            raise Conflict("The volume is attached to another machine.", hint="End that first.")
        states = {str(one.get("status")) for one in items(found, "attachmentSet")}
        if at and states == {"attached"}:
            return _BY_ID + volume.replace("-", "")
        if not at and not asked:
            mapped = items(machine, "blockDeviceMapping")
            taken = {str(one.get("deviceName")) for one in mapped}
            device = next((one for one in _DEVICES if one not in taken), "")
            if not device:
                raise Conflict("The machine has no room for more volumes.", hint="Name fewer.")
            await region.ask("AttachVolume", InstanceId=own, VolumeId=volume, Device=device)
            asked = True
        if asyncio.get_running_loop().time() > until:
            raise Unavailable("A volume is not attached yet.", hint="It is tried again.")
        await asyncio.sleep(_LOOK_SECONDS if asked else 0)


async def remove(region: Region, volume: str) -> None:
    """Remove a volume and what is on it. Idempotent; raises `Conflict` while it is in use."""
    try:
        found = await _shown(region, volume)
    except NotFound:
        return
    if holder(found):
        raise Conflict(
            "The volume is attached to a machine.", hint="End that machine, then remove it."
        )
    if found.get("status") not in _ENDED:
        await region.delete("DeleteVolume", VolumeId=volume)


async def remove_disks(region: Region, site: str, lease_id: str) -> bool:
    """Remove the disks that the machine of a lease left, if it did; return whether none was."""
    found = await of_site(region, site, lease_id)
    for one, _ in found:
        if not holder(one):
            await region.delete("DeleteVolume", VolumeId=str(one["volumeId"]))
    return not found


async def _named(region: Region, site: str, name: str) -> list[Json]:
    mine = await of_site(region, site, KEPT)
    return [one for one, _ in mine if words(one).get(_NAME_TAG) == name]


async def _make(
    region: Region, section: EC2Section, tags: Tags, name: str, size_bytes: int, zone: str
) -> Json:
    kept = tags.model_copy(update={"lease": KEPT})
    [told] = specified(kept, f"gridcloud-{name}", "volume")
    told["Tag"].append({"Key": _NAME_TAG, "Value": name})
    answer = await region.ask(
        "CreateVolume",
        AvailabilityZone=zone,
        Size=-(-size_bytes // GIB),
        VolumeType=section.volume_type,
        TagSpecification=[told],
    )
    if not isinstance(answer.get("volumeId"), str):
        raise not_understood("make a volume")
    return answer


async def _shown(region: Region, volume: str) -> Json:
    found = await region.listed("DescribeVolumes", "volumeSet", VolumeId=[volume])
    if not found:
        raise NotFound(f"There is no volume {volume}.", hint="Start again with it.")
    return found[0]


def _time(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
