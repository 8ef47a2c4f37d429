"""Volumes in cinder, and attaching them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gridcloud.errors import Conflict, NotFound, Unavailable
from gridcloud.model.need import GIB
from gridcloud.model.things import KEPT, Tags, Thing, Volume
from gridcloud.providers.openstack.errors import not_understood
from gridcloud.providers.openstack.regions import Json, Region
from gridcloud.providers.openstack.section import OpenStackSection
from gridcloud.providers.openstack.tagging import of_server

_SERVICE = "volumev3"
_READY_SECONDS, _LOOK_SECONDS = 40.0, 0.5
_USED = frozenset({"in-use", "attaching", "detaching", "reserved"})


async def of_site(region: Region, site: str) -> list[tuple[Json, Tags]]:
    """Return the volumes of a site (if none is named, of all); none where there is no cinder."""
    if not await region.offers(_SERVICE):
        return []
    found = await region.listed(_SERVICE, "/volumes/detail", "volumes")
    tagged = ((one, of_server(one)) for one in found)
    mine = [(one, tags) for one, tags in tagged if tags and site in {"", tags.site}]
    return sorted(mine, key=lambda pair: (str(pair[0].get("created_at")), pair[0]["id"]))


def thing(found: Json, tags: Tags) -> Thing:
    """Return a volume as a thing."""
    return Thing(kind="volume", id=found["id"], tags=tags)


def read(found: Mapping[str, Any], region: str, zones: tuple[str, ...], at: str) -> Volume:
    """Return how cinder shows a volume; ``at`` is the lease of the machine it is at."""
    zone = str(found.get("availability_zone") or "")
    size = found.get("size")
    return Volume(
        id=f"{region}/{found['id']}",
        name=str(found.get("name")),
        size_bytes=(size if isinstance(size, int) else 0) * GIB,
        created_at=_time(found.get("created_at")),
        attached_to=at,
        place=f"{region}/{zone}" if zone in zones else "",
    )


def holder(found: Mapping[str, Any]) -> str:
    """Return the id of the machine that a volume is attached to, if it is."""
    attachments = found.get("attachments")
    for one in attachments if isinstance(attachments, list) else ():
        if isinstance(one, dict) and one.get("server_id"):
            return str(one["server_id"])
    return ""


async def ready(
    region: Region,
    section: OpenStackSection,
    tags: Tags,
    name: str,
    size_bytes: int,
    zone: str,
) -> str:
    """Return the id of the volume of a name, made if it is not there, once it can be attached."""
    there = [one for one, _ in await of_site(region, tags.site) if one.get("name") == name]
    if not there and not size_bytes:
        raise NotFound(
            f"There is no volume {name!r} in {region.name}.",
            hint="Say a size to have it made, as in NAME:10G:/mount.",
        )
    found = there[0] if there else await _make(region, section, tags, name, size_bytes, zone)
    if not there:
        again = [one for one, _ in await of_site(region, tags.site) if one.get("name") == name]
        found = again[0] if again else found
        for other in again[1:]:  # made at the same time; nothing can be on them yet
            await region.delete(_SERVICE, f"/volumes/{other['id']}")
    until = asyncio.get_running_loop().time() + _READY_SECONDS
    while (status := str(found.get("status"))) != "available":
        if status in _USED:
            raise Conflict(
                f"The volume {name} is attached to another machine.",
                hint="End that machine first, or name another volume.",
            )
        if status.startswith("error") or asyncio.get_running_loop().time() > until:
            raise Unavailable(
                f"The volume {name} is {status}.", hint="Remove it if that does not pass."
            )
        await asyncio.sleep(_LOOK_SECONDS)
        found = await _shown(region, found["id"])
    return str(found["id"])


async def attach(region: Region, server: str, volume: str) -> str:
    """Attach a volume to a machine, and wait until it is; return what `device` does. Idempotent."""
    path = f"/servers/{server}/os-volume_attachments"
    answer = await region.get("compute", path)
    attachments = answer.get("volumeAttachments")
    found = next((a for a in attachments or () if a.get("volumeId") == volume), None)
    if found is None:
        body = {"volumeAttachment": {"volumeId": volume}}
        found = (await region.ask("compute", "POST", path, body)).get("volumeAttachment")
    if not isinstance(found, dict):
        raise not_understood("attach a volume")
    until = asyncio.get_running_loop().time() + _READY_SECONDS
    while (status := str((await _shown(region, volume)).get("status"))) != "in-use":
        if status.startswith("error") or asyncio.get_running_loop().time() > until:
            raise Unavailable(f"A volume is {status}, and not attached.", hint="It is tried again.")
        await asyncio.sleep(_LOOK_SECONDS)
    return device(str(found.get("device") or ""), volume)


def device(told: str, volume: str) -> str:
    """Return the file by which an attached volume is surely found.

    What nova tells is a guess: hypervisors name disks in an order of their own. But KVM gives them
    the volume's id as serial number, and virtio keeps 20 characters of that.
    """
    if told.startswith("/dev/vd"):
        return f"/dev/disk/by-id/virtio-{volume[:20]}"
    if told.startswith("/dev/sd"):
        return f"/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_{volume}"
    return told


async def remove(region: Region, volume: str) -> None:
    """Remove a volume and what is on it. Idempotent; raises `Conflict` while it is in use."""
    try:
        status = str((await _shown(region, volume)).get("status"))
    except NotFound:
        return
    if status in _USED:
        raise Conflict(
            "The volume is attached to a machine.", hint="End that machine, then remove it."
        )
    if status != "deleting":
        await region.delete(_SERVICE, f"/volumes/{volume}")


async def _make(
    region: Region,
    section: OpenStackSection,
    tags: Tags,
    name: str,
    size_bytes: int,
    zone: str,
) -> Json:
    wanted: Json = {
        "name": name,
        "size": -(-size_bytes // GIB),
        "metadata": tags.model_copy(update={"lease": KEPT}).written(),
    }
    if section.volume_type:
        wanted["volume_type"] = section.volume_type
    if zone and zone in await _zones(region):
        wanted["availability_zone"] = zone
    made = (await region.ask(_SERVICE, "POST", "/volumes", {"volume": wanted})).get("volume")
    if not isinstance(made, dict) or not isinstance(made.get("id"), str):
        raise not_understood("make a volume")
    return made


async def _zones(region: Region) -> set[str]:
    """Return the zones of the storage, which need not be those of the machines."""
    listed = (await region.get(_SERVICE, "/os-availability-zone")).get("availabilityZoneInfo")
    return {str(one.get("zoneName")) for one in listed or () if isinstance(one, dict)}


async def _shown(region: Region, volume: str) -> Json:
    found = (await region.get(_SERVICE, f"/volumes/{volume}")).get("volume")
    if not isinstance(found, dict):
        raise not_understood("show a volume")
    return found


def _time(text: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)).replace(tzinfo=UTC)
    except ValueError:
        return None
