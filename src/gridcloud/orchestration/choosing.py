"""Chooses among the offers of the moment: a thin shell around the planner and the line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from gridcloud.model.choice import Constraints, Order, Strategy
from gridcloud.model.job import Job, JobSpec
from gridcloud.model.lease import Lease
from gridcloud.model.need import Need
from gridcloud.model.offer import Offer, Plan
from gridcloud.orchestration.line import Placing, place
from gridcloud.orchestration.market import Market, Wish, suitable
from gridcloud.orchestration.planner import check_names, check_possible, judge
from gridcloud.orchestration.ports import Leasing
from gridcloud.settings import JobSettings

T = TypeVar("T")
_SHUN_A_REFUSER_FOR = 5.0
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

    @property
    def order(self) -> Order:
        """The order in line."""
        return self._settings().order

    @property
    def patience(self) -> timedelta:
        """See `Recourse`."""
        return self._settings().patience

    def shun(self, offer: Offer) -> float:
        """Leave alone for a few seconds who has just refused; return for how many."""
        self._shunned[offer.source] = asyncio.get_running_loop().time() + _SHUN_A_REFUSER_FOR
        return _SHUN_A_REFUSER_FOR

    def strategy(self, spec: JobSpec) -> Strategy:
        """Return the strategy of a job."""
        return spec.strategy or self._settings().strategy

    async def check(self, spec: JobSpec) -> None:
        """Refuse a job that names something unknown, or that no offer known now could ever serve.

        Raises `InvalidSpec`.
        """
        wish = Wish(spec.need, spec.site, spec.constraints)
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
        most: int | None = None,
    ) -> Plan:
        """Judge the offers known now; changes nothing. Raises `InvalidSpec` for unknown names."""
        chosen = strategy or self._settings().strategy
        wish = Wish(need, site, constraints or Constraints(), chosen)
        offers = await self._leasing.offers()

        def work() -> Plan:
            check_names(wish, offers)
            return judge(Market(offers), wish, most=most)

        return await _do(work, offers)

    async def place(self, queued: Sequence[Job], explain: Iterable[str]) -> Placing:
        """Match waiting jobs, oldest first, with the offers of now; those that have to wait are
        told why if they are among ``explain``. One call at a time."""
        now = asyncio.get_running_loop().time()
        self._shunned = {source: end for source, end in self._shunned.items() if end > now}
        offers = await self._leasing.offers()
        if self._shunned:
            offers = [
                offer.model_copy(update={"problem": "refused a moment ago"})
                if offer.source in self._shunned
                else offer
                for offer in offers
            ]
        settings, ids = self._settings(), frozenset(explain)

        def work() -> Placing:
            self._market = self._market.refreshed(offers)
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
        offers = [offer for offer in await self._leasing.offers() if not offer.problem]
        wish = Wish.of(job, self.strategy(job.spec))
        fit = await _do(lambda: suitable(Market(offers).rows, wish), offers)
        return "" if fit else "nothing else here could serve it"

    async def renew(self, lease: Lease, until: datetime) -> Lease:
        """See `Recourse`."""
        return await self._leasing.renew(lease, until)


async def _do(work: Callable[[], T], offers: Sequence[Offer]) -> T:
    """Look through offers here if they are few, else beside the event loop."""
    return await asyncio.to_thread(work) if len(offers) > _MANY_OFFERS else work()
