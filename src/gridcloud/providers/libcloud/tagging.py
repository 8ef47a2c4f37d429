"""How tags are kept at EC2: as tags, told in the call that makes a thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gridcloud.model.things import LEASE_TAG, NAME_TAG, SITE_TAG, Tags
from gridcloud.providers.libcloud.asking import Json, Region, filters, items


def specified(tags: Tags, name: str, *kinds: str, called: str = "") -> list[Json]:
    """Return the tag specifications of a call that makes things of these kinds; ``called`` is the
    name of the network that they are part of."""
    pairs = {"Name": name, **tags.written()} | ({NAME_TAG: called} if called else {})
    tag = [{"Key": key, "Value": value} for key, value in pairs.items()]
    return [{"ResourceType": kind, "Tag": tag} for kind in kinds]


def of(thing: Mapping[str, Any]) -> Tags | None:
    """Return the tags of a thing; None for one that no gridcloud site made."""
    return Tags.read(words(thing))


def words(thing: Mapping[str, Any]) -> dict[str, str]:
    """Return all tags of a thing."""
    found = items(thing, "tagSet")
    return {str(one.get("key")): str(one.get("value") or "") for one in found}


def carrying(site: str, lease: str = "", **more: str | list[str]) -> list[Json]:
    """Return the filters for what carries these tags; ``_`` in further names stands for ``-``."""
    wanted: dict[str, str | list[str]] = {f"tag:{SITE_TAG}": site}
    if lease:
        wanted[f"tag:{LEASE_TAG}"] = lease
    return filters(wanted | {name.replace("_", "-"): value for name, value in more.items()})


async def sites(region: Region) -> set[str]:
    """Return the sites of which something is in a region."""
    wanted = filters({"key": SITE_TAG})
    found = await region.listed("DescribeTags", "tagSet", Filter=wanted)
    return {str(one.get("value")) for one in found}
