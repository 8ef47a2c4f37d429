"""Finding the image to boot from at Oracle Cloud."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Any

from gridcloud.errors import InvalidSpec, NotFound
from gridcloud.model.shape import Shape
from gridcloud.providers.cloud.clouds import Image
from gridcloud.providers.oci.asking import Region

_ID = "ocid1.image."
_OURS, _PLATFORM = "own", "platform"
#: Whom the makers of these images log in as; any name works, since gridcloud makes the account.
_USERS = {"ubuntu": "ubuntu", "oracle": "opc", "centos": "opc"}
_NEAR = 5
_MIB = 2**20


async def found(region: Region, wanted: str, shape: Shape) -> Image:
    """Return the newest image of an OCID, of a name, or of ``OWNER/NAME``, that a shape boots.

    OWNER is ``platform``, ``own`` (the compartment of the settings) or a compartment's OCID; ``*``
    is any text. Raises `NotFound`, naming near ones.
    """
    if wanted.startswith(_ID):
        return _read(await _by_id(region, wanted, shape), shape)
    owner, has_owner, name = wanted.rpartition("/")
    compartment = owner if owner.startswith("ocid1.") else region.compartment
    if has_owner and owner not in {_OURS, _PLATFORM} and compartment != owner:
        raise NotFound(
            f"There is no image {wanted!r}: {owner!r} owns none.",
            hint=f"OWNER is {_PLATFORM}, {_OURS}, or the OCID of a compartment.",
        )
    listed = await region.listed(
        "compute", "list_images", compartment, shape=shape.name, lifecycle_state="AVAILABLE"
    )
    owned = [one for one in listed if _belongs(one, owner)]
    hits = [one for one in owned if fnmatchcase(str(one.display_name), name)]
    if not hits:
        raise _none(region, wanted, name, [str(one.display_name) for one in owned], shape)
    return _read(max(hits, key=lambda one: (str(one.time_created), str(one.id))), shape)


async def _by_id(region: Region, wanted: str, shape: Shape) -> Any:
    try:
        image = await region.ask("compute", "get_image", wanted)
    except NotFound as error:
        raise NotFound(
            f"There is no image {wanted!r} in {region.name}, or this user may not see it.",
            hint="An image's OCID is another one in each region.",
        ) from error
    fitting = await region.listed("compute", "list_image_shape_compatibility_entries", wanted)
    # Images of long ago tell of no shapes at all.
    if fitting and shape.name not in {str(one.shape) for one in fitting}:
        raise InvalidSpec(
            f"The image {image.display_name} does not boot on {shape.name}.",
            hint="Name another image with --image.",
        )
    return image


def _belongs(image: Any, owner: str) -> bool:
    """Tell whether an image is an owner's; those of the platform are in no compartment."""
    if owner == _PLATFORM:
        return image.compartment_id is None
    return owner == "" or image.compartment_id is not None


def _read(image: Any, shape: Shape) -> Image:
    about = f"{image.operating_system} {image.display_name}".lower()
    return Image(
        id=str(image.id),
        name=str(image.display_name or image.id)[:255],
        user=next((user for word, user in _USERS.items() if word in about), "gridcloud"),
        disk_bytes=int(image.size_in_mbs or 0) * _MIB,
        architecture=shape.architecture,  # it was asked for by the shape
    )


def _none(region: Region, wanted: str, name: str, names: list[str], shape: Shape) -> NotFound:
    known = sorted(set(names))
    closest = difflib.get_close_matches(name, known, _NEAR, 0.4) or known[:_NEAR]
    return NotFound(
        f"There is no image {wanted!r} for {shape.name} in {region.name}.",
        hint=f"There are for instance: {', '.join(closest)}."
        if closest
        else f"Name one by its OCID, or as {_PLATFORM}/NAME* or {_OURS}/NAME*.",
    )
