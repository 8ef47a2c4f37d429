"""Finding images: those that LXD has, and those it fetches when a machine is made."""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import Any

from gridcloud.errors import InvalidSpec, NotFound
from gridcloud.providers.cloud.clouds import Image
from gridcloud.providers.lxd.connecting import Remotes
from gridcloud.providers.lxd.section import InstanceType

_LEAST_FINGERPRINT = 6
#: As images are made for these, so is their user called.
_USERS = {"debian", "ubuntu", "fedora", "centos", "almalinux", "rocky", "alpine", "opensuse"}
_USER = "gridcloud"


def found(images: list[dict[str, Any]], wanted: str, kind: InstanceType) -> Image:
    """Return the image that ``wanted`` names by an alias, with ``*`` for any text, by the beginning
    of its fingerprint, or by its description; the newest of several.

    Raises `NotFound`, naming near ones, and `InvalidSpec` if nothing is wanted.
    """
    fitting = [image for image in images if image.get("type", "container") == kind.value]
    names = sorted({name for image in fitting for name in _aliases(image)})
    if not wanted:
        here = f"There are for instance: {', '.join(names[:8])}." if names else "There is none yet."
        raise InvalidSpec(
            "No image is named.", hint=f"Name one with `image` in the settings. {here}"
        )
    named = [image for image in fitting if _is(image, wanted)]
    if not named:
        near = ", ".join(difflib.get_close_matches(wanted, names, 5, 0.4) or names[:5])
        here = f"There are for instance: {near}." if near else "This project has none."
        raise NotFound(
            f"LXD has no {kind.value} image {wanted!r}.",
            hint=f"{here} One that is to be fetched has its server in front: ubuntu:24.04.",
        )
    newest = max(named, key=lambda image: str(image.get("created_at", "")))
    properties = newest.get("properties") or {}
    return Image(
        id=newest["fingerprint"],
        name=next(iter(_aliases(newest)), "") or newest["fingerprint"][:12],
        user=user_of(str(properties.get("os", ""))),
        architecture=newest.get("architecture", "x86_64"),
    )


def fetched(remotes: Remotes, wanted: str, architecture: str) -> Image:
    """Return an image ``REMOTE:ALIAS`` that LXD is to fetch; raises `NotFound` for an unknown
    server. Whether that has it is seen when a machine is made."""
    remote, _, alias = wanted.partition(":")
    remotes.image_server(remote)
    distribution = re.split(r"[/:.-]", remote if remote.startswith("ubuntu") else alias)[0]
    return Image(id=wanted, name=wanted, user=user_of(distribution), architecture=architecture)


def source(remotes: Remotes, image: Image) -> dict[str, str]:
    """Return what LXD is told to make a machine from."""
    remote, colon, alias = image.id.partition(":")
    if not colon:
        return {"type": "image", "fingerprint": image.id}
    server, protocol = remotes.image_server(remote)
    return {
        "type": "image",
        "mode": "pull",
        "server": server,
        "protocol": protocol,
        "alias": alias,
    }


def user_of(distribution: str) -> str:
    """Return whom to log in as; an account that is not there is made at first boot."""
    name = distribution.lower().partition(" ")[0]
    return name if name in _USERS else _USER


def _aliases(image: dict[str, Any]) -> list[str]:
    return [alias["name"] for alias in image.get("aliases") or []]


def _is(image: dict[str, Any], wanted: str) -> bool:
    if len(wanted) >= _LEAST_FINGERPRINT and image["fingerprint"].startswith(wanted):
        return True
    names = [*_aliases(image), str((image.get("properties") or {}).get("description", ""))]
    return any(fnmatch.fnmatchcase(name, wanted) for name in names)
