"""Finding the image to boot from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from gridcloud.errors import InvalidSpec, NotFound
from gridcloud.model.need import GIB
from gridcloud.providers.cloud.clouds import Image
from gridcloud.providers.openstack.regions import Region

_ID = re.compile(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")
_ARCHITECTURES = {"": "x86_64", "amd64": "x86_64", "arm64": "aarch64"}
#: Whom the makers of these images log in as; any name works, since gridcloud makes the account.
_USERS = {
    "debian": "debian",
    "ubuntu": "ubuntu",
    "fedora": "fedora",
    "centos": "centos",
    "almalinux": "almalinux",
    "rocky": "rocky",
    "opensuse": "opensuse",
    "rhel": "cloud-user",
}
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_NEAR = 5


async def image(region: Region, wanted: str) -> Image:
    """Return the newest image of an id, a name, or ``OWNER/NAME``, with ``*`` for any text.

    OWNER is the id of the project that has it, or one of ``public``, ``shared``, ``community``
    and ``private``. Raises `NotFound`, naming near ones.
    """
    if not wanted:
        raise InvalidSpec(
            "No image is named to boot from.", hint="Name one with --image or in the settings."
        )
    if _ID.fullmatch(wanted):
        return read(await region.get("image", f"/images/{wanted}"))
    exact = "" if "*" in wanted else wanted
    found = await region.listed("image", "/images", "images", **({"name": exact} if exact else {}))
    if not (hits := matching(found, wanted)) and exact:
        found = await region.listed("image", "/images", "images")
        hits = matching(found, wanted)
    if not hits and wanted.startswith("community/"):
        found = await region.listed("image", "/images", "images", visibility="community")
        hits = matching(found, wanted)
    if not hits:
        names = sorted({str(one.get("name")) for one in found if one.get("name")})
        near = difflib.get_close_matches(wanted.rpartition("/")[2], names, _NEAR) or names[:_NEAR]
        raise NotFound(
            f"There is no image {wanted!r} in {region.name or 'this cloud'}.",
            hint=f"There are for instance: {', '.join(near)}." if near else "There are none.",
        )
    return read(max(hits, key=lambda one: (str(one.get("created_at")), one["id"])))


def matching(found: list[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """Return the images that can be booted from and that a name or ``OWNER/NAME`` means.

    A name may hold a ``/`` itself, as those of EGI do; so whole names go first.
    """
    there = [one for one in found if one.get("status") == "active" and one.get("name")]
    if whole := [one for one in there if one["name"] == wanted]:
        return whole
    owner, has_owner, name = wanted.partition("/")
    pattern = re.sub(r"([\[?])", r"[\1]", name if has_owner else wanted)
    return [
        one
        for one in there
        if fnmatchcase(one["name"], pattern)
        and (not has_owner or owner in {one.get("owner"), one.get("visibility")})
    ]


def read(found: Mapping[str, Any]) -> Image:
    """Return what an image says of itself."""
    architecture = str(found.get("hw_architecture") or found.get("architecture") or "")
    # Some formats are sparse: `size` is what is stored, `virtual_size` what a disk must hold.
    size = max(_whole(found.get("virtual_size")), _whole(found.get("min_disk")) * GIB)
    return Image(
        id=str(found.get("id")),
        name=str(found.get("name") or found.get("id"))[:255],
        user=_user(found),
        disk_bytes=size,
        memory_bytes=_whole(found.get("min_ram")) * 1024**2,
        architecture=_ARCHITECTURES.get(architecture, architecture),
    )


def _user(found: Mapping[str, Any]) -> str:
    told = str(found.get("os_admin_user") or "")
    if _USER.fullmatch(told):
        return told
    about = f"{found.get('os_distro') or ''} {found.get('name') or ''}".lower()
    return next((user for word, user in _USERS.items() if word in about), "gridcloud")


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
