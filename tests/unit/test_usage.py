"""Figures: what is summed, how it fades, how it is printed."""

import asyncio
import csv
import io
import time
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import text

from gridcloud.cli.main import cli
from gridcloud.client import Client
from gridcloud.model.need import GIB, Resources
from gridcloud.model.usage import (
    FadingSums,
    Figures,
    Grouping,
    KeptReceipt,
    Loan,
    ReceiptFilter,
    ReceiptsQuery,
    ReceiptState,
    Side,
    UsageReport,
    UsageRow,
    leased,
)
from gridcloud.site.accounting import Accounting
from gridcloud.store.database import Database
from gridcloud.store.receipts import ReceiptStore
from gridcloud.store.schema import receipts
from gridcloud.store.usage import UsageStore

NOW = datetime(2026, 5, 15, tzinfo=UTC)
DAY = timedelta(days=1)
PHYSICS, OPTICS = f"physics.{'a' * 64}", f"optics.{'b' * 64}"
ALL = ReceiptFilter()
_ADDED = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 1e7), st.floats(0, 1e6)), max_size=30
)


def faded(added, now, half_life):
    sums = FadingSums(half_life)
    for key, ago, amount in added:
        sums.add(key, now.timestamp() - ago, amount)
    return sums.sums(now)


@given(added=_ADDED, hours=st.integers(1, 2000))
def test_all_halves_after_a_half_life(added, hours):
    """Whatever was used, a half-life later it counts half."""
    half_life = timedelta(hours=hours)
    sums = FadingSums(half_life)
    for key, ago, amount in added:
        sums.add(key, NOW.timestamp() - ago, amount)
    now, later = sums.sums(NOW), sums.sums(NOW + half_life)
    assert later == pytest.approx({key: amount / 2 for key, amount in now.items()})


@given(one=_ADDED, two=_ADDED, hours=st.integers(1, 2000), data=st.data())
def test_sums_are_additive_in_any_order(one, two, hours, data):
    """What two lists make together is the sum of what each makes; order does not matter."""
    half_life = timedelta(hours=hours)
    both = faded(data.draw(st.permutations(one + two)), NOW, half_life)
    first, second = faded(one, NOW, half_life), faded(two, NOW, half_life)
    for key in "abc":
        parts = first.get(key, 0) + second.get(key, 0)
        assert both.get(key, 0) == pytest.approx(parts, rel=1e-9, abs=1e-6)


@given(added=_ADDED, hours=st.integers(1, 2000))
def test_sums_are_what_the_formula_says(added, hours):
    """Each part times one half to the power of its age in half-lives."""
    half_life = timedelta(hours=hours)
    expected = dict.fromkeys("abc", 0.0)
    for key, ago, amount in added:
        expected[key] += amount * 0.5 ** (ago / half_life.total_seconds())
    found = faded(added, NOW, half_life)
    for key in "abc":
        assert found.get(key, 0.0) == pytest.approx(expected[key], rel=1e-6, abs=1e-6)


def test_no_half_life_is_refused():
    """Nothing fades at once."""
    with pytest.raises(ValueError, match="positive"):
        FadingSums(timedelta(0))


def test_figures_are_of_what_was_leased():
    """CPUs, GiB and GPUs times hours; the clock alone decides, not what was done with them."""
    resources = Resources(cpus=4, memory_bytes=6 * GIB, gpus=1)
    found = leased(resources, NOW, NOW + timedelta(minutes=30), 2.5)
    assert (found.cpu_hours, found.gb_hours, found.gpu_hours, found.credits) == (2, 3, 0.5, 2.5)


def receipt(number, **changes):
    ended = NOW - changes.pop("ago", DAY)
    values = {
        "id": f"{number:064x}",
        "side": Side.LENT,
        "state": ReceiptState.AGREED,
        "number": number,
        "community": PHYSICS,
        "lender": "1" * 64,
        "borrower": "2" * 64,
        "site": "laptop",
        "person": "ann@laptop",
        "lease_id": f"lease{number}",
        "resources": Resources(cpus=2, memory_bytes=4 * GIB, gpus=1),
        "begun_at": ended - timedelta(hours=1),
        "ended_at": ended,
        "credits": 0.5,
        "document": "d",
    }
    return KeptReceipt(**(values | changes))


@pytest.fixture
async def database(tmp_path):
    made = Database(tmp_path / "site.db")
    await made.open()
    yield made
    await made.close()


async def keep(database, *receipts):
    store = ReceiptStore(database)
    for each in receipts:
        if each.side is Side.LENT:
            await store.append(each.lease_id, each.community, lambda *_, each=each: each)
        else:
            await store.receive(each, lambda _, each=each: each)


async def groups(database, by, **chosen):
    report = await UsageStore(database).usage(by, ReceiptFilter(**chosen), NOW)
    return {(row.side, row.group): row.figures.receipts for row in report.rows}


async def test_rows_stand_for_what_was_asked(database):
    """By community, person, site and month; lent and borrowed are never added together."""
    borrowed = {"side": Side.BORROWED, "site": "cluster", "person": "me@here"}
    await keep(
        database,
        receipt(1),
        receipt(2, person="bob@laptop", ago=40 * DAY),
        receipt(3, community=OPTICS),
        receipt(4, **borrowed),
    )
    lent, took = Side.LENT, Side.BORROWED
    assert await groups(database, Grouping.COMMUNITY) == {
        (lent, PHYSICS): 2,
        (lent, OPTICS): 1,
        (took, PHYSICS): 1,
    }
    assert await groups(database, Grouping.MONTH) == {
        (lent, "2026-04"): 1,
        (lent, "2026-05"): 2,
        (took, "2026-05"): 1,
    }
    by_person = await groups(database, Grouping.PERSON, community="physics")
    assert by_person == {(lent, "ann@laptop"): 1, (lent, "bob@laptop"): 1, (took, "me@here"): 1}
    assert await groups(database, Grouping.SITE, since=NOW - 7 * DAY, person="me@here") == {
        (took, "cluster"): 1
    }
    assert await groups(database, Grouping.COMMUNITY, community=OPTICS[:12]) == {(lent, OPTICS): 1}


_KEPT = st.fixed_dictionaries(
    {
        "ago": st.integers(0, 200).map(lambda hours: hours * timedelta(hours=7)),
        "side": st.sampled_from(list(Side)),
        "community": st.sampled_from([PHYSICS, OPTICS]),
        "person": st.sampled_from(["ann@laptop", "bob@laptop"]),
        "state": st.sampled_from([ReceiptState.AGREED, ReceiptState.OPEN]),
        "credits": st.integers(0, 9).map(float),
    }
)


@settings(max_examples=25, deadline=None)
@given(kept=st.lists(_KEPT, max_size=12), late=st.sets(st.integers(0, 11)), ago=st.integers(0, 70))
def test_kept_sums_are_those_of_the_receipts(tmp_path_factory, kept, late, ago):
    """Agreed at once or later, since any day: a table shows what its receipts add up to."""
    made = [receipt(number, **each) for number, each in enumerate(kept, start=1)]
    since = NOW - ago * DAY

    async def found():
        database = Database(tmp_path_factory.mktemp("usage") / "site.db")
        await database.open()
        await keep(database, *made)
        for number in sorted(late):
            if number < len(made):
                await ReceiptStore(database).settle(made[number].id, ReceiptState.AGREED)
        usage = UsageStore(database)
        chosen = ReceiptFilter(since=since, person="ann@laptop")
        report = await usage.usage(Grouping.COMMUNITY, chosen, NOW)
        await database.close()
        return {(row.side, row.group): row.figures for row in report.rows}

    expected = {}
    for number, each in enumerate(made):
        agreed = each.state is ReceiptState.AGREED or number in late
        if agreed and each.person == "ann@laptop" and each.ended_at >= since:
            group = each.side, each.community
            expected[group] = expected.get(group, Figures()) + each.figures
    assert asyncio.run(found()) == expected


async def test_only_what_both_signed_is_counted(database):
    """The rest is told as numbers, and listed."""
    await keep(
        database,
        receipt(1),
        receipt(2, state=ReceiptState.OPEN),
        receipt(3, state=ReceiptState.DISPUTED),
    )
    loan = Loan(
        lease_id="gone",
        lender="3" * 64,
        community=OPTICS,
        site="cluster",
        person="me@here",
        resources=Resources(cpus=1),
        starts_at=NOW - 3 * DAY,
        ends_at=NOW - 2 * DAY,
    )
    usage = UsageStore(database)
    await usage.change_loan("gone", lambda _: loan)
    report = await usage.usage(Grouping.COMMUNITY, ALL, NOW)
    assert report.total(Side.LENT) == report.rows[0].figures
    assert report.rows[0].figures.receipts == 1
    assert (report.open, report.disputed, report.missing) == (1, 1, 1)
    for where, expected in ((PHYSICS, (1, 1, 0)), ("optics", (0, 0, 1)), ("none", (0, 0, 0))):
        found = await usage.usage(Grouping.COMMUNITY, ReceiptFilter(community=where), NOW)
        assert (found.open, found.disputed, found.missing) == expected
    assert len(await usage.missing(ReceiptFilter(side=Side.LENT), NOW)) == 0


async def test_shares_come_from_all_that_was_lent(database):
    """By borrower and by person, also what is open; read anew at a start, added to after."""
    await keep(database, receipt(1, ago=7 * DAY), receipt(2, ago=0 * DAY, borrower="3" * 64))
    accounting = Accounting(
        lambda: None, ReceiptStore(database), UsageStore(database), None, lambda: NOW
    )
    await accounting.start()
    await accounting.stop()
    found = accounting.usage(NOW, 7 * DAY)
    assert found == pytest.approx({"2" * 64: 3600.0, "3" * 64: 7200.0})
    people = accounting.usage_of_people(NOW + 7 * DAY, 7 * DAY)
    assert people == pytest.approx(
        {("2" * 64, PHYSICS, "ann@laptop"): 1800.0, ("3" * 64, PHYSICS, "ann@laptop"): 3600.0}
    )
    assert accounting.usage(NOW, 1000 * DAY)["2" * 64] > 7100


async def test_a_hundred_thousand_receipts_are_summed_at_once(database):
    """A table of months over years of loans takes well under a second."""

    def fill(connection):
        names = [column.name for column in receipts.columns]
        changed = {
            "row": "n",
            "id": "printf('%064x', n)",
            "number": "n",
            "lease_id": "'lease' || n",
            "ended": "ended - n * 432",
            "month": "strftime('%Y-%m', ended - n * 432, 'unixepoch')",
        }
        values = ", ".join(changed.get(name, f'"{name}"') for name in names)
        counted = "WITH RECURSIVE c(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM c WHERE n < 100000)"
        quoted = ", ".join(f'"{name}"' for name in names)
        connection.execute(
            text(f"INSERT INTO receipts ({quoted}) {counted} SELECT {values} FROM receipts, c")
        )
        parts = "side, community, site, person, month"
        sums = "sum(cpu_hours), sum(gb_hours), sum(gpu_hours), sum(credits), min(begun), max(ended)"
        connection.execute(text("DELETE FROM receipt_sums"))
        connection.execute(
            text(
                f"INSERT INTO receipt_sums SELECT {parts}, count(*), {sums} "
                f"FROM receipts GROUP BY {parts}"
            )
        )

    await keep(database, receipt(1))
    await database.run(fill)
    usage = UsageStore(database)
    spent = []
    for chosen in (ALL, ReceiptFilter(since=NOW - 200 * DAY)):
        began = time.perf_counter()
        report = await usage.usage(Grouping.MONTH, chosen, NOW)
        spent.append(time.perf_counter() - began)
    assert max(spent) < 0.5
    report = await usage.usage(Grouping.MONTH, ALL, NOW)
    assert report.total(Side.LENT).receipts == 100_000


@pytest.mark.parametrize(
    "wrong",
    [{"community": "%"}, {"community": "a_b"}, {"person": "ann"}, {"latest": 0}, {"since": "now"}],
)
def test_a_filter_that_makes_no_sense_is_refused(wrong):
    """Nothing odd comes near a query."""
    with pytest.raises(ValidationError):
        ReceiptsQuery(**wrong)


REPORT = UsageReport(
    by=Grouping.PERSON,
    rows=(
        UsageRow(
            side=Side.LENT,
            community=PHYSICS,
            group="ann@laptop",
            figures=Figures(
                receipts=2,
                cpu_hours=1 / 3,
                gb_hours=2,
                credits=1e-7,
                begun_at=NOW - DAY,
                ended_at=NOW,
            ),
        ),
    ),
    disputed=2,
    open=1,
)


@pytest.fixture
def site(monkeypatch):
    """Let commands speak to no site, and get what a test says."""
    asked = []

    def usage(self, by, chosen):
        asked.append((by, chosen))
        return REPORT

    monkeypatch.setattr(Client, "__init__", lambda self, **_: None)
    monkeypatch.setattr(Client, "close", lambda self: None)
    monkeypatch.setattr(Client, "usage", usage)
    return asked


def run(*arguments):
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    return done.return_value or done.exit_code, done.output


def test_csv_is_the_same_for_the_same_books(site):
    """RFC 4180, figures with six digits, times in ISO 8601."""
    _, printed = run("usage", "--by", "person", "--csv")
    assert printed == run("usage", "--by", "person", "--csv")[1]
    raw = CliRunner().invoke(cli, ["usage", "--by", "person", "--csv"]).stdout_bytes
    assert raw.count(b"\r\n") == raw.count(b"\n") == 2
    heads, row = csv.reader(io.StringIO(printed))
    assert heads[:4] == ["side", "community", "person", "receipts"]
    assert row[:5] == ["lent", PHYSICS, "ann@laptop", "2", "0.333333"]
    assert row[-2:] == ["2026-05-14T00:00:00+00:00", "2026-05-15T00:00:00+00:00"]


def test_the_table_says_what_is_not_in_it(site):
    """Disputes are shown, with the command that lists them."""
    _, printed = run("usage")
    assert "ann@laptop (physics)" in printed
    assert "2 disputed, 1 not countersigned yet: gridcloud receipts list --disputed" in printed


def test_since_is_a_length_or_a_date(site):
    """7d ago, or a day in UTC; anything else is a usage error."""
    run("usage", "--since", "2026-05-01", "--community", "physics", "--by", "month")
    by, chosen = site[-1]
    assert (by, chosen.since) == (Grouping.MONTH, datetime(2026, 5, 1, tzinfo=UTC))
    run("usage", "--since", "7d")
    ago = datetime.now(UTC) - site[-1][1].since
    assert timedelta(days=7) <= ago < timedelta(days=7, minutes=1)
    assert run("usage", "--since", "yesterday")[0] != 0


def test_verifying_needs_no_site(tmp_path, monkeypatch):
    """A file that is no book fails with its line named, and no site is started."""
    monkeypatch.setenv("GRIDCLOUD_STATE", str(tmp_path / "none"))
    file = tmp_path / "books.jsonl"
    file.write_text('{"gridcloud_receipts":1,"site":"' + "a" * 64 + '","receipts":0}\n')
    assert run("receipts", "verify", str(file)) == (
        0,
        "0 receipts, 0 not countersigned, nothing wrong\n",
    )
    assert run("receipts", "verify", "--community", "optics", str(file))[0] == 64
    file.write_text("nonsense\n")
    status, printed = run("receipts", "verify", str(file))
    assert status == 1
    assert f"{file}, line 1: not readable" in printed
    assert not (tmp_path / "none").exists()
