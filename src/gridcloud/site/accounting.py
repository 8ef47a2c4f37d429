"""The accounts of a site: a receipt for each loan that ended, shown until its borrower answers."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

import structlog

from gridcloud.errors import GridcloudError, Unavailable
from gridcloud.grid.books import Heading, Line, NameLine, ReceiptLine
from gridcloud.grid.community_store import Shelf
from gridcloud.grid.credentials import verify_credential
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.messages import ReceiptReply, printable
from gridcloud.grid.papers import LeaseGrant
from gridcloud.grid.receipts import ANY_TIME, Receipt, price, read_countersignature, receipt_hash
from gridcloud.model.lease import Lease
from gridcloud.model.usage import (
    FadingSums,
    Grouping,
    KeptReceipt,
    ReceiptFilter,
    ReceiptState,
    Side,
    UsageReport,
)
from gridcloud.store.receipts import ReceiptStore
from gridcloud.store.usage import UsageStore

log = structlog.get_logger()
_FIRST_RETRY, _LAST_RETRY = 2.0, 900.0
_AT_ONCE = 8
#: How long a borrower is shown receipts at a time: one that answers slowly delays no other's.
_TURN_SECONDS = 20.0
_PAGE = 100


class Credentials(Protocol):
    """Where the members' credentials are kept; see `gridcloud.grid.community_store`."""

    async def read_about(self, shelf: str, community: str, key: str) -> dict[str, tuple[str, str]]:
        """Return what of one key stands on a shelf: document and note, by subject."""
        ...


class Names:
    """Members' names, with the credentials that prove them: kept for good beside the receipts, so
    that old books can still be checked when a member has left."""

    def __init__(self, receipts: ReceiptStore, credentials: Credentials) -> None:
        self._receipts = receipts
        self._credentials = credentials

    async def note(self, community: str, key: str, name: str = "") -> str:
        """Keep what proves a member's ``name`` (any, if empty) unless it is kept; return the name
        that is proved, else "". Idempotent."""
        if known := await self._receipts.knows_name(community, key, name):
            return known
        about = await self._credentials.read_about(Shelf.MEMBER, community, key)
        for credential, _ in about.values():
            with contextlib.suppress(GridcloudError):  # what proves nothing is not kept
                membership = verify_credential(credential, community, ANY_TIME)
                if membership.member == key:
                    proved = membership.site_name
                    await self._receipts.save_name(community, key, proved, credential)
        return await self._receipts.knows_name(community, key, name)


class Accounting:
    """What this site lent, in receipts it signs, and questions about all it lent and borrowed.

    `start` it before anything is lent, and `stop` it in the end.
    """

    def __init__(
        self,
        identity: Callable[[], Identity],
        receipts: ReceiptStore,
        usage: UsageStore,
        names: Names,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._identity = identity
        self._receipts = receipts
        self._usage = usage
        self._names = names
        self._clock = clock
        self._consumed = _Consumed()
        self._news = asyncio.Event()
        self._showing: asyncio.Task[None] | None = None
        #: When the next try is due of borrowers that did not answer (in the loop's time), and the
        #: pause after that.
        self._retries: dict[str, tuple[float, float]] = {}
        #: How far borrowers were that ran out of time in their turn.
        self._shown_to: dict[str, int] = {}
        #: Shows a receipt to a borrower (key, community, text). Set by who knows the way.
        self.show: Callable[[str, str, str], Awaitable[ReceiptReply]] = _nobody

    async def start(self) -> None:
        """Read what was lent before, and begin to show receipts that wait for an answer."""
        for row in await self._receipts.consumed():
            self._consumed.add(*row)
        self._retries.clear()
        self._shown_to.clear()
        self._showing = asyncio.create_task(self._keep_showing(), name="receipts")

    async def stop(self) -> None:
        """Stop to show receipts; the next start goes on. Idempotent."""
        if self._showing:
            self._showing.cancel()
            await asyncio.gather(self._showing, return_exceptions=True)
            self._showing = None

    async def loan_begun(self, grant: LeaseGrant) -> None:
        """Keep what proves the names in a loan's receipt while both sides are members.

        Idempotent. Without it that is done at the loan's end.
        """
        await self._names.note(grant.community, grant.lender)
        await self._names.note(grant.community, grant.borrower, site_of(grant.person))

    async def loan_ended(self, lease: Lease, grant: LeaseGrant) -> None:
        """Make the receipt of a loan that has ended; ``grant`` is the newest, ``lease`` as it is
        to be written down once this returns.

        Idempotent, also over crashes: the receipt that is kept first stays.
        """
        await self.loan_begun(grant)
        ended_at = max(grant.starts_at, lease.ended_at or min(self._clock(), grant.ends_at))
        resources = grant.need.resources
        identity = self._identity()

        def make(number: int, previous: str) -> KeptReceipt:
            receipt = Receipt(
                community=grant.community,
                lender=grant.lender,
                borrower=grant.borrower,
                person=grant.person,
                lease_id=grant.lease_id,
                resources=resources,
                begun_at=grant.starts_at,
                ended_at=ended_at,
                prices=grant.prices,
                credits=price(grant.prices, resources, grant.starts_at, ended_at),
                number=number,
                previous=previous,
            )
            site = site_of(grant.person)
            return kept(receipt, sign(identity, receipt), Side.LENT, ReceiptState.OPEN, site)

        receipt, new = await self._receipts.append(lease.id, grant.community, make)
        if new:
            log.info("receipt made", lease=lease.id, number=receipt.number, receipt=receipt.id)
            self._consumed.add(
                receipt.borrower,
                receipt.community,
                receipt.person,
                receipt.ended_at.timestamp(),
                receipt.figures.cpu_hours * 3600,
            )
            self._news.set()

    def usage(self, now: datetime, half_life: timedelta) -> dict[str, float]:
        """Return the CPU-seconds that each borrower (by key) was lent, as leased; what ended a
        half-life ago counts half. From memory; open and disputed receipts count too."""
        sums: dict[str, float] = defaultdict(float)
        for (borrower, _, _), amount in self._consumed.sums(now, half_life).items():
            sums[borrower] += amount
        return dict(sums)

    def usage_of_people(
        self, now: datetime, half_life: timedelta
    ) -> dict[tuple[str, str, str], float]:
        """As `usage`, by borrower's key, community and person."""
        return self._consumed.sums(now, half_life)

    async def report(self, by: Grouping, chosen: ReceiptFilter) -> UsageReport:
        """Return the figures of all that was lent and borrowed."""
        return await self._usage.usage(by, chosen, self._clock())

    async def receipts(self, chosen: ReceiptFilter, latest: int) -> list[KeptReceipt]:
        """Return the latest receipts, oldest first, and loans for which none came."""
        found = await self._receipts.listed(chosen, latest)
        found += await self._usage.missing(chosen, self._clock())
        return sorted(found, key=lambda each: (each.ended_at, each.id))[-latest:]

    async def receipt(self, text: str) -> KeptReceipt:
        """Return one receipt by the beginning of its id, or its lease; raises `NotFound`."""
        return await self._receipts.find(text)

    async def books(self, community: str | None) -> AsyncIterator[bytes]:
        """Return all receipts as a file that proves itself; see `gridcloud.grid.books`."""
        chosen = ReceiptFilter(community=community)
        number = await self._receipts.count(chosen)
        yield _line(Heading(site=self._identity().key, receipts=number))
        for where, credential in await self._receipts.names(community):
            yield _line(NameLine(community=where, credential=credential))
        place = 0
        while number > 0 and (page := await self._receipts.page(chosen, place, _PAGE)):
            for _, each in page[:number]:
                line = ReceiptLine(receipt=each.document, countersignature=each.countersignature)
                yield _line(line)
            number, place = number - len(page), page[-1][0]

    async def _keep_showing(self) -> None:
        while True:
            self._news.clear()
            pause = _LAST_RETRY
            try:
                pause = await self._show_due()
            except Exception:  # whatever it was, receipts are shown again later
                log.exception("receipts could not be shown")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._news.wait()

    async def _show_due(self) -> float:
        """Show what is open to every borrower that is due; return for how long nothing is."""
        now = asyncio.get_running_loop().time()
        waiting = await self._receipts.waiting()
        self._retries = {key: self._retries[key] for key in waiting if key in self._retries}
        slots = asyncio.Semaphore(_AT_ONCE)

        async def show(borrower: str) -> None:
            async with slots:
                try:
                    async with asyncio.timeout(_TURN_SECONDS):
                        await self._show_all_to(borrower)
                except TimeoutError:  # others have their turn before the rest of it
                    _, pause = self._retries.get(borrower, (0.0, _FIRST_RETRY))
                    self._retries[borrower] = asyncio.get_running_loop().time(), pause

        async with asyncio.TaskGroup() as group:
            for borrower in waiting:
                if self._retries.get(borrower, (0.0, 0.0))[0] <= now:
                    group.create_task(show(borrower))
        due = [at for at, _ in self._retries.values()]
        return max(0.0, min(due, default=now + _LAST_RETRY) - asyncio.get_running_loop().time())

    async def _show_all_to(self, borrower: str) -> None:
        place = self._shown_to.pop(borrower, 0)
        unanswered = place > 0  # what stands before that is shown again later
        while page := await self._receipts.open_to(borrower, place, _PAGE):
            for place, receipt in page:
                self._shown_to[borrower] = place  # should its turn be over now
                try:
                    unanswered |= not await self._show(receipt)
                except GridcloudError as error:
                    log.info("receipt not shown", receipt=receipt.id, cause=error.message)
                    remark = f"not countersigned yet: {printable(error.message)}"
                    await self._receipts.settle(receipt.id, ReceiptState.OPEN, remark=remark)
                    unanswered = True
                    if error.retryable:  # the site itself is away, not this receipt at fault
                        return self._try_later(borrower)
        if unanswered:
            return self._try_later(borrower)
        self._shown_to.pop(borrower, None)
        self._retries.pop(borrower, None)
        return None

    async def _show(self, receipt: KeptReceipt) -> bool:
        """Show a receipt and keep the answer; return whether it settles the matter."""
        reply = await self.show(receipt.borrower, receipt.community, receipt.document)
        if reply.countersignature:
            read_countersignature(reply.countersignature, receipt.document, receipt.borrower)
            await self._receipts.settle(
                receipt.id, ReceiptState.AGREED, countersignature=reply.countersignature
            )
        elif reply.dispute:
            log.warning("receipt disputed", receipt=receipt.id, lease=receipt.lease_id)
            await self._receipts.settle(
                receipt.id, ReceiptState.DISPUTED, remark=printable(reply.dispute)
            )
        return bool(reply.countersignature or reply.dispute)

    def _try_later(self, borrower: str) -> None:
        self._shown_to.pop(borrower, None)
        _, pause = self._retries.get(borrower, (0.0, _FIRST_RETRY))
        due = asyncio.get_running_loop().time() + pause
        self._retries[borrower] = due, min(pause * 2, _LAST_RETRY)


class _Consumed:
    """What was lent, compactly: some 24 bytes for each loan, and sums that fade."""

    def __init__(self) -> None:
        self._people: list[tuple[str, str, str]] = []
        self._places: dict[tuple[str, str, str], int] = {}
        self._whose, self._ends, self._amounts = array("L"), array("d"), array("d")
        self._half_life = timedelta(0)
        self._fading: FadingSums[int] | None = None

    def add(
        self, borrower: str, community: str, person: str, ended: float, cpu_seconds: float
    ) -> None:
        who = borrower, community, person
        if who not in self._places:
            self._places[who] = len(self._people)
            self._people.append(who)
        self._whose.append(self._places[who])
        self._ends.append(ended)
        self._amounts.append(cpu_seconds)
        if self._fading:
            self._fading.add(self._places[who], ended, cpu_seconds)

    def sums(self, now: datetime, half_life: timedelta) -> dict[tuple[str, str, str], float]:
        if self._fading is None or self._half_life != half_life:
            fading = FadingSums[int](half_life)
            for whose, ended, amount in zip(self._whose, self._ends, self._amounts, strict=True):
                fading.add(whose, ended, amount)
            self._half_life, self._fading = half_life, fading
        return {self._people[place]: amount for place, amount in self._fading.sums(now).items()}


def kept(
    receipt: Receipt, document: str, side: Side, state: ReceiptState, site: str
) -> KeptReceipt:
    """Return a receipt as it is kept; ``site`` is the other side's name."""
    return KeptReceipt(
        id=receipt_hash(document),
        side=side,
        state=state,
        number=receipt.number,
        community=receipt.community,
        lender=receipt.lender,
        borrower=receipt.borrower,
        site=site,
        person=receipt.person,
        lease_id=receipt.lease_id,
        resources=receipt.resources,
        begun_at=receipt.begun_at,
        ended_at=receipt.ended_at,
        credits=receipt.credits,
        document=document,
    )


def site_of(person: str) -> str:
    """Return the name of the site that vouches for a person."""
    return person.rpartition("@")[2]


def _line(line: Line) -> bytes:
    return line.model_dump_json().encode() + b"\n"


async def _nobody(borrower: str, community: str, receipt: str) -> ReceiptReply:
    raise Unavailable(f"There is no way to {short(borrower)} yet.")
