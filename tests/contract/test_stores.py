"""What communities remember, on disk and in memory: one suite for both."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gridcloud.grid.community_store import MemoryCommunityStore
from gridcloud.store.database import Database
from gridcloud.store.papers import PaperStore


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
    assert await store.members("c") == {}
    await store.remove_member("c", "k")
    await store.forget_community("c")


async def test_documents_come_back_as_they_were(store):
    """No byte of a signed document changes, whatever it holds."""
    odd = "eyJ.\n\"'; DROP TABLE papers; -- ü \N{SNOWMAN} \t"
    await store.save_community("c", odd)
    await store.save_member("c", "k", odd, "p" * 100_000)
    assert await store.communities() == {"c": odd}
    assert await store.members("c") == {"k": (odd, "p" * 100_000)}


async def test_the_latest_is_kept(store):
    """Saving again replaces, in place of adding."""
    for number in range(3):
        await store.save_community("c", f"c{number}")
        await store.save_member("c", "k", f"m{number}", f"p{number}")
    assert await store.communities() == {"c": "c2"}
    assert await store.members("c") == {"k": ("m2", "p2")}


async def test_communities_are_apart(store):
    """What happens to one community touches no other."""
    for community in ("a", "b"):
        await store.save_community(community, community)
        await store.save_member(community, "k", f"m{community}", "")
    await store.remove_member("a", "k")
    assert await store.members("a") == {}
    assert await store.members("b") == {"k": ("mb", "")}
    await store.forget_community("a")
    assert await store.communities() == {"b": "b"}
    assert await store.members("b") == {"k": ("mb", "")}


async def test_a_forgotten_community_is_gone_with_its_members(store):
    """Joining it again starts from nothing."""
    await store.save_community("c", "d")
    await store.save_member("c", "k", "m", "p")
    await store.forget_community("c")
    await store.save_community("c", "d")
    assert await store.members("c") == {}


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
    await store.save_member("c", "k", "m", "p")
    (await store.communities()).clear()
    (await store.members("c")).clear()
    assert await store.communities() == {"c": "d"}
    assert await store.members("c") == {"k": ("m", "p")}


_NAME = st.sampled_from(["a", "b"])
_STEP = st.one_of(
    st.tuples(st.just("save_community"), _NAME, _NAME),
    st.tuples(st.just("forget_community"), _NAME),
    st.tuples(st.just("save_member"), _NAME, _NAME, _NAME, _NAME),
    st.tuples(st.just("remove_member"), _NAME, _NAME),
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
        for community in ("a", "b"):
            assert await papers.members(community) == await memory.members(community)
        await database.close()

    asyncio.run(run())


async def test_a_write_is_on_disk_when_it_returns(tmp_path):
    """Another process, as after a crash, finds all of it."""
    first = Database(tmp_path / "site.db")
    await first.open()
    store = PaperStore(first)
    await store.save_community("c", "d")
    await store.save_grant("c", "lease", "granted")
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
