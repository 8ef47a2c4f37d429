"""The named volumes of a container engine that are a site's."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from gridcloud.errors import Conflict, NotFound
from gridcloud.model.things import KEPT, SITE_TAG, Tags, Volume
from gridcloud.providers.containers import recipe
from gridcloud.providers.containers.engine import Engine

#: What was asked for; the engine does not bound it.
_SIZE_LABEL = "gridcloud-size"


class Volumes:
    """Lists, makes and removes. Nothing blocks; all errors are `GridcloudError`."""

    def __init__(self, reach: Callable[[], Awaitable[Engine]], site_key: str) -> None:
        self._reach = reach
        self._tags = Tags.of(site_key, KEPT)

    async def listed(self) -> list[Volume]:
        """Return the site's, with the lease of a container that each is in."""
        found = []
        prefix = recipe.volume_name(self._tags, "")
        for one in await self._tagged():
            tags, called = Tags.read(one.get("Labels") or {}), str(one.get("Name") or "")
            if tags is not None and tags.site == self._tags.site and called.startswith(prefix):
                holder = await self._holder(called)
                found.append(_read(one, called.removeprefix(prefix), holder))
        return found

    async def sites(self) -> set[str]:
        """Return the sites that have some."""
        tags = [Tags.read(one.get("Labels") or {}) for one in await self._tagged()]
        return {each.site for each in tags if each}

    async def make(self, name: str, size_bytes: int) -> None:
        """Make one. Idempotent."""
        labels = self._tags.written() | {_SIZE_LABEL: str(size_bytes)}
        body = {"Name": recipe.volume_name(self._tags, name), "Labels": labels}
        await (await self._reach()).call("POST", "/volumes/create", body=body)

    async def remove(self, name: str) -> None:
        """Remove one; raises `NotFound`, and `Conflict` while it is in a container."""
        there = {volume.name for volume in await self.listed()}
        if name not in there:
            near = ", ".join(sorted(there)) or "none"
            raise NotFound(f"There is no volume {name!r} here.", hint=f"There are: {near}.")
        called = recipe.volume_name(self._tags, name)
        try:
            await (await self._reach()).call("DELETE", f"/volumes/{called}")
        except NotFound:
            return  # somebody was faster
        except Conflict as error:
            raise Conflict(
                f"The volume {name} is in use by a container.", hint="End its job first."
            ) from error

    async def _tagged(self) -> list[dict[str, Any]]:
        """Return the volumes of all sites."""
        query = {"filters": json.dumps({"label": [SITE_TAG]})}
        found = await (await self._reach()).call("GET", "/volumes", query=query)
        listed = found.get("Volumes") if isinstance(found, dict) else None
        return [one for one in listed or [] if isinstance(one, dict)]

    async def _holder(self, called: str) -> str:
        """Return the lease of a container that has a volume, or else what that is called."""
        query = {"all": "true", "filters": json.dumps({"volume": [called]})}
        found = await (await self._reach()).call("GET", "/containers/json", query=query)
        for one in found if isinstance(found, list) else []:
            tags = Tags.read(one.get("Labels") or {})
            return tags.lease if tags else str(one.get("Id") or "somebody else")
        return ""


def _read(told: dict[str, Any], name: str, holder: str) -> Volume:
    size = str((told.get("Labels") or {}).get(_SIZE_LABEL) or "")
    try:
        # Docker tells seconds, podman parts of them to the billionth.
        made = datetime.fromisoformat(str(told.get("CreatedAt") or ""))
    except ValueError:
        made = None
    return Volume(
        id=str(told["Name"]),
        name=name,
        size_bytes=int(size) if size.isdecimal() else 0,
        created_at=made if made is not None and made.tzinfo else None,
        attached_to=holder,
    )
