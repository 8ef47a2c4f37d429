"""A loan is honoured once, whatever is duplicated, late or at the same time; settings are live."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridcloud.access.keys import ephemeral, public_line
from gridcloud.errors import (
    Conflict,
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NoCapacity,
    Unavailable,
)
from gridcloud.grid.leasing import LeaseRequest
from gridcloud.grid.papers import Role
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.providers.base import Capacity, Lender
from gridcloud.settings import load
from gridcloud.site.confining import Confining
from gridcloud.site.keyring import Keyring
from gridcloud.site.lending import Lending
from gridcloud.site.live_settings import LiveSettings
from gridcloud.site.recalling import Recalls

OPTICS = f"optics.{'a' * 64}"
LINE = public_line(ephemeral())
HOUR = timedelta(hours=1)
POLICY = """
name = "uni"
[lending]
enabled = true
cpus = 4
max_time = "10h"
[[lending.rules]]
notice = "30m"
"""


class Pauses:
    """Lets others go first for some turns, as a store on a disk would."""

    def __init__(self, seed=0):
        self.random = random.Random(seed)

    async def some(self):
        for _ in range(self.random.randrange(3)):
            await asyncio.sleep(0)


class MemoryLeases:
    """A lease store that complains about what must never be written."""

    def __init__(self, pauses, limit):
        self.pauses = pauses
        self.limit = limit
        self.kept = {}

    async def save(self, lease):
        await self.pauses.some()
        before = self.kept.get(lease.id)
        if before is not None:
            assert before.live or not lease.live, "a loan that was over came back"
            assert lease.revision >= before.revision
            if lease.ends_at > before.ends_at:
                assert before.recall is None, "a recalled loan was lengthened"
                assert lease.revision > before.revision
            if before.recall:
                assert lease.recall == before.recall
        self.kept[lease.id] = lease
        used = sum(each.need.cpus for each in self.kept.values() if each.live)
        assert used <= self.limit, "more was given than there is"

    async def find(self, lease_id):
        await self.pauses.some()
        return self.kept.get(lease_id)

    async def live(self):
        await self.pauses.some()
        return [lease for lease in self.kept.values() if lease.live]

    async def ended_since(self, role, since):
        return [lease for lease in self.kept.values() if lease.ended_at]


class MemoryPapers:
    def __init__(self, pauses):
        self.pauses = pauses
        self.grants, self.ends, self.looks = {}, {}, 0
        self.joined = {OPTICS: "its founding document"}

    async def communities(self):
        return self.joined

    async def save_grant(self, community, lease_id, grant, ends_at):
        await self.pauses.some()
        self.grants[lease_id] = grant
        self.ends[lease_id] = ends_at

    async def forget_grants(self, before, keep):
        self.looks += 1
        for lease_id in [each for each, end in self.ends.items() if end < before]:
            if lease_id not in keep:
                del self.grants[lease_id], self.ends[lease_id]

    async def grant(self, lease_id):
        await self.pauses.some()
        return self.grants.get(lease_id)


class PretendHost(Lender):
    """The host provider, without sandboxes."""

    isolation = "nothing"

    def __init__(self, pauses):
        self.pauses = pauses
        self.ends = {}
        self.launched = []
        self.gone = {}

    async def capacity(self):
        return Capacity(resources=Resources(cpus=4, memory_bytes=64 * GIB, gpus=2))

    async def lending_problem(self):
        return ""

    async def launch(self, lease):
        self.launched.append(lease.id)
        await self.pauses.some()
        self.ends[lease.id] = lease.ends_at
        return Machine(lease_id=lease.id, provider="local", folder="jobs", sandbox=True)

    async def terminate(self, lease_id):
        await self.pauses.some()
        self.ends.pop(lease_id, None)

    async def extend(self, lease_id, ends_at):
        await self.pauses.some()
        if lease_id in self.ends:
            self.ends[lease_id] = ends_at

    async def ended(self, lease_id):
        return self.gone.get(lease_id, "")

    def home(self, lease_id):
        return None

    def shown_as(self, lease_id):
        return "/home/guest"

    async def enter(self, lease_id, command, descriptors, env):
        raise NotImplementedError


class Desk:
    """A `Lending` on pretended things."""

    def __init__(self, folder, text=POLICY, seed=0, keyring=None):
        self.file = folder / "settings.toml"
        self.file.write_text(text)
        self.live = LiveSettings(self.file, load(self.file, {}))
        pauses = Pauses(seed)
        self.leases, self.papers = MemoryLeases(pauses, 4), MemoryPapers(pauses)
        self.host = PretendHost(pauses)
        self.keyring = keyring or Keyring(folder / "keys")
        self.ended = []
        self.told = []
        self.make()

    def make(self):
        """Make the part that a restart makes anew."""
        self.lending = Lending(
            self.live,
            self.keyring,
            self.leases,
            self.papers,
            None,
            Confining({"local": self.host}, self.live),
        )
        self.lending.guests.address = "127.0.0.1:22"
        self.lending.guests.open = _nothing
        self.lending.open = True
        self.lending.on_ended = self.note
        self.lending.recalls.tell = self.tell

    async def note(self, lease, grant):
        assert self.leases.kept[lease.id].live, "told before it was written down as over"
        self.ended.append((lease.id, lease.ended_at, grant.revision))

    async def tell(self, grant, reason):
        self.told.append((grant.lease_id, grant.ends_at, grant.revision, reason))

    def request(self, number=1, cpus=1, borrower="b", time=HOUR, roles=(Role.CONSUMER,)):
        return LeaseRequest(
            lease_id=f"l{number}",
            community=OPTICS,
            lender=self.keyring.identity.key,
            borrower=borrower * 64,
            person="alice@lab",
            roles=roles,
            need=Need(cpus=cpus, time=time),
            ssh_public_key=LINE,
        )

    async def grant(self, number=1, **more):
        return await self.lending.grant(self.request(number, **more))

    def change(self, text):
        self.file.write_text(text)
        return self.live.take_over()


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


async def test_the_same_request_gets_the_same_grant(desk):
    """A copy of a request makes nothing anew, and one that comes after the end nothing at all."""
    first = await desk.grant()
    assert await desk.grant() == first
    assert desk.host.launched == ["l1"]
    changes = []
    desk.lending.on_change = lambda: changes.append(1)
    await desk.lending.release("l1", "b" * 64)
    await desk.lending.release("l1", "b" * 64)
    assert changes == [1]
    with pytest.raises(Conflict, match="is over"):
        await desk.grant()
    assert desk.host.launched == ["l1"]
    assert [lease_id for lease_id, *_ in desk.ended] == ["l1"], "told once"


async def test_what_is_no_ssh_key_starts_nothing(desk):
    """A key that no certificate can be made for is refused before anything is launched."""
    bad = desk.request().model_copy(update={"ssh_public_key": "ssh-ed25519 AAAA"})
    with pytest.raises(InvalidSpec, match="public key"):
        await desk.lending.grant(bad)
    assert desk.host.launched == []
    assert desk.leases.kept == {}


async def test_what_is_given_back_before_its_request_comes_is_not_granted(desk):
    """Words may overtake one another; nobody would give that loan back before its end."""
    await desk.lending.release("l1", "b" * 64)
    with pytest.raises(Conflict, match="given back"):
        await desk.grant()
    assert desk.host.launched == []
    await desk.lending.release("l2", "c" * 64)  # another's word counts nothing
    assert (await desk.grant(2)).lease_id == "l2"


async def test_little_is_remembered_of_what_was_never_asked_for(desk, monkeypatch):
    """Whoever gives back what never was fills no memory."""
    monkeypatch.setattr("gridcloud.site.lending._MOST_CALLED_OFF", 3)
    for number in range(9):
        await desk.lending.release(f"l{number}", "b" * 64)
    assert (await desk.grant(1)).lease_id == "l1"
    with pytest.raises(Conflict):
        await desk.grant(8)


async def test_requests_at_the_same_time_get_no_more_than_there_is(desk):
    """Each is decided knowing what the others got; copies among them are one."""
    numbers = [*range(1, 9), *range(1, 9)]
    answers = await asyncio.gather(*map(desk.grant, numbers), return_exceptions=True)
    granted = {answer.lease_id for answer in answers if not isinstance(answer, Exception)}
    assert len(granted) == 4
    assert all(isinstance(a, NoCapacity) for a in answers if isinstance(a, Exception))
    assert sorted(desk.host.launched) == sorted(granted)


async def test_another_borrower_has_no_say(desk):
    """Whoever does not have a loan can neither learn of it, nor lengthen or end it."""
    grant = await desk.grant()
    for act in (
        lambda: desk.lending.release("l1", "c" * 64),
        lambda: desk.lending.renew("l1", "c" * 64, grant.ends_at + HOUR),
        lambda: desk.grant(borrower="c"),
    ):
        with pytest.raises(Forbidden):
            await act()
    assert desk.leases.kept["l1"].ends_at == grant.ends_at


async def test_a_renewal_moves_the_end_everywhere(desk):
    """Store, sandbox, document and certificate follow; a copy of the renewal changes nothing."""
    first = await desk.grant()
    until = first.ends_at + 2 * HOUR
    renewed = await desk.lending.renew("l1", "b" * 64, until)
    assert (renewed.ends_at, renewed.revision) == (until, 1)
    assert renewed.certificate != first.certificate
    assert desk.leases.kept["l1"].ends_at == desk.host.ends["l1"] == until
    for late in (until, first.ends_at + HOUR):
        assert await desk.lending.renew("l1", "b" * 64, late) == renewed
    assert await desk.grant() == renewed
    with pytest.raises(Forbidden, match="10h 00m at most"):
        await desk.lending.renew("l1", "b" * 64, first.starts_at + 11 * HOUR)
    await desk.lending.release("l1", "b" * 64)
    with pytest.raises(Conflict, match="is over"):
        await desk.lending.renew("l1", "b" * 64, until)


async def test_a_recall_moves_the_end_everywhere_and_is_told(desk):
    """The loan ends after its notice, no renewal undoes that, its borrower hears of it."""
    first = await desk.grant(time=5 * HOUR)
    loan = await desk.lending.end_at_word("l1", now=False)
    end = loan.ends_at
    assert timedelta(minutes=29) < end - datetime.now(UTC) <= timedelta(minutes=30)
    assert desk.host.ends["l1"] == desk.leases.kept["l1"].ends_at == end
    with pytest.raises(Conflict, match="wants it back"):
        await desk.lending.renew("l1", "b" * 64, first.ends_at + HOUR)
    await asyncio.sleep(0)
    await desk.lending.end_at_word("l1", now=False)
    assert desk.told[0] == ("l1", end, 1, "its owner wants it back")
    assert (await desk.grant()).ends_at == end


async def test_a_borrower_that_is_away_is_told_later(monkeypatch, desk):
    """It is tried until it succeeds, and begun again after a restart."""
    monkeypatch.setattr("gridcloud.site.recalling._FIRST_RETRY", 0.001)
    grant, heard, tries = await desk.grant(time=5 * HOUR), asyncio.Event(), []

    async def away(grant, reason):
        tries.append(grant.ends_at)
        if len(tries) < 3:
            raise Unavailable("The borrower is away.")
        heard.set()

    desk.lending.recalls.tell = away
    await desk.lending.recall("l1", "own users")
    await asyncio.wait_for(heard.wait(), 10)
    assert len(tries) == 3
    desk.make()
    await desk.lending.start()
    await asyncio.sleep(0)
    assert desk.told[0][:2] == (grant.lease_id, tries[0])
    await desk.lending.recalls.close()


async def _nothing():
    pass


async def test_a_stranger_to_the_recall_is_not_asked_for_ever():
    """A borrower that refuses to hear of a recall is left alone; the end comes all the same."""
    recalls, tries = Recalls(), []

    async def refuse(grant, reason):
        tries.append(grant)
        raise Forbidden("Not mine.")

    class Grant:
        lease_id = "l1"
        ends_at = datetime.now(UTC) + HOUR

    recalls.tell = refuse
    recalls.begin(Grant(), "x")
    recalls.begin(Grant(), "x")
    while recalls.under_way("l1"):
        await asyncio.sleep(0)
    assert len(tries) == 1


async def test_a_crash_after_the_store_was_written_is_mended(desk):
    """The store alone says when a loan ends: document and sandbox follow it at the next start."""
    first = await desk.grant(time=5 * HOUR)
    recalled = desk.leases.kept["l1"].recalled("own users", datetime.now(UTC))
    desk.leases.kept["l1"] = recalled
    desk.make()
    await desk.lending.start()
    assert desk.host.ends["l1"] == recalled.ends_at
    again = await desk.grant()
    assert (again.ends_at, again.revision) == (recalled.ends_at, first.revision + 1)
    assert desk.lending.guests.find("l1").ends_at == recalled.ends_at
    await desk.lending.recalls.close()


async def test_own_jobs_come_first(desk):
    """What an own job waits for is recalled, kept from others, and lent again once it does not."""
    for number in (1, 2, 3):
        await desk.grant(number, time=5 * HOUR)
    await desk.lending.make_room(Need(cpus=2))
    assert [each.recalled for each in await desk.lending.loans()] == [
        "",
        "",
        "its owner's own users need it",
    ]
    await desk.lending.make_room(Need(cpus=2))
    assert sum(bool(each.recalled) for each in await desk.lending.loans()) == 1
    with pytest.raises(NoCapacity):
        await desk.grant(4)
    assert (await desk.lending.digest(OPTICS)).free.cpus == 0
    await desk.lending.make_room(Need(cpus=40))
    desk.lending.desk._promised_until = datetime.now(UTC)
    await desk.grant(4)


async def test_loans_without_notice_are_not_recalled(tmp_path):
    """What was lent for good stays lent until its end, or until its owner ends it at once."""
    desk = Desk(tmp_path, POLICY.replace('notice = "30m"', "cpus = 4"))
    await desk.grant(time=5 * HOUR)
    await desk.lending.make_room(Need(cpus=4))
    assert not desk.leases.kept["l1"].recall
    with pytest.raises(Conflict, match="without a notice"):
        await desk.lending.end_at_word("l1", now=False)
    ended = await desk.lending.end_at_word("l1", now=True)
    assert ended.state is LeaseState.RELEASED
    assert not desk.host.ends


async def test_loans_of_who_left_end(desk):
    """A removed member's loans end at once; so do all of a community that is left."""
    await desk.grant(1, borrower="b")
    await desk.grant(2, borrower="c")

    async def still(community, key):
        return key != "b" * 64

    desk.lending.still_member = still
    await desk.lending.keep_house()
    assert desk.leases.kept["l1"].reason == "no longer a member"
    assert desk.leases.kept["l2"].live
    await desk.lending.end_all_of(f"other.{'c' * 64}", "left")
    assert desk.leases.kept["l2"].live
    await desk.lending.end_all_of(OPTICS, "left")
    assert not desk.leases.kept["l2"].live


async def test_the_end_is_told_again_after_a_failure(desk):
    """What could not be written down about an end keeps the loan on the books until it can."""
    await desk.grant()
    told = desk.note

    async def fail(lease, grant):
        raise Unavailable("The disk is full.")

    desk.lending.on_ended = fail
    with pytest.raises(Unavailable):
        await desk.lending.release("l1", "b" * 64)
    assert desk.leases.kept["l1"].live
    desk.lending.on_ended = told
    await desk.lending.release("l1", "b" * 64)
    assert len(desk.ended) == 1
    assert not desk.leases.kept["l1"].live


async def test_grants_of_loans_long_over_are_forgotten(desk):
    """A month after their end, and never one of a loan that still has to be accounted for."""
    await desk.grant(1)
    await desk.grant(2)
    await desk.lending.end(desk.leases.kept["l1"], "done")
    await desk.lending.keep_house()
    assert set(desk.papers.grants) == {"l1", "l2"}
    await desk.lending.keep_house()
    assert desk.papers.looks == 1, "not each time"
    month = timedelta(days=30)
    desk.papers.ends = {each: end - month for each, end in desk.papers.ends.items()}
    desk.make()
    await desk.lending.keep_house()
    assert set(desk.papers.grants) == {"l1", "l2"}, "they ended less than a month ago"
    desk.papers.ends = {each: end - month for each, end in desk.papers.ends.items()}
    desk.make()
    await desk.lending.keep_house()
    assert set(desk.papers.grants) == {"l2"}


async def test_the_room_goes_to_who_waited(desk):
    """A refusal for want of room leaves a claim that later requests do not push back."""
    await desk.grant(1, cpus=4, borrower="a")
    with pytest.raises(NoCapacity):
        await desk.grant(2, cpus=4, borrower="b")
    await desk.lending.release("l1", "a" * 64)
    with pytest.raises(NoCapacity, match="for others"):
        await desk.grant(3, cpus=1, borrower="a")
    await desk.grant(4, cpus=4, borrower="b")


async def test_a_change_of_settings_takes_effect(desk):
    """Later decisions go by the new file; loans that run keep the terms that they were given."""
    changes = []
    desk.lending.on_change = lambda: changes.append(1)
    first = await desk.grant(1)
    assert desk.change(POLICY.replace("cpus = 4", "cpus = 2").replace("30m", "1m"))
    second = await desk.grant(2)
    assert (first.notice_seconds, second.notice_seconds) == (1800, 60)
    with pytest.raises(NoCapacity):
        await desk.grant(3)
    assert desk.change(POLICY.replace("cpus = 4", "cpus = 1"))
    assert (await desk.lending.desk.problems())[0] == (
        "lending: over quota: all loans: 2 of 1 CPUs are lent"
    )
    await desk.lending.stop()
    assert len(changes) >= 4


async def test_a_rule_for_a_community_this_site_is_not_in_is_told(desk):
    """File, rule, name and what to do; nothing is blocked, and joining it mends that."""
    for_optics = 'communities = ["optics", "physics"]\n[[lending.rules]]\ncommunity = "optics"\n'
    other = '[[lending.rules]]\ncommunity = "physics"\n'
    text = POLICY.replace("[[lending.rules]]\n", f"{for_optics}{other}[[lending.rules]]\n")
    assert desk.change(text)
    (told,) = await desk.lending.desk.problems()
    assert told.startswith(
        f"lending: {desk.file}: rule 2 is for physics, which this site is not in"
    )
    assert "'gridcloud community join CODE'" in told
    assert await desk.grant()
    desk.papers.joined[f"physics.{'b' * 64}"] = "its founding document"
    assert await desk.lending.desk.problems() == ()

    async def removed(community, key):
        return not (community == OPTICS and key == desk.keyring.identity.key)

    desk.lending.still_member = removed
    (told,) = await desk.lending.desk.problems()
    assert "rule 1 is for optics" in told


async def test_a_broken_file_changes_nothing(desk):
    """What held before holds, the mistake is told with file and line, and mended by the next."""
    good = desk.live.current
    assert not desk.change(POLICY.replace("cpus = 4", 'cpus = "four"'))
    assert desk.live.current is good
    assert "settings.toml, line 5: lending.cpus" in desk.live.problem
    assert not desk.change(POLICY)
    assert desk.live.problem == ""


async def test_what_needs_a_restart_is_told(desk):
    """A change that cannot be taken over is no secret; the rest of the file holds at once."""
    text = POLICY.replace("cpus = 4", "cpus = 3") + '[gateway]\nlisten = "127.0.0.1:9"\n'
    assert desk.change(text.replace('name = "uni"', 'name = "other"'))
    assert desk.live.current.lending.cpus == 3
    assert desk.live.current.name == "uni"
    assert "name, gateway.listen will hold from the next start on" in desk.live.problem


async def test_the_file_is_watched(monkeypatch, desk):
    """A change is noticed without being told of it."""
    monkeypatch.setattr("gridcloud.site.live_settings.LOOK_EVERY_SECONDS", 0.01)
    monkeypatch.setattr("gridcloud.site.live_settings._SETTLED_SECONDS", 0.0)
    changed = asyncio.Event()
    desk.live.listeners.append(lambda before: changed.set())
    desk.live.start()
    desk.file.write_text(POLICY.replace("cpus = 4", "cpus = 3"))
    await asyncio.wait_for(changed.wait(), 20)
    await desk.live.stop()
    assert desk.live.current.lending.cpus == 3


_STEP = st.tuples(
    st.sampled_from(["grant", "grant", "renew", "release", "recall", "end", "room", "settings"]),
    st.integers(1, 4),
    st.integers(1, 4),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(_STEP, max_size=6), max_size=8), st.integers(0, 10**6))
def test_nothing_is_lent_twice_or_revived(tmp_path_factory, batches, seed):
    """Copies, late ones and all at once: the store is never asked to keep what must not be.

    Requests, renewals, releases, recalls, own jobs and policy changes for a few loans run at the
    same time; `MemoryLeases` checks each write against the one before.
    """
    folder = tmp_path_factory.getbasetemp()
    asyncio.run(_interleave(Desk(folder, seed=seed, keyring=_keyring(folder)), batches))


def _keyring(folder, made={}):  # noqa: B006 - one for all examples: making keys takes long
    return made.setdefault(folder, Keyring(folder / "keys"))


async def _interleave(desk, batches):
    seen = {}

    async def act(kind, number, amount):
        lending, borrower = desk.lending, "b" * 64
        until = datetime.now(UTC) + amount * 2 * HOUR
        try:
            match kind:
                case "grant":
                    grant = await desk.grant(number, cpus=number, time=HOUR)
                case "renew":
                    grant = await lending.renew(f"l{number}", borrower, until)
                    assert grant.ends_at >= until
                case "release":
                    return await lending.release(f"l{number}", borrower)
                case "recall":
                    return await lending.recall(f"l{number}", "own users")
                case "end":
                    lease = desk.leases.kept.get(f"l{number}")
                    return lease and await lending.end(lease, "its end has come")
                case "room":
                    return await lending.make_room(Need(cpus=amount))
                case _:
                    return desk.change(POLICY.replace("cpus = 4", f"cpus = {amount}"))
        except GridcloudError:
            return None
        known = seen.setdefault((grant.lease_id, grant.revision), grant)
        assert known == grant, "one revision says two things"
        return None

    for batch in batches:
        await asyncio.gather(*(act(*step) for step in batch))
    live = {lease.id for lease in desk.leases.kept.values() if lease.live}
    assert set(desk.host.ends) == live, "a sandbox without a loan, or the reverse"
    for lease_id in live:
        lease = desk.leases.kept[lease_id]
        assert lease.state is LeaseState.ACTIVE
        assert desk.host.ends[lease_id] == lease.ends_at
        assert desk.lending.guests.find(lease_id).ends_at == lease.ends_at
    ended = [lease_id for lease_id, *_ in desk.ended]
    assert len(ended) == len(set(ended)), "one end was told twice"
    over = {key for key, lease in desk.leases.kept.items() if not lease.live and lease.ended_at}
    assert set(ended) == over
    await desk.lending.stop()


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from("agrxe"), st.integers(0, 600), st.integers(0, 600)), max_size=20
    )
)
def test_the_life_of_a_lease_goes_one_way(steps):
    """Whatever comes in whatever order, a lease only goes on: no state, revision or recall is
    ever taken back, and its end moves earlier once at most."""
    start = datetime(2025, 1, 1, tzinfo=UTC)
    order = list(LeaseState)
    terms = {"notice": "PT5M", "processes": 8, "disk_bytes": 1}
    lease = Lease.model_validate(
        {
            "id": "l", "role": LeaseRole.LENT, "state": LeaseState.INTENT, "provider": "local",
            "need": Need(), "created_at": start, "ends_at": start + HOUR, "terms": terms,
        }
    )  # fmt: skip
    shortened = 0
    for kind, at, amount in steps:
        now, before = start + timedelta(minutes=at), lease
        try:
            if kind == "a":
                lease = lease.activated(Machine(lease_id="l", provider="local", folder="jobs"))
            elif kind == "g":
                lease = lease.renewed(start + timedelta(minutes=amount))
            elif kind == "r":
                lease = lease.recalled("own users", now)
            elif kind == "x":
                lease = lease.released("given back", now)
            else:
                assert lease.expired(now) == (now >= lease.ends_at)
        except Conflict:
            assert before is lease
        assert order.index(lease.state) >= order.index(before.state)
        assert lease.revision >= before.revision
        assert before.recall is None or lease.recall == before.recall
        shortened += lease.ends_at < before.ends_at
        if not before.live:
            assert lease is before
    assert shortened <= 1
