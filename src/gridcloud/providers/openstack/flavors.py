"""The sizes of machine of a region, their GPUs, and what the quota leaves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from gridcloud.model.need import GIB, Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.providers.openstack.errors import not_understood
from gridcloud.providers.openstack.regions import Region
from gridcloud.providers.openstack.section import OpenStackSection

_MIB = 1024**2
#: What operators call their GPUs in an alias or a device profile; those can be network cards too.
_GPU = re.compile(
    r"gpu|nvidia|tesla|geforce|quadro|rtx|grid|radeon|instinct"
    r"|(?<![a-z0-9])(a\d{1,3}|b\d{2,3}|h\d{2,3}|k\d{2}|l\d{1,2}s?|m\d{2}|p\d{1,3}|t4|v100|mi\d{2,3})"
    r"(?![a-z0-9])",
    re.IGNORECASE,
)
_ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


async def shapes(region: Region, section: OpenStackSection) -> list[Shape]:
    """Return the flavors of the settings that this account may use."""
    found = await region.listed("compute", "/flavors/detail", "flavors")
    wanted = [one for one in found if _matches(one.get("name"), section.flavors)]
    made = [one for flavor in wanted if (one := shape(flavor, region.name, section))]
    return list({one.name: one for one in reversed(made)}.values())[::-1]


def shape(flavor: Mapping[str, Any], region: str, section: OpenStackSection) -> Shape | None:
    """Return what a flavor is; None for one that nothing can be made of."""
    try:
        name, cpus, memory = flavor["name"], int(flavor["vcpus"]), int(flavor["ram"]) * _MIB
        disk = int(flavor.get("disk") or 0) * GIB
    except (KeyError, TypeError, ValueError) as error:
        raise not_understood("a flavor") from error
    extra = flavor.get("extra_specs")
    extra = extra if isinstance(extra, dict) else {}
    if flavor.get("OS-FLV-DISABLED:disabled") or not name or cpus < 1 or memory < 1:
        return None
    told = [number for pattern, number in section.gpus.items() if fnmatchcase(name, pattern)]
    architecture = str(extra.get("trait:HW_ARCH", extra.get("hw:architecture", "x86_64")))
    return Shape(
        name=name,
        region=region,
        resources=Resources(cpus=cpus, memory_bytes=memory, gpus=told[0] if told else gpus(extra)),
        disk_bytes=disk,
        price=next(
            (p for pattern, p in section.prices.items() if fnmatchcase(name, pattern)), None
        ),
        currency=section.currency,
        architecture=_ARCHITECTURES.get(architecture, architecture),
    )


def gpus(extra: Mapping[str, Any]) -> int:
    """Return how many GPUs the extra specs of a flavor promise.

    As nova documents them: ``resources:VGPU`` (or PGPU, or a custom class that is named for one),
    ``pci_passthrough:alias`` as ``NAME:COUNT,...``, ``accel:device_profile``.
    """
    found = 0
    for key, value in extra.items():
        resource = re.fullmatch(r"resources\d*:(\w+)", key)
        if resource and (resource[1] in {"VGPU", "PGPU"} or _custom_gpu(resource[1])):
            found += _count(value)
        elif key == "pci_passthrough:alias":
            aliases = (alias.strip().partition(":") for alias in str(value).split(","))
            found += sum(_count(number or 1) for name, _, number in aliases if _GPU.search(name))
        elif key == "accel:device_profile" and _GPU.search(str(value)):
            found += 1
    return min(found, 2**16)


async def headroom(region: Region) -> Headroom:
    """Return what the project's quota leaves."""
    limits = (await region.get("compute", "/limits")).get("limits")
    absolute = limits.get("absolute") if isinstance(limits, dict) else None
    if not isinstance(absolute, dict):
        raise not_understood("the limits of the project")
    memory = _left(absolute, "maxTotalRAMSize", "totalRAMUsed")
    return Headroom(
        cpus=_left(absolute, "maxTotalCores", "totalCoresUsed"),
        memory_bytes=None if memory is None else memory * _MIB,
        machines=_left(absolute, "maxTotalInstances", "totalInstancesUsed"),
    )


async def ids(region: Region) -> dict[str, str]:
    """Return the ids of flavors by name; of two of one name the first counts, as in `shapes`."""
    found = await region.listed("compute", "/flavors", "flavors")
    return {str(one.get("name")): one["id"] for one in reversed(found)}


async def zones(region: Region) -> tuple[str, ...]:
    """Return the availability zones that are up."""
    answer = await region.get("compute", "/os-availability-zone")
    listed = answer.get("availabilityZoneInfo")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise not_understood("the availability zones")
    return tuple(
        str(one.get("zoneName")) for one in listed if (one.get("zoneState") or {}).get("available")
    )


def _left(limits: Mapping[str, Any], most: str, used: str) -> int | None:
    maximum = limits.get(most, -1)
    if not isinstance(maximum, int) or maximum < 0:
        return None
    taken = limits.get(used, 0)
    return max(0, maximum - (taken if isinstance(taken, int) else 0))


def _matches(name: object, patterns: tuple[str, ...]) -> bool:
    return isinstance(name, str) and any(fnmatchcase(name, pattern) for pattern in patterns)


def _custom_gpu(resource: str) -> bool:
    return resource.startswith("CUSTOM_") and bool(_GPU.search(resource.replace("_", " ")))


def _count(text: object) -> int:
    try:
        return max(0, int(str(text)))
    except ValueError:
        return 0
