"""Volumes at LXD: custom storage volumes, known by their tags, attached as disk devices."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from gridcloud.errors import Conflict, NotFound
from gridcloud.model.things import KEPT, LEASE_TAG, SITE_TAG, Tags, Thing, Volume
from gridcloud.providers.lxd.api import API, segment
from gridcloud.providers.lxd.instances import lease_of, path_of, user_keys
from gridcloud.providers.lxd.section import InstanceType, LXDSection

#: Where a container finds a volume; it is shown at the path of the order from there.
MOUNTS = "/mnt/gridcloud"
_NAME_TAG = "gridcloud-name"
#: What the kernel of a virtual machine calls a disk that LXD gives it.
_DISK = "/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_lxd_"


class Volumes:
    """The volumes of one site in a pool. Names at LXD hold the site's, so sites do not meet."""

    def __init__(self, api: API, section: LXDSection, site: str) -> None:
        self._api, self._section, self._site = api, section, site
        self._path = f"/storage-pools/{segment(section.pool)}/volumes/custom"

    async def listed(self) -> list[Volume]:
        """Return this site's volumes."""
        return [_read(one) for one in await self._mine()]

    async def things(self) -> list[Thing]:
        """Return them as things that are kept."""
        tags = Tags(site=self._site, lease=KEPT)
        return [Thing(kind="volume", id=one["name"], tags=tags) for one in await self._mine()]

    async def sites(self) -> set[str]:
        """Return the sites that have some here."""
        return {str(one["config"][f"user.{SITE_TAG}"]) for one in await self._tagged()}

    async def made(self, tags: Tags, name: str, size_bytes: int, place: str) -> str:
        """Return the volume of a name, made if it is not there. See `Cloud.volume`."""
        own = f"gridcloud-{self._site[:12]}-{name}"
        there = {one.id: one for one in await self.listed()}.get(own)
        if there is None and not size_bytes:
            raise NotFound(
                f"There is no volume {name!r} in the pool {self._section.pool}.",
                hint="Say how large it is to be: NAME:SIZE:PATH.",
            )
        if there is None:
            there = await self._make(own, name, tags, size_bytes, place)
        if there.attached_to:
            raise Conflict(
                f"The volume {name} is in use by the machine of {there.attached_to}.",
                hint="Stop that machine first.",
            )
        if place and there.place not in {"", place}:
            raise Conflict(
                f"The volume {name} is on {there.place}.", hint="Make the machine there."
            )
        return own

    async def attach(self, instance: str, volume: str) -> str:
        """Show a volume to an instance; return the folder, or the disk, that it finds it at."""
        name = volume.removeprefix(f"gridcloud-{self._site[:12]}-")
        device, container = f"gc-{name}", self._section.type is InstanceType.CONTAINER
        where = f"{MOUNTS}/{name}" if container else f"{_DISK}{device.replace('-', '--')}"
        seen = await self._api.ask("GET", path_of(instance))
        if device in seen.metadata["devices"]:
            return where
        holders = await self._holders(volume)
        if holders - {instance}:
            raise Conflict(
                f"The volume {name} is in use elsewhere.", hint="Stop its machine first."
            )
        disk = {"type": "disk", "pool": self._section.pool, "source": volume}
        devices = {device: disk | ({"path": where} if container else {})}
        begun = await self._api.ask(
            "PATCH", path_of(instance), {"devices": devices}, etag=seen.etag
        )
        if begun.operation:
            await self._api.wait(begun.operation)
        return where

    async def remove(self, volume: str) -> None:
        """Remove one. Idempotent; raises `Conflict` while it is in use."""
        try:
            holders = await self._holders(volume)
            if holders:
                raise Conflict(
                    f"The volume {volume} is in use by {', '.join(sorted(holders))}.",
                    hint="Stop its machine first.",
                )
            begun = await self._api.ask("DELETE", f"{self._path}/{segment(volume)}")
            if begun.operation:
                await self._api.wait(begun.operation)
        except NotFound:
            return

    async def _make(self, own: str, name: str, tags: Tags, size_bytes: int, place: str) -> Volume:
        # A container mounts a file system; only a virtual machine takes a bare disk.
        container = self._section.type is InstanceType.CONTAINER
        body = {
            "name": own,
            "content_type": "filesystem" if container else "block",
            "config": {"size": str(size_bytes), f"user.{_NAME_TAG}": name, **user_keys(tags)},
        }
        try:
            begun = await self._api.ask(
                "POST", self._path, body, query={"target": place} if place else None
            )
            if begun.operation:
                await self._api.wait(begun.operation)
        except Conflict:
            pass  # an attempt whose answer was lost had made it
        there = {one.id: one for one in await self.listed()}.get(own)
        return there or Volume(id=own, name=name, size_bytes=size_bytes, place=place)

    async def _holders(self, volume: str) -> set[str]:
        told = await self._api.get(f"{self._path}/{segment(volume)}")
        return {_last(path) for path in told.get("used_by") or []}

    async def _mine(self) -> list[dict[str, Any]]:
        site = f"user.{SITE_TAG}"
        return [one for one in await self._tagged() if one["config"][site] == self._site]

    async def _tagged(self) -> list[dict[str, Any]]:
        """Return the volumes of all sites in the project."""
        told = await self._api.get(self._path, recursion="1")
        tagged = {f"user.{SITE_TAG}", f"user.{LEASE_TAG}"}
        return [
            one
            for one in told or []
            if tagged <= one["config"].keys()
            and one.get("project", self._api.project) == self._api.project
        ]


def _read(told: dict[str, Any]) -> Volume:
    created, place = str(told.get("created_at") or ""), str(told.get("location") or "")
    holders = {lease_of(_last(path)) for path in told.get("used_by") or []} - {""}
    return Volume(
        id=told["name"],
        name=told["config"].get(f"user.{_NAME_TAG}", told["name"]),
        size_bytes=int(told["config"].get("size") or 0),
        created_at=datetime.fromisoformat(created) if created[:4] > "0001" else None,
        attached_to=min(holders, default=""),
        place="" if place == "none" else place,
    )


def _last(path: str) -> str:
    return path.partition("?")[0].rpartition("/")[2]
