"""Offers of capacity, and the plan that ranks them for a need."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from gridcloud.model.choice import OWN
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Resources
from gridcloud.model.prices import Prices

_REASONS_TOLD = 8


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
    the cloud does not say. It is ``free`` as long as the quota has room for one more.
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

    @property
    def place(self) -> str:
        """Its name for people: ``site/provider``."""
        return f"{self.site}/{self.provider}"

    @property
    def source(self) -> str:
        """Whose capacity it is, whatever the owner calls itself: ``key/provider``."""
        return f"{self.peer or OWN}/{self.provider}"


class Verdict(Frozen):
    """The planner's word on one offer.

    ``rank`` counts from 1 for offers that can serve now; None for those that cannot, with
    ``reasons``. ``later`` is true when the offer could serve once it has room.
    """

    offer: Offer
    rank: int | None = None
    reasons: tuple[str, ...] = ()
    later: bool = False


class Plan(Frozen):
    """Offers judged for one need, the best first; ``left_out`` counts those judged but not told."""

    verdicts: tuple[Verdict, ...]
    left_out: int = 0

    @property
    def winners(self) -> tuple[Offer, ...]:
        """Offers that can serve now, the best first."""
        return tuple(v.offer for v in self.verdicts if v.rank is not None)

    @property
    def possible_later(self) -> bool:
        """Whether any offer could serve once it has room."""
        return any(v.later for v in self.verdicts)

    def explain(self) -> str:
        """Return one sentence with the reasons of the first few offers that lost."""
        losers = [v for v in self.verdicts if v.reasons]
        told = [
            f"{v.offer.place}: {', '.join(reason.rstrip('.') for reason in v.reasons)}"
            for v in losers[:_REASONS_TOLD]
        ]
        if more := len(losers) - len(told) + self.left_out:
            told.append(f"and {more} more")
        return "; ".join(told) or "no site offers anything"
