"""What lenders tell this site about what it borrowed, and whether it agrees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import structlog

from gridcloud.errors import Forbidden, NotFound
from gridcloud.grid.documents import LEEWAY, sign
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.papers import LeaseGrant
from gridcloud.grid.receipts import (
    Countersignature,
    Receipt,
    chain_objections,
    link,
    loan_objections,
    read_receipt,
    receipt_hash,
)
from gridcloud.model.lease import Lease, LeaseRole
from gridcloud.model.prices import Prices
from gridcloud.model.quantities import format_duration
from gridcloud.model.usage import FadingSums, KeptReceipt, Loan, ReceiptState, Side
from gridcloud.site.accounting import Names, kept, site_of
from gridcloud.store.leases import LeaseStore
from gridcloud.store.receipts import ReceiptStore
from gridcloud.store.usage import UsageStore

log = structlog.get_logger()
#: After this long what was borrowed counts half, for spreading what this site asks for.
_FORGOTTEN_BY_HALVES = timedelta(days=7)
#: Receipts of one lease that are kept; a lender that shows more, each another, is not heard.
_MOST_OF_A_LEASE = 4


class Tenancy:
    """See `gridcloud.grid.leasing.Tenant`."""

    def __init__(
        self,
        identity: Callable[[], Identity],
        leases: LeaseStore,
        receipts: ReceiptStore,
        usage: UsageStore,
        names: Names,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._identity = identity
        self._leases = leases
        self._receipts = receipts
        self._usage = usage
        self._names = names
        self._clock = clock
        self._lately = FadingSums[str](_FORGOTTEN_BY_HALVES)
        #: Called with the lease, its new end and the lender's reason once a recall is kept.
        self.on_recall: Callable[[Lease, datetime, str], None] = lambda lease, until, reason: None

    async def start(self) -> None:
        """Read what was borrowed before."""
        for lender, ended, cpu_seconds in await self._receipts.borrowed_from():
            self._lately.add(lender, ended, cpu_seconds)

    def borrowed_lately(self) -> dict[str, float]:
        """Return the CPU-seconds borrowed of each lender (by key); a week ago counts half."""
        return self._lately.sums(self._clock())

    async def granted(self, grant: LeaseGrant) -> None:
        """Keep the terms of a loan; its receipt is judged by them. A later grant moves its end.

        Raises `Forbidden` for a grant that begins before it was asked for, and for a later one
        that changes more than the end.
        """
        lease = await self._leases.find(grant.lease_id)
        if lease is not None and grant.starts_at < lease.created_at - LEEWAY:
            raise _dishonest(grant, "granted a lease that began before it was asked for")
        if lease is not None and grant.need != lease.need:
            raise _dishonest(grant, "granted a lease for something else than was asked")
        site = await self._names.note(grant.community, grant.lender)
        await self._names.note(grant.community, grant.borrower, site_of(grant.person))

        def terms(known: Loan | None) -> Loan:
            if known is not None:
                if _agreed(grant) != (known.lender, known.community, known.person, known.prices):
                    raise _dishonest(grant, "changed the terms of a lease")
                return known.model_copy(update={"ends_at": grant.ends_at})
            return Loan(
                lease_id=grant.lease_id,
                lender=grant.lender,
                community=grant.community,
                site=site or short(grant.lender),
                person=grant.person,
                resources=grant.need.resources,
                prices=grant.prices,
                starts_at=grant.starts_at,
                ends_at=grant.ends_at,
                notice=None
                if grant.notice_seconds is None
                else timedelta(seconds=grant.notice_seconds),
            )

        await self._usage.change_loan(grant.lease_id, terms)

    async def giving_back(self, lease_id: str) -> None:
        """Note that the lender is being told that a loan is over; of several tries the last."""
        now = self._clock()
        await self._usage.change_loan(
            lease_id, lambda known: known and known.model_copy(update={"given_back_at": now})
        )

    async def recalled(self, grant: LeaseGrant, reason: str) -> None:
        """See `Tenant`."""
        lease = await self._borrowed(grant.lender, grant.lease_id)
        if lease.reason or (lease.ends_at is not None and grant.ends_at >= lease.ends_at):
            return  # a lease is recalled once
        reason, ending = reason or "its owner needs it", {"ends_at": grant.ends_at}
        if short_of := _too_short(await self._usage.loan(lease.id), grant, self._clock()):
            log.warning("recalled with less notice than agreed", lease=lease.id, why=short_of)
            reason = f"{reason.rstrip('.')} ({short_of})"
        if await self._leases.change(
            lease.id, lambda kept: kept.model_copy(update=ending | {"reason": reason})
        ):
            await self._usage.change_loan(
                lease.id, lambda known: known and known.model_copy(update=ending)
            )
            self.on_recall(lease, grant.ends_at, reason)

    async def countersign(self, lender: str, document: str) -> tuple[str, str]:
        """See `Tenant`. The same receipt gets the same answer; both are kept."""
        receipt = read_receipt(document, lender, self._clock())
        mine = self._identity()
        if receipt.borrower != mine.key:
            raise Forbidden("That receipt is for another borrower.")
        try:
            lease = await self._borrowed(lender, receipt.lease_id)
        except NotFound as error:
            raise Forbidden(error.message, hint="Was it another site's?") from error
        loan = await self._loan(lease)
        if receipt.community == loan.community:
            await self._names.note(loan.community, mine.key, site_of(receipt.person))

        new = False  # a receipt shown again counts once

        def decide(related: Sequence[KeptReceipt]) -> KeptReceipt:
            nonlocal new
            new = True
            if sum(each.lease_id == lease.id for each in related) >= _MOST_OF_A_LEASE:
                raise Forbidden(f"{short(lender)} showed too many receipts of one lease.")
            others = [link(each.document, _reread(each)) for each in related]
            objections = loan_objections(receipt, loan)
            objections += chain_objections(link(document, receipt), others)
            if objections:
                disputed = kept(receipt, document, Side.BORROWED, ReceiptState.DISPUTED, loan.site)
                return disputed.model_copy(update={"remark": "; ".join(objections)[:1024]})
            agreed = kept(receipt, document, Side.BORROWED, ReceiptState.AGREED, loan.site)
            word = Countersignature(
                receipt=receipt_hash(document), borrower=mine.key, agreed_at=self._clock()
            )
            return agreed.model_copy(update={"countersignature": sign(mine, word)})

        shown = kept(receipt, document, Side.BORROWED, ReceiptState.OPEN, loan.site)
        answer = await self._receipts.receive(shown, decide)
        if new:
            self._lately.add(lender, receipt.ended_at.timestamp(), shown.figures.cpu_hours * 3600)
        return answer.countersignature, answer.remark

    async def _loan(self, lease: Lease) -> Loan:
        """Return a loan as it was granted; or, if the grant never came, as it was asked for, free
        of charge until now."""
        assert lease.peer and lease.community
        loan = await self._usage.loan(lease.id)
        if loan is None:
            loan = Loan(
                lease_id=lease.id,
                lender=lease.peer,
                community=lease.community,
                site=await self._names.note(lease.community, lease.peer) or short(lease.peer),
                person="",
                resources=lease.need.resources,
                starts_at=lease.created_at,
                ends_at=lease.ends_at or max(self._clock(), lease.created_at),
            )
        over = loan.given_back_at or lease.ended_at
        return loan.model_copy(update={"given_back_at": over})

    async def _borrowed(self, lender: str, lease_id: str) -> Lease:
        lease = await self._leases.find(lease_id)
        if lease is None or lease.role is not LeaseRole.BORROWED:
            raise NotFound(f"Nothing is borrowed here as {lease_id}.")
        if lease.peer != lender:
            raise Forbidden("That lease is another lender's.")
        return lease


def _too_short(loan: Loan | None, grant: LeaseGrant, now: datetime) -> str:
    """Return that a recall gives less notice than was agreed, empty if it does not."""
    if loan is None:
        return ""
    if loan.notice is None:
        return "though it had agreed not to recall it"
    # Clocks differ, and telling takes a moment.
    if grant.ends_at - now >= loan.notice - min(LEEWAY, loan.notice / 2):
        return ""
    return f"with less notice than the {format_duration(loan.notice)} agreed"


def _agreed(grant: LeaseGrant) -> tuple[str, str, str, Prices]:
    """Return what no later grant changes."""
    return grant.lender, grant.community, grant.person, grant.prices


def _dishonest(grant: LeaseGrant, what: str) -> Forbidden:
    return Forbidden(
        f"{short(grant.lender)} {what}.", hint="Use another site, and tell that one's owner."
    )


def _reread(receipt: KeptReceipt) -> Receipt:
    return read_receipt(receipt.document, receipt.lender)
