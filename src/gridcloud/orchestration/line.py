"""Who of the waiting jobs comes first, and who may pass whom. Pure: values in, values out.

What keeps large jobs from starving under a stream of small ones is one rule for all orders: a job
takes no place that one ahead of it, which still waits, could use. In order ``fair`` it may, if it
ends by its own time limit before the other has waited for `LONGEST_DELAY`: so those that pass
delay nobody beyond that, and whoever fits some offer is placed once its elders ended.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from gridcloud.model.choice import Order, Strategy
from gridcloud.model.job import Job
from gridcloud.model.offer import Offer
from gridcloud.orchestration.market import Market, Row, Wish, able, suitable
from gridcloud.orchestration.planner import judge
from gridcloud.orchestration.strategies import Rank, best, ranks

#: How long a job may be kept waiting by others that pass it, in order ``fair``.
LONGEST_DELAY = timedelta(minutes=30)
#: What copying and cleaning up may take beside a job's own time limit.
_BESIDE = timedelta(minutes=1)
#: What a job without a time limit is taken to need, when urgencies are compared.
_USUAL_TIME = timedelta(hours=1)
_REASONS_FOR = 20


@dataclass
class Placing:
    """What one look at the line came to: who goes where, who has to wait."""

    market: Market
    strategy: Strategy
    placed: list[tuple[Job, Offer]] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def explain(self, ids: Container[str]) -> None:
        """Put into ``reasons`` why each of these jobs has to wait, in words, by its id."""
        told: dict[Wish, str] = {}
        for job in self.waiting:
            if job.id in ids:
                wish = Wish.of(job, self.strategy)
                if wish not in told:
                    told[wish] = self._why(wish)
                self.reasons[job.id] = told[wish]

    def _why(self, wish: Wish) -> str:
        judged = judge(self.market, wish, most=_REASONS_FOR)
        if not judged.winners:
            return judged.explain()
        return "a job ahead of it waits for the same places"


@dataclass
class _Wishing:
    """Those who wish alike. ``waiting`` are their numbers, from the front of the line. ``ranked``
    are the places for them, the best first, each with what had been taken from it by then."""

    wish: Wish
    waiting: deque[int] = field(default_factory=deque)
    claim: int | None = None
    ranked: list[tuple[Rank, int]] | None = None
    looked: bool = False
    in_vain: bool = False


def place(
    queued: Sequence[Job],
    market: Market,
    *,
    order: Order = Order.FIFO,
    strategy: Strategy = Strategy.FIRST_FIT,
    now: datetime,
) -> Placing:
    """Match waiting jobs, given oldest first, with offers; what they take is taken in ``market``.

    ``fifo``: the oldest first. ``lifo``: the youngest first, so the old may wait for ever.
    ``fair``: urgency grows with waiting, the faster the less is asked for; and after
    `LONGEST_DELAY` a job goes before all that are younger.
    """
    line = list(queued) if order is not Order.LIFO else list(reversed(queued))
    return _Round(line, market, strategy, now, fair=order is Order.FAIR).placing()


class _Round:
    """One look at the line. The jobs' numbers are their places in it."""

    def __init__(
        self, line: list[Job], market: Market, strategy: Strategy, now: datetime, *, fair: bool
    ) -> None:
        self._line = line
        self._now = now
        self._fair = fair
        self._result = Placing(market, strategy)
        self._rows = market.rows
        self._wishings: dict[Wish, _Wishing] = {}
        self._of: list[_Wishing] = []
        for number, job in enumerate(line):
            wish = Wish.of(job, strategy)
            wishing = self._wishings.setdefault(wish, _Wishing(wish))
            wishing.waiting.append(number)
            self._of.append(wishing)

    def placing(self) -> Placing:
        turns = list(range(len(self._line)))
        if self._fair:
            turns.sort(key=self._urgency)
        chosen: dict[int, Offer] = {}
        again = True
        while again:
            waiting = [number for number in turns if number not in chosen]
            for number in waiting:
                if offer := self._place(number):
                    chosen[number] = offer
            # Who stood back for an elder may go once that is placed itself.
            again = self._fair and len(chosen) > len(turns) - len(waiting)
            for wishing in self._wishings.values():
                wishing.in_vain = False
        self._result.placed = [(self._line[number], offer) for number, offer in chosen.items()]
        self._result.waiting = [job for n, job in enumerate(self._line) if n not in chosen]
        return self._result

    def _urgency(self, number: int) -> tuple[bool, float, int]:
        job = self._line[number]
        waited, need = self._now - job.created_at, job.spec.need
        if waited >= LONGEST_DELAY:
            return (False, 0.0, number)
        work = (need.time or _USUAL_TIME) * need.cpus
        return (True, -(waited / work), number)

    def _place(self, number: int) -> Offer | None:
        wishing = self._of[number]
        if wishing.in_vain:  # one that wishes the same just found nothing
            return None
        row = self._choose(wishing, self._claimed(number))
        if row is None:
            wishing.in_vain = True
            return None
        offer = row.offer  # as it was: that is what the owner said
        row.take(wishing.wish.need.resources)
        wishing.waiting.remove(number)
        self._rank_anew(row)
        return offer

    def _claimed(self, number: int) -> bytes:
        """Return a byte for each row, not zero where this job may not go."""
        claims = 0
        for other in self._wishings.values():
            if other.waiting and other.waiting[0] < number and not self._passes(number, other):
                claims |= self._claim(other)
        return claims.to_bytes(len(self._rows), "little") if claims else b""

    def _passes(self, number: int, other: _Wishing) -> bool:
        """Whether a job is gone before the first of the others has waited too long."""
        time = self._line[number].spec.need.time
        if not self._fair or time is None:
            return False
        deadline = self._line[other.waiting[0]].created_at + LONGEST_DELAY
        return self._now + time + _BESIDE <= deadline

    def _claim(self, wishing: _Wishing) -> int:
        """Return the rows that could serve a wish, now or later, as a number: a byte for each."""
        if wishing.claim is None:
            flags = bytearray(len(self._rows))
            for row in suitable(self._rows, wishing.wish):
                flags[row.index] = 1
            wishing.claim = int.from_bytes(flags, "little")
        return wishing.claim

    def _choose(self, wishing: _Wishing, claimed: bytes) -> Row | None:
        wish = wishing.wish
        if not wishing.looked:  # for one job a look is quicker than a ranking
            wishing.looked = True
            rows = able(self._rows, wish)
            return best([r for r in rows if not claimed[r.index]] if claimed else rows, wish)
        if wishing.ranked is None:
            rows = able(self._rows, wish)
            taken = [row.taken for row in rows]
            wishing.ranked = sorted(zip(ranks(rows, wish), taken, strict=True))
        for rank, taken_then in wishing.ranked:
            row = self._rows[rank[-1]]
            if row.taken == taken_then and not (claimed and claimed[row.index]):
                return row
        return None

    def _rank_anew(self, row: Row) -> None:
        """Put a row that has less now where it belongs in each ranking."""
        for wishing in self._wishings.values():
            if wishing.ranked is not None and able([row], wishing.wish):
                (rank,) = ranks([row], wishing.wish)
                insort(wishing.ranked, (rank, row.taken))
