"""What communities remember, on disk and in memory: one suite for both."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, inspect

from gridcloud.grid.community_store import MemoryCommunityStore, Shelf
from gridcloud.model.need import Resources
from gridcloud.model.usage import KeptReceipt, ReceiptFilter, ReceiptState, Side
from gridcloud.store import migrations, schema
from gridcloud.store.database import Database
from gridcloud.store.papers import PaperStore
from gridcloud.store.receipts import ReceiptStore


@pytest.fixture(params=["memory", "papers"])
async def store(request, tmp_path):
    if request.param == "memory":
        yield MemoryCommunityStore()
        return
    database = Database(tmp_path / "site.db")
    await database.open()
    yield PaperStore(database)
    await database.close()


async def test_an_empty_store(store):
    """There is nothing, and asking for it is no error."""
    assert await store.communities() == {}
    assert await store.read(Shelf.MEMBER, "c") == {}
    assert await store.read_all(Shelf.WAITING) == {}
    await store.save(Shelf.MEMBER, "c", {})
    await store.remove(Shelf.MEMBER, "c", ["k"])
    await store.forget_community("c")


async def test_documents_come_back_as_they_were(store):
    """No byte of a signed document changes, whatever it holds."""
    odd = "eyJ.\n\"'; DROP TABLE papers; -- ü \N{SNOWMAN} \t"
    await store.save_community("c", odd)
    await store.save(Shelf.MEMBER, "c", {"k": (odd, "p" * 100_000)})
    assert await store.communities() == {"c": odd}
    assert await store.read(Shelf.MEMBER, "c") == {"k": (odd, "p" * 100_000)}


async def test_the_latest_is_kept(store):
    """Saving again replaces, in place of adding; what is not named stays."""
    await store.save(Shelf.MEMBER, "c", {"other": ("m", "p")})
    for number in range(3):
        await store.save_community("c", f"c{number}")
        await store.save(Shelf.MEMBER, "c", {"k": (f"m{number}", f"p{number}")})
    assert await store.communities() == {"c": "c2"}
    assert await store.read(Shelf.MEMBER, "c") == {"other": ("m", "p"), "k": ("m2", "p2")}


async def test_thousands_at_once(store):
    """All of a large community is saved, and removed, by one call."""
    rows = {f"k{number}": (f"m{number}", "p") for number in range(3000)}
    await store.save(Shelf.MEMBER, "c", rows)
    assert await store.read(Shelf.MEMBER, "c") == rows
    await store.remove(Shelf.MEMBER, "c", rows)
    assert await store.read(Shelf.MEMBER, "c") == {}


async def test_communities_and_shelves_are_apart(store):
    """What happens to one community, or shelf, touches no other."""
    for community in ("a", "b"):
        await store.save_community(community, community)
        for shelf in Shelf:
            await store.save(shelf, community, {"k": (f"{shelf} {community}", "")})
    await store.remove(Shelf.MEMBER, "a", ["k"])
    assert await store.read(Shelf.MEMBER, "a") == {}
    assert await store.read(Shelf.REQUEST, "a") == {"k": ("request a", "")}
    assert await store.read(Shelf.MEMBER, "b") == {"k": ("member b", "")}
    assert await store.read_all(Shelf.WAITING) == {
        each: {"k": (f"waiting {each}", "")} for each in ("a", "b")
    }
    await store.forget_community("a")
    assert await store.communities() == {"b": "b"}
    assert await store.read(Shelf.MEMBER, "b") == {"k": ("member b", "")}


async def test_a_forgotten_community_is_gone_with_its_shelves(store):
    """Joining it again starts from nothing."""
    await store.save_community("c", "d")
    for shelf in Shelf:
        await store.save(shelf, "c", {"k": ("m", "p")})
    await store.forget_community("c")
    await store.save_community("c", "d")
    assert [await store.read(shelf, "c") for shelf in Shelf] == [{}] * len(Shelf)


async def test_used_invitations_stay_used(store):
    """Even a community that was left does not let an invitation be used twice."""
    await store.save_community("c", "d")
    assert await store.use_invitation("c", "s", "first") == "first"
    await store.forget_community("c")
    assert await store.use_invitation("c", "s", "second") == "first"
    assert await store.use_invitation("c", "s", "first") == "first"
    assert await store.use_invitation("other", "s", "second") == "second"


async def test_of_many_at_once_one_uses_the_invitation(store):
    """All get the same answer."""
    users = [f"key{number}" for number in range(20)]
    found = await asyncio.gather(*(store.use_invitation("c", "s", user) for user in users))
    assert len(set(found)) == 1
    assert found[0] in users


async def test_what_is_returned_is_a_copy(store):
    """Whoever changes what they got changes nothing here."""
    await store.save_community("c", "d")
    await store.save(Shelf.MEMBER, "c", {"k": ("m", "p")})
    (await store.communities()).clear()
    (await store.read(Shelf.MEMBER, "c")).clear()
    assert await store.communities() == {"c": "d"}
    assert await store.read(Shelf.MEMBER, "c") == {"k": ("m", "p")}


_NAME = st.sampled_from(["a", "b"])
_STEP = st.one_of(
    st.tuples(st.just("save_community"), _NAME, _NAME),
    st.tuples(st.just("forget_community"), _NAME),
    st.tuples(
        st.just("save"),
        st.sampled_from(Shelf),
        _NAME,
        st.dictionaries(_NAME, st.tuples(_NAME, _NAME)),
    ),
    st.tuples(st.just("remove"), st.sampled_from(Shelf), _NAME, st.lists(_NAME)),
    st.tuples(st.just("use_invitation"), _NAME, _NAME, _NAME),
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(_STEP, max_size=25))
def test_both_stores_are_the_same(tmp_path_factory, steps):
    """Whatever is done to both, they never differ."""

    async def run():
        database = Database(tmp_path_factory.mktemp("store") / "site.db")
        await database.open()
        memory, papers = MemoryCommunityStore(), PaperStore(database)
        for verb, *arguments in steps:
            one = await getattr(memory, verb)(*arguments)
            assert await getattr(papers, verb)(*arguments) == one
        assert await papers.communities() == await memory.communities()
        for shelf in Shelf:
            assert await papers.read_all(shelf) == await memory.read_all(shelf)
        await database.close()

    asyncio.run(run())


async def test_a_write_is_on_disk_when_it_returns(tmp_path):
    """Another process, as after a crash, finds all of it."""
    first = Database(tmp_path / "site.db")
    await first.open()
    store = PaperStore(first)
    await store.save_community("c", "d")
    await store.save_grant("c", "lease", "granted", datetime(2026, 5, 1, tzinfo=UTC))
    await store.use_invitation("c", "s", "k")
    second = Database(tmp_path / "site.db")
    await second.open()
    found = PaperStore(second)
    assert await found.communities() == {"c": "d"}
    assert await found.grant("lease") == "granted"
    assert await found.grant("another") is None
    assert await found.use_invitation("c", "s", "other") == "k"
    await second.close()
    await first.close()


async def test_grants_of_long_ago_are_dropped(tmp_path):
    """By their newest end, whatever zone that was written in, and not those to keep."""
    database = Database(tmp_path / "site.db")
    await database.open()
    store, noon = PaperStore(database), datetime(2026, 5, 1, 12, tzinfo=UTC)
    east = timezone(timedelta(hours=9))
    ends = {"old": -1, "kept": -1, "renewed": -1, "new": 1}
    for name, hours in ends.items():
        ends_at = (noon + timedelta(hours=hours)).astimezone(east)
        await store.save_grant("c", name, "granted", ends_at)
    await store.save_grant("c", "renewed", "later", noon + timedelta(hours=1))
    await store.save(Shelf.MEMBER, "c", {"old": ("document", "")})
    await store.forget_grants(noon, ["kept"])
    found = {name: await store.grant(name) for name in ends}
    assert found == {"old": None, "kept": "granted", "renewed": "later", "new": "granted"}
    assert await store.read(Shelf.MEMBER, "c") == {"old": ("document", "")}
    await database.close()


async def test_what_is_about_one_member_is_read_alone(tmp_path):
    """Under its key and what begins with it and a stroke; nothing of keys that begin alike."""
    database = Database(tmp_path / "site.db")
    await database.open()
    store = PaperStore(database)
    subjects = ("a1", "a1/x/plain", "a1/y/manager", "a10", "a1.", "a2/x/plain", "A1/x", "a")
    for shelf in (Shelf.MEMBER, Shelf.REVOCATION):
        await store.save(shelf, "c", {each: (f"{shelf} {each}", "") for each in subjects})
    found = await store.read_about(Shelf.MEMBER, "c", "a1")
    assert found == {each: (f"member {each}", "") for each in subjects[:3]}
    assert await store.read_about(Shelf.MEMBER, "d", "a1") == {}
    await database.close()


def _kept(lease_id, number, previous):
    at = datetime(2026, 5, 1, tzinfo=UTC)
    return KeptReceipt(
        id=f"{lease_id}-{number}-{previous[:8]}",
        side=Side.LENT,
        state=ReceiptState.OPEN,
        number=number,
        community="c.k",
        lender="l",
        borrower="b",
        site="s",
        person="p@s",
        lease_id=lease_id,
        resources=Resources(cpus=1),
        begun_at=at,
        ended_at=at,
        document=previous,
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(leases=st.lists(st.sampled_from("abcdefgh"), max_size=20))
def test_receipts_are_numbered_once_for_each_loan(tmp_path_factory, leases):
    """Whatever is appended at once and again: a number a loan, none left out, each after its
    forerunner; and another process finds the same."""

    async def run():
        path = tmp_path_factory.mktemp("store") / "site.db"
        database = Database(path)
        await database.open()
        store = ReceiptStore(database)

        def add(lease):
            return store.append(lease, "c.k", lambda *place: _kept(lease, *place))

        made = await asyncio.gather(*map(add, leases))
        assert sum(new for _, new in made) == len(set(leases))
        await database.close()
        again = Database(path)
        await again.open()
        page = [each for _, each in await ReceiptStore(again).page(ReceiptFilter(), 0, 100)]
        assert [each.number for each in page] == list(range(1, len(set(leases)) + 1))
        assert [each.document for each in page[1:]] == [each.id for each in page[:-1]]
        assert {each.lease_id: each for each in page} == {each.lease_id: each for each, _ in made}
        await again.close()

    asyncio.run(run())


async def test_a_receipt_that_cannot_be_made_takes_no_number(tmp_path):
    """Whatever goes wrong while it is made, the next one has its number."""
    database = Database(tmp_path / "site.db")
    await database.open()
    store = ReceiptStore(database)

    def broken(*_):
        raise ValueError("no signature")

    with pytest.raises(ValueError, match="no signature"):
        await store.append("a", "c.k", broken)
    receipt, new = await store.append("b", "c.k", lambda *place: _kept("b", *place))
    assert (receipt.number, new) == (1, True)
    await database.close()


async def test_the_schema_of_receipts_goes_and_comes_back(tmp_path):
    """A store can be brought back to the one before, which keeps what that held."""
    database = Database(tmp_path / "site.db")
    await database.open()
    await PaperStore(database).save_community("c", "d")
    await database.close()
    engine = create_engine(f"sqlite:///{tmp_path / 'site.db'}")
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["engine"] = engine
    command.downgrade(config, "0001")
    with engine.connect() as connection:
        assert not set(inspect(connection).get_table_names()) & {"receipts", "borrowed_loans"}
    engine.dispose()
    again = Database(tmp_path / "site.db")
    await again.open()
    assert await PaperStore(again).communities() == {"c": "d"}
    assert await ReceiptStore(again).count(ReceiptFilter()) == 0
    await again.close()


async def test_the_tables_are_those_of_the_migrations(tmp_path):
    """A store that was migrated has every table, column and index that the schema names."""
    database = Database(tmp_path / "site.db")
    await database.open()
    await database.close()
    engine = create_engine(f"sqlite:///{tmp_path / 'site.db'}")
    with engine.connect() as connection:
        found = inspect(connection)
        for table in schema.metadata.sorted_tables:
            columns = {column["name"] for column in found.get_columns(table.name)}
            assert columns == set(table.columns.keys())
            named = {index["name"] for index in found.get_indexes(table.name)}
            assert named >= {index.name for index in table.indexes}
    engine.dispose()
