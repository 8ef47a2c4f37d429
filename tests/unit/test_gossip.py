"""Gossip between whole brokers in virtual time: who is there, what is known, at what price."""

import asyncio
import base64
import hashlib
import json
import random
from collections import Counter
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jws
from joserfc.jwk import OKPKey

from gridcloud.errors import Forbidden, InvalidSpec, Unavailable
from gridcloud.grid.broker import Broker
from gridcloud.grid.calling import Caller
from gridcloud.grid.community_store import MemoryCommunityStore
from gridcloud.grid.documents import sign
from gridcloud.grid.exchanges import Exchanges, fields
from gridcloud.grid.identity import Identity
from gridcloud.grid.memory_transport import Link, MemoryNetwork
from gridcloud.grid.messages import Kind, MemberRecord, Nothing, RevocationRecord
from gridcloud.grid.news import Alive, News, ProbeBody, ProbeReply, VouchReply, Word
from gridcloud.grid.papers import (
    CommunityPaper,
    Membership,
    OfferDigest,
    Offered,
    Revocation,
    Role,
    community_id,
)
from gridcloud.grid.swim import PeerState
from gridcloud.model.need import Resources
from simulation.virtual_time import EPOCH, now, run

LATENCY = Link(delay_min=0.005, delay_max=0.03)


class Owner:
    """Offers what the test sets."""

    def __init__(self):
        self.cpus = 4

    async def digest(self, community):
        if self.cpus == 0:
            return None
        capacity = Resources(cpus=self.cpus, memory_bytes=2**30)
        return Offered(capacity=capacity, free=capacity, max_time_seconds=60, network=False)


class World:
    """A founder and members of one community, on one network, in the running loop's time."""

    def __init__(self, size, seed=1, link=LATENCY):
        self.network = MemoryNetwork(seed)
        self.network.set_link(link)
        self.seed = seed
        self.clock = asyncio.get_running_loop().clock()
        self.identities = [identity(seed, number) for number in range(size)]
        founder = self.identities[0]
        self.community = community_id("foam", founder.key)
        self.founding = sign(
            founder, CommunityPaper(name="foam", founder=founder.key, created_at=EPOCH)
        )
        self.brokers = {}
        self.owners = {}
        self.asked = Counter()
        self.arrived = Counter()
        self.bytes = 0

    @property
    def keys(self):
        return list(self.brokers)

    def credential(self, number, roles=(Role.PROVIDER, Role.CONSUMER)):
        founder, key = self.identities[0], self.identities[number].key
        return sign(
            founder,
            Membership(
                community=self.community,
                member=key,
                site_name=f"site{number}",
                roles=tuple(Role) if number == 0 else roles,
                issued_at=EPOCH,
                issuer=founder.key,
            ),
        )

    async def start(self, number, knows=()):
        """Start a site that knows itself and some others."""
        identity = self.identities[number]
        transport = self.network.node(identity.key)
        self._count(transport)
        owner = Owner()
        broker = Broker(
            identity,
            transport,
            MemoryCommunityStore(),
            owner,
            None,
            clock=self.clock,
            chance=random.Random(f"{self.seed}/{number}"),
        )
        self.brokers[identity.key], self.owners[identity.key] = broker, owner
        await broker._directory.enter(self.community, self.founding, self.credential(number))
        await broker._directory.merge(self.community, [self.record(other) for other in knows])
        await broker.start()
        return broker

    def record(self, number):
        broker = self.brokers[self.identities[number].key]
        return MemberRecord(
            credential=self.credential(number), presence=broker._directory.presence()
        )

    async def start_all(self, know_all=True):
        for number in range(len(self.identities)):
            await self.start(number, knows=range(number) if know_all else [0] * (number > 0))

    def _count(self, transport):
        request = transport.request

        async def counted(peer, message, timeout):
            self.asked[transport.address().key] += 1
            self.arrived[peer.key] += 1
            self.bytes += len(message)
            return await request(peer, message, timeout)

        transport.request = counted

    async def until(self, true, limit):
        """Return how long it takes until ``true()``; fails after ``limit`` seconds."""
        began = now()
        while not true():
            assert now() - began < limit, f"not within {limit} s"
            await asyncio.sleep(0.1)
        return now() - began

    def state(self, observer, key):
        return self.brokers[observer]._gossip.swim.seen(key).state

    def all_see(self, state, keys, observers=None):
        return all(
            self.state(observer, key) is state
            for observer in (observers or self.keys)
            for key in keys
            if key != observer
        )

    def roster(self, key):
        return self.brokers[key]._directory._rosters[self.community]

    def agreed(self, keys=None):
        return len({self.roster(key).digest() for key in keys or self.keys}) == 1

    def share(self, state):
        """Return which part of all views of others is that."""
        views = [self.state(one, other) for one in self.keys for other in self.keys if one != other]
        return views.count(state) / len(views)

    def circle(self, key):
        return self.brokers[key]._gossip.exchanges.circles[self.community]

    def offered(self, key, lender):
        held = self.circle(key).book._held.get(lender)
        return held and held.digest.offered.capacity.cpus

    def all_offered(self, cpus):
        return all(self.offered(key, lender) == cpus for key in self.keys for lender in self.keys)

    async def kill(self, key):
        """End a site as a crash does."""
        await self.network.kill(key)
        await self.brokers[key]._gossip.close()

    async def remove(self, number):
        """Have the founder remove a member."""
        founder, key = self.identities[0], self.identities[number].key
        paper = Revocation(
            community=self.community, member=key, issuer=founder.key, revoked_at=self.clock()
        )
        record = RevocationRecord(revocation=sign(founder, paper))
        await self.brokers[founder.key]._directory.add(self.community, record)

    async def close(self):
        for broker in self.brokers.values():
            await broker.close()


def sign_anything(identity, kind, payload):
    """Sign what no paper would say."""
    key = OKPKey.import_key(
        {
            "kty": "OKP",
            "crv": "Ed25519",
            "x": base64.urlsafe_b64encode(bytes.fromhex(identity.key)).rstrip(b"=").decode(),
            "d": base64.urlsafe_b64encode(identity.secret_bytes).rstrip(b"=").decode(),
        }
    )
    header = {"alg": "Ed25519", "typ": kind, "kid": identity.key}
    registry = jws.JWSRegistry(algorithms=["Ed25519"])
    return jws.serialize_compact(header, json.dumps(payload), key, registry=registry)


def in_world(size, **options):
    """Run a test in a world of its own, in virtual time."""

    def decorate(test):
        def wrapped():
            async def main():
                world = World(size, **options)
                try:
                    await test(world)
                finally:
                    await world.close()

            run(main)

        wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
        return wrapped

    return decorate


def identity(seed, number):
    """Return the identity that a test's site has each time."""
    secret = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return Identity(Ed25519PrivateKey.from_private_bytes(secret))


@in_world(30)
async def test_a_small_grid_meets_notices_a_death_and_heals(world):
    """Thirty sites: a full mesh in 2 s, a killed one seen in 6 s, a partition healed in 3 s."""
    await world.start_all()
    await world.until(lambda: world.all_see(PeerState.ALIVE, world.keys), 2)
    await asyncio.sleep(20)  # until all have spoken to one another, not only heard of them
    dead, *rest = world.keys[7], *world.keys[:7], *world.keys[8:]
    await world.kill(dead)
    await world.until(lambda: world.all_see(PeerState.DEAD, [dead], rest), 6)
    assert world.all_see(PeerState.ALIVE, rest, rest)
    one, other = rest[:9], rest[9:]
    world.network.partition(one, other)
    await world.until(
        lambda: (
            world.all_see(PeerState.DEAD, one, other) and world.all_see(PeerState.DEAD, other, one)
        ),
        20,
    )
    assert world.all_see(PeerState.ALIVE, one, one)
    world.asked.clear()
    await asyncio.sleep(10)
    assert max(world.asked.values()) / 10 < 8  # what is asked in vain is bounded, too
    world.network.heal()
    await world.until(lambda: world.all_see(PeerState.ALIVE, rest, rest), 3)


@in_world(30, link=Link(loss=0.2, delay_min=0.005, delay_max=0.05))
async def test_news_reaches_all_though_a_fifth_of_messages_is_lost(world):
    """Who knows only the founder at first knows everyone soon; a removal reaches all, for good."""
    await world.start_all(know_all=False)
    await world.until(lambda: len(world.roster(world.keys[-1]).members) == 30, 20)
    await world.until(world.agreed, 20)
    await world.until(lambda: world.share(PeerState.ALIVE) > 0.95, 20)
    removed, rest = world.keys[20], [key for key in world.keys if key != world.keys[20]]
    await world.remove(20)
    await world.until(
        lambda: all(world.roster(key).revoked(removed) for key in world.keys), 15
    )  # it learns of it itself
    await world.until(lambda: world.agreed(rest), 15)
    for key in rest[:5]:
        directory = world.brokers[key]._directory
        await directory.merge(world.community, [world.record(20)])
        assert removed not in world.roster(key).members
    assert not any(world.brokers[key]._gossip.knows(removed) for key in rest)


@in_world(30)
async def test_what_a_site_sends_is_bounded(world):
    """In peace two messages a second, of a few kilobytes, whatever is told of others."""
    await world.start_all()
    await asyncio.sleep(5)
    world.asked.clear()
    world.bytes = 0
    await asyncio.sleep(10)
    assert max(world.asked.values()) / 10 < 3
    assert world.bytes / 30 / 10 < 8192


@in_world(20)
async def test_offers_reach_all_and_the_newest_counts(world):
    """A change is known everywhere in seconds; who was away hears of it when it is back."""
    await world.start_all()
    await world.until(lambda: world.all_offered(4), 10)
    lender, away = world.keys[3], world.keys[9]
    await world.network.kill(away)
    world.owners[lender].cpus = 77
    world.brokers[lender].offer_changed()
    rest = [key for key in world.keys if key not in (lender, away)]
    await world.until(lambda: all(world.offered(key, lender) == 77 for key in rest), 5)
    await asyncio.sleep(30)
    assert world.offered(away, lender) == 4
    await world.network.restart(away)
    await world.until(lambda: world.offered(away, lender) == 77, 10)
    world.owners[lender].cpus = 0
    world.brokers[lender].offer_changed()
    await asyncio.sleep(5)
    for key in rest:
        (offer,) = [o for o in await world.brokers[key].offers() if o.address.key == lender]
        assert (offer.digest, offer.problem) == (None, "site3 lends nothing in foam.")


@in_world(5)
async def test_look_ups_ask_nobody(world):
    """Offers are at hand: no message is sent to list them."""
    await world.start_all()
    await world.until(lambda: world.all_offered(4), 10)
    world.asked.clear()
    for broker in world.brokers.values():
        assert len(await broker.offers()) == 4
    assert not world.asked


@in_world(4)
async def test_an_impossible_offer_is_its_owners_problem_alone(world):
    """2^64 CPUs: the offer is refused with a reason, is not passed on, and hurts nobody else."""
    await world.start_all()
    await world.until(lambda: world.all_offered(4), 10)
    liar, victim = world.keys[1], world.keys[2]
    held = world.circle(liar).book._held[liar]
    payload = json.loads(held.digest.model_dump_json())
    payload["offered"]["capacity"]["cpus"] = 2**64
    payload["version"] += 1
    document = sign_anything(world.identities[1], OfferDigest.kind, payload)
    world.circle(liar).spread(document)
    await asyncio.sleep(10)
    for key in (world.keys[0], victim, world.keys[3]):
        offers = {o.address.key: o for o in await world.brokers[key].offers()}
        assert offers[liar].digest is None
        assert offers[liar].problem.startswith("its offer cannot be used: ")
        assert "cpus" in offers[liar].problem
        assert all(o.problem == "" for k, o in offers.items() if k != liar)


@in_world(10)
async def test_who_is_slandered_stays_alive_and_is_not_flooded(world):
    """A member that tells all the others that one is dead makes them look, within bounds."""
    await world.start_all()
    await world.until(lambda: world.all_see(PeerState.ALIVE, world.keys), 5)
    liar, victim = world.keys[4], world.keys[5]
    world.arrived.clear()
    for _ in range(100):
        world.circle(liar).rumour(victim, PeerState.DEAD)
        await asyncio.gather(
            *(
                world.brokers[liar]._gossip._exchange(key, 1.0)
                for key in world.keys
                if key not in (liar, victim)
            )
        )
    assert world.all_see(PeerState.ALIVE, [victim])
    took = 100 * 0.06
    assert world.arrived[victim] < 10 * (2 + took)


@in_world(6)
async def test_who_is_heard_only_through_others_lives(world):
    """One way is cut: helpers bring the peer's own signed word, and it is not thought dead."""
    await world.start_all()
    await world.until(lambda: world.all_see(PeerState.ALIVE, world.keys), 5)
    one, other = world.keys[1], world.keys[2]
    world.network.set_link(Link(loss=1.0), one, other)
    world.network.set_link(Link(loss=1.0), other, one)
    await asyncio.sleep(20)
    seen = world.brokers[one].peers_seen()[other]
    assert (seen.state, seen.through_others) == (PeerState.ALIVE, True)
    assert world.all_see(PeerState.ALIVE, world.keys)
    (offer,) = [o for o in await world.brokers[one].offers() if o.address.key == other]
    assert offer.problem.startswith("unreachable from this site")
    world.network.set_link(LATENCY, one, other)
    world.network.set_link(LATENCY, other, one)
    await world.until(lambda: not world.brokers[one].peers_seen()[other].through_others, 10)


@in_world(4)
async def test_only_a_word_of_a_moment_ago_proves_that_a_site_is_there(world):
    """Addresses signed long ago and heard only now bring nobody back to life; fresh ones do."""
    await world.start_all()
    await world.until(lambda: world.all_see(PeerState.ALIVE, world.keys), 5)
    one, dead = world.keys[1], world.keys[2]
    directory = world.brokers[dead]._directory
    await world.kill(dead)
    await world.until(lambda: world.state(one, dead) is PeerState.DEAD, 15)
    await asyncio.sleep(30)
    for age, state in ((11, PeerState.DEAD), (1, PeerState.ALIVE)):
        said = directory._presence[0].model_copy(
            update={"issued_at": world.clock() - timedelta(seconds=age)}
        )
        record = MemberRecord(
            credential=world.credential(2), presence=sign(world.identities[2], said)
        )
        await world.brokers[one]._directory.merge(world.community, [record])
        assert world.state(one, dead) is state
    await world.until(lambda: world.state(one, dead) is PeerState.DEAD, 15)


@in_world(4)
async def test_a_helper_cannot_fake_life(world):
    """A word by the helper itself, or on an old nonce, brings nobody back to life."""
    await world.start_all()
    await world.until(lambda: world.all_see(PeerState.ALIVE, world.keys), 5)
    one, dead, helper = world.keys[1], world.keys[2], world.keys[3]
    exchanges = world.brokers[one]._gossip.exchanges
    fake = world.brokers[helper]._gossip.exchanges
    true = await exchanges.word_through(helper, dead, "0" * 32, 1)
    assert true
    old = sign(
        world.identities[2],
        Alive(site=dead, asker=one, nonce="0" * 32, said_at=world.clock()),
    )
    own = sign(
        world.identities[3],
        Alive(site=helper, asker=one, nonce="1" * 32, said_at=world.clock()),
    )
    for word in (old, own):

        async def lies(_key, _body, word=word):
            return VouchReply(word=word)

        fake.probe_for = lies
        try:
            believed = await exchanges.word_through(helper, dead, "1" * 32, 1)
        except Forbidden:
            believed = False
        assert not believed


@in_world(3)
async def test_a_peer_learns_only_of_communities_it_shares(world):
    """What is said of one community never goes to a member of another alone."""
    await world.start_all()
    secret = (await world.brokers[world.keys[1]].create_community("secret", "boss")).id
    heard = []
    for key in (world.keys[0], world.keys[2]):
        transport = world.network.node(key)

        async def listening(peer, message, inner=transport._handler):
            reply = await inner(peer, message)
            heard.append(message + reply)
            return reply

        transport._handler = listening
    await asyncio.sleep(10)
    assert heard
    assert not any(secret.encode() in message for message in heard)
    caller = Caller(world.network.node(world.keys[2]), world.clock)
    asking = await world.brokers[world.keys[2]]._directory.asking(world.community)
    word = Word(**{**fields(asking), "community": secret}, members_digest="0", offers_digest="0")
    address = world.network.node(world.keys[1]).address()
    with pytest.raises(Forbidden):
        await caller.ask(address, Kind.PROBE, ProbeBody(words=(word,)), ProbeReply, 1)


@in_world(40)
async def test_a_newcomer_pulls_a_long_list_in_pages(world):
    """However long the list, no message is longer than allowed, and all of it arrives."""
    await world.start_all()
    await asyncio.sleep(5)
    pages = []

    class Counted(Exchanges):
        async def synced(self, key, body):
            pages.append(body.offset)
            return (await self.circle(body.community)).page(body, 8192)

    for broker in world.brokers.values():
        broker._gossip.exchanges.__class__ = Counted
    world.identities.append(identity(world.seed, 40))
    newcomer = await world.start(40, knows=[0])
    await newcomer.refresh_members(world.community)
    assert len(world.roster(newcomer._identity.key).members) == 41
    assert len(pages) > 4


@in_world(3)
async def test_a_probe_that_brings_too_much_is_refused(world):
    """News is bounded on arrival, too, before any of it is proved."""
    await world.start_all()
    caller = Caller(world.network.node(world.keys[1]), world.clock)
    asking = await world.brokers[world.keys[1]]._directory.asking(world.community)
    junk = News(offers=tuple(f"{number:04d}" + "x" * 1000 for number in range(500)))
    word = Word(**fields(asking), members_digest="0", offers_digest="0", news=junk)
    address = world.network.node(world.keys[0]).address()
    with pytest.raises(InvalidSpec, match="bytes of news"):
        await caller.ask(address, Kind.PROBE, ProbeBody(words=(word,)), ProbeReply, 1)


@in_world(4)
async def test_a_flood_costs_the_flooder_alone(world):
    """Who asks too often is told so, retryably; others are answered as ever."""
    await world.start_all()
    await asyncio.sleep(3)
    target, loud, quiet = (world.network.node(key) for key in world.keys[:3])
    stranger = world.network.node(Identity.generate().key)
    await stranger.start(world.brokers[world.keys[0]].handle)
    for flooder in (loud, stranger):
        caller = Caller(flooder, world.clock)
        results = await asyncio.gather(
            *(caller.ask(target.address(), Kind.PING, Nothing(), Nothing, 5) for _ in range(1000)),
            return_exceptions=True,
        )
        refused = [each for each in results if isinstance(each, Unavailable)]
        assert len(refused) >= 750
        assert all(error.retryable and "too often" in error.message for error in refused)
        polite = Caller(quiet, world.clock)
        await polite.ask(target.address(), Kind.PING, Nothing(), Nothing, 5)
    await stranger.close()


@in_world(3)
async def test_a_site_whose_clock_is_wrong_is_there_and_the_problem_is_named(world):
    """It answers, so it lives; that clocks differ is shown, not hidden."""
    await world.start_all()
    await asyncio.sleep(3)
    wrong = world.brokers[world.keys[2]]
    late = asyncio.get_running_loop().clock(off=timedelta(hours=1))
    wrong._clock = wrong._caller._clock = late
    await asyncio.sleep(5)
    seen = world.brokers[world.keys[0]].peers_seen()[world.keys[2]]
    assert seen.state is PeerState.ALIVE
    assert "1h" in seen.problem


def test_the_same_seed_is_the_same_story():
    """Nothing in gossip depends on real time, real chance, or the order of a set."""

    def story():
        async def main():
            world = World(12, seed=5, link=Link(loss=0.1, delay_min=0.01, delay_max=0.05))
            await world.start_all(know_all=False)
            await asyncio.sleep(10)
            await world.close()
            return world.bytes, sorted(world.asked.items()), world.arrived

        return run(main)

    assert story() == story()
