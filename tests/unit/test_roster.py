"""The roster: who is a member follows from what was signed, in whatever order it is heard."""

import functools
import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gridcloud.errors import Conflict, Forbidden, GridcloudError
from gridcloud.grid import roster as roster_module
from gridcloud.grid.documents import LEEWAY, sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.messages import MemberRecord, RevocationRecord
from gridcloud.grid.papers import Membership, Presence, Revocation, Role, community_id
from gridcloud.grid.roster import Roster

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
FOUNDER, X, Y, K, L, EVE = (Identity.generate() for _ in range(6))
FOAM = community_id("foam", FOUNDER.key)
PLAIN, ALL = (Role.PROVIDER, Role.CONSUMER), tuple(Role)


def at(minute):
    """Return a time some minutes after the first of these tests'."""
    return NOW - timedelta(hours=10) + timedelta(minutes=minute)


@functools.cache
def membership(issuer, member, minute, roles=PLAIN, name=None, since=None):
    """Return the document of a membership."""
    paper = Membership(
        community=FOAM,
        member=member.key,
        site_name=name or f"site-{member.key[:6]}",
        roles=roles,
        issued_at=at(minute),
        issuer=issuer.key,
        since=since,
    )
    return sign(issuer, paper)


@functools.cache
def presence(site, minute):
    """Return where a site says it is."""
    paper = Presence(site=site.key, addresses=(f"10.0.0.{minute % 250}:1",), issued_at=at(minute))
    return sign(site, paper)


@functools.cache
def admitted(issuer, member, minute, roles=PLAIN, chain="", said=None, **more):
    """Return a member's record; ``chain`` is the membership of the manager that signs."""
    document = membership(issuer, member, minute, roles, **more)
    credential = f"{document}~{chain}" if chain else document
    return MemberRecord(credential=credential, presence=presence(member, said or minute))


@functools.cache
def removed(issuer, member, minute, proof="", reason=""):
    """Return a revocation; ``proof`` is the credential of who signs."""
    paper = Revocation(
        community=FOAM,
        member=member.key,
        issuer=issuer.key,
        revoked_at=at(minute),
        reason=reason,
    )
    return RevocationRecord(revocation=sign(issuer, paper), proof=proof)


def made_of(*items):
    """Return a roster that heard these."""
    roster = Roster(FOAM, lambda: NOW)
    for item in items:
        roster.add(item)
    return roster


X_MANAGES = membership(FOUNDER, X, 1, ALL)
Y_MANAGES = membership(FOUNDER, Y, 2, ALL)
F = admitted(FOUNDER, FOUNDER, 0, ALL)
MANAGER_X = MemberRecord(credential=X_MANAGES, presence=presence(X, 1))
MANAGER_Y = MemberRecord(credential=Y_MANAGES, presence=presence(Y, 2))
BASE = (F, MANAGER_X, MANAGER_Y)


def in_every_order(*items):
    """Return the one roster that these make in every order, having checked that it is one."""
    rosters = [made_of(*BASE, *order) for order in itertools.permutations(items)]
    first = rosters[0]
    for other in rosters[1:]:
        assert other.digest() == first.digest()
        assert other.members == first.members
    return first


class TestWhoIsAMember:
    def test_the_founder_and_managers_admit(self):
        """By the founder's signature, or a manager's with the founder's behind it."""
        roster = in_every_order(admitted(FOUNDER, K, 5), admitted(X, L, 5, chain=X_MANAGES))
        assert roster.members.keys() >= {FOUNDER.key, X.key, K.key, L.key}

    @pytest.mark.parametrize("by", [FOUNDER, X, K])
    def test_who_was_removed_or_left_is_no_member(self, by):
        """The founder removes, a manager removes, a member leaves."""
        proof = {FOUNDER: "", X: X_MANAGES, K: membership(FOUNDER, K, 5)}[by]
        roster = in_every_order(admitted(FOUNDER, K, 5), removed(by, K, 6, proof))
        assert K.key not in roster.members
        assert roster.revoked(K.key).issuer == by.key

    def test_replayed_credentials_bring_nobody_back(self):
        """Whatever is heard after a removal, if it was issued before."""
        replays = [admitted(FOUNDER, K, 5, said=30), admitted(X, K, 5, chain=X_MANAGES, said=31)]
        roster = in_every_order(*replays, removed(FOUNDER, K, 6))
        for item in replays:
            roster.add(item)
        assert K.key not in roster.members

    def test_at_the_same_moment_the_removal_wins(self):
        """A membership has to be issued later to count."""
        assert K.key not in in_every_order(admitted(FOUNDER, K, 6), removed(FOUNDER, K, 6)).members

    def test_who_left_stays_away_though_its_manager_left_before(self):
        """Its leaving is its own word, not the manager's."""
        credential = f"{membership(X, K, 5)}~{X_MANAGES}"
        roster = in_every_order(
            admitted(X, K, 5, chain=X_MANAGES),
            removed(X, X, 8, X_MANAGES),
            removed(K, K, 9, credential),
        )
        assert K.key not in roster.members

    def test_a_later_membership_admits_anew(self):
        """A removal is of what was, not of a key for ever."""
        roster = in_every_order(
            admitted(FOUNDER, K, 5), removed(FOUNDER, K, 6), admitted(X, K, 7, chain=X_MANAGES)
        )
        assert K.key in roster.members
        assert roster.revoked(K.key) is None

    def test_a_managers_removal_voids_no_manager(self):
        """Only the founder removes managers; the word of another is kept and does nothing."""
        roster = in_every_order(removed(X, Y, 9, X_MANAGES))
        assert roster.members[Y.key].has(Role.MANAGER)

    def test_what_a_removed_manager_signed_is_void(self):
        """Members it admitted drop out; members it removed come back; back-dating is no help."""
        roster = in_every_order(
            admitted(X, K, 5, chain=X_MANAGES),
            admitted(FOUNDER, L, 5),
            removed(X, L, 6, X_MANAGES),
            removed(FOUNDER, X, 8),
        )
        assert K.key not in roster.members
        assert L.key in roster.members
        backdated = admitted(X, EVE, 3, chain=X_MANAGES), removed(X, L, 7, X_MANAGES)
        assert [roster.add(item) for item in backdated] == [False, False]
        assert EVE.key not in roster.members
        assert L.key in roster.members

    def test_what_was_signed_anew_outlives_the_manager(self):
        """As whoever removes a manager does first."""
        roster = in_every_order(
            admitted(X, K, 5, chain=X_MANAGES), removed(FOUNDER, X, 8), admitted(FOUNDER, K, 7)
        )
        assert K.key in roster.members

    def test_a_manager_made_plain_loses_its_word(self):
        """Its old membership proves nothing any more, also if it becomes a manager again."""
        items = (
            admitted(X, K, 5, chain=X_MANAGES),
            admitted(FOUNDER, X, 8),
            admitted(FOUNDER, X, 12, ALL),
        )
        roster = in_every_order(*items)
        assert K.key not in roster.members
        again = membership(FOUNDER, X, 12, ALL)
        roster.add(admitted(X, K, 13, chain=again))
        assert K.key in roster.members

    def test_what_a_manager_signed_before_it_left_stays(self):
        """Leaving in peace takes nobody along; signing goes no further."""
        roster = in_every_order(
            admitted(X, K, 5, chain=X_MANAGES),
            removed(X, X, 8, X_MANAGES),
            admitted(X, L, 9, chain=X_MANAGES),
        )
        assert K.key in roster.members
        assert L.key not in roster.members
        assert X.key not in roster.members

    def test_roles_are_what_was_said_last(self):
        """By the founder or a manager, for a plain member."""
        roster = in_every_order(
            admitted(FOUNDER, K, 5), admitted(X, K, 7, (Role.CONSUMER,), X_MANAGES)
        )
        assert roster.members[K.key].membership.roles == (Role.CONSUMER,)

    def test_a_manager_makes_no_manager_plain(self):
        """Not even by what looks like a newer admission."""
        roster = in_every_order(admitted(X, Y, 9, chain=X_MANAGES))
        assert roster.members[Y.key].has(Role.MANAGER)

    def test_no_lost_role_comes_back_through_a_weaker_removal(self):
        """Made plain by the founder and then removed by a manager, one is no manager again."""
        roster = in_every_order(admitted(FOUNDER, Y, 9), removed(X, Y, 10, X_MANAGES))
        assert Y.key not in roster.members

    def test_the_founder_is_removed_by_nobody_but_itself(self):
        """A manager's revocation of it is not even kept; its own is, and managers go on."""
        with pytest.raises(Forbidden, match="founder"):
            made_of(*BASE).add(removed(X, FOUNDER, 9, X_MANAGES))
        roster = in_every_order(removed(FOUNDER, FOUNDER, 9), admitted(X, K, 10, chain=X_MANAGES))
        assert FOUNDER.key not in roster.members
        assert {X.key, K.key} <= roster.members.keys()

    def test_the_newest_presence_counts(self):
        """Whoever passes it on, and beside whatever credential."""
        roster = in_every_order(admitted(FOUNDER, K, 5, said=9), admitted(X, K, 7, chain=X_MANAGES))
        assert roster.members[K.key].presence.issued_at == at(9)


class TestHostile:
    @pytest.mark.parametrize(
        "item",
        [
            removed(K, L, 9),
            removed(K, L, 9, membership(FOUNDER, K, 5)),
            removed(K, L, 9, X_MANAGES),
            removed(EVE, EVE, 9),
            removed(EVE, EVE, 9, membership(FOUNDER, K, 5)),
            removed(FOUNDER, L, 9, "x"),
            admitted(EVE, EVE, 9, ALL),
            admitted(K, EVE, 9, chain=membership(FOUNDER, K, 5)),
            admitted(K, EVE, 9, chain=X_MANAGES),
            admitted(X, EVE, 9, ALL, X_MANAGES),
            admitted(X, K, -5, chain=X_MANAGES),
            removed(X, K, -5, X_MANAGES),
        ],
    )
    def test_what_proves_nothing_changes_nothing(self, item):
        """A plain member's, a stranger's, a manager's beyond its rank, or before its time."""
        roster = made_of(*BASE, admitted(FOUNDER, K, 5), admitted(FOUNDER, L, 5))
        before = roster.digest(), dict(roster.members)
        with pytest.raises(GridcloudError):
            roster.add(item)
        assert (roster.digest(), dict(roster.members)) == before

    def test_the_future_is_not_believed(self):
        """A revocation or membership dated ahead by more than clocks may differ."""
        late = int((NOW + LEEWAY - at(0)).total_seconds() / 60) + 1
        for item in (removed(FOUNDER, K, late), admitted(FOUNDER, K, late)):
            with pytest.raises(Forbidden, match="NTP"):
                made_of(*BASE).add(item)

    @given(st.data())
    @settings(max_examples=150, deadline=None)
    def test_one_bit_flipped_is_refused(self, data):
        """Whatever it changes, in a membership, its chain, a revocation or its proof."""
        record = data.draw(
            st.sampled_from(
                [admitted(X, K, 5, chain=X_MANAGES), removed(X, K, 6, X_MANAGES), removed(K, K, 6)]
            )
        )
        field = data.draw(st.sampled_from([name for name, text in record if text]))
        text = getattr(record, field).encode()
        place = data.draw(st.integers(0, len(text) * 8 - 1))
        changed = bytearray(text)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(GridcloudError):
            made_of(*BASE).add(
                record.model_copy(update={field: changed.decode("ascii", "replace")})
            )

    def test_an_old_chain_knocks_nobody_out(self):
        """A credential with its manager's older membership behind it hides no better one."""
        again = membership(FOUNDER, X, 12, ALL)
        weak = admitted(X, K, 14, chain=X_MANAGES)
        good = admitted(X, K, 13, chain=again)
        roster = in_every_order(good, weak, removed(FOUNDER, X, 10), admitted(FOUNDER, X, 12, ALL))
        assert roster.members[K.key].record.credential == good.credential

    def test_a_roster_has_an_end(self, monkeypatch):
        """Who is removed for filling it makes room again."""
        monkeypatch.setattr(roster_module, "MAX_SEATS", 8)
        roster = made_of(*BASE)
        with pytest.raises(Conflict, match="full"):
            for _ in range(8):
                roster.add(admitted(X, Identity.generate(), 5, chain=X_MANAGES))
        roster.add(removed(FOUNDER, X, 9))
        roster.add(admitted(FOUNDER, K, 10))
        assert K.key in roster.members


_SITES = (X, Y, K, L)


@st.composite
def _items(draw):
    """Return something that the founder, or somebody else, might have signed."""
    minute = draw(st.integers(3, 40))
    member = draw(st.sampled_from(_SITES))
    issuer = draw(st.sampled_from((FOUNDER, X, Y, member)))
    roles = draw(st.sampled_from((PLAIN, ALL, (Role.CONSUMER,))))
    manages = draw(st.sampled_from([1, 2, *range(10, 40, 10)]))
    chain = "" if issuer is FOUNDER else membership(FOUNDER, issuer, manages, ALL)
    if draw(st.booleans()):
        said = draw(st.integers(3, 40))
        name = draw(st.sampled_from(["one", "two", "three"]))
        return admitted(issuer, member, minute, roles, chain, said, name=name)
    return removed(issuer, member, minute, chain)


def _accepted(items):
    roster, good = made_of(*BASE), []
    for item in items:
        try:
            roster.add(item)
        except GridcloudError:
            continue
        good.append(item)
    return good, roster


@settings(max_examples=150, deadline=None)
@given(st.lists(_items(), max_size=14), st.randoms(use_true_random=False))
def test_any_order_and_any_duplicates_make_the_same_roster(items, chance):
    """Same state, same hash, same names: a merge is commutative, associative and idempotent."""
    good, first = _accepted(items)
    assume(good)
    shuffled = [*BASE, *good, *chance.choices(good, k=len(good))]
    chance.shuffle(shuffled)
    other = made_of(*shuffled)
    assert other.summary() == first.summary()
    assert other.digest() == first.digest()
    assert other.members == first.members
    for key in first.members:
        assert other.shown(key) == first.shown(key)
        assert other.named(first.shown(key)) == first.members[key]
    shown = [first.shown(key) for key in first.members]
    assert len(shown) == len(set(shown))


@settings(max_examples=60, deadline=None)
@given(st.lists(_items(), max_size=10), st.lists(_items(), max_size=10))
def test_two_rosters_that_exchange_what_differs_agree(ours, theirs):
    """By buckets whose hashes differ, both ways, as often as something does."""
    one, two = _accepted(ours)[1], _accepted(theirs)[1]
    for _ in range(4):
        a, b = one.summary(), two.summary()
        differ = [bucket for bucket in a if a[bucket] != b[bucket]]
        to_two, to_one = one.items_in(differ), two.items_in(differ)
        for item in to_two:
            two.add(item)
        for item in to_one:
            one.add(item)
    assert one.digest() == two.digest()
    assert one.members == two.members


@settings(max_examples=50, deadline=None)
@given(st.lists(_items(), max_size=12))
def test_what_is_kept_makes_the_same_roster_again(items):
    """As after a restart; hashes kept up to date item by item are those made at once."""
    _, roster = _accepted(items)
    again = made_of(*roster.items_in(range(roster_module.BUCKETS)))
    assert again.summary() == roster.summary()
    assert again.members == roster.members


def test_adding_tells_whether_it_was_new():
    """What is known already is not passed on for ever."""
    roster = made_of(*BASE)
    item = admitted(FOUNDER, K, 5)
    assert [roster.add(item), roster.add(item)] == [True, False]


class TestNames:
    @pytest.mark.parametrize(("first", "later"), [(K, L), (L, K)])
    def test_the_earlier_member_keeps_its_name(self, first, later):
        """The later is shown with the start of its key; both are found by what is shown."""
        roster = in_every_order(
            admitted(FOUNDER, first, 5, name="lab"),
            admitted(X, later, 6, chain=X_MANAGES, name="lab"),
        )
        assert roster.shown(first.key) == "lab"
        assert roster.shown(later.key) == f"lab~{later.key[:4]}"
        assert roster.named("lab").key == first.key
        assert roster.named(f"lab~{later.key[:4]}").key == later.key
        assert roster.named("lab~") is None
        assert roster.named("nobody") is None

    def test_a_membership_made_out_anew_keeps_its_place(self):
        """Being promoted costs nobody its name."""
        roster = in_every_order(
            admitted(FOUNDER, K, 5, name="lab"),
            admitted(FOUNDER, L, 6, name="lab"),
            admitted(FOUNDER, K, 9, ALL, name="lab", since=at(5)),
        )
        assert roster.shown(K.key) == "lab"

    def test_a_name_is_free_again_when_its_member_is_gone(self):
        """The next of that name has it."""
        roster = in_every_order(
            admitted(FOUNDER, K, 5, name="lab"),
            admitted(FOUNDER, L, 6, name="lab"),
            removed(FOUNDER, K, 9),
        )
        assert roster.shown(L.key) == "lab"


def test_a_refusal_says_who_when_why_and_what_next():
    """So that the removed know whom to ask."""
    roster = made_of(*BASE, admitted(FOUNDER, K, 5, name="lab"))
    roster.add(removed(FOUNDER, K, 6, reason="its owner moved away"))
    told = roster.refusal(K.key)
    name = f"site-{FOUNDER.key[:6]}"
    assert told.message == (
        f"lab ({K.key[:8]}) was removed from foam on 2026-05-01 by {name}: its owner moved away."
    )
    assert "new invitation" in told.hint


def test_what_a_site_said_while_its_clock_was_ahead_gives_way_once_that_is_right():
    """Nobody else took it; were it kept for being the latest, the site would be shut out until
    that time has come."""
    clock = [at(100)]
    mine = Roster(FOAM, lambda: clock[0])
    mine.add(F)
    mine.add(admitted(FOUNDER, K, 1, said=100))
    clock[0] = at(40)
    assert mine.add(admitted(FOUNDER, K, 1, said=40))
    others = Roster(FOAM, lambda: at(40))
    for item in (F, admitted(FOUNDER, K, 1, said=40)):
        others.add(item)
    assert mine.digest() == others.digest()
    assert not mine.add(admitted(FOUNDER, K, 1, said=39))
