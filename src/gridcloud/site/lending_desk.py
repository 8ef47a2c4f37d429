"""Where a lender decides: what is known now, put before the owner's rules and the line of those
who wait. Carrying out is `gridcloud.site.lending`'s."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from gridcloud.grid.leasing import LeaseRequest
from gridcloud.grid.papers import Offered
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.model.quantities import format_bytes, format_duration
from gridcloud.orchestration.consumption import Ledger, cpu_seconds
from gridcloud.orchestration.fairness import Claims
from gridcloud.orchestration.lender import LENT_FROM, NOTHING, Asker, Lender, for_nobody
from gridcloud.orchestration.policy import Full, decide, offered, over_quota
from gridcloud.site.confining import Confining
from gridcloud.site.live_settings import LiveSettings
from gridcloud.store.leases import LeaseStore

#: How long room is kept for an own job after it was last said to wait.
_PROMISE_HOLDS = timedelta(seconds=30)
#: How old a sum over all that was lent may be; what runs now is added anew each time.
_LONGEST_PERIOD = timedelta(days=366)


class LendingDesk:
    """Holds what decisions need beside the store: what was used, who waits, what is promised."""

    def __init__(
        self,
        settings: LiveSettings,
        leases: LeaseStore,
        confining: Confining,
        communities: Callable[[], Awaitable[Sequence[str]]],
    ) -> None:
        self._live = settings
        self._leases = leases
        self._confining = confining
        #: Gives the communities that this site is a member of.
        self._communities = communities
        self._claims = Claims()
        self._promised = NOTHING
        self._promised_until = datetime.min.replace(tzinfo=UTC)
        self._opening: tuple[bool, ...] = ()
        self.ledger = Ledger()
        #: Gives what each site used lately, by its key, for fairness among those that wait.
        self.usage: Callable[[datetime], Mapping[str, float]] = lambda now: {}

    async def start(self) -> None:
        """Read what was lent before."""
        since = datetime.now(UTC) - _LONGEST_PERIOD
        self.ledger = Ledger(await self._leases.ended_since(LeaseRole.LENT, since))

    async def lender(self) -> Lender:
        """Return all that decisions look at, as it is now."""
        settings = self._live.current
        have = (await self._confining.capacity()).resources
        return Lender(
            name=settings.name,
            lending=settings.lending,
            # A sandbox shows its guest no devices, so there is no GPU to be had in one.
            host=have.model_copy(update={"gpus": 0}),
            live=await self._leases.live(),
            ledger=self.ledger,
            promised=self._promised if datetime.now(UTC) < self._promised_until else NOTHING,
        )

    async def consider(self, request: LeaseRequest) -> Lease:
        """Return the loan that a request gets, not written down yet.

        Raises what `decide` does, and `Full` where others have waited longer.
        """
        lender, now, need = await self.lender(), datetime.now(UTC), request.need
        asker = _asker(request)
        try:
            granted = decide(lender, asker, need, now)
            if self._claims.before(lender, asker, need, self._usage(lender, now), now):
                raise Full(
                    f"{lender.name} keeps its room for others, who waited longer or had less.",
                    hint="Ask again: whoever does so gets its turn.",
                )
        except Full:
            self._claims.refused(asker, need, now)
            raise
        return Lease(
            id=request.lease_id,
            role=LeaseRole.LENT,
            state=LeaseState.INTENT,
            provider=LENT_FROM,
            need=need,
            created_at=now,
            ends_at=granted.ends_at,
            community=request.community,
            peer=request.borrower,
            person=request.person,
            terms=granted.terms,
        )

    def lent(self, request: LeaseRequest) -> None:
        """Note that a request was granted: who waits has one more before it."""
        self._claims.granted(_asker(request), request.need, datetime.now(UTC))

    def ended(self, lease: Lease) -> None:
        """Count a loan that is over among what was used."""
        self.ledger.add(lease)

    def promise(self, need: Need) -> None:
        """Keep room for an own job for a while."""
        self._promised, self._promised_until = need.resources, datetime.now(UTC) + _PROMISE_HOLDS

    async def digest(self, community: str) -> Offered | None:
        """Return what is offered to a community now; None when nothing is."""
        if await self.refusal():
            return None
        lender = await self.lender()
        standing = offered(lender, community, datetime.now(UTC))
        if standing is None:
            return None
        notice = standing.terms.notice
        names = sorted({folder.name for folder in standing.terms.software})
        return Offered(
            capacity=standing.capacity,
            free=standing.free,
            max_time_seconds=max(1, int(standing.max_time.total_seconds())),
            network=standing.terms.network,
            isolation=await self._confining.isolation(),
            software=tuple(name for name in names if name.isascii() and name.isprintable())[:256],
            prices=standing.terms.prices,
            country=lender.lending.country or "",
            provider=LENT_FROM,
            notice_seconds=None if notice is None else int(notice.total_seconds()),
            opens_at=standing.opens_at,
        )

    async def hours_changed(self) -> bool:
        """Return whether the hours of a rule began or ended since this was asked last."""
        lender, now = await self.lender(), datetime.now(UTC)
        before = self._opening
        self._opening = tuple(lender.window(rule, now).open for rule in lender.rules)
        return self._opening != before

    async def refusal(self) -> str:
        """Return why nothing at all is lent, empty if something is."""
        if not self._live.current.lending.enabled:
            return "its owner has not enabled lending"
        return await self._problem()

    async def describe(self) -> str:
        """Return in words what is lent, or why nothing is."""
        lending = self._live.current.lending
        if not lending.enabled:
            return "off; set enabled = true under [lending] in the settings"
        if problem := await self._problem():
            return f"not offered: {problem}"
        lender = await self.lender()
        limit, rules = lender.limit, len(lending.rules)
        by = "" if not rules else f", by {rules} rule{'s'[: rules != 1]}"
        words = (
            f"{limit.cpus} CPUs, {format_bytes(limit.memory_bytes)}, at most "
            f"{format_duration(lending.max_time)}, {'with' if lending.network else 'no'} network, "
            f"confined by {await self._confining.describe()}"
        )
        return "; ".join([words + by, *(f"over quota: {line}" for line in over_quota(lender))])

    async def problems(self) -> tuple[str, ...]:
        """Return why what the owner means to lend cannot be lent, which rules are for nobody, and
        where more is lent than the rules allow by now."""
        lending = self._live.current.lending
        if not lending.enabled:
            return ()
        found = [problem] if (problem := await self._problem()) else []
        if lending.gpus or any(rule.gpus for rule in lending.rules):
            found.append("GPUs of this host are not lent: a sandbox shows no devices")
        found += [
            f"{self._live.file}: {where} for {community}, which this site is not in; "
            "correct the name, or join it with 'gridcloud community join CODE'"
            for where, community in for_nobody(lending, await self._communities())
        ]
        found += [f"over quota: {line}" for line in over_quota(await self.lender())]
        return tuple(f"lending: {line}" for line in found)

    async def _problem(self) -> str:
        return await self._confining.problem()

    def _usage(self, lender: Lender, now: datetime) -> dict[str, float]:
        """Return what each site used lately, what runs now among it."""
        used = dict(self.usage(now))
        for _, lease in lender.loans:
            ran = cpu_seconds(lease.need, max(timedelta(0), now - lease.created_at))
            used[lease.peer or ""] = used.get(lease.peer or "", 0.0) + ran
        return used


def _asker(request: LeaseRequest) -> Asker:
    roles = frozenset(role.value for role in request.roles)
    return Asker(request.community, request.borrower, request.person, roles)
