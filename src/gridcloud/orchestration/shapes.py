"""Shapes among the rows of a market: what their machines cost beside one another, and how far the
quota that they share reaches in one round of placing. Pure and synchronous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Self

from gridcloud.model.need import Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.model.shape import Headroom

if TYPE_CHECKING:
    from gridcloud.orchestration.market import Row

#: The least that a flexible machine may have.
ONE_CPU = Resources(cpus=1)
#: What takes the place of a cost that cannot be compared: more than any other.
_BEYOND_COMPARE = 1e12


@dataclass(slots=True, eq=False)
class ShapeRow:
    """What a row has besides if a machine of a shape is to be made, as long as ``pool`` has room.

    ``cost`` is what an hour costs, infinite if that is not known where others' of the same cloud
    is; ``cpu_cost`` is of each CPU of a flexible one. ``money`` is the cost where it can be
    compared with others'. ``size`` ranks the smallest first, those of equal cost by what they are;
    it is empty for a flexible one.
    """

    offer: Offer
    flexible: bool
    priced: bool
    cost: float = 0.0
    cpu_cost: float = 0.0
    money: float = 0.0
    size: tuple[float, ...] = ()
    pool: Pool | None = None

    @classmethod
    def of(cls, offer: Offer) -> Self:
        """Return what an offer says."""
        return cls(offer, offer.flexible, priced=offer.cost is not None)

    def price(self, *, others_say: bool, comparable: bool) -> None:
        """Say what it costs beside others: whether ``others_say`` so of the same provider, and
        whether all are in one currency."""
        has, cost = self.offer.capacity, self.offer.cost
        self.cost = self.cpu_cost = 0.0
        if cost is None:
            self.cost = inf if others_say else 0.0
        elif self.flexible:
            self.cpu_cost = cost / (has.cpus or 1)
        else:
            self.cost = cost
        dear = self.cost == inf or (bool(cost) and not comparable)
        self.money = _BEYOND_COMPARE if dear else self.cost
        fixed = (self.money, has.gpus, has.cpus, has.memory_bytes, self.cost)
        self.size = () if self.flexible else fixed

    def hourly(self, need: Need) -> float:
        """Return what an hour of the machine for a need costs, in the currency of its cloud."""
        return self.cost + self.cpu_cost * need.cpus


class Pool:
    """What a cloud's quota leaves in a region, for all of its shapes together, in one round."""

    def __init__(self, quota: Headroom) -> None:
        self._left = quota
        #: The shapes made of it.
        self.rows: list[Row] = []

    def take(self, amount: Resources) -> None:
        """Note that one more machine is made, and which shapes it leaves no room for."""
        left = self._left = without(self._left, amount)
        most = [inf if has is None else has for has in (left.cpus, left.memory_bytes, left.gpus)]
        for row in self.rows:
            flexible = row.offer.flexible
            lacking = left.lacking(ONE_CPU if flexible else row.offer.capacity)
            if row.works and lacking:
                row.shut(told(lacking))
            elif flexible:
                row.cpus, row.memory, row.gpus = map(min, (row.cpus, row.memory, row.gpus), most)


def crowded(offer: Offer) -> bool:
    """Whether a shape cannot be made now for nothing but its quota, in which there may be room
    later."""
    least = ONE_CPU if offer.flexible else offer.capacity
    return offer.quota is not None and offer.problem == told(offer.quota.lacking(least))


def told(lacking: Sequence[str]) -> str:
    """Return what a quota lacks as the problem of an offer."""
    return ", ".join(lacking)


def without(quota: Headroom, amount: Resources) -> Headroom:
    """Return what a quota leaves once a machine of that size is made besides."""
    left = {
        "cpus": _less(quota.cpus, amount.cpus),
        "memory_bytes": _less(quota.memory_bytes, amount.memory_bytes),
        "gpus": _less(quota.gpus, amount.gpus),
        "machines": _less(quota.machines, 1),
    }
    return Headroom(**left)


def _less(has: int | None, amount: int) -> int | None:
    return None if has is None else max(0, has - amount)
