"""Finding the image to boot from at EC2."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from gridcloud.errors import NotFound
from gridcloud.model.need import GIB
from gridcloud.providers.cloud.clouds import Image
from gridcloud.providers.libcloud.asking import Json, Region, filters, items

_ID = re.compile(r"ami-[0-9a-f]{8,17}")
#: The accounts by which makers of images publish them, as each tells in its documentation.
OWNERS = {
    "debian": "136693071363",
    "ubuntu": "099720109477",
    "fedora": "125523088429",
    "rocky": "792107900819",
    "almalinux": "764336703387",
    "redhat": "309956199498",
    "suse": "013907871322",
}
#: Whom the makers of these images log in as; any name works, since gridcloud makes the account.
_USERS = {
    "debian": "admin",
    "ubuntu": "ubuntu",
    "fedora": "fedora",
    "centos": "centos",
    "rocky": "rocky",
    "almalinux": "ec2-user",
    "suse": "ec2-user",
    "rhel": "ec2-user",
    "al20": "ec2-user",
    "amzn": "ec2-user",
}
_ARCHITECTURES = {"x86_64": "x86_64", "aarch64": "arm64"}
_NEAR = 5


async def found(region: Region, wanted: str, architecture: str) -> Json:
    """Return the newest image of an id, of ``OWNER/NAME``, or of a name in the own account or
    Amazon's; ``*`` is any text. Raises `NotFound`, naming near ones."""
    if _ID.fullmatch(wanted):
        answer = await region.ask("DescribeImages", ImageId=[wanted])
        if hits := items(answer, "imagesSet"):
            return hits[0]
        raise _none(region, wanted, [])
    owner, has_owner, name = wanted.partition("/")
    owners = [OWNERS.get(owner.lower(), owner)] if has_owner else ["self", "amazon"]
    told: dict[str, str | list[str]] = {
        "name": name if has_owner else wanted,
        "architecture": _ARCHITECTURES.get(architecture, architecture),
        "state": "available",
    }
    try:
        answer = await region.ask("DescribeImages", Owner=owners, Filter=filters(told))
    except NotFound:
        answer = {}
    hits = [one for one in items(answer, "imagesSet") if one.get("imageId")]
    if not hits:
        begin = f"{re.split(r'[*?]', str(told['name']))[0][:8]}*"
        near = await region.ask("DescribeImages", Owner=owners, Filter=filters({"name": begin}))
        raise _none(region, wanted, items(near, "imagesSet"))
    return max(hits, key=lambda one: (str(one.get("creationDate")), str(one["imageId"])))


def read(found: Mapping[str, Any]) -> Image:
    """Return what an image says of itself."""
    architecture = str(found.get("architecture") or "x86_64")
    return Image(
        id=str(found.get("imageId")),
        name=str(found.get("name") or found.get("imageId"))[:255],
        user=_user(found),
        disk_bytes=disk_gib(found) * GIB,
        architecture="aarch64" if architecture == "arm64" else architecture,
    )


def disk_gib(found: Mapping[str, Any]) -> int:
    """Return the size of an image's root disk; 0 if it is not told."""
    root = found.get("rootDeviceName")
    for one in items(found, "blockDeviceMapping"):
        ebs = one.get("ebs")
        if one.get("deviceName") == root and isinstance(ebs, dict):
            size = str(ebs.get("volumeSize") or "0")
            return int(size) if size.isdigit() else 0
    return 0


def _user(found: Mapping[str, Any]) -> str:
    about = f"{found.get('name') or ''} {found.get('imageLocation') or ''}".lower()
    return next((user for word, user in _USERS.items() if word in about), "gridcloud")


def _none(region: Region, wanted: str, near: list[Json]) -> NotFound:
    names = sorted({str(one.get("name")) for one in near if one.get("name")})
    closest = difflib.get_close_matches(wanted.rpartition("/")[2], names, _NEAR) or names[:_NEAR]
    owners = ", ".join(OWNERS)
    return NotFound(
        f"There is no image {wanted!r} in {region.name}.",
        hint=f"There are for instance: {', '.join(closest)}."
        if closest
        else f"Name one as OWNER/NAME*; OWNER is an account, self, amazon, or one of {owners}.",
    )
