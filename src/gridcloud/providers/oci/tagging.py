"""How tags are kept at Oracle Cloud: as freeform tags, told in the call that makes a thing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gridcloud.model.things import NAME_TAG, Tags

#: What is on its way out, or has gone; OCI shows such for hours.
_LEAVING = frozenset({"TERMINATING", "TERMINATED", "DELETING", "DELETED"})


def of(thing: Any) -> Tags | None:
    """Return the tags of a thing; None for one that no gridcloud site made."""
    return Tags.read(thing.freeform_tags or {})


def of_site(found: Iterable[Any], site: str, lease_id: str = "") -> list[tuple[Any, Tags]]:
    """Return those of a list that a site made, or that it made for a lease; the oldest first."""
    mine = [
        (one, tags)
        for one in found
        if (tags := of(one)) and tags.site == site and lease_id in {"", tags.lease}
    ]
    return sorted(mine, key=lambda pair: (str(pair[0].time_created), str(pair[0].id)))


def called(thing: Any) -> str:
    """Return the name of the network that a thing is part of; empty if that has none."""
    return str((thing.freeform_tags or {}).get(NAME_TAG, ""))


def gone(thing: Any) -> bool:
    """Tell whether nothing of a thing is left."""
    return str(thing.lifecycle_state) in {"TERMINATED", "DELETED"}


def leaving(thing: Any) -> bool:
    """Tell whether a thing has gone or is about to."""
    return str(thing.lifecycle_state) in _LEAVING
