"""How tags are kept: by nova and cinder as metadata, by neutron in the description, since those are
what a thing can be given in the call that makes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gridcloud.model.things import Tags

_WORD = re.compile(r"(gridcloud-[a-z-]+)=(\S+)")


def described(tags: Tags, **more: str) -> str:
    """Return the description of a thing in neutron."""
    words = tags.written() | {f"gridcloud-{key}": value for key, value in more.items()}
    return " ".join(f"{key}={value}" for key, value in words.items())


def words(thing: Mapping[str, Any]) -> dict[str, str]:
    """Return what the description of a thing in neutron tells."""
    text = thing.get("description")
    return dict(_WORD.findall(text)) if isinstance(text, str) else {}


def of_network(thing: Mapping[str, Any]) -> Tags | None:
    """Return the tags of a thing in neutron."""
    return Tags.read(words(thing))


def of_server(thing: Mapping[str, Any]) -> Tags | None:
    """Return the tags of a thing in nova or cinder."""
    metadata = thing.get("metadata")
    if not isinstance(metadata, dict):
        return None
    return Tags.read({str(key): str(value) for key, value in metadata.items()})
