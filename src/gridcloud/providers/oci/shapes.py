"""Oracle's shapes: what they have, where they are, and what the account's limits leave.

A CPU here is what a machine shows as one: a hardware thread. Oracle counts OCPUs, physical cores:
two CPUs on x86 and on Ampere A2 and later, but one on Ampere A1. A flexible shape is made with
whole OCPUs, and with memory between two bounds for each.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from oci.core.models import LaunchInstanceShapeConfigDetails

from gridcloud.errors import Forbidden, GridcloudError, InvalidSpec, NoCapacity, NotFound
from gridcloud.model.need import GIB, Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.providers.oci.asking import Region
from gridcloud.providers.oci.errors import not_understood
from gridcloud.providers.oci.section import OCISection

_ARM = re.compile(r"Ampere|\bArm\b|Grace", re.IGNORECASE)
_ONE_CPU = re.compile(r"\.Standard\.A1\.")
#: Machines that may be taken back at any time, at half the price; bare metal is not sold so.
_SPOT, _SPOT_PRICE = "VM.*", 0.5
_FREE = "ALWAYS_FREE"
_CORES, _MEMORY, _GPUS = "-core-count", "-memory-count", re.compile(r"^(vm-)?gpu.*-count$")
#: So many limits are asked for at most; with more in use, what is left is unknown.
_MOST_LIMITS = 40


async def shapes(region: Region, section: OCISection) -> list[Shape]:
    """Return the shapes of the settings, each twice where it can be had as spot capacity too."""
    found: list[Shape] = []
    for name, told in (await _told(region, section)).items():
        made = _shape(told, name, region.name, section)
        found.append(made)
        if section.spot and fnmatchcase(name, _SPOT):
            price = made.price if made.price is None else made.price * _SPOT_PRICE
            found.append(made.model_copy(update={"spot": True, "price": price}))
    return found


async def places(region: Region, shape: Shape, section: OCISection) -> tuple[str, ...]:
    """Return the availability domains that have a shape, in the order of the settings."""
    domains = await _domains(region, section)
    listed = await asyncio.gather(
        *(
            region.listed(
                "compute",
                "list_shapes",
                region.compartment,
                availability_domain=domain,
                shape=shape.name,
            )
            for domain in domains
        )
    )
    there = tuple(
        domain
        for domain, found in zip(domains, listed, strict=True)
        if any(str(one.shape) == shape.name for one in found)
    )
    if not there:
        raise NoCapacity(
            f"No availability domain of {region.name} has {shape.name}.",
            hint="Choose another shape or region, or correct zones in the settings.",
        )
    return there


async def headroom(region: Region, section: OCISection) -> Headroom:
    """Return what the account's limits leave; nothing is known where they may not be asked.

    Each family of shapes has limits of its own in each availability domain; of those the largest
    is told, so that a machine may be refused all the same.
    """
    told = await _told(region, section)
    per_core = {
        str(limit): _cpus_per_ocpu(name) for name, one in told.items() for limit in _limits(one)
    }
    try:
        tenancy = await region.tenancy()
        values = await region.listed("limits", "list_limit_values", tenancy, "compute")
        wanted = [one for one in values if one.value and str(one.name) in per_core]
        if not values or len(wanted) > _MOST_LIMITS:
            return Headroom()
        left = await asyncio.gather(*(_left(region, tenancy, one) for one in wanted))
    except (Forbidden, NotFound):
        return Headroom()
    names = [str(one.name) for one in wanted]
    pairs = list(zip(names, left, strict=True))
    cores = [n * per_core[name] for name, n in pairs if name.endswith(_CORES)]
    memory = [n for name, n in pairs if name.endswith(_MEMORY)]
    gpus = [n for name, n in pairs if _GPUS.match(name)]
    known = {name for name in per_core if name.endswith(_CORES)}
    return Headroom(
        cpus=max(cores, default=0) if known and _all_bounded(told) else None,
        memory_bytes=max(memory) * GIB if memory and _all_bounded(told, _MEMORY) else None,
        gpus=max(gpus) if gpus else None,
    )


def configured(
    shape: Shape, told: Any, resources: Resources
) -> LaunchInstanceShapeConfigDetails | None:
    """Return what a machine of a flexible shape is made with; None for a fixed one.

    ``told`` is the shape as OCI tells it. As much as is needed, within its bounds: much memory
    takes more OCPUs than were asked for.
    """
    if not shape.flexible:
        return None
    gib = max(1, math.ceil(resources.memory_bytes / GIB))
    ocpus = math.ceil(max(resources.cpus, 1) / _cpus_per_ocpu(shape.name))
    least, most = 1.0, 0.0
    if memory := told.memory_options:
        least = float(memory.min_per_ocpu_in_gbs or 1)
        most = float(memory.max_per_ocpu_in_gbs or 0)
        gib = max(gib, math.ceil(memory.min_in_g_bs or 1))
    if bounds := told.ocpu_options:
        ocpus = max(ocpus, math.ceil(bounds.min or 1))
    if most:
        ocpus = max(ocpus, math.ceil(gib / most))
    gib = max(gib, math.ceil(ocpus * least))
    return LaunchInstanceShapeConfigDetails(ocpus=float(ocpus), memory_in_gbs=float(gib))


async def told_of(region: Region, shape: Shape) -> Any:
    """Return a shape as OCI tells it; raises `NotFound`."""
    found = await region.listed("compute", "list_shapes", region.compartment, shape=shape.name)
    for one in found:
        if str(one.shape) == shape.name:
            return one
    raise NotFound(f"There is no shape {shape.name} in {region.name}.", hint="Choose another one.")


async def _told(region: Region, section: OCISection) -> dict[str, Any]:
    """Return the shapes of the settings by name; one is listed for each domain that has it."""
    found = await region.listed("compute", "list_shapes", region.compartment)
    return {
        str(one.shape): one
        for one in found
        if any(fnmatchcase(str(one.shape), pattern) for pattern in section.shapes)
    }


async def _domains(region: Region, section: OCISection) -> list[str]:
    """Return the availability domains to use, by their whole names or by ends such as ``AD-1``."""
    found = await region.ask("identity", "list_availability_domains", region.compartment)
    names = sorted(str(one.name) for one in found)
    if not section.zones:
        return names
    wanted = [
        name
        for zone in section.zones
        for name in names
        if name.lower() == zone.lower() or name.lower().endswith(f"-{zone.lower()}")
    ]
    if not wanted:
        raise InvalidSpec(
            f"None of the zones of the settings is in {region.name}.",
            hint=f"There are: {', '.join(names)}.",
        )
    return list(dict.fromkeys(wanted))


def _shape(told: Any, name: str, region: str, section: OCISection) -> Shape:
    flexible = bool(told.is_flexible) or bool(told.ocpu_options and told.ocpu_options.max)
    ocpus, memory = float(told.ocpus or 0), float(told.memory_in_gbs or 0)
    if flexible and told.ocpu_options:
        ocpus = float(told.ocpu_options.max or ocpus)
    if flexible and told.memory_options:
        memory = float(told.memory_options.max_in_g_bs or memory)
    if ocpus <= 0 or memory <= 0:
        raise not_understood(f"the shape {name} has no CPUs or no memory")
    price = next((p for pattern, p in section.prices.items() if fnmatchcase(name, pattern)), None)
    if price is None and told.billing_type == _FREE:
        price = 0.0
    return Shape(
        name=name,
        region=region,
        resources=Resources(
            cpus=max(1, int(ocpus * _cpus_per_ocpu(name))),
            memory_bytes=int(memory * GIB),
            gpus=int(told.gpus or 0),
        ),
        price=price,
        currency=section.currency,
        architecture="aarch64" if _arm(told, name) else "x86_64",
        flexible=flexible,
    )


def _arm(told: Any, name: str) -> bool:
    return bool(_ARM.search(str(told.processor_description or "")) or _ONE_CPU.search(name))


def _cpus_per_ocpu(name: str) -> int:
    return 1 if _ONE_CPU.search(name) else 2


def _limits(told: Any) -> Iterable[str]:
    return told.quota_names or ()


def _all_bounded(told: dict[str, Any], end: str = _CORES) -> bool:
    """Tell whether every shape has a limit of a kind; else there may be room beside them."""
    return all(any(str(name).endswith(end) for name in _limits(one)) for one in told.values())


async def _left(region: Region, tenancy: str, limit: Any) -> int:
    more = {}
    if limit.availability_domain:
        more["availability_domain"] = limit.availability_domain
    try:
        found = await region.ask(
            "limits", "get_resource_availability", "compute", limit.name, tenancy, **more
        )
    except GridcloudError as error:
        if isinstance(error, Forbidden | NotFound):
            return int(limit.value)  # some limits have no count of what is used
        raise
    return int(limit.value if found.available is None else found.available)
