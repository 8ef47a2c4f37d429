"""Peers' offers are the same objects while they say the same: what searches them relies on it."""

from datetime import UTC, datetime, timedelta

from gridcloud.grid.offers import PeerOffer
from gridcloud.grid.papers import OfferDigest, Offered
from gridcloud.grid.transport import PeerAddress
from gridcloud.model.api import CommunityInfo
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need, Resources
from gridcloud.site.offered import PeerOffers
from gridcloud.site.peers import _as_members_see, _made_offer

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
COMMUNITY = f"physics.{'f' * 64}"


def _key(number):
    return f"{number + 1:064x}"


def said(number, free=4, version=1, latency=0.1):
    """What one peer offers, as the broker tells it."""
    key = _key(number)
    digest = OfferDigest(
        site=key,
        site_name=f"s{number}",
        community=COMMUNITY,
        version=version,
        offered=Offered(
            capacity=Resources(cpus=4, memory_bytes=2**30),
            free=Resources(cpus=free, memory_bytes=2**30),
            max_time_seconds=3600,
            network=False,
        ),
        issued_at=NOW,
        expires_at=NOW + timedelta(minutes=5),
    )
    return PeerOffer(
        community=COMMUNITY,
        site_name=f"s{number}",
        address=PeerAddress(key=key),
        digest=digest,
        problem="",
        seen_at=NOW,
        latency_seconds=latency,
    )


def loan(number, at):
    """What was borrowed of a peer."""
    return Lease(
        id=f"l{number}",
        role=LeaseRole.BORROWED,
        state=LeaseState.ACTIVE,
        provider="lent",
        need=Need(cpus=1),
        created_at=NOW + at,
        peer=_key(number),
        community=COMMUNITY,
    )


def test_only_the_offer_that_changed_is_made_anew():
    """Equal words of a peer give the same object, whatever else changed; new words a new one."""
    offers = PeerOffers(_made_offer)
    before = offers.listed([said(1), said(2), said(3)], [], [])
    after = offers.listed([said(0), said(1), said(2, free=1, version=2), said(3)], [], [])
    assert [offer.free.cpus for offer in after] == [4, 4, 1, 4]
    assert after[1] is before[0]
    assert after[2] is not before[1]
    assert after[3] is before[2]
    assert offers.listed([said(1, latency=0.5)], [], [])[0].latency_seconds == 0.5
    assert offers.listed([], [], []) == []


def test_a_loan_changes_the_offer_of_its_owner_alone():
    """What is borrowed, and what is given back, counts at once, and at that owner only."""
    offers = PeerOffers(_made_offer)
    peers = [said(1), said(2)]
    before = offers.listed(peers, [], [])
    borrowed = loan(1, timedelta(seconds=1))
    after = offers.listed(peers, [borrowed], [])
    assert after[0].free.cpus == 3
    assert after[1] is before[1]
    back = loan(2, -timedelta(seconds=5))
    again = offers.listed([said(1), said(2, free=3)], [], [(NOW + timedelta(seconds=1), back)])
    assert [offer.free.cpus for offer in again] == [4, 4]
    assert offers.listed(peers, [], [])[1].free.cpus == 4


def test_nothing_changed_costs_no_look_at_each():
    """The very same list comes back, so that the planner compares nothing but identities."""
    offers = PeerOffers(_made_offer)
    peers = [said(number) for number in range(50)]
    assert offers.listed(list(peers), [], []) is offers.listed(list(peers), [], [])


def test_a_community_that_this_site_was_removed_from_offers_nothing():
    """Its members' last words no longer count, and the reason is the removal; others' stand."""
    optics = f"optics.{'e' * 64}"
    other = said(2).model_copy(update={"community": optics})
    gone = CommunityInfo(id=COMMUNITY, name="physics", founder="f" * 64, problem="Removed by one.")
    asking = CommunityInfo(id=optics, name="optics", founder="e" * 64, waiting="x", problem="later")
    first, second = _as_members_see([said(1), other], [gone, asking])
    assert second is other
    offer = _made_offer(first, (), ())
    assert (offer.problem, offer.known, offer.capacity) == ("Removed by one.", True, Resources())
