"""Offers of capacity, and the plan that ranks them for a need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated

from pydantic import Field

from gridcloud.model.choice import OWN
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Resources
from gridcloud.model.prices import Prices
from gridcloud.model.shape import Headroom

_REASONS_TOLD = 8
#: Of how many shapes of one provider the reasons are told; the others are counted.
_SHAPES_TOLD = 2


def offer_key(
    peer: str | None, provider: str, region: str = "", shape: str = "", *, spot: bool = False
) -> str:
    """Return what names an offer whatever its owner calls itself; see `Offer.key`."""
    source = f"{peer or OWN}/{provider}"
    return f"{source}/{region}/{shape}{'/spot' if spot else ''}" if shape else source


class Offer(Frozen):
    """What one provider of one site can give.

    ``capacity`` is all it has, ``free`` what is not leased now. ``peer`` is the owner's key, None
    on the user's own site. ``max_time`` is the owner's longest lease. ``problem`` says why it
    cannot serve at the moment (such as an unreachable machine), empty when it can. Where
    ``known`` is false its size was never learned, so that it may turn out to be large enough.

    ``country`` (ISO 3166, two letters) and ``kind`` (of provider, such as ``ssh``) are empty when
    the owner does not say. ``latency_seconds`` is a round trip to a peer, None if never measured.
    ``preemptible`` is how long before its end a recall is told; None if never recalled. ``share``
    is what this site used there lately, in CPU-seconds for each CPU there.

    One with a ``shape`` is of a cloud: a machine of that size (``capacity``) is made for the lease
    in ``region`` and is its alone; ``cost`` is what an hour of it costs in ``currency``, None if
    the cloud does not say. It is ``free`` as long as the ``quota``, which all shapes of a region
    share, has room for one more. A ``flexible`` one is made as large as is needed, at its part of
    the cost.
    """

    site: str
    provider: str
    peer: str | None = None
    community: str | None = None
    capacity: Resources
    free: Resources
    known: bool = True
    max_time: timedelta | None = None
    isolation: str = ""
    network: bool = True
    problem: str = ""
    country: Annotated[str, Field(pattern=r"^([A-Z]{2})?$")] = ""
    kind: Annotated[str, Field(pattern=r"^[a-z0-9-]{0,32}$")] = ""
    prices: Prices = Prices()
    latency_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    preemptible: Annotated[timedelta, Field(ge=timedelta(0))] | None = None
    share: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    shape: Annotated[str, Field(max_length=128)] = ""
    region: Annotated[str, Field(max_length=128)] = ""
    cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    currency: Annotated[str, Field(max_length=8)] = ""
    spot: bool = False
    flexible: bool = False
    quota: Headroom | None = None

    @property
    def place(self) -> str:
        """Its name for people: ``site/provider``."""
        return f"{self.site}/{self.provider}"

    @property
    def source(self) -> str:
        """Whose capacity it is, whatever the owner calls itself: ``key/provider``."""
        return offer_key(self.peer, self.provider)

    @property
    def area(self) -> str:
        """Where a cloud's quota and troubles are shared: its source with the region."""
        return f"{self.source}/{self.region}"

    @property
    def key(self) -> str:
        """What tells it from all other offers: its source, with region and shape if it has one."""
        return offer_key(self.peer, self.provider, self.region, self.shape, spot=self.spot)

    @property
    def label(self) -> str:
        """All of its name for people: its place, with shape and region if it has them."""
        where = f" in {self.region}" if self.region else ""
        how = ", spot" if self.spot else ""
        return f"{self.place} {self.shape}{where}{how}" if self.shape else self.place

    def hourly(self, resources: Resources) -> float | None:
        """Return what an hour of the machine made for so much costs in ``currency``; None if that
        is not known, or no machine is made."""
        if self.cost is None or not self.flexible or not self.capacity.cpus:
            return self.cost
        return self.cost * resources.cpus / self.capacity.cpus


class Verdict(Frozen):
    """The planner's word on one offer.

    ``rank`` counts from 1 for offers that can serve now; None for those that cannot, with
    ``reasons``. ``later`` is true when the offer could serve once it has room. ``behind`` says why
    one that can serve is not the best.
    """

    offer: Offer
    rank: int | None = None
    reasons: tuple[str, ...] = ()
    later: bool = False
    behind: str = ""


class Plan(Frozen):
    """Offers judged for one need, the best first.

    ``fit`` counts those that can serve now, ``left_out`` those judged but not told, of which
    ``shapes_left_out`` counts the shapes of clouds by their place.
    """

    verdicts: tuple[Verdict, ...]
    fit: int = 0
    left_out: int = 0
    shapes_left_out: dict[str, int] = {}

    @property
    def winners(self) -> tuple[Offer, ...]:
        """Offers that can serve now, the best first."""
        return tuple(v.offer for v in self.verdicts if v.rank is not None)

    @property
    def possible_later(self) -> bool:
        """Whether any offer could serve once it has room."""
        return any(v.later for v in self.verdicts)

    def explain(self) -> str:
        """Return one sentence with the reasons of the first few offers that lost.

        Of each cloud a few shapes are told; the others are counted.
        """
        told: list[str] = []
        shapes: Counter[str] = Counter()
        untold = Counter(self.shapes_left_out)
        more = self.left_out - sum(untold.values())
        for verdict in self.verdicts:
            offer = verdict.offer
            if not verdict.reasons:
                continue
            if offer.shape and shapes[offer.place] == _SHAPES_TOLD:
                untold[offer.place] += 1
            elif len(told) == _REASONS_TOLD:
                more += 1
            else:
                reasons = ", ".join(reason.rstrip(".") for reason in verdict.reasons)
                told.append(f"{offer.label}: {reasons}")
                shapes[offer.place] += bool(offer.shape)
        return "; ".join([*told, *_and_more(untold, more)]) or "no site offers anything"


def _and_more(shapes: Mapping[str, int], others: int) -> list[str]:
    """Return words for offers of which no reasons are told."""
    told = [
        f"and {count} more shape{'s'[: count != 1]} of {place}"
        for place, count in shapes.items()
        if count
    ]
    if len(told) > _REASONS_TOLD:
        others += sum(list(shapes.values())[_REASONS_TOLD:])
        told = told[:_REASONS_TOLD]
    return [*told, f"and {others} more"] if others else told
