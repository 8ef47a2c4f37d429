"""Instance types as shapes: what they have, where they are, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from libcloud.pricing import get_size_price

from gridcloud.errors import Forbidden, InvalidSpec, NoCapacity
from gridcloud.model.need import Resources
from gridcloud.model.shape import Shape
from gridcloud.providers.libcloud.asking import Json, Region, filters, items
from gridcloud.providers.libcloud.errors import not_understood
from gridcloud.providers.libcloud.section import EC2Section

_MIB = 1024**2
_PAGE = 100
_PRICES_PAGE = 1000
#: Architectures by what EC2 calls them; a type that has several is of the first that is here.
_ARCHITECTURES = {"x86_64": "x86_64", "arm64": "aarch64"}


async def shapes(region: Region, section: EC2Section) -> list[Shape]:
    """Return the types of the settings, each twice where it can be had as spot capacity too."""
    wanted = filters({"instance-type": list(section.types)} if section.types != ("*",) else {})
    found = await region.listed(
        "DescribeInstanceTypes", "instanceTypeSet", MaxResults=_PAGE, Filter=wanted
    )
    told = [kind for kind in found if _matches(kind.get("instanceType"), section.types)]
    names = [str(kind.get("instanceType")) for kind in told]
    prices = await region.blocking(lambda: _prices(region.name, names))
    with_spot = section.spot and any("spot" in _usages(kind) for kind in told)
    spot = await _spot_prices(region, wanted) if with_spot else {}
    currency = "CNY" if region.name.startswith("cn-") else "USD"
    shapes = []
    for kind in told:
        made = _shape(kind, region.name, currency)
        if made is None:
            continue
        if "on-demand" in _usages(kind):
            price = _told(made.name, section.prices)
            price = prices.get(made.name) if price is None else price
            shapes.append(made.model_copy(update={"price": price}))
        if section.spot and "spot" in _usages(kind):
            shapes.append(made.model_copy(update={"price": spot.get(made.name), "spot": True}))
    return shapes


async def zones(region: Region, shape: Shape, section: EC2Section) -> tuple[str, ...]:
    """Return the zones that have a type, in the order of the settings."""
    found = await region.listed(
        "DescribeInstanceTypeOfferings",
        "instanceTypeOfferingSet",
        LocationType="availability-zone",
        Filter=filters({"instance-type": shape.name}),
    )
    # Local zones, which cost more and have less, have the longer names.
    there = sorted({str(one.get("location")) for one in found}, key=lambda name: (len(name), name))
    if zones := tuple(zone for zone in section.zones or there if zone in there):
        return zones
    if not there:
        raise NoCapacity(
            f"No zone of {region.name} has {shape.name}.", hint="Choose another type or region."
        )
    raise InvalidSpec(
        f"None of the zones of the settings has {shape.name}.",
        hint=f"It is in {', '.join(there)}. Correct zones in the settings.",
    )


def _shape(kind: Mapping[str, Any], region: str, currency: str) -> Shape | None:
    """Return what a type is; None for one that this program knows no images for."""
    try:
        processor, cpus = kind["processorInfo"], int(kind["vCpuInfo"]["defaultVCpus"])
        memory = int(kind["memoryInfo"]["sizeInMiB"]) * _MIB
        known = [str(one) for one in processor["supportedArchitectures"]]
        gpus = sum(int(one.get("count") or 1) for one in _gpus(kind))
    except (KeyError, TypeError, ValueError) as error:
        raise not_understood("an instance type") from error
    architecture = next((ours for theirs, ours in _ARCHITECTURES.items() if theirs in known), "")
    if not architecture:
        return None
    return Shape(
        name=str(kind["instanceType"]),
        region=region,
        resources=Resources(cpus=cpus, memory_bytes=memory, gpus=gpus),
        currency=currency,
        architecture=architecture,
    )


def _gpus(kind: Mapping[str, Any]) -> list[Json]:
    info = kind.get("gpuInfo")
    return items(info, "gpus") if isinstance(info, dict) else []


def _usages(kind: Mapping[str, Any]) -> list[str]:
    found = kind.get("supportedUsageClasses")
    return found if isinstance(found, list) else ["on-demand"]


def _prices(region: str, names: list[str]) -> dict[str, float]:
    """Return what Libcloud's tables say that types cost for an hour; newer ones are not there."""
    told = {name: get_size_price("compute", "ec2_linux", name, region=region) for name in names}
    return {name: float(price) for name, price in told.items() if price}


async def _spot_prices(region: Region, wanted: list[Json]) -> dict[str, float]:
    """Return the lowest price of each type now; none where they may not be asked."""
    try:
        found = await region.listed(
            "DescribeSpotPriceHistory",
            "spotPriceHistorySet",
            MaxResults=_PRICES_PAGE,
            StartTime=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            ProductDescription=["Linux/UNIX"],
            Filter=wanted,
        )
    except Forbidden:
        return {}
    lowest: dict[str, float] = {}
    for one in found:
        name, price = str(one.get("instanceType")), _number(one.get("spotPrice"))
        if price is not None:
            lowest[name] = min(price, lowest.get(name, price))
    return lowest


def _number(text: object) -> float | None:
    try:
        return max(0.0, float(str(text)))
    except ValueError:
        return None


def _told(name: str, prices: Mapping[str, float]) -> float | None:
    return next((price for pattern, price in prices.items() if fnmatchcase(name, pattern)), None)


def _matches(name: object, patterns: tuple[str, ...]) -> bool:
    return isinstance(name, str) and any(fnmatchcase(name, pattern) for pattern in patterns)
