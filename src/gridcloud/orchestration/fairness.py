"""Fairness among those who borrow here: who was refused for want of room is not passed over. Pure.

A refusal for want of room leaves a *claim*, which lives for as long as it is asked again. A request
is granted only if it does not push back a claim of higher priority. Priority grows with waiting and
with every grant that went before, and is lower for a site that used much of this lender lately
(FairFit). So shares of those who always ask become equal, and nobody starves: once
a claim has waited for `patience`, or for `passes` grants, no newcomer goes before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from gridcloud.errors import GridcloudError
from gridcloud.model.need import Need, Resources
from gridcloud.orchestration.lender import NOTHING, Asker, Lender
from gridcloud.orchestration.policy import Full, decide

_Key = tuple[str, str, str, Resources]


@dataclass
class Claim:
    """Somebody who waits: since when, until when if not asked again, and how many went before."""

    asker: Asker
    need: Need
    since: datetime
    until: datetime
    passed_over: int = 0


class Claims:
    """Those who wait for room here, in memory: after a restart they ask again. Not for threads.

    After ``patience``, or ``passes`` grants to others, waiting outweighs whatever share. Claims
    lapse after ``holds_for``. At most ``most`` are kept, ``most_each`` of one site.
    """

    def __init__(
        self,
        *,
        patience: timedelta = timedelta(days=1),
        passes: int = 1000,
        holds_for: timedelta = timedelta(seconds=30),
        most: int = 512,
        most_each: int = 8,
    ) -> None:
        self._patience = patience
        self._passes = passes
        self._holds_for = holds_for
        self._most = most
        self._most_each = most_each
        self._claims: dict[_Key, Claim] = {}

    def refused(self, asker: Asker, need: Need, now: datetime) -> None:
        """Note that a need had no room; one that is noted keeps its place in line."""
        self._forget_lapsed(now)
        key, until = _key(asker, need), now + self._holds_for
        if key in self._claims:
            self._claims[key].until = until
        elif self._has_room(asker.borrower):
            self._claims[key] = Claim(asker, need, now, until)

    def granted(self, asker: Asker, need: Need, now: datetime) -> None:
        """Note that a need was served."""
        self._forget_lapsed(now)
        self._claims.pop(_key(asker, need), None)
        for claim in self._claims.values():
            claim.passed_over += 1

    def before(
        self, lender: Lender, asker: Asker, need: Need, usage: Mapping[str, float], now: datetime
    ) -> Claim | None:
        """Return the claim that a request would push back, of those that go before it, or None.

        ``usage`` is what each site used lately, in whatever unit.
        """
        self._forget_lapsed(now)
        in_all = sum(usage.values()) or 1.0

        def priority(claim: Claim) -> float:
            waited = (now - claim.since) / self._patience + claim.passed_over / self._passes
            return waited - usage.get(claim.asker.borrower, 0.0) / in_all

        own = self._claims.get(_key(asker, need)) or Claim(asker, need, now, now)
        mine = priority(own)
        first = [(priority(claim), key) for key, claim in self._claims.items()]
        for _, key in sorted((each for each in first if each[0] > mine), key=_rank):
            claim = self._claims[key]
            if not _pushed_back(lender, claim, asker, need):
                continue
            if _could_be_served(lender, claim, now):
                return claim
            del self._claims[key]  # it may come back once nothing but room is wanting
        return None

    def _has_room(self, borrower: str) -> bool:
        """Whether one more claim may be kept; whoever has most gives one up for a newcomer."""
        count = Counter(key[1] for key in self._claims)
        if count[borrower] >= self._most_each:
            return False
        if len(self._claims) >= self._most:
            greediest, many = count.most_common(1)[0]
            if many <= count[borrower] + 1:
                return False
            latest = max(
                (key for key in self._claims if key[1] == greediest),
                key=lambda key: self._claims[key].since,
            )
            del self._claims[latest]
        return True

    def _forget_lapsed(self, now: datetime) -> None:
        for key in [key for key, claim in self._claims.items() if claim.until < now]:
            del self._claims[key]


def _key(asker: Asker, need: Need) -> _Key:
    return asker.community, asker.borrower, asker.person, need.resources


def _rank(one: tuple[float, _Key]) -> float:
    return -one[0]


def _pushed_back(lender: Lender, claim: Claim, asker: Asker, need: Need) -> bool:
    """Whether a claim would have to wait longer for room if ``need`` were served."""
    rule, other = lender.rule_for(claim.asker), lender.rule_for(asker)
    if rule is None:
        return False
    wants, takes = claim.need.resources, need.resources
    left = lender.left(rule)
    if rule is other and _takes_of(wants.minus(left.minus(takes)), takes):
        return True
    # What has to come back under its own rule, before it can be served, will be free then.
    coming = wants.minus(left)
    return _takes_of(wants.minus(lender.free.minus(takes) + coming), takes)


def _could_be_served(lender: Lender, claim: Claim, now: datetime) -> bool:
    """Whether nothing but want of room keeps a claim from being granted."""
    try:
        decide(lender, claim.asker, claim.need, now)
    except Full:
        return True
    except GridcloudError:
        return False
    return True


def _takes_of(short: Resources, takes: Resources) -> bool:
    """Whether something is taken of what is short."""
    return short.within(takes) != NOTHING
