"""Offers of capacity, and the plan that ranks them for a need."""

from __future__ import annotations

from datetime import timedelta

from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Resources


class Offer(Frozen):
    """What one provider of one site can give.

    ``capacity`` is all it has, ``free`` what is not leased now. ``peer`` is the owner's key, None
    on the user's own site. ``max_time`` is the owner's longest lease. ``problem`` says why it
    cannot serve at the moment (such as an unreachable machine), empty when it can. Where
    ``known`` is false its size was never learned, so that it may turn out to be large enough.
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

    @property
    def place(self) -> str:
        """Its name for people: ``site/provider``."""
        return f"{self.site}/{self.provider}"


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
    """All offers judged for one need, the best first."""

    verdicts: tuple[Verdict, ...]

    @property
    def winners(self) -> tuple[Offer, ...]:
        """Offers that can serve now, the best first."""
        return tuple(v.offer for v in self.verdicts if v.rank is not None)

    @property
    def possible_later(self) -> bool:
        """Whether any offer could serve once it has room."""
        return any(v.later for v in self.verdicts)

    def explain(self) -> str:
        """Return one sentence with the reason of each offer that lost."""
        losers = [
            f"{v.offer.place}: {', '.join(reason.rstrip('.') for reason in v.reasons)}"
            for v in self.verdicts
            if v.reasons
        ]
        return "; ".join(losers) or "no site offers anything"
