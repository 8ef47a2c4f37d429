"""Receipts between two sites: made once, countersigned or disputed, and checked by anyone."""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gridcloud.errors import Forbidden, InvalidSpec, Unavailable
from gridcloud.grid.books import Auditor
from gridcloud.grid.community_store import Shelf
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.messages import ReceiptReply
from gridcloud.grid.papers import LeaseGrant, Membership, Role, community_id
from gridcloud.grid.receipts import (
    NO_RECEIPT,
    Countersignature,
    Link,
    Receipt,
    chain_objections,
    read_countersignature,
    read_receipt,
    receipt_hash,
)
from gridcloud.model.lease import Endpoint, Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.model.prices import Prices
from gridcloud.model.quantities import format_duration
from gridcloud.model.usage import Grouping, ReceiptFilter, ReceiptState, Side
from gridcloud.site.accounting import Accounting, Names
from gridcloud.site.tenancy import Tenancy
from gridcloud.store.database import Database
from gridcloud.store.leases import LeaseStore
from gridcloud.store.papers import PaperStore
from gridcloud.store.receipts import ReceiptStore
from gridcloud.store.usage import UsageStore

START = datetime(2026, 5, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
NEED = Need(cpus=4, memory_bytes=8 * 2**30)
PRICES = Prices(cpu_hour=1.5, memory_gib_hour=0.25)
ALL = ReceiptFilter()


class Clock:
    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now


class Books:
    """A site's accounts on a store of their own."""

    def __init__(self, path, name, clock):
        self.name, self.clock, self.key = name, clock, Identity.generate()
        self.database = Database(path)
        self.receipts, self.usage = ReceiptStore(self.database), UsageStore(self.database)
        self.leases, self.papers = LeaseStore(self.database), PaperStore(self.database)
        names = Names(self.receipts, self.papers)
        self.accounting = Accounting(self.identity, self.receipts, self.usage, names, clock)
        self.tenancy = Tenancy(self.identity, self.leases, self.receipts, self.usage, names, clock)

    def identity(self):
        return self.key

    async def export(self, community=None):
        return b"".join([line async for line in self.accounting.books(community)])

    async def listed(self):
        return await self.accounting.receipts(ALL, 1000)


class Pair:
    """A lender and a borrower in one community, and loans between them."""

    def __init__(self, folder):
        self.clock = Clock()
        self.lender = Books(folder / "lender.db", "lender", self.clock)
        self.borrower = Books(folder / "borrower.db", "borrower", self.clock)
        self.community = community_id("physics", self.lender.key.key)
        self.lender.accounting.show = self.show
        self.loans = 0

    async def open(self):
        for site in (self.lender, self.borrower):
            await site.database.open()
        for site in (self.lender, self.borrower):
            membership = Membership(
                community=self.community,
                member=site.key.key,
                site_name=site.name,
                roles=tuple(Role),
                issued_at=START,
                issuer=self.lender.key.key,
            )
            row = {site.key.key: (sign(self.lender.key, membership), "")}
            for each in (self.lender, self.borrower):
                await each.papers.save(Shelf.MEMBER, self.community, row)

    async def close(self):
        for site in (self.lender, self.borrower):
            await site.accounting.stop()
            await site.database.close()

    async def show(self, borrower, community, document):
        assert (borrower, community) == (self.borrower.key.key, self.community)
        answer, dispute = await self.borrower.tenancy.countersign(self.lender.key.key, document)
        return ReceiptReply(countersignature=answer, dispute=dispute)

    async def lend(self, hours=2.0):
        """Grant a loan to the borrower; return what both sides know of it."""
        self.loans += 1
        lease_id = f"lease{self.loans}"
        grant = LeaseGrant(
            lease_id=lease_id,
            community=self.community,
            lender=self.lender.key.key,
            borrower=self.borrower.key.key,
            person="ann@borrower",
            need=NEED,
            endpoint=Endpoint(host="127.0.0.1", user="guest", host_keys=()),
            certificate="ssh-ed25519-cert-v01@openssh.com AAAA",
            folder="jobs",
            starts_at=self.clock(),
            ends_at=self.clock() + hours * HOUR,
            prices=PRICES,
        )
        lease = Lease(
            id=lease_id,
            role=LeaseRole.LENT,
            state=LeaseState.ACTIVE,
            provider="local",
            need=NEED,
            created_at=grant.starts_at,
            ends_at=grant.ends_at,
            community=self.community,
            peer=self.borrower.key.key,
            person=grant.person,
        )
        theirs = {"role": LeaseRole.BORROWED, "peer": self.lender.key.key, "person": None}
        await self.lender.leases.save(lease)
        await self.borrower.leases.save(lease.model_copy(update=theirs))
        await self.borrower.tenancy.granted(grant)
        return lease, grant

    async def end(self, lease, grant):
        """Give a loan back and end it, as the two sites do."""
        await self.borrower.tenancy.giving_back(lease.id)
        await self.lender.accounting.loan_ended(lease.released("done", self.clock()), grant)

    async def loan(self, hours=1.0):
        lease, grant = await self.lend()
        self.clock.now += hours * HOUR
        await self.end(lease, grant)
        return lease, grant

    def forged(self, grant, **changes):
        """Return a receipt that the lender signs, whatever it says."""
        values = {
            "community": self.community,
            "lender": self.lender.key.key,
            "borrower": self.borrower.key.key,
            "person": grant.person,
            "lease_id": grant.lease_id,
            "resources": NEED.resources,
            "begun_at": grant.starts_at,
            "ended_at": grant.starts_at + HOUR,
            "prices": PRICES,
            "credits": 8.0,
            "number": 1,
            "previous": NO_RECEIPT,
        }
        return sign(self.lender.key, Receipt(**(values | changes)))

    async def judged(self, document):
        return await self.borrower.tenancy.countersign(self.lender.key.key, document)


@pytest.fixture
async def pair(tmp_path):
    made = Pair(tmp_path)
    await made.open()
    yield made
    await made.close()


async def until(condition):
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.005)


async def settled(pair, state=ReceiptState.AGREED):
    await until_all(pair.lender, state)


async def until_all(site, state):
    async def condition():
        found = await site.listed()
        return found and all(each.state is state for each in found)

    await until(condition)


async def test_a_loan_is_countersigned_and_both_sides_count_the_same(pair):
    """What one lent the other borrowed, to the last digit."""
    await pair.lender.accounting.start()
    await pair.loan(1.0)
    await pair.loan(0.5)
    await settled(pair)
    (lent,) = (await pair.lender.accounting.report(Grouping.COMMUNITY, ALL)).rows
    (borrowed,) = (await pair.borrower.accounting.report(Grouping.COMMUNITY, ALL)).rows
    assert (lent.side, borrowed.side) == (Side.LENT, Side.BORROWED)
    assert lent.figures == borrowed.figures
    assert lent.figures.cpu_hours == pytest.approx(6.0)
    assert lent.figures.gb_hours == pytest.approx(12.0)
    assert lent.figures.credits == pytest.approx(12.0)
    assert {each.site for each in await pair.lender.listed()} == {"borrower"}
    assert {each.site for each in await pair.borrower.listed()} == {"lender"}


async def test_what_was_borrowed_lately_is_known_of_each_lender(pair):
    """A receipt shown twice counts once; a week later it counts half; a restart forgets nothing."""
    await pair.lender.accounting.start()
    await pair.loan(1.0)
    await settled(pair)
    (listed,) = await pair.lender.listed()
    receipt = await pair.lender.accounting.receipt(listed.id)
    await pair.borrower.tenancy.countersign(pair.lender.key.key, receipt.document)
    lately = pair.borrower.tenancy.borrowed_lately()
    assert lately == {pair.lender.key.key: pytest.approx(receipt.figures.cpu_hours * 3600)}
    pair.clock.now += timedelta(days=7)
    site = pair.borrower
    names = Names(site.receipts, site.papers)
    restarted = Tenancy(site.identity, site.leases, site.receipts, site.usage, names, site.clock)
    await restarted.start()
    half = pytest.approx(lately[pair.lender.key.key] / 2, rel=0.01)
    assert restarted.borrowed_lately() == {pair.lender.key.key: half}


async def test_a_loan_has_one_receipt_however_often_it_ends(pair):
    """Ended again after a crash, or twice at once: the first receipt stays."""
    lease, grant = await pair.lend()
    pair.clock.now += HOUR
    over = lease.released("done", pair.clock())
    await asyncio.gather(*(pair.lender.accounting.loan_ended(over, grant) for _ in range(5)))
    pair.clock.now += HOUR / 2
    later = lease.released("done", pair.clock())
    await pair.lender.accounting.loan_ended(later, grant)
    (receipt,) = await pair.lender.listed()
    assert (receipt.number, receipt.ended_at) == (1, START + HOUR)


async def test_numbers_follow_one_another_in_each_community(pair):
    """1, 2, 3 without a gap, each with the hash of the one before, whatever comes at once."""
    loans = [await pair.lend() for _ in range(8)]
    pair.clock.now += HOUR
    await asyncio.gather(*(pair.end(*loan) for loan in loans))
    page = [each for _, each in await pair.lender.receipts.page(ALL, 0, 100)]
    read = [read_receipt(each.document, pair.lender.key.key) for each in page]
    assert [each.number for each in read] == list(range(1, 9))
    assert [each.previous for each in read] == [NO_RECEIPT, *(each.id for each in page[:-1])]


async def test_a_receipt_is_shown_until_it_is_answered(pair, monkeypatch):
    """A borrower that is away gets it when it is back, by the lender's own trying."""
    monkeypatch.setattr("gridcloud.site.accounting._FIRST_RETRY", 0.001)
    tries = 0

    async def away(*shown):
        nonlocal tries
        tries += 1
        if tries < 4:
            raise Unavailable("Nobody answers.")
        return await pair.show(*shown)

    pair.lender.accounting.show = away
    await pair.lender.accounting.start()
    await pair.loan()
    await settled(pair)
    assert tries == 4


async def test_showing_goes_on_after_a_restart(pair):
    """What was open when the site stopped is shown by the next start."""
    await pair.loan()
    assert [each.state for each in await pair.lender.listed()] == [ReceiptState.OPEN]
    await pair.lender.accounting.start()
    await settled(pair)


async def test_one_borrower_that_is_away_keeps_no_other_waiting(pair):
    """Receipts to others are countersigned meanwhile, and why this one is not is shown."""
    lease, grant = await pair.lend()
    away = Identity.generate().key

    async def show(borrower, *rest):
        if borrower == away:
            raise Unavailable("Nobody answers.")
        return await pair.show(borrower, *rest)

    pair.lender.accounting.show = show
    pair.clock.now += HOUR
    absent = grant.model_copy(update={"borrower": away, "lease_id": "absent"})
    over = lease.model_copy(update={"id": "absent"}).released("done", pair.clock())
    await pair.lender.accounting.loan_ended(over, absent)
    await pair.end(lease, grant)
    await pair.lender.accounting.start()

    async def told():
        found = {each.lease_id: each for each in await pair.lender.listed()}
        answered = found[lease.id].state is ReceiptState.AGREED
        return answered and "Nobody answers" in found["absent"].remark

    await until(told)


async def test_a_false_countersignature_settles_nothing(pair, monkeypatch):
    """Another's signature, or one under another receipt, leaves the receipt open."""
    monkeypatch.setattr("gridcloud.site.accounting._FIRST_RETRY", 600.0)
    lease, grant = await pair.lend()
    pair.clock.now += HOUR
    await pair.end(lease, grant)
    answers = [
        sign(
            pair.borrower.key,
            Countersignature(
                receipt="a" * 64, borrower=pair.borrower.key.key, agreed_at=pair.clock()
            ),
        ),
        "x.y.z",
    ]

    async def lie(*_):
        return ReceiptReply(countersignature=answers.pop())

    pair.lender.accounting.show = lie
    for left, reason in ((1, "not a signed document"), (0, "another receipt")):
        await pair.lender.accounting.start()

        async def noted(reason=reason):
            return reason in (await pair.lender.listed())[0].remark

        await until(noted)
        assert len(answers) == left
        await pair.lender.accounting.stop()
    (receipt,) = await pair.lender.listed()
    assert receipt.state is ReceiptState.OPEN


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"person": "eve@borrower"}, "for ann@borrower, not eve@borrower"),
        ({"resources": Need(cpus=8, memory_bytes=8 * 2**30).resources}, "other CPUs"),
        ({"prices": Prices(cpu_hour=3), "credits": 12.0}, "other prices"),
        ({"begun_at": START - HOUR, "credits": 16.0}, "began only at"),
        ({"ended_at": START + HOUR * 1.5, "credits": 12.0}, "was over at"),
        ({"credits": 8.1}, "8.1 credits where its own figures make 8"),
        ({"number": 2}, "number and the hash"),
        ({"previous": "a" * 64}, "number and the hash"),
    ],
)
async def test_a_receipt_that_differs_from_the_loan_is_disputed(pair, changes, reason):
    """The borrower says in what, keeps it, signs nothing, and gives the same answer again."""
    lease, grant = await pair.lend()
    pair.clock.now += HOUR
    await pair.borrower.tenancy.giving_back(lease.id)
    pair.clock.now += HOUR
    document = pair.forged(grant, **changes)
    answer = await pair.judged(document)
    assert answer[0] == ""
    assert reason in answer[1]
    assert await pair.judged(document) == answer
    (kept,) = await pair.borrower.listed()
    assert (kept.state, kept.remark) == (ReceiptState.DISPUTED, answer[1])
    report = await pair.borrower.accounting.report(Grouping.COMMUNITY, ALL)
    assert (report.disputed, report.rows) == (1, ())


async def test_a_dispute_is_seen_by_the_lender(pair):
    """Its receipt is marked with the borrower's reason and not shown again."""
    lease, grant = await pair.lend()
    pair.clock.now += HOUR / 4
    await pair.borrower.tenancy.giving_back(lease.id)
    pair.clock.now += HOUR
    await pair.lender.accounting.loan_ended(lease.released("late", pair.clock()), grant)
    await pair.lender.accounting.start()
    await settled(pair, ReceiptState.DISPUTED)
    (receipt,) = await pair.lender.listed()
    assert "was over at" in receipt.remark
    assert await pair.lender.receipts.waiting() == []


async def test_less_than_was_lent_is_no_dispute(pair):
    """A lender that ended early, or forgives, is countersigned."""
    _, grant = await pair.lend()
    pair.clock.now += HOUR
    shorter = pair.forged(grant, ended_at=START + HOUR / 2, credits=4.0)
    assert (await pair.judged(shorter))[1] == ""


async def test_a_receipt_of_the_future_is_refused(pair):
    """Whoever shows it at once cannot charge for what is still to come."""
    _, grant = await pair.lend()
    pair.clock.now += HOUR / 2
    with pytest.raises(Forbidden, match="only from"):
        await pair.judged(pair.forged(grant))
    assert await pair.borrower.listed() == []


async def test_a_fork_is_disputed(pair):
    """Two receipts of one number, or two of one loan, are not both signed."""
    _, first = await pair.lend()
    _, second = await pair.lend()
    pair.clock.now += HOUR
    assert (await pair.judged(pair.forged(first)))[1] == ""
    assert "another receipt numbered 1" in (await pair.judged(pair.forged(second)))[1]
    again = pair.forged(first, number=2, previous="b" * 64)
    assert "another receipt of this lease" in (await pair.judged(again))[1]


async def test_an_altered_chain_is_disputed(pair):
    """A receipt that does not hold the hash of the one shown before it is not signed."""
    _, first = await pair.lend()
    _, second = await pair.lend()
    pair.clock.now += HOUR
    await pair.judged(pair.forged(first))
    altered = pair.forged(second, number=2, previous="b" * 64)
    assert "does not follow receipt 1" in (await pair.judged(altered))[1]


async def test_what_is_no_business_of_this_site_is_refused_and_not_kept(pair):
    """Unknown leases, others' leases and others' receipts leave nothing in the store."""
    _, grant = await pair.lend()
    pair.clock.now += HOUR
    other = Identity.generate()
    for document, lender in (
        (pair.forged(grant, lease_id="unknown"), pair.lender.key.key),
        (pair.forged(grant, borrower=other.key), pair.lender.key.key),
        (pair.forged(grant), other.key),
        (sign(other, Receipt(**{**claims(pair, grant), "lender": other.key})), other.key),
        (pair.forged(grant) + "A" * 5000, pair.lender.key.key),
        ("", pair.lender.key.key),
        ("a.b.c", pair.lender.key.key),
    ):
        with pytest.raises((Forbidden, InvalidSpec)):
            await pair.borrower.tenancy.countersign(lender, document)
    assert await pair.borrower.listed() == []


def claims(pair, grant):
    return read_receipt(pair.forged(grant), pair.lender.key.key).model_dump()


async def test_many_receipts_of_one_loan_do_not_fill_the_store(pair):
    """After a few different ones the lender is not heard any more."""
    _, grant = await pair.lend()
    pair.clock.now += HOUR
    refused = 0
    for number in range(2, 30):
        with contextlib.suppress(Forbidden):
            await pair.judged(pair.forged(grant, number=number, previous="c" * 64))
            continue
        refused += 1
    assert len(await pair.borrower.listed()) <= 4
    assert refused >= 24


async def test_a_loan_whose_grant_never_arrived(pair):
    """Its receipt is agreed to if it is free, and disputed if it is not."""
    lease, grant = await pair.lend()
    other = lease.model_copy(
        update={
            "id": "lost",
            "role": LeaseRole.BORROWED,
            "state": LeaseState.INTENT,
            "peer": pair.lender.key.key,
            "ends_at": None,
        }
    )
    await pair.borrower.leases.save(other)
    pair.clock.now += HOUR
    lost = grant.model_copy(update={"lease_id": "lost"})
    dear = pair.forged(lost, number=5, previous="d" * 64)
    assert "prices" in (await pair.judged(dear))[1]
    free = pair.forged(lost, number=7, previous="d" * 64, prices=Prices(), credits=0.0)
    assert "another receipt of this lease" in (await pair.judged(free))[1]
    await pair.borrower.leases.save(other.model_copy(update={"id": "lost2"}))
    lost = grant.model_copy(update={"lease_id": "lost2"})
    free = pair.forged(lost, number=9, previous="d" * 64, prices=Prices(), credits=0.0)
    assert (await pair.judged(free))[1] == ""


async def test_a_loan_without_a_receipt_is_missing_after_a_day(pair):
    """Then, not before, and no more once the receipt comes."""
    lease, grant = await pair.loan()
    pair.clock.now += timedelta(hours=23)
    assert (await pair.borrower.accounting.report(Grouping.COMMUNITY, ALL)).missing == 0
    pair.clock.now += timedelta(hours=2)
    assert (await pair.borrower.accounting.report(Grouping.COMMUNITY, ALL)).missing == 1
    (shown,) = await pair.borrower.listed()
    assert (shown.state, shown.lease_id) == (ReceiptState.MISSING, lease.id)
    assert (shown.site, shown.ended_at) == ("lender", START + HOUR)
    assert (await pair.judged(pair.forged(grant)))[1] == ""
    assert (await pair.borrower.accounting.report(Grouping.COMMUNITY, ALL)).missing == 0


async def test_a_renewed_and_recalled_loan_is_judged_by_its_newest_end(pair):
    """The end moves with each grant; the beginning stays."""
    _, grant = await pair.lend()
    pair.clock.now += HOUR
    renewed = {"starts_at": pair.clock(), "ends_at": START + 3 * HOUR, "revision": 1}
    await pair.borrower.tenancy.granted(grant.model_copy(update=renewed))
    pair.clock.now += 2 * HOUR
    whole = pair.forged(grant, ended_at=START + 3 * HOUR, credits=24.0)
    assert (await pair.judged(whole))[1] == ""
    _, second = await pair.lend()
    begun = pair.clock()
    recalled = second.model_copy(update={"ends_at": begun + HOUR / 2, "revision": 1})
    await pair.borrower.tenancy.recalled(recalled, "own work")
    pair.clock.now += HOUR
    late = pair.forged(second, begun_at=begun, ended_at=begun + HOUR, number=9, previous="e" * 64)
    assert "was over at" in (await pair.judged(late))[1]


async def test_books_prove_themselves(pair):
    """Both sides' files are checked with nothing but the community's identity."""
    await pair.lender.accounting.start()
    for _ in range(3):
        await pair.loan()
    await settled(pair)
    lent, borrowed = await pair.lender.export(), await pair.borrower.export("physics")
    for files in ([lent], [borrowed], [lent, borrowed]):
        audit = audited(*files, communities=[pair.community])
        assert audit.flaws == ()
        assert (audit.receipts, audit.open) == (3, 0)
        (sums,) = audit.agreed
        assert (sums.lender_name, sums.borrower_name) == ("lender", "borrower")
        assert sums.figures.cpu_hours == pytest.approx(12.0)
        assert sums.figures.credits == pytest.approx(24.0)
    other = community_id("physics", pair.borrower.key.key)
    assert len(audited(lent, communities=[other]).flaws) == 3
    assert await pair.lender.export("chemistry") == audited_empty(pair)


def audited_empty(pair):
    return f'{{"gridcloud_receipts":1,"site":"{pair.lender.key.key}","receipts":0}}\n'.encode()


def audited(*files, communities=()):
    auditor = Auditor(communities)
    for number, content in enumerate(files):
        auditor.read(f"file{number}", content.splitlines(keepends=True))
    return auditor.audit()


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Return a lender's file of three countersigned receipts, and the community."""

    async def make():
        pair = Pair(tmp_path_factory.mktemp("books"))
        await pair.open()
        await pair.lender.accounting.start()
        for _ in range(3):
            await pair.loan()
        await settled(pair)
        file = await pair.lender.export()
        await pair.close()
        return file, pair.community

    return asyncio.run(make())


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_altered_bit_goes_unnoticed(books, data):
    """Whichever bit of a file is turned, something is wrong, and a receipt's own line is named."""
    file, community = books
    at = data.draw(st.integers(0, len(file) * 8 - 1))
    altered = bytearray(file)
    altered[at // 8] ^= 1 << (at % 8)
    audit = audited(bytes(altered), communities=[community])
    assert audit.flaws
    if b"\n" not in (file[at // 8 : at // 8 + 1], altered[at // 8 : at // 8 + 1]):
        line = file[: at // 8].count(b"\n") + 1
        assert line == 1 or line in {flaw.line for flaw in audit.flaws}


def test_a_dropped_receipt_is_noticed(books):
    """In the lender's own books a missing number is a fault; in others' it is only told."""
    first, *lines = books[0].splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if b'"receipt"' in line) + 1
    dropped = first.replace(b'"receipts":3', b'"receipts":2') + b"".join(
        lines[:at] + lines[at + 1 :]
    )
    audit = audited(dropped)
    assert [flaw.problem for flaw in audit.flaws] == ["before it number 2 is missing"]


def test_a_file_cut_short_is_noticed(books):
    """The heading says how many receipts there should be."""
    short = b"".join(books[0].splitlines(keepends=True)[:-1])
    assert "There should be 3" in audited(short).flaws[0].problem
    assert audited(b"").flaws


def test_names_without_a_credential_prove_nothing(books):
    """Keys that anyone could have made up are a fault, and do not count."""
    lines = [each for each in books[0].splitlines(keepends=True) if b'"credential"' not in each]
    audit = audited(b"".join(lines))
    assert len(audit.flaws) == 6
    assert audit.agreed == ()


def test_receipts_of_one_number_in_two_files_are_noticed(tmp_path):
    """A lender that shows each borrower another receipt 1 is found when they compare."""
    lender, borrower = Identity.generate(), Identity.generate()
    community = community_id("physics", lender.key)

    def book(lease):
        receipt = Receipt(
            community=community,
            lender=lender.key,
            borrower=borrower.key,
            person="ann@borrower",
            lease_id=lease,
            resources=NEED.resources,
            begun_at=START,
            ended_at=START + HOUR,
            prices=PRICES,
            credits=8.0,
            number=1,
            previous=NO_RECEIPT,
        )
        heading = f'{{"gridcloud_receipts":1,"site":"{borrower.key}","receipts":1}}\n'
        return f'{heading}{{"receipt":"{sign(lender, receipt)}"}}\n'.encode()

    problems = [flaw.problem for flaw in audited(book("one"), book("two")).flaws]
    assert problems.count("there is another receipt numbered 1") == 2


def test_only_the_very_text_that_was_signed_counts():
    """Base64 that decodes to the same bytes, but is another text, is refused."""
    borrower = Identity.generate()
    word = Countersignature(receipt=receipt_hash("r"), borrower=borrower.key, agreed_at=START)
    text = sign(borrower, word)
    assert read_countersignature(text, "r", borrower.key) == word
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = text[:-1] + letters[letters.index(text[-1]) ^ 1]
    for altered in (other, text + "=", text + "\n", text.replace(".", ".\n")):
        with pytest.raises((InvalidSpec, Forbidden)):
            read_countersignature(altered, "r", borrower.key)


@given(numbers=st.lists(st.integers(1, 12), unique=True, min_size=1))
def test_any_part_of_an_honest_chain_is_without_objection(numbers):
    """A borrower sees only its own receipts, in any order; that alone is no fault."""
    chain, previous = {}, NO_RECEIPT
    for number in range(1, 13):
        chain[number] = Link(receipt_hash(str(number)), "l", "c", f"x{number}", number, previous)
        previous = chain[number].id
    shown = []
    for number in numbers:
        assert chain_objections(chain[number], shown) == []
        shown.append(chain[number])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prices": Prices(cpu_hour=99.0)}, "changed the terms"),
        ({"person": "eve@borrower"}, "changed the terms"),
        ({"need": Need(cpus=400)}, "something else than was asked"),
        ({"starts_at": START - timedelta(days=900)}, "began before it was asked for"),
    ],
)
async def test_a_later_grant_changes_nothing_but_the_end(pair, changes, why):
    """A lender cannot raise the price, or date the loan back, by way of a renewal."""
    _, grant = await pair.lend()
    later = {"ends_at": grant.ends_at + HOUR, "revision": 1} | changes
    with pytest.raises(Forbidden, match=why):
        await pair.borrower.tenancy.granted(grant.model_copy(update=later))
    pair.clock.now += HOUR
    assert (await pair.judged(pair.forged(grant)))[1] == "", "the loan is as it was granted"


async def test_a_first_grant_that_is_dated_back_is_refused(pair):
    """Else its receipt would count time before the loan was asked for."""
    lease, grant = await pair.lend()
    theirs = {"id": "old", "role": LeaseRole.BORROWED, "peer": pair.lender.key.key}
    await pair.borrower.leases.save(lease.model_copy(update=theirs))
    old = {"lease_id": "old", "starts_at": START - 24 * HOUR}
    with pytest.raises(Forbidden, match="before it was asked for"):
        await pair.borrower.tenancy.granted(grant.model_copy(update=old))


async def test_a_recall_of_what_was_given_back_brings_nothing_to_life(pair):
    """What is over stays over, and nobody is told of a recall."""
    lease, grant = await pair.lend()
    kept = await pair.borrower.leases.find(lease.id)
    recalled = []
    pair.borrower.tenancy.on_recall = lambda *word: recalled.append(word)
    early = grant.model_copy(update={"ends_at": START + HOUR / 2, "revision": 1})
    find = pair.borrower.leases.find

    async def found_just_before(lease_id):
        found = await find(lease_id)
        await pair.borrower.leases.save(kept.released("given back", START))
        return found

    pair.borrower.leases.find = found_just_before
    await pair.borrower.tenancy.recalled(early, "own work")
    assert not (await find(lease.id)).live
    assert not recalled


async def test_a_borrower_that_answers_slowly_delays_no_other(pair, monkeypatch):
    """Its turn ends, others are shown theirs, and it goes on where it was."""
    monkeypatch.setattr("gridcloud.site.accounting._TURN_SECONDS", 0.1)
    slow, shown = Identity.generate().key, []
    loans = [await pair.lend() for _ in range(4)]
    for lease, grant in loans[:3]:
        ended = lease.released("done", START)
        await pair.lender.accounting.loan_ended(ended, grant.model_copy(update={"borrower": slow}))

    async def show(borrower, community, document):
        if borrower != slow:
            return await pair.show(borrower, community, document)
        shown.append(document)
        await asyncio.Event().wait()
        return ReceiptReply()

    pair.lender.accounting.show = show
    await pair.lender.accounting.start()
    await until(lambda: _is(len(shown) > 0))
    lease, grant = loans[3]
    await pair.end(lease.released("done", START), grant)

    async def countersigned():
        found = [each for each in await pair.lender.listed() if each.lease_id == lease.id]
        return found and found[0].state is ReceiptState.AGREED

    await until(countersigned)
    await until(lambda: _is(len(set(shown)) == 3))


async def _is(condition):
    return condition


@pytest.mark.parametrize(
    ("notice", "told_ahead", "remark"),
    [
        (1800, timedelta(minutes=30), ""),
        (1800, timedelta(minutes=29, seconds=30), ""),
        (1800, timedelta(minutes=20), " (with less notice than the {} agreed)"),
        (10, timedelta(seconds=6), ""),
        (10, timedelta(seconds=1), " (with less notice than the {} agreed)"),
        (None, timedelta(minutes=30), " (though it had agreed not to recall it)"),
    ],
)
async def test_a_recall_before_its_notice_is_remarked_upon(pair, notice, told_ahead, remark):
    """It is heard all the same, since the owner ends the loan; but its user learns what it is."""
    lease, grant = await pair.lend()
    grant = grant.model_copy(update={"lease_id": "other", "notice_seconds": notice})
    theirs = {"id": "other", "role": LeaseRole.BORROWED, "peer": pair.lender.key.key}
    await pair.borrower.leases.save(lease.model_copy(update=theirs))
    await pair.borrower.tenancy.granted(grant)
    recalled = []
    pair.borrower.tenancy.on_recall = lambda *word: recalled.append(word)
    early = {"ends_at": START + told_ahead, "revision": 1, "notice_seconds": 0}
    await pair.borrower.tenancy.recalled(grant.model_copy(update=early), "own work.")
    ((_, until, reason),) = recalled
    agreed = format_duration(timedelta(seconds=notice or 0))
    assert (until, reason) == (START + told_ahead, f"own work{remark.format(agreed) or '.'}")
    stranger = grant.model_copy(update={"lender": Identity.generate().key})
    with pytest.raises(Forbidden, match="another lender's"):
        await pair.borrower.tenancy.recalled(stranger, "own work")


async def test_a_loan_is_recalled_once(pair):
    """A lender that goes on to shorten it, by a little each time, is not heard."""
    lease, grant = await pair.lend()
    recalled = []
    pair.borrower.tenancy.on_recall = lambda *word: recalled.append(word)
    for less in range(1, 9):
        ends_at = START + HOUR - timedelta(seconds=less)
        early = grant.model_copy(update={"ends_at": ends_at, "revision": less})
        await pair.borrower.tenancy.recalled(early, "own work")
    assert len(recalled) == 1
    assert (await pair.borrower.leases.find(lease.id)).ends_at == START + HOUR - timedelta(
        seconds=1
    )
