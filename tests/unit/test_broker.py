"""Whole brokers talking over the in-memory network: membership, offers and leases between sites."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import (
    Conflict,
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NoCapacity,
    NotFound,
    TimedOut,
    Unavailable,
)
from gridcloud.grid.broker import Broker
from gridcloud.grid.calling import Caller
from gridcloud.grid.community_store import MemoryCommunityStore
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.leasing import lease_id
from gridcloud.grid.memory_transport import Link, MemoryNetwork
from gridcloud.grid.messages import (
    Asking,
    DigestBody,
    GrantBody,
    Kind,
    LeaseBody,
    Nothing,
    encode_reply,
)
from gridcloud.grid.news import News, ProbeBody, ProbeReply, SyncBody, SyncReply, Word
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.papers import LeaseGrant, OfferDigest, Offered
from gridcloud.model.lease import Endpoint
from gridcloud.model.need import Need, Resources

DAY = timedelta(days=1)
SSH_KEY = "ssh-ed25519 AAAAC3Nz"
NEED = Need(cpus=2, time=timedelta(hours=1))
LENDER = ("provider", "consumer")


class Clock:
    """A clock that stands, some way off the common one."""

    def __init__(self, off=timedelta(0)):
        self.now = datetime(2026, 5, 1, 12, tzinfo=UTC) + off

    def __call__(self):
        return self.now


class HonestOwner:
    """Lends as the protocol asks: idempotent by id, and each lease to its borrower alone."""

    def __init__(self, clock):
        self._clock = clock
        self.capacity = Resources(cpus=8, memory_bytes=2**34)
        self.offering = True
        self.launches = []
        self.leases = {}

    async def digest(self, community):
        if not self.offering:
            return None
        return Offered(
            capacity=self.capacity,
            free=self.capacity,
            max_time_seconds=3600,
            network=False,
            isolation="bubblewrap",
        )

    async def grant(self, request):
        if request.lease_id in self.leases:
            return self.leases[request.lease_id]
        if request.need.cpus > self.capacity.cpus:
            raise NoCapacity("No room here.", hint="Try later.")
        await asyncio.sleep(0)  # launching takes a moment, in which a duplicate may come
        self.launches.append(request)
        self.leases[request.lease_id] = LeaseGrant(
            lease_id=request.lease_id,
            community=request.community,
            lender=request.lender,
            borrower=request.borrower,
            person=request.person,
            need=request.need,
            endpoint=Endpoint(host="127.0.0.1", port=22, user="guest", host_keys=(SSH_KEY,)),
            certificate="ssh-ed25519-cert-v01@openssh.com AAAA",
            folder="jobs",
            starts_at=self._clock(),
            ends_at=self._clock() + timedelta(hours=1),
        )
        return self.leases[request.lease_id]

    async def renew(self, lease, borrower, until):
        if lease not in self.leases or self.leases[lease].borrower != borrower:
            raise NotFound("You have no such lease.")
        self.leases[lease] = self.leases[lease].model_copy(update={"ends_at": until})
        return self.leases[lease]

    async def release(self, lease, borrower):
        if lease in self.leases and self.leases[lease].borrower != borrower:
            raise Forbidden("That lease is another site's.")
        self.leases.pop(lease, None)


class Tenant:
    """Notes what lenders tell."""

    def __init__(self):
        self.recalls = []

    async def recalled(self, grant, reason):
        self.recalls.append((grant, reason))

    async def countersign(self, lender, document):
        return "", f"{lender[:4]} showed {document}"


class Site:
    """A broker with all it needs."""

    def __init__(self, transport_for, clock=None):
        self.identity = Identity.generate()
        self.clock = clock or Clock()
        self.owner = HonestOwner(self.clock)
        self.store = MemoryCommunityStore()
        self.transport = transport_for(self.identity)
        self.tenant = Tenant()
        self.broker = Broker(
            self.identity, self.transport, self.store, self.owner, self.tenant, clock=self.clock
        )

    @property
    def key(self):
        return self.identity.key

    async def code(self, roles=LENDER, valid_for=DAY):
        return (await self.broker.invite("foam", roles, valid_for)).code

    async def borrow(self, lender, community, request_id="job-1", need=NEED, timeout=5.0):
        return await self.broker.request_lease(
            lender.key,
            community,
            request_id,
            need=need,
            user="ada",
            ssh_public_key=SSH_KEY,
            timeout=timeout,
        )


@pytest.fixture
def network():
    return MemoryNetwork(seed=1)


@pytest.fixture
async def site(network):
    """Returns a function that starts a site; all are closed at the end."""
    made = []

    async def one(clock=None):
        made.append(Site(lambda identity: network.node(identity.key), clock))
        await made[-1].broker.start()
        return made[-1]

    yield one
    for each in made:
        await each.broker.close()


@pytest.fixture
async def pair(site):
    """A founder ``university``, a member ``lab``, and their community."""
    university, lab = await site(), await site()
    community = (await university.broker.create_community("foam", "university")).id
    await lab.broker.join(await university.code(), "lab")
    return university, lab, community


async def test_found_invite_join_offers_lease_renew_release(pair):
    """The whole way between two sites."""
    university, lab, community = pair
    assert [c.roles for c in await lab.broker.communities()] == [LENDER]
    for each in pair[:2]:
        names = [(m.site_name, m.myself) for m in await each.broker.members("foam")]
        assert names == [("lab", each is lab), ("university", each is university)]
    await lab.broker.refresh_offers(1, timedelta(0))
    (offer,) = await lab.broker.offers()
    assert (offer.site_name, offer.problem) == ("university", "")
    assert offer.digest.offered.capacity.cpus == 8
    grant = await lab.borrow(university, community)
    assert (grant.lender, grant.borrower) == (university.key, lab.key)
    assert (grant.person, grant.need) == ("ada@lab", NEED)
    assert grant.lease_id == lab.broker.lease_id("job-1")
    until = grant.ends_at + timedelta(hours=1)
    renewed = await lab.broker.renew_lease(university.key, community, grant.lease_id, until)
    assert renewed.ends_at == until
    for _ in range(2):
        await lab.broker.release_lease(university.key, community, grant.lease_id)
    assert university.owner.leases == {}


async def test_a_stranger_learns_and_gets_nothing(pair, site):
    """A non-member is refused members, offers and leases, and told to ask for an invitation."""
    university, lab, community = pair
    eve = await site()
    asking = await lab.broker._directory.asking(community)
    caller = Caller(eve.transport, eve.clock)
    said = asking.model_dump()
    lease = LeaseBody(**said, request_id="1", need=NEED, user="eve", ssh_public_key=SSH_KEY)
    probe = ProbeBody(words=(Word(**said, members_digest="0", offers_digest="0"),))
    sync = SyncBody(**said, members=(0,) * 64, offers=(0,) * 64)
    for kind, body, expected in (
        (Kind.PROBE, probe, ProbeReply),
        (Kind.SYNC, sync, SyncReply),
        (Kind.OFFERS, asking, DigestBody),
        (Kind.LEASE, lease, GrantBody),
    ):
        with pytest.raises(Forbidden, match=r"not a member of foam.*invitation"):
            await caller.ask(university.broker.address(), kind, body, expected, 5)
    assert university.owner.launches == []
    with pytest.raises(NotFound):
        await eve.borrow(university, community)


async def test_a_member_who_is_no_consumer_borrows_nothing(pair, site):
    """Roles are the lender's to check."""
    university, _, community = pair
    giver = await site()
    await giver.broker.join(await university.code(("provider",)), "giver")
    with pytest.raises(Forbidden, match="no consumer"):
        await giver.borrow(university, community)
    assert university.owner.launches == []


async def test_a_member_who_is_no_provider_neither_offers_nor_lends(pair, site):
    """A consumer is not asked for offers, and would not answer."""
    university, lab, community = pair
    taker = await site()
    await taker.broker.join(await university.code(("consumer",)), "taker")
    await lab.broker.refresh_members("foam")
    await lab.broker.refresh_offers(1, timedelta(0))
    assert [offer.site_name for offer in await lab.broker.offers()] == ["university"]
    with pytest.raises(NoCapacity):
        await lab.borrow(taker, community)


@pytest.mark.parametrize("off", [timedelta(minutes=10), timedelta(minutes=-10)])
async def test_a_site_with_a_wrong_clock_is_told_so(pair, site, off):
    """Ten minutes off: nothing is joined or leased; the error says how far and what to do."""
    university, lab, community = pair
    code = await university.code()
    late = await site(Clock(off))
    with pytest.raises(GridcloudError, match="NTP"):
        await late.broker.join(code, "late")
    lab.clock.now += off
    with pytest.raises(Conflict, match=r"10m 00s.*NTP"):
        await lab.borrow(university, community)
    assert university.owner.launches == []


async def test_a_duplicated_lease_message_is_one_lease(pair, network):
    """The network says it twice and the caller repeats it: one launch, one grant."""
    university, lab, community = pair
    network.set_link(Link(duplicate=1.0))
    first = await lab.borrow(university, community)
    assert await lab.borrow(university, community) == first
    await asyncio.sleep(0)
    assert len(university.owner.launches) == 1
    other = await lab.borrow(university, community, "job-2")
    assert other.lease_id != first.lease_id


async def test_a_lost_answer_is_had_by_asking_again(pair, network):
    """What was granted unheard is not granted twice."""
    university, lab, community = pair
    network.set_link(Link(loss=1.0), university.key, lab.key)
    with pytest.raises(TimedOut):
        await lab.borrow(university, community, timeout=0.05)
    network.set_link(Link(), university.key, lab.key)
    grant = await lab.borrow(university, community)
    assert [request.lease_id for request in university.owner.launches] == [grant.lease_id]


async def test_anothers_lease_is_neither_renewed_nor_released(pair, site):
    """The lender goes by the key that asks."""
    university, lab, community = pair
    grant = await lab.borrow(university, community)
    other = await site()
    await other.broker.join(await university.code(), "other")
    with pytest.raises(Forbidden):
        await other.broker.release_lease(university.key, community, grant.lease_id)
    with pytest.raises(NotFound):
        await other.broker.renew_lease(
            university.key, community, grant.lease_id, grant.ends_at + DAY
        )
    assert university.owner.leases == {grant.lease_id: grant}


async def test_a_refusal_of_the_owner_comes_back_as_it_was(pair):
    """Code, cause and hint are the owner's."""
    university, lab, community = pair
    with pytest.raises(NoCapacity, match=r"No room here. Try later."):
        await lab.borrow(university, community, need=Need(cpus=99))


@pytest.mark.parametrize(
    "lie",
    [
        {"borrower": "1" * 64},
        {"lease_id": "other"},
        {"person": "root@lab"},
        {"need": Need(cpus=1)},
        {"ends_at": datetime(2026, 5, 1, 11, 59, 30, tzinfo=UTC)},
        {"ends_at": datetime(2026, 5, 1, 1, tzinfo=UTC)},
        {"starts_at": datetime(2026, 5, 1, 13, tzinfo=UTC)},
    ],
)
async def test_a_lying_lender_is_not_believed(pair, lie):
    """A grant for someone or something else, or for another time, is refused by the borrower."""
    university, lab, community = pair
    true = await lab.borrow(university, community)
    false = sign(university.identity, true.model_copy(update=lie))
    answers(university, GrantBody(grant=false))
    with pytest.raises(Forbidden):
        await lab.borrow(university, community)


async def test_a_grant_signed_by_another_is_not_believed(pair, site):
    """A lender cannot pass on somebody else's lease."""
    university, lab, community = pair
    other = await site()
    true = await lab.borrow(university, community)
    passed_on = sign(other.identity, true.model_copy(update={"lender": other.key}))
    answers(university, GrantBody(grant=passed_on))
    with pytest.raises(Forbidden, match="signed by"):
        await lab.borrow(university, community)


def answers(site, body):
    """Make a site answer everything with one body."""

    async def handler(_key, _message):
        return encode_reply(body, site.clock())

    site.transport._handler = handler


async def test_a_renewal_shorter_than_asked_is_not_believed(pair):
    """Renewed means renewed."""
    university, lab, community = pair
    grant = await lab.borrow(university, community)
    answers(university, GrantBody(grant=sign(university.identity, grant)))
    with pytest.raises(Forbidden):
        await lab.broker.renew_lease(university.key, community, grant.lease_id, grant.ends_at + DAY)


@pytest.mark.parametrize("confusion", [{"lease_id": "other"}, {"person": "root@lab"}])
async def test_an_owner_that_confuses_leases_gives_nothing_away(pair, confusion):
    """A fault in the owner is noticed before anything is signed."""
    university, lab, community = pair
    grant = await lab.borrow(university, community)

    async def confused(*_):
        return grant.model_copy(update=confusion)

    university.owner.grant = confused
    with pytest.raises(GridcloudError) as caught:
        await lab.borrow(university, community)
    assert "for something else" not in caught.value.message  # noticed there, not only here
    if "lease_id" in confusion:
        university.owner.renew = confused
        with pytest.raises(Forbidden, match="not this borrower's"):
            await lab.broker.renew_lease(university.key, community, grant.lease_id, grant.ends_at)


async def test_a_fault_of_a_site_is_told_without_its_inside(pair):
    """An unexpected exception becomes an answer; its text stays in that site's log."""
    university, lab, community = pair

    async def faulty(_request):
        raise RuntimeError("secret path")

    university.owner.grant = faulty
    with pytest.raises(GridcloudError, match="failed to answer") as caught:
        await lab.borrow(university, community)
    assert "secret" not in str(caught.value)
    assert caught.value.code == "internal"


async def test_offers_are_pulled_at_once_and_failures_noted(pair, site, network):
    """A dead peer costs its own offer only, with the reason; what it last said stays known."""
    university, lab, _community = pair
    third = await site()
    await third.broker.join(await university.code(), "third")
    await lab.broker.refresh_members("foam", 0.1)
    await lab.broker.refresh_offers(0.1, timedelta(0))
    await network.kill(third.key)
    await lab.broker.refresh_offers(0.1, timedelta(0))
    third_offer, university_offer = sorted(
        await lab.broker.offers(), key=lambda offer: offer.site_name
    )
    assert university_offer.problem == ""
    assert third_offer.problem.startswith("unreachable: ")
    assert third_offer.digest is not None
    lab.clock.now += timedelta(minutes=6)
    assert all(offer.digest is None for offer in await lab.broker.offers())


async def test_fresh_offers_are_not_asked_for_again(pair):
    """Within ``max_age`` a look-up is local; after it the peer is asked."""
    university, lab, _ = pair
    await lab.broker.refresh_offers(1, DAY)
    university.owner.capacity = Resources(cpus=3, memory_bytes=2**30)
    lab.clock.now += timedelta(seconds=5)
    await lab.broker.refresh_offers(1, timedelta(seconds=10))
    assert (await lab.broker.offers())[0].digest.offered.capacity.cpus == 8
    lab.clock.now += timedelta(seconds=5)
    await lab.broker.refresh_offers(1, timedelta(seconds=10))
    assert (await lab.broker.offers())[0].digest.offered.capacity.cpus == 3


async def test_a_peer_that_lends_nothing_says_so(pair):
    """Not lending is a reason, and ends what was offered before."""
    university, lab, _ = pair
    await lab.broker.refresh_offers(1, timedelta(0))
    university.owner.offering = False
    await lab.broker.refresh_offers(1, timedelta(0))
    (offer,) = await lab.broker.offers()
    assert offer.digest is None
    assert offer.problem == "university lends nothing in foam."


@pytest.mark.parametrize("lie", [{"site_name": "institute"}, {"version": 0}, "expired", "other"])
async def test_a_false_offer_is_left_out(pair, lie):
    """Another name, an older version, an expired digest or another's changes nothing."""
    university, lab, _ = pair
    await lab.broker.refresh_offers(1, timedelta(0))
    true = (await lab.broker.offers())[0].digest
    greedy = true.offered.model_copy(update={"capacity": Resources(cpus=999)})
    false = true.model_copy(update={"offered": greedy})
    signer = university.identity
    if lie == "expired":
        false = false.model_copy(update={"expires_at": lab.clock() - DAY})
    elif lie == "other":
        signer = Identity.generate()
        false = false.model_copy(update={"site": signer.key})
    else:
        false = false.model_copy(update=lie)
    answers(university, DigestBody(digest=sign(signer, OfferDigest(**false.model_dump()))))
    await lab.broker.refresh_offers(1, timedelta(0))
    (offer,) = await lab.broker.offers()
    assert offer.digest in (None, true)


async def test_members_learn_where_others_moved_to(pair, site):
    """Whoever asks says where it is; others hear it from whom they ask."""
    university, lab, _ = pair
    third = await site()
    await third.broker.join(await university.code(), "third")
    assert [m.site_name for m in await lab.broker.members("foam")] == ["lab", "third", "university"]
    third.transport._address = third.transport.address().model_copy(
        update={"addresses": ("10.9.9.9:1",)}
    )
    third.clock.now += timedelta(seconds=1)
    await third.broker.refresh_members("foam", 0.1)
    for each in (lab, university):
        (found,) = (m for m in await each.broker.members("foam") if m.site_name == "third")
        assert found.addresses == ("10.9.9.9:1",)


async def test_a_lying_member_cannot_inject_members(pair, site):
    """News with an unproved member in it adds nobody."""
    university, lab, community = pair
    eve = await site()
    theirs = (await eve.broker.create_community("foam", "eve")).id
    records = await eve.broker._directory.introductions(theirs, 10)
    asking = await university.broker._directory.asking(community)
    word = Word(
        **asking.model_dump(),
        members_digest="0",
        offers_digest="0",
        news=News(members=records),
    )
    answers(university, ProbeReply(words=(word,)))
    await lab.broker.refresh_members(community)
    assert [m.site_name for m in await lab.broker.members(community)] == ["lab", "university"]


async def test_who_leaves_is_gone_on_both_sides(pair):
    """The others are told; what was left is forgotten; leaving twice is an error."""
    university, lab, _ = pair
    await lab.broker.leave("foam")
    assert await lab.broker.communities() == []
    assert [m.site_name for m in await university.broker.members("foam")] == ["university"]
    with pytest.raises(NotFound):
        await lab.broker.leave("foam")


async def test_leaving_works_when_nobody_answers(pair, network):
    """A site may always go."""
    university, lab, _ = pair
    await network.kill(university.key)
    await lab.broker.leave("foam", timeout=0.05)
    assert await lab.broker.communities() == []


async def test_joining_what_one_is_in_is_a_conflict(pair):
    """Neither the founder nor a member joins again; the code stays unused."""
    university, lab, _ = pair
    code = await university.code()
    for member in (university, lab):
        with pytest.raises(Conflict, match="already"):
            await member.broker.join(code, "again")


@pytest.mark.parametrize("name", ["", "Lab", "a b", "x" * 64])
async def test_a_bad_site_name_is_refused_before_anyone_is_asked(pair, site, name):
    """The code is not spent on a name that cannot be."""
    university, _, _ = pair
    with pytest.raises(InvalidSpec, match="a-z"):
        await (await site()).broker.join(await university.code(), name)


async def test_an_inviter_that_cannot_be_reached_is_named(pair, site, network):
    """Nothing is half joined."""
    university, _, _ = pair
    code, late = await university.code(), await site()
    await network.kill(university.key)
    with pytest.raises(Unavailable, match="cannot be reached"):
        await late.broker.join(code, "late", timeout=0.05)
    assert await late.broker.communities() == []


async def test_what_cannot_be_asked_for_is_refused_at_home(pair):
    """A user name or SSH key that cannot be sent is an error here, not at the peer."""
    university, lab, community = pair
    for user, key in (("a da", SSH_KEY), ("ada", "two\nlines")):
        with pytest.raises(InvalidSpec):
            await lab.broker.request_lease(
                university.key, community, "1", need=NEED, user=user, ssh_public_key=key
            )


async def test_garbage_is_answered_with_an_error(pair):
    """The handler never raises, and answers even a site that asks nonsense."""
    university, lab, community = pair
    caller = Caller(lab.transport, lab.clock)
    for kind in Kind:
        if kind is not Kind.PING:
            with pytest.raises(InvalidSpec):
                await caller.ask(university.broker.address(), kind, Nothing(), Nothing, 5)
    odd = Asking(community=community, credential="~~", presence="")
    with pytest.raises(Forbidden):
        await caller.ask(university.broker.address(), Kind.OFFERS, odd, DigestBody, 5)
    for message in (b"", b"{}", b"\xff"):
        assert b'"ok":false' in await university.broker.handle(lab.key, message)
    assert await caller.ask(university.broker.address(), Kind.PING, Nothing(), Nothing, 5)


def test_a_lease_id_is_the_same_each_time_and_differs_between_borrowers():
    """It can be written down before anyone is asked, and names one request of one site."""
    one = lease_id("a" * 64, "job-1")
    assert one == lease_id("a" * 64, "job-1")
    assert len({one, lease_id("b" * 64, "job-1"), lease_id("a" * 64, "job-2")}) == 3
    assert len(one) == 16
    assert one.isalnum()
    assert one == one.lower()


@pytest.mark.component
async def test_the_whole_way_over_iroh():
    """Found, invite, join, offers, lease and release between two brokers over real QUIC."""
    university, lab = Site(OverlayTransport), Site(OverlayTransport)
    try:
        await university.broker.start()
        await lab.broker.start()
        community = (await university.broker.create_community("foam", "university")).id
        invitation = await university.broker.invite("foam", LENDER, DAY)
        assert "loopback" in invitation.warning
        await lab.broker.join(invitation.code, "lab")
        await lab.broker.refresh_offers(5, timedelta(0))
        (offer,) = await lab.broker.offers()
        assert (offer.site_name, offer.problem) == ("university", "")
        grant = await lab.borrow(university, community)
        assert grant.person == "ada@lab"
        await lab.broker.release_lease(university.key, community, grant.lease_id)
        assert university.owner.leases == {}
        await university.broker.refresh_offers(5, timedelta(0))
        assert [o.problem for o in await university.broker.offers()] == [""]
    finally:
        await lab.broker.close()
        await university.broker.close()
