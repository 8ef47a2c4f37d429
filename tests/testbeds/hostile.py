"""What a hostile peer may say: valid things, and what becomes of them when they are tampered with.

`twist` and `retold` make JSON trees and signed documents that are nearly right, which is where
decoders stumble; plain noise seldom gets past the first check.
"""

import asyncio
import base64
import json
import random
from datetime import timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from gridcloud.errors import NotFound
from gridcloud.grid.broker import Broker
from gridcloud.grid.community_store import MemoryCommunityStore
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.memory_transport import MemoryNetwork
from gridcloud.grid.messages import (
    Asking,
    JoinBody,
    Kind,
    LeaseBody,
    LeaveBody,
    MemberRecord,
    Nothing,
    RecallBody,
    ReceiptBody,
    ReleaseBody,
    RenewBody,
    RevocationRecord,
    encode_request,
)
from gridcloud.grid.news import News, ProbeBody, ProbeForBody, Rumour, SyncBody, VouchBody, Word
from gridcloud.grid.papers import (
    CommunityPaper,
    Invitation,
    LeaseGrant,
    Membership,
    OfferDigest,
    Offered,
    Presence,
    Revocation,
    Role,
    community_id,
)
from gridcloud.grid.receipts import NO_RECEIPT, Receipt
from gridcloud.grid.swim import PeerState
from gridcloud.model.lease import Endpoint
from gridcloud.model.need import Need, Resources
from gridcloud.model.prices import Prices
from simulation.virtual_time import EPOCH, VirtualTimeLoop

SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJ8oYyTqT3Q1wHbQb6w4yU7V2tqfjH8mYh7b0Y1cZ0a"
LENDER = (Role.PROVIDER, Role.CONSUMER)


def identity(name):
    """Return an identity that is the same each time."""
    seed = random.Random(f"hostile {name}").randbytes(32)
    return Identity(Ed25519PrivateKey.from_private_bytes(seed))


FOUNDER, EVE, ADA, STRANGER = (identity(name) for name in ("founder", "eve", "ada", "stranger"))
COMMUNITY = community_id("foam", FOUNDER.key)
FOUNDING = sign(FOUNDER, CommunityPaper(name="foam", founder=FOUNDER.key, created_at=EPOCH))


def membership(who, name, roles=LENDER, issuer=FOUNDER, at=EPOCH, community=COMMUNITY):
    """Return a credential signed by the founder."""
    paper = Membership(
        community=community,
        member=who.key,
        site_name=name,
        roles=roles,
        issued_at=at,
        issuer=issuer.key,
    )
    return sign(issuer, paper)


CREDENTIALS = {
    FOUNDER.key: membership(FOUNDER, "founder", tuple(Role)),
    EVE.key: membership(EVE, "eve"),
    ADA.key: membership(ADA, "ada"),
}


def presence(who, at=EPOCH, address="10.9.9.9:4433", **more):
    """Return where a site says it is."""
    return sign(who, Presence(site=who.key, addresses=(address,), issued_at=at, **more))


def record(who, at=EPOCH):
    """Return what is known of a member."""
    return MemberRecord(credential=CREDENTIALS[who.key], presence=presence(who, at))


def offer(who, name, version=1, at=EPOCH, cpus=4, holds=timedelta(hours=1)):
    """Return a signed offer."""
    some = Resources(cpus=cpus, memory_bytes=2**30)
    paper = OfferDigest(
        site=who.key,
        site_name=name,
        community=COMMUNITY,
        version=version,
        offered=Offered(capacity=some, free=some, max_time_seconds=60, network=False),
        issued_at=at,
        expires_at=at + holds,
    )
    return sign(who, paper)


def revocation(who, issuer, at=EPOCH):
    """Return a removal."""
    paper = Revocation(community=COMMUNITY, member=who.key, issuer=issuer.key, revoked_at=at)
    return sign(issuer, paper)


def asking(who):
    """Return what a member says of itself in a request."""
    return {
        "community": COMMUNITY,
        "credential": CREDENTIALS[who.key],
        "presence": presence(who),
    }


def word(who, **news):
    """Return a word of news."""
    rumours = news.pop("rumours", ())
    return Word(
        **asking(who), members_digest="0", offers_digest="0", news=News(**news), rumours=rumours
    )


def grant(lender, borrower, lease="lease1"):
    """Return a signed grant."""
    paper = LeaseGrant(
        lease_id=lease,
        community=COMMUNITY,
        lender=lender.key,
        borrower=borrower.key,
        person="ada@founder",
        need=Need(),
        endpoint=Endpoint(host="127.0.0.1", user="guest", host_keys=(SSH_KEY,)),
        certificate="ssh-ed25519-cert-v01@openssh.com AAAA",
        folder="jobs",
        starts_at=EPOCH,
        ends_at=EPOCH + timedelta(hours=1),
    )
    return sign(lender, paper)


def receipt(lender, borrower, lease="lease1", **changes):
    """Return a signed receipt."""
    paper = Receipt(
        **{
            "community": COMMUNITY,
            "lender": lender.key,
            "borrower": borrower.key,
            "person": "ada@founder",
            "lease_id": lease,
            "resources": Resources(cpus=1),
            "begun_at": EPOCH,
            "ended_at": EPOCH,
            "prices": Prices(),
            "credits": 0.0,
            "number": 1,
            "previous": NO_RECEIPT,
        }
        | changes
    )
    return sign(lender, paper)


def invitation(inviter, secret="0" * 32, **changes):
    """Return an invitation's document."""
    paper = Invitation(
        **{
            "community": COMMUNITY,
            "inviter": inviter.key,
            "addresses": ("10.0.0.1:4433",),
            "secret": secret,
            "roles": LENDER,
            "issued_at": EPOCH,
            "expires_at": EPOCH + timedelta(days=1),
        }
        | changes
    )
    return sign(inviter, paper)


def bodies(who, target):
    """Return a body of every kind of request that a member may send, with all its parts."""
    ask = asking(who)
    news = {
        "members": (record(who), record(FOUNDER)),
        "revocations": (RevocationRecord(revocation=revocation(ADA, FOUNDER)),),
        "offers": (offer(who, "eve"),),
        "rumours": (Rumour(key=target.key, state=PeerState.DEAD),),
    }
    zeros = (0,) * 64
    return {
        Kind.PING: Nothing(),
        Kind.JOIN: JoinBody(invitation=invitation(target), site_name="eve", presence=presence(who)),
        Kind.LEAVE: LeaveBody(
            community=COMMUNITY,
            revocation=revocation(ADA, who),
            proof=CREDENTIALS[who.key],
        ),
        Kind.PROBE: ProbeBody(words=(word(who, **news),)),
        Kind.PROBE_FOR: ProbeForBody(**ask, target=ADA.key, nonce="0" * 32),
        Kind.VOUCH: VouchBody(**ask, asker=who.key, nonce="0" * 32),
        Kind.SYNC: SyncBody(**ask, members=zeros, offers=zeros),
        Kind.OFFERS: Asking(**ask),
        Kind.LEASE: LeaseBody(
            **ask, request_id="job", need=Need(time=60), user="eve", ssh_public_key=SSH_KEY
        ),
        Kind.RENEW: RenewBody(**ask, lease_id="lease1", until=EPOCH),
        Kind.RELEASE: ReleaseBody(lease_id="lease1"),
        Kind.RECALL: RecallBody(**ask, grant=grant(who, target), reason="why"),
        Kind.RECEIPT: ReceiptBody(**ask, receipt=receipt(who, target)),
    }


class Noted:
    """An owner and tenant in one that notes what it is asked and refuses nothing it should not."""

    def __init__(self):
        self.leases = {}
        self.recalls = []
        self.receipts = []

    async def digest(self, community):
        some = Resources(cpus=4, memory_bytes=2**30)
        return Offered(capacity=some, free=some, max_time_seconds=60, network=False)

    async def grant(self, request):
        if request.lease_id not in self.leases:
            self.leases[request.lease_id] = LeaseGrant(
                lease_id=request.lease_id,
                community=request.community,
                lender=request.lender,
                borrower=request.borrower,
                person=request.person,
                need=request.need,
                endpoint=Endpoint(host="127.0.0.1", user="guest", host_keys=(SSH_KEY,)),
                certificate="ssh-ed25519-cert-v01@openssh.com AAAA",
                folder="jobs",
                starts_at=EPOCH,
                ends_at=EPOCH + timedelta(days=30),
            )
        return self.leases[request.lease_id]

    async def renew(self, lease_id, borrower, until):
        lease = self.leases.get(lease_id)
        if lease is None or lease.borrower != borrower:
            raise NotFound("There is no such lease.")
        return lease

    async def release(self, lease_id, borrower):
        lease = self.leases.get(lease_id)
        if lease is not None and lease.borrower == borrower:
            del self.leases[lease_id]

    async def recalled(self, grant, reason):
        self.recalls.append((grant, reason))

    async def countersign(self, lender, document):
        self.receipts.append(document)
        return "", "no"


class Victim:
    """A broker that is asked directly, in a virtual time of its own; use it as a context.

    It is the founder's; Eve and Ada are members. Its gossip does not run, so that nothing but what
    it is told changes what it knows.
    """

    def __enter__(self):
        self._runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        loop = self._runner.get_loop()
        self.clock = loop.clock()
        self.store, self.noted = MemoryCommunityStore(), Noted()
        self.network = MemoryNetwork(1)
        transport = self.network.node(FOUNDER.key)
        self.broker = Broker(
            FOUNDER,
            transport,
            self.store,
            self.noted,
            self.noted,
            clock=self.clock,
            chance=random.Random(1),
        )
        directory = self.broker._directory

        async def begin():
            await transport.start(self.broker.handle)
            await directory.enter(COMMUNITY, FOUNDING, CREDENTIALS[FOUNDER.key])
            await directory.merge(COMMUNITY, [record(EVE), record(ADA)])
            await self.broker._gossip._follow()

        self._runner.run(begin())
        return self

    def __exit__(self, *_):
        self._runner.close()

    def ask(self, who, message):
        """Return the reply to a message, as it is read; time passes so that no limit is met."""

        self.wait()
        return self.ask_at_once([(who, message)])[0]

    def wait(self):
        """Let a minute pass, and have it say anew where it is if it is time to."""

        async def go():
            await asyncio.sleep(60)
            await self.broker._directory.asking(COMMUNITY)

        self._runner.run(go())

    def ask_at_once(self, asked):
        """Return the replies to (who, message) pairs that all come in one instant."""

        async def go():
            now = self.clock()
            return await asyncio.gather(
                *(self.broker.handle(who.key, said(now)) for who, said in asked)
            )

        return [json.loads(reply) for reply in self._runner.run(go())]

    def run(self, work):
        """Run a coroutine in the victim's time."""
        return self._runner.run(work)

    def state(self):
        """Return all that a message could change."""
        circles = self.broker._gossip.exchanges.circles
        return (
            {name: (c.roster.digest(), c.book.digest()) for name, c in circles.items()},
            json.dumps(
                sorted((repr(k), repr(sorted(v.items()))) for k, v in self.store._shelves.items())
            ),
            sorted(self.store._used.items()),
            sorted(self.noted.leases),
            len(self.noted.recalls),
            len(self.noted.receipts),
        )


def message(kind, body, number=0):
    """Return a function of the time that makes a valid request."""
    return lambda now: encode_request(kind, body, now, number)


# Tampering: by a seed, so that an example is small to tell and a campaign quick to run

_TIMES = ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01T00:00:00", "now"]
_NASTY = [
    *(None, True, False, "", "\0", "\u202e", "\ud800", "a" * 5000, "\n", "~", "..", "0" * 64),
    *(0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**64), 10**400, 1e308, -0.0, 1e-320),
    *(float("nan"), float("inf"), -float("inf")),
    *([], {}, [[]], [None] * 70, {"a": {"b": {}}}, ["x"] * 5000),
    *_TIMES,
    *(STRANGER.key, EVE.key, COMMUNITY, f"foam.{STRANGER.key}", "300.1.1.1:99999", "[::1]:1"),
]
_DEPTH, _LARGE = 8, 5000


def nasty(chance):
    """Return a value that decoders may stumble over."""
    if chance.random() < 0.1:
        depth = chance.randrange(1, 190)
        return json.loads("[" * depth + "]" * depth)
    if chance.random() < 0.2:
        return "".join(chr(chance.randrange(0, 0x2FF)) for _ in range(chance.randrange(20)))
    return json.loads(json.dumps(chance.choice(_NASTY)))


def _places(tree, here=()):
    if here:
        yield here
    if len(here) < _DEPTH:
        inside = enumerate(tree) if isinstance(tree, list) else ()
        for name, value in list(tree.items() if isinstance(tree, dict) else inside)[:80]:
            yield from _places(value, (*here, name))


def twist(tree, chance):
    """Return a copy of a JSON tree with a few of its places changed, swapped, lost or doubled."""
    tree = json.loads(json.dumps(tree))
    for _ in range(chance.randrange(1, 4)):
        places = list(_places(tree))
        if not places:
            return tree
        *way, name = chance.choice(places)
        holder = _at(tree, way)
        match chance.choice(["nasty", "nasty", "lose", "add", "swap", "repeat", "text"]):
            case "nasty":
                holder[name] = nasty(chance)
            case "lose":
                del holder[name]
            case "add" if isinstance(holder, dict):
                holder[chance.choice(["x", "kind", "alg", "\0", "é"])] = nasty(chance)
            case "swap":
                holder[name] = json.loads(json.dumps(_at(tree, chance.choice(places))))
            case "repeat" if isinstance(holder, list) and len(json.dumps(holder)) < _LARGE:
                holder.extend([holder[name]] * chance.choice([1, 63, 1000]))
            case "text" if isinstance(holder[name], str):
                holder[name] = alter(holder[name], chance)
    return tree


def _at(tree, way):
    for name in way:
        tree = tree[name]
    return tree


def alter(text, chance):
    """Return a text with a little of it changed."""
    at = chance.randrange(len(text) + 1)
    end = min(len(text), at + chance.randrange(5))
    middle = chance.choice([".", "~", "=", "", "A" * 100, text, chr(chance.randrange(0x2FF))])
    return text[:at] + middle + text[end:]


def twisted(tree):
    """Return a strategy of what `twist` makes of a tree."""
    return st.integers(0, 2**64).map(lambda seed: twist(tree, random.Random(seed)))


def twisted_documents(document, signer):
    """Return a strategy of what `retold` makes of a document."""
    return st.integers(0, 2**64).map(lambda seed: retold(document, signer, random.Random(seed)))


def forged(header, payload, signer):
    """Return a JWS of any header and payload (bytes or JSON), truly signed by ``signer``."""
    parts = [
        part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)
    ]
    text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    signature = base64.urlsafe_b64encode(signer.sign(text)).rstrip(b"=")
    return (text + b"." + signature).decode()


def payload_of(document):
    """Return what a document says, as JSON."""
    part = document.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def header_of(document):
    """Return a document's header."""
    part = document.split(".")[0]
    return json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def retold(document, signer, chance):
    """Return a document whose payload or header was tampered with, signed anew by ``signer``."""
    header, payload = header_of(document), payload_of(document)
    match chance.choice(["payload", "payload", "header", "raw", "text", "double"]):
        case "payload":
            payload = twist(payload, chance)
        case "header":
            header = twist(header, chance)
        case "raw":
            payload = chance.choice([chance.randbytes(chance.randrange(40)), b"[" * 50_000])
        case "text":
            return alter(document, chance)
        case "double":
            first = json.dumps(twist(payload, chance))
            payload = (first[:-1] + ", " + json.dumps(payload)[1:]).encode()
    return forged(header, payload, signer)


ODD_HEADERS = [
    {"alg": "none"},
    {"alg": "None"},
    {"alg": "EdDSA"},
    {"alg": "HS256"},
    {"alg": "ES256"},
    {"alg": ["Ed25519"]},
    {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}},
    {"jku": "http://127.0.0.1/"},
    {"x5u": "http://127.0.0.1/"},
    {"crit": ["b64"], "b64": False},
    {"zip": "DEF"},
    {"kid": STRANGER.key},
    {"kid": "../../etc/passwd"},
    {"typ": "gridcloud-membership"},
    {"typ": None},
]
