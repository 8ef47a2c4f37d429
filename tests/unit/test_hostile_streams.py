"""Streams, frames and handshakes of a hostile peer: it costs the one stream or link."""

import asyncio
import contextlib
import json
import random
import struct
import time
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gridcloud.errors import GridcloudError, Unavailable
from gridcloud.grid.identity import Identity
from gridcloud.grid.links import MAX_LINKS_OF_STRANGERS, STRANGERS_STAY_SECONDS, LinkDown, LinkTable
from gridcloud.grid.messaging import MAX_STRANGER_BYTES, Answering
from gridcloud.grid.mux import BadFrame, Frame, Mux
from gridcloud.grid.mux_link import MuxLink
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.punching import INTRODUCE, MEET, OBSERVE, Meeting
from gridcloud.grid.relaying import RELAY, RELAYED
from gridcloud.grid.streams import Services, header
from gridcloud.grid.tls_channel import TlsChannel, TlsIdentity, answer_over, dial_over
from gridcloud.grid.transport import MAX_MESSAGE_BYTES, Path
from gridcloud.site import entrance
from gridcloud.site.ways import _check
from testbeds.byte_streams import stream_pair
from testbeds.hostile import EVE, STRANGER, identity, twist

quick = settings(deadline=None, suppress_health_check=list(HealthCheck))
ME, OTHER = identity("me"), identity("other")
SERVED = [OBSERVE, INTRODUCE, MEET, RELAY, RELAYED, "message", "gateway"]


class Said:
    """A stream on which everything was said already; notes what comes back."""

    def __init__(self, said, ends=True):
        self._left = bytes(said)
        self._ends = ends
        self.answer = b""
        self.closed = False

    async def read(self, limit):
        data, self._left = self._left[:limit], self._left[limit:]
        if not data and not self._ends:
            raise Unavailable("It broke.")
        return data

    async def write(self, data):
        if self.closed:
            raise Unavailable("It is closed.")
        self.answer += data

    async def write_eof(self):
        pass

    def close(self):
        self.closed = True


class Line:
    """A link whose peer opens what the test hands it, and to which nothing can be opened."""

    def __init__(self, key):
        self.key, self.alive, self.dialled = key, True, False

    async def open(self):
        raise LinkDown("nobody is there")

    def path(self):
        return Path(how="direct")

    def observed(self):
        return "10.0.0.9:4433"

    def meter(self, toll):
        self.toll = toll

    def close(self):
        self.alive = False


class Site:
    """The services of a site that trusts everybody, so that nothing ends at the first check."""

    def __init__(self):
        self.transport = OverlayTransport(ME, listen=None)
        self.transport.settle(
            Neighbourhood(
                may_introduce=lambda _source, _target: True, may_relay=lambda _source, _target: True
            )
        )
        gateway = entrance.Entrance(lambda: None, lambda _key: ())
        self.transport.serve("gateway", gateway.accept)
        links = self.transport._links
        answering = Answering(self.handle, lambda _key: True, links, lambda _key: 0.0)
        self.transport._services.serve_lasting("message", answering.accept)
        self.link = Line(EVE.key)
        self.transport._links.add(self.link)
        self.transport._links.add(Line(OTHER.key))

    async def handle(self, key, message):
        return b"answer"

    async def say(self, said, *, ends=True):
        """Return what comes back to a stream that says this."""
        stream = Said(said, ends)
        with capture_logs() as logs:
            await self.transport._services._answer(self.link, stream)
        assert stream.closed
        assert not [line for line in logs if line["log_level"] == "error"], logs
        return stream.answer


def message(said):
    return struct.pack(">II", 1, len(said)) + said


MEETING = json.loads(
    Meeting(site=OTHER.key, addresses=("10.0.0.1:4433", "[::1]:1")).model_dump_json()
)


@quick
@given(st.integers(0, 2**64), st.sampled_from(SERVED), st.booleans())
def test_nonsense_on_a_stream_costs_that_stream_only(seed, service, ends):
    """Every service that answers peers: whatever is said, the stream ends, and the link lives."""
    chance = random.Random(seed)
    what = chance.choice(
        [
            lambda: chance.randbytes(chance.randrange(200)),
            lambda: json.dumps(twist(MEETING, chance)).encode("utf-8", "replace"),
            lambda: bytes.fromhex(OTHER.key) + chance.randbytes(chance.randrange(100)),
            lambda: b"x" * 200_000,
        ]
    )()
    start = bytearray(header(service, asks=chance.random() < 0.5))
    if chance.random() < 0.3:
        start[chance.randrange(16)] = chance.randrange(256)

    async def attempt():
        site = Site()
        await site.say(bytes(start) + what, ends=ends)
        assert site.link.alive
        assert await site.say(header("message") + message(b"hello")) == message(b"answer")
        assert not site.transport._services._open
        await site.transport._punching.close()

    asyncio.run(attempt())


async def test_a_stranger_may_say_little():
    """Who is no member has no megabyte of anybody's memory; a member has."""

    async def handle(_key, message):
        return str(len(message)).encode()

    links = LinkTable(lambda _key: True)
    answering = Answering(handle, lambda key: key == "member", links, lambda _key: 0.0)
    long = Said(message(b"x" * MAX_MESSAGE_BYTES))
    await answering.accept(Line("member"), long)
    assert long.answer == message(str(MAX_MESSAGE_BYTES).encode())
    with pytest.raises(Unavailable):
        await answering.accept(Line("stranger"), Said(message(b"x" * (MAX_STRANGER_BYTES + 1))))
    short = Said(message(b"x" * MAX_STRANGER_BYTES))
    await answering.accept(Line("stranger"), short)
    assert short.answer


def test_one_stranger_leaves_room_for_others():
    """Of what strangers may open one has a small part: those on all the links leave some."""
    services = Services(LinkTable(lambda _key: False), lambda key: key == "member")
    for _ in range(4):
        assert services._has_room("greedy")
        services._open["greedy"] += 1
    assert not services._has_room("greedy")
    for number in range(MAX_LINKS_OF_STRANGERS - 2):
        services._open[f"loris{number}"] = 4
    assert services._has_room("modest")
    services._open["member"] = 100
    assert services._has_room("member")


@pytest.mark.parametrize(("key", "most"), [("member", 128), ("stranger", 4)])
async def test_streams_that_come_all_at_once_are_counted(key, most):
    """A link that hands over hundreds in one turn of the loop gets no more than its share."""
    services = Services(LinkTable(lambda _key: False), lambda key: key == "member")
    held, taken = asyncio.Event(), []

    async def hold(_key, stream):
        taken.append(stream)
        await held.wait()

    services.serve("hold", hold)
    streams = [Said(header("hold")) for _ in range(200)]

    class Burst(Line):
        async def accept(self):
            if not left:
                held.set()
                raise LinkDown("it is over")
            if len(left) == 1:
                await asyncio.sleep(0.1)
            return left.pop()

    left = list(streams)
    assert services.attach(Burst(key))
    await held.wait()
    assert 0 < len(taken) <= most
    assert all(stream.closed for stream in streams if stream not in taken)
    await services.close()


def test_strangers_share_a_small_rate_of_streams():
    """However many keys a host makes up, what it opens is taken at one rate."""
    services = Services(LinkTable(lambda _key: False), lambda key: key == "member")
    pauses = [services.pause(f"stranger{number}") for number in range(500)]
    assert pauses[0] == 0
    assert pauses[-1] > 1.5
    assert services.pause("member") == 0


def test_strangers_that_never_end_do_not_keep_newcomers_out():
    """A stranger's link in use gives way to another's once it had its time; a member's does not."""
    now = 0.0
    table = LinkTable(lambda key: key == "member", clock=lambda: now)
    held = contextlib.ExitStack()
    members = Line("member")
    assert table.add(members)
    held.enter_context(table.using(members))
    for number in range(MAX_LINKS_OF_STRANGERS):
        line = Line(f"loris{number}")
        assert table.add(line)
        held.enter_context(table.using(line))
    assert not table.add(Line("newcomer"))
    now = STRANGERS_STAY_SECONDS + 1
    newcomer = Line("newcomer")
    assert table.add(newcomer)
    assert newcomer.alive
    assert members.alive
    held.close()


def frames(*each):
    return b"".join(
        struct.pack(">BIH", kind, number, len(payload)) + payload for kind, number, payload in each
    )


FLOODS = {
    "pings": [frames((Frame.PING, 0, b"12345678"))] * 2000,
    "opened and let go": [
        frames((Frame.OPEN, number, b""), (Frame.RESET, number, b""))
        for number in range(2, 4000, 2)
    ],
    "credit for nothing": [
        frames((Frame.OPEN, 2, b"")),
        *[frames((Frame.CREDIT, 2, bytes(4)))] * 2000,
    ],
    "single bytes": [
        frames((Frame.OPEN, 2, b"")),
        *[frames((Frame.DATA, 2, b"x"))] * 2000,
    ],
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_of_small_frames_is_paid_for(flood):
    """Each is counted, so that a link's owner can be made to wait; nothing heaps up meanwhile."""
    mux = Mux(dialled=True)
    for frame in FLOODS[flood]:
        mux.receive(frame)
    assert mux.small >= 2000
    assert mux.waiting < 64 * 1024
    assert mux.flows <= 1


async def test_who_floods_with_frames_is_taken_slowly():
    """After its allowance a peer is read at its rate; another link is read as ever."""
    here, there = stream_pair()
    hers, mine = TlsIdentity(EVE), TlsIdentity(ME)
    (channel, key), hostile = await asyncio.gather(
        answer_over(here, mine), dial_over(there, hers, ME.key)
    )
    link = MuxLink(channel, key, dialled=False, how="tls")
    counted = []

    def toll(frames):
        counted.append(frames)
        return 3600.0 if sum(counted) > 1000 else 0.0

    link.meter(toll)
    flood = frames((Frame.PING, 0, b"12345678")) * 100
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            while True:
                await hostile.write(flood)
    assert 1000 < sum(counted) < 5000
    assert link.alive
    link.close()
    hostile.close()
    await link.closed()


def test_members_and_strangers_pay_for_frames_apart():
    """What strangers send is counted together, and takes nothing from a member."""
    services = Services(LinkTable(lambda _key: False), lambda key: key == "member")
    assert services._pause_for("one", 6000) == 0
    assert services._pause_for("another", 2000) > 0.9
    assert services._pause_for("member", 6000) == 0


@quick
@given(st.integers(0, 2**64), st.booleans())
def test_frames_of_any_kind_take_bounded_time(seed, dialled):
    """Noise and frames nearly right: an error that ends the channel, or a little more state."""
    chance = random.Random(seed)
    mux = Mux(dialled=dialled)
    said = b"".join(
        struct.pack(
            ">BIH",
            chance.choice([0, 1, 2, 3, 4, 5, 6, 7, 255]),
            chance.choice([0, 1, 2, 3, 4, 2**31, 2**32 - 1]),
            size := chance.choice([0, 1, 4, 8, 16384, 65535]),
        )
        + chance.randbytes(min(size, 100))
        for _ in range(20)
    )
    began = time.process_time()
    with contextlib.suppress(BadFrame):
        for at in range(0, len(said), 50):
            mux.receive(said[at : at + 50])
            while mux.opened:
                flow = mux.opened.popleft()
                mux.read(flow, 100)
                mux.reset(flow)
    assert time.process_time() - began < 1


# Handshakes


class Shown:
    """Stands for TLS, of which the other end showed this certificate."""

    def __init__(self, certificate):
        self._certificate = certificate

    def getpeercert(self, binary_form):
        return self._certificate


def peer_key(certificate):
    channel = TlsChannel.__new__(TlsChannel)
    channel._tls = Shown(certificate)
    return channel.peer_key()


def certificate(private):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gridcloud")])
    own_hash = isinstance(private, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2100, 1, 1, tzinfo=UTC))
        .sign(private, None if own_hash else hashes.SHA256())
    )
    return made.public_bytes(Encoding.DER)


GOOD = certificate(ed25519.Ed25519PrivateKey.from_private_bytes(EVE.secret_bytes))


@pytest.mark.parametrize(
    "private",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.BrainpoolP256R1()),
        ed448.Ed448PrivateKey.generate(),
        dsa.generate_private_key(1024),
    ],
    ids=["rsa", "p256", "brainpool", "ed448", "dsa"],
)
def test_a_certificate_of_another_kind_of_key_is_turned_away(private):
    """Only an Ed25519 key is a site."""
    assert peer_key(GOOD) == EVE.key
    with pytest.raises(LinkDown):
        peer_key(certificate(private))


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (bytes.fromhex("a003020102"), bytes.fromhex("a003020105")),
        (b"\x2b\x65\x70", b"\x2b\x65\x7f"),
    ],
    ids=["version", "algorithm"],
)
def test_a_certificate_of_no_known_kind_is_turned_away(part, other):
    """A version or an algorithm that nobody has heard of is no fault of ours."""
    assert part in GOOD
    with pytest.raises(LinkDown, match="malformed"):
        peer_key(GOOD.replace(part, other))


@quick
@given(st.integers(0, 2**64))
def test_a_mangled_certificate_is_turned_away(seed):
    """Whatever bytes stand for a certificate, the dial fails and nothing else does."""
    chance = random.Random(seed)
    mangled = bytearray(GOOD)
    for _ in range(chance.randrange(1, 6)):
        mangled[chance.randrange(len(mangled))] = chance.randrange(256)
    del mangled[chance.randrange(len(mangled) // 2, len(mangled) + 1) :]
    with contextlib.suppress(LinkDown):
        assert len(peer_key(bytes(mangled))) == 64


@quick
@given(st.integers(0, 2**64))
def test_whoever_answers_a_dial_with_nonsense_is_given_up(seed):
    """Noise in place of TLS, to either side."""
    chance = random.Random(seed)
    said = chance.choice([b"", b"\x16\x03\x01", b"\x15\x03\x03\x00\x02", b"SSH-2.0-x\r\n"])
    said += chance.randbytes(chance.randrange(300))

    async def attempt():
        for greet in (
            answer_over(Said(said), TlsIdentity(ME)),
            dial_over(Said(said), TlsIdentity(ME), EVE.key),
        ):
            with pytest.raises(LinkDown):
                await greet

    asyncio.run(attempt())


@pytest.mark.parametrize(
    "proof",
    [
        lambda key, _sign: key + bytes(64),
        lambda _key, _sign: bytes(96),
        lambda _key, _sign: b"\x01" + bytes(31) + b"\x01" + bytes(63),
        lambda key, sign: key + sign(b"gridcloud-tls/2 client proof"),
        lambda key, sign: Identity.generate().key.encode()[:32] + sign(key),
    ],
    ids=["no signature", "nothing", "a weak key", "another text", "another key"],
)
async def test_a_false_proof_opens_nothing(proof):
    """Who dials has to sign the fresh number with the key it claims."""
    here, there = stream_pair()

    async def dial():
        channel = TlsChannel(there, TlsIdentity(EVE).client, server_side=False)
        await channel.handshake()
        await channel.read_exactly(32)
        await channel.write(proof(bytes.fromhex(EVE.key), EVE.sign))
        with pytest.raises(LinkDown):
            await channel.read_exactly(1)

    async def answer():
        try:
            with pytest.raises(LinkDown, match=r"prove its key|anybody can sign"):
                await answer_over(here, TlsIdentity(ME))
        finally:
            here.close()

    await asyncio.gather(dial(), answer())
    there.close()


@given(st.binary(max_size=3))
def test_what_a_lender_answers_first_is_a_welcome_or_an_error(said):
    """The entrance's byte: all but one end the way with a reason."""
    if said == entrance.WELCOME:
        _check(said, STRANGER.key)
    else:
        with pytest.raises(GridcloudError):
            _check(said, STRANGER.key)
