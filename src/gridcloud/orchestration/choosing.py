"""Chooses among the offers of the moment: a thin shell around the planner and the line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence, Sized
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from gridcloud.errors import GridcloudError, NoCapacity, Throttled, TimedOut
from gridcloud.model.api import CommunityInfo
from gridcloud.model.choice import Constraints, Order, Strategy
from gridcloud.model.job import Job, JobSpec
from gridcloud.model.lease import Lease
from gridcloud.model.need import Need
from gridcloud.model.offer import Offer, Plan
from gridcloud.orchestration.line import Placing, place
from gridcloud.orchestration.market import Market, Wish, suitable
from gridcloud.orchestration.planner import check_names, check_possible, judge
from gridcloud.orchestration.ports import Leasing
from gridcloud.orchestration.shapes import crowded
from gridcloud.orchestration.standing import bound, out_of_reach
from gridcloud.settings import JobSettings

T = TypeVar("T")
_SHUN_A_REFUSER_FOR = 5.0
#: A cloud that has no such machine hardly has one some seconds later, and asking costs calls.
_SHUN_A_SHAPE_FOR = 60.0
_SHUN_A_CLOUD_FOR = 30.0
#: After so many shapes that a region cannot give, the region is left alone.
_SHAPES_TRIED = 3
#: So many offers take longer to look through than the event loop should be kept waiting.
_MANY_OFFERS = 500


class Choosing:
    """Where jobs go. ``settings`` is asked each time, so that a change takes effect at once; it is
    also the drivers' `Recourse`."""

    def __init__(self, leasing: Leasing, settings: Callable[[], JobSettings]) -> None:
        self._leasing = leasing
        self._settings = settings
        self._market = Market()
        self._shunned: dict[str, float] = {}
        #: What `plan` looks at, one look at a time; nothing is ever taken from it.
        self._looked_at = Market()
        self._looking = asyncio.Lock()

    @property
    def order(self) -> Order:
        """The order in line."""
        return self._settings().order

    @property
    def patience(self) -> timedelta:
        """See `Recourse`."""
        return self._settings().patience

    def shun(self, offer: Offer, error: GridcloudError | None = None) -> float:
        """Leave alone for a while who has just refused; return for how many seconds.

        A cloud that has no such machine, or did not say in time, is asked for other shapes and in
        other regions; for three shapes of a region in vain, not there either. Any other error is
        one of the whole provider.
        """
        now = asyncio.get_running_loop().time()
        self._forget_shunned(now)
        if not offer.shape:
            self._shunned[offer.source] = now + _SHUN_A_REFUSER_FOR
            return _SHUN_A_REFUSER_FOR
        if not isinstance(error, NoCapacity | TimedOut):
            wanted = error.after_seconds if isinstance(error, Throttled) else 0.0
            seconds = max(_SHUN_A_CLOUD_FOR, wanted)
            self._shunned[offer.source] = now + seconds
            return seconds
        self._shunned[offer.key] = now + _SHUN_A_SHAPE_FOR
        if sum(key.startswith(f"{offer.area}/") for key in self._shunned) >= _SHAPES_TRIED:
            self._shunned[offer.area] = now + _SHUN_A_SHAPE_FOR
        return _SHUN_A_SHAPE_FOR

    def _forget_shunned(self, now: float) -> None:
        self._shunned = {key: end for key, end in self._shunned.items() if end > now}

    def strategy(self, spec: JobSpec) -> Strategy:
        """Return the strategy of a job."""
        return spec.strategy or self._settings().strategy

    async def check(self, spec: JobSpec) -> None:
        """Refuse a job that names something unknown, or that no offer known now could ever serve.

        Raises `InvalidSpec`.
        """
        wish = Wish(spec.need, spec.site, spec.constraints, spot=spec.machine.spot)
        offers = await self._leasing.offers()

        def work() -> None:
            check_names(wish, offers)
            check_possible(wish, offers)

        await _do(work, offers)

    async def plan(
        self,
        need: Need,
        site: str | None = None,
        constraints: Constraints | None = None,
        strategy: Strategy | None = None,
        *,
        spot: bool = False,
        most: int | None = None,
    ) -> Plan:
        """Judge the offers known now; changes nothing. Raises `InvalidSpec` for unknown names."""
        chosen = strategy or self._settings().strategy
        wish = Wish(need, site, constraints or Constraints(), chosen, spot=spot)
        offers = await self._leasing.offers()

        def work() -> Plan:
            check_names(wish, offers)
            self._looked_at = self._looked_at.refreshed(offers)
            return judge(self._looked_at, wish, most=most)

        async with self._looking:
            return await _do(work, offers)

    async def place(self, queued: Sequence[Job], explain: Iterable[str]) -> Placing:
        """Match waiting jobs, oldest first, with the offers of now; those that have to wait are
        told why if they are among ``explain``. One call at a time."""
        now = asyncio.get_running_loop().time()
        self._forget_shunned(now)
        offers = await self._leasing.offers()
        settings, ids, shunned = self._settings(), frozenset(explain), frozenset(self._shunned)

        def work() -> Placing:
            self._market = self._market.refreshed(offers)
            if shunned:
                self._market.shut(shunned, "refused a moment ago")
            placing = place(
                queued,
                self._market,
                order=settings.order,
                strategy=settings.strategy,
                now=datetime.now(UTC),
            )
            placing.explain(ids)
            return placing

        return await _do(work, offers)

    async def hopeless(
        self, placing: Placing, communities: Callable[[], Awaitable[Sequence[CommunityInfo]]]
    ) -> list[tuple[Job, str]]:
        """Return those who wait in vain for a community that this site is in no more, and why.

        ``communities`` returns those that it is in, was removed from, or asks to be admitted to;
        it is called only where a job is bound to any.
        """
        wishes = [(job, Wish.of(job, placing.strategy)) for job in placing.waiting]
        wishes = [(job, wish) for job, wish in wishes if bound(wish)]
        if not wishes:
            return []
        known = await communities()
        market = placing.market

        def work() -> list[tuple[Job, str]]:
            told = {wish: out_of_reach(wish, market, known) for wish in {w for _, w in wishes}}
            return [(job, told[wish]) for job, wish in wishes if told[wish]]

        return await _do(work, market.rows)

    def exhausted(self, job: Job) -> str:
        """Return why a job that lost its place is not placed anew however much room there is."""
        limit = job.spec.resubmit
        limit = self._settings().resubmit if limit is None else limit
        if job.resubmitted < limit:
            return ""
        return f"that was done {limit} times, as was allowed" if limit else "it is not to be"

    async def refusal(self, job: Job) -> str:
        """See `Recourse`."""
        if why := self.exhausted(job):
            return why
        offers = await self._leasing.offers()
        offers = [offer for offer in offers if not offer.problem or crowded(offer)]
        wish = Wish.of(job, self.strategy(job.spec))
        fit = await _do(lambda: suitable(Market(offers).rows, wish), offers)
        return "" if fit else "nothing else here could serve it"

    async def renew(self, lease: Lease, until: datetime) -> Lease:
        """See `Recourse`."""
        return await self._leasing.renew(lease, until)


async def _do(work: Callable[[], T], offers: Sized) -> T:
    """Look through offers here if they are few, else beside the event loop."""
    return await asyncio.to_thread(work) if len(offers) > _MANY_OFFERS else work()
