"""The book of offers: only proved, newer ones by lending members; told anew when they change."""

from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import Forbidden, GridcloudError, Unavailable
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.limits import Limits
from gridcloud.grid.messages import Kind, MemberRecord
from gridcloud.grid.offers import NOT_YET, OfferBook
from gridcloud.grid.papers import (
    Membership,
    OfferDigest,
    Offered,
    Presence,
    Role,
    community_id,
)
from gridcloud.grid.roster import Roster
from gridcloud.grid.swim import PeerState, Seen
from gridcloud.model.need import Resources

BEGIN = datetime(2026, 5, 1, tzinfo=UTC)
FOUNDER, LENDER, TAKER = (Identity.generate() for _ in range(3))
COMMUNITY = community_id("foam", FOUNDER.key)


class Book:
    """A book of a community with a founder, a lender and one who only borrows."""

    def __init__(self):
        self.now = BEGIN
        self.roster = Roster(COMMUNITY, lambda: self.now)
        for identity, name, roles in (
            (FOUNDER, "founder", tuple(Role)),
            (LENDER, "lender", (Role.PROVIDER,)),
            (TAKER, "taker", (Role.CONSUMER,)),
        ):
            self.roster.add(member(identity, name, roles))
        self.book = OfferBook(self.roster, lambda: self.now)

    def listed(self, **seen):
        return {
            offer.site_name: offer
            for offer in self.book.listed(FOUNDER.key, lambda _key: Seen(**seen))
        }


def member(identity, name, roles):
    membership = Membership(
        community=COMMUNITY,
        member=identity.key,
        site_name=name,
        roles=roles,
        issued_at=BEGIN,
        issuer=FOUNDER.key,
    )
    presence = Presence(site=identity.key, addresses=("127.0.0.1:1",), issued_at=BEGIN)
    return MemberRecord(credential=sign(FOUNDER, membership), presence=sign(identity, presence))


def offer(version=1, by=LENDER, **other):
    size = Resources(cpus=version, memory_bytes=2**30)
    said = {
        "site": by.key,
        "site_name": "lender",
        "community": COMMUNITY,
        "version": version,
        "offered": Offered(capacity=size, free=size, max_time_seconds=60, network=False),
        "issued_at": BEGIN,
        "expires_at": BEGIN + timedelta(minutes=5),
    }
    return sign(by, OfferDigest(**{**said, **other}))


@pytest.fixture
def held():
    return Book()


def test_the_newest_version_counts_in_whatever_order_they_come(held):
    """An older digest never replaces a newer one; the hash follows from what is held."""
    first, second = offer(1), offer(2)
    assert held.book.add(second) == LENDER.key
    assert held.book.add(first) is None
    other = Book()
    assert [other.book.add(first), other.book.add(second), other.book.add(second)] == [
        LENDER.key,
        LENDER.key,
        None,
    ]
    assert held.book.digest() == other.book.digest()
    assert held.listed()["lender"].digest.version == 2


@pytest.mark.parametrize(
    "false",
    [
        lambda: offer(site_name="founder"),
        lambda: offer(community=community_id("other", FOUNDER.key)),
        lambda: offer(expires_at=BEGIN - timedelta(minutes=5)),
        lambda: offer(expires_at=BEGIN + timedelta(days=1)),
        lambda: offer(issued_at=BEGIN + timedelta(hours=1)),
        lambda: offer(by=TAKER, site_name="taker"),
        lambda: offer()[:-4] + "AAAA",
        lambda: "not a document",
    ],
)
def test_what_is_not_a_lending_members_own_is_refused(held, false):
    """Another name, community or time, a borrower's, a forged one, nonsense: nothing changes."""
    before = held.book.digest()
    with pytest.raises(GridcloudError):
        held.book.add(false())
    assert held.book.digest() == before
    assert held.listed()["lender"].digest is None


def test_an_offer_of_an_unknown_site_is_left_out_without_a_word(held):
    """Its record may still be on its way; when it is there, the offer is compared again."""
    stranger = Identity.generate()
    assert held.book.add(offer(by=stranger, site_name="stranger")) is None
    held.roster.add(member(stranger, "stranger", (Role.PROVIDER,)))
    assert held.book.add(offer(by=stranger, site_name="stranger")) == stranger.key


def test_asked_of_one_another_s_word_is_refused(held):
    """Who is asked for its offer cannot answer with somebody else's."""
    with pytest.raises(Forbidden):
        held.book.add(offer(), signer=FOUNDER.key)


def test_the_list_says_why_there_is_no_offer(held):
    """Nothing yet, expired, dead, not reached from here, lending nothing, or faulty."""
    assert held.listed()["lender"].problem == NOT_YET
    assert "taker" not in held.listed()
    held.book.add(offer(1))
    assert held.listed()["lender"].problem == ""
    assert held.listed(state=PeerState.DEAD)["lender"].problem.startswith("unreachable: lender")
    assert held.listed(direct=False)["lender"].problem.startswith("unreachable from this site")
    held.book.silent(LENDER.key, "no answer")
    assert held.listed()["lender"].problem == "unreachable: no answer"
    held.book.confirm(LENDER.key)
    held.book.blame(LENDER.key, "its offer cannot be used: 2^64 CPUs")
    assert held.listed()["lender"].digest is None
    nothing = Resources()
    held.book.add(
        offer(2, offered=Offered(capacity=nothing, free=nothing, max_time_seconds=1, network=False))
    )
    assert held.listed()["lender"].problem == "lender lends nothing in foam."
    held.book.add(offer(3))
    held.now += timedelta(minutes=5)
    assert held.listed()["lender"].problem == "its offer expired"


def test_an_offer_outside_its_owners_hours_says_when_they_begin(held):
    """By the reader's clock, with its zone; nobody asks before, and the list is looked at then."""
    opens = BEGIN + timedelta(minutes=2)
    size = Resources(cpus=4, memory_bytes=2**30)
    said = Offered(
        capacity=size, free=Resources(), max_time_seconds=60, network=False, opens_at=opens
    )
    held.book.add(offer(1, offered=said))
    shown = held.listed()["lender"]
    assert shown.problem == f"closed until {opens.astimezone():%a %H:%M %Z}"
    assert shown.digest.offered.capacity == size
    assert held.book.next_expiry() == opens
    held.now = opens
    assert held.listed()["lender"].problem == ""
    assert held.book.next_expiry() > opens


def test_what_expired_is_dropped_and_no_longer_compared(held):
    """A book that dropped an offer equals one that never had it."""
    empty = held.book.digest()
    held.book.add(offer(1))
    assert held.book.digest() != empty
    held.now += timedelta(minutes=7)
    held.book.prune()
    assert held.book.digest() == empty
    assert not held.book.documents_in(range(64))


def test_limits_let_a_burst_through_and_then_a_rate():
    """A member may ask 200 times at once and 50 a second; of leases fewer; it is told so."""
    limits = Limits()
    for _ in range(200):
        limits.enter("a", 0.0, member=True)
    with pytest.raises(Unavailable, match="too often"):
        limits.enter("a", 0.0, member=True)
    limits.enter("b", 0.0, member=True)
    for _ in range(50):
        limits.enter("a", 1.0, member=True)
    for _ in range(100):
        limits.allow("a", Kind.LEASE, 0.0)
    with pytest.raises(Unavailable):
        limits.allow("a", Kind.LEASE, 0.0)
    limits.allow("a", Kind.RELEASE, 0.0)
    limits.allow("b", Kind.LEASE, 0.0)


def test_strangers_share_one_small_budget_that_members_do_not_feel():
    """However many keys they make up, they have 60 requests at once; members go on."""
    limits, refused = Limits(), 0
    for number in range(1000):
        try:
            limits.enter(f"stranger{number}", 0.0, member=False)
        except Unavailable:
            refused += 1
    assert refused == 940
    limits.enter("member", 0.0, member=True)
