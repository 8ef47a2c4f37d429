"""Peers' offers as the planner sees them, kept: the same object for as long as it says the same.

What looks through ten thousand offers, in every round of placing, then looks at the changed ones
only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import NamedTuple

from gridcloud.grid.offers import PeerOffer
from gridcloud.model.lease import Lease
from gridcloud.model.offer import Offer

GivenBack = tuple[datetime, Lease]


class _Loans(NamedTuple):
    """What this site has and had of one owner since it last said what is free."""

    borrowed: tuple[Lease, ...] = ()
    given_back: tuple[GivenBack, ...] = ()


_NONE = _Loans()


class PeerOffers:
    """Makes offers by ``make``, of what a peer said, what was borrowed there, and given back."""

    def __init__(
        self, make: Callable[[PeerOffer, Iterable[Lease], Iterable[GivenBack]], Offer]
    ) -> None:
        self._make = make
        self._peers: list[PeerOffer] = []
        self._loans: dict[str, _Loans] = {}
        self._offers: list[Offer] = []

    def listed(
        self,
        peers: list[PeerOffer],
        borrowed: Iterable[Lease],
        given_back: Iterable[GivenBack],
    ) -> list[Offer]:
        """Return the offers of peers in their order; not to be changed."""
        loans = _by_owner(borrowed, given_back)
        if peers != self._peers or loans != self._loans:
            known = {
                (peer.community, peer.address.key): (peer, offer)
                for peer, offer in zip(self._peers, self._offers, strict=True)
            }
            self._offers = [self._offer(peer, loans, known) for peer in peers]
            self._peers, self._loans = peers, loans
        return self._offers

    def _offer(
        self,
        peer: PeerOffer,
        loans: dict[str, _Loans],
        known: dict[tuple[str, str], tuple[PeerOffer, Offer]],
    ) -> Offer:
        key = peer.address.key
        now = loans.get(key, _NONE)
        last = known.get((peer.community, key))
        if (
            last is not None
            and now == self._loans.get(key, _NONE)
            and _says_the_same(last[0], peer)
        ):
            return last[1]
        return self._make(peer, now.borrowed, now.given_back)


def _by_owner(borrowed: Iterable[Lease], given_back: Iterable[GivenBack]) -> dict[str, _Loans]:
    has: dict[str, list[Lease]] = defaultdict(list)
    had: dict[str, list[GivenBack]] = defaultdict(list)
    for lease in borrowed:
        has[lease.peer or ""].append(lease)
    for at, lease in given_back:
        had[lease.peer or ""].append((at, lease))
    return {key: _Loans(tuple(has[key]), tuple(had[key])) for key in {*has, *had}}


def _says_the_same(before: PeerOffer, after: PeerOffer) -> bool:
    if before is after:
        return True
    same = before.digest is after.digest or before.digest == after.digest
    words = (after.problem, after.site_name, after.latency_seconds)
    return same and words == (before.problem, before.site_name, before.latency_seconds)
