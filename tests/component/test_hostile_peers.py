"""Hostile peers against real sites on loopback: they fare badly, and others do not notice.

What floods comes from other loopback addresses than what is honest, as it would from other hosts.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import struct
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from iroh import iroh_ffi as iroh

from gridcloud.errors import GridcloudError, Unavailable
from gridcloud.grid.broker import Broker
from gridcloud.grid.communities import CODE_PREFIX
from gridcloud.grid.community_store import MemoryCommunityStore
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.links import LinkDown
from gridcloud.grid.messages import Kind, Nothing, decode_reply, encode_request
from gridcloud.grid.mux import Frame
from gridcloud.grid.mux_link import MuxLink
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.papers import Presence
from gridcloud.grid.streams import header, open_on, read_exactly
from gridcloud.grid.tls_channel import TlsChannel, TlsIdentity, dial_over
from gridcloud.grid.tls_link import TcpStream
from gridcloud.grid.transport import PeerAddress
from testbeds.hostile import Noted
from testbeds.sites import wait_until

PATIENCE = 60
HOSTILE_HOST = "127.0.0.2"
MB = 1024 * 1024


class RealSite:
    """A broker over the real transport."""

    def __init__(self, **listening):
        self.identity = Identity.generate()
        self.transport = OverlayTransport(self.identity, **listening)
        noted = Noted()
        self.broker = Broker(self.identity, self.transport, MemoryCommunityStore(), noted, noted)
        self.transport.settle(self.broker.neighbourhood(MB))

    async def ping(self, other):
        """Ask another site whether it is there; raises if it does not answer."""
        now = datetime.now(UTC)
        said = encode_request(Kind.PING, Nothing(), now)
        where = other.transport.address()
        reply = await self.transport.request(where, said, PATIENCE)
        decode_reply(reply, Nothing, datetime.now(UTC))


@pytest.fixture
async def grid():
    """A founder, and honest members by UDP and by TLS; Eve, a member too, is driven by the test."""
    founder = RealSite(listen="127.0.0.1:0", tls_listen="127.0.0.1:0")
    honest = [RealSite(listen="127.0.0.1:0"), RealSite(listen=None, tls_listen="127.0.0.1:0")]
    eve = RealSite(listen=None)
    sites = [founder, *honest, eve]
    for site in sites:
        await site.broker.start()
    await founder.broker.create_community("foam", "founder")
    for site, name in zip(sites[1:], ("udp", "tls", "eve"), strict=True):
        await site.broker.join(await code(founder), name)
    await eve.broker.close()
    yield founder, honest, eve.identity
    for site in sites:
        await site.broker.close()


async def code(founder):
    invited = await founder.broker.invite("foam", ("consumer", "provider"), timedelta(days=1))
    return invited.code


def tcp(founder):
    host, _, port = founder.transport.address().tls[0].rpartition(":")
    return host, int(port)


async def connect(founder):
    """Return a TCP connection from the hostile host."""
    reader, writer = await asyncio.open_connection(*tcp(founder), local_addr=(HOSTILE_HOST, 0))
    return TcpStream(reader, writer)


async def link_as(founder, identity):
    """Return a hostile link over TLS."""
    raw = await connect(founder)
    try:
        channel = await dial_over(raw, TlsIdentity(identity), founder.identity.key)
    except BaseException:
        raw.close()
        raise
    return MuxLink(channel, founder.identity.key, dialled=True, how="tls")


async def for_ever(work):
    """Do it again and again; what it meets with is its own affair."""
    for turn in itertools.count():
        with contextlib.suppress(GridcloudError, LinkDown, OSError, TimeoutError):
            await work()
        if turn % 10 == 0:
            await asyncio.sleep(0.01)


async def half_open(founder, _eve):
    """TCP connections on which nothing is ever said."""
    held = [await connect(founder) for _ in range(100)]
    try:
        await for_ever(lambda: asyncio.sleep(1))
    finally:
        for each in held:
            each.close()


async def endless_handshakes(founder, _eve):
    """TLS that is begun byte by byte and never ended."""

    async def dribble():
        raw = await connect(founder)
        try:
            for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200):
                await raw.write(bytes([byte]))
                await asyncio.sleep(0.02)
        finally:
            raw.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(40):
            group.create_task(for_ever(dribble))


async def with_links(founder, identities, act):
    """Have hostile links do something again and again, each made anew when it broke."""

    async def one(identity):
        link = await link_as(founder, identity)
        try:
            while link.alive:
                await act(link)
                await asyncio.sleep(0)
        finally:
            link.close()
            await link.closed()

    async with asyncio.TaskGroup() as group:
        for identity in identities:
            group.create_task(for_ever(lambda identity=identity: one(identity)))


async def dribble_streams(link):
    """Open as many streams as one may, and say a letter at a time on each."""
    streams = []
    try:
        while len(streams) < 90:
            streams.append(await open_on(link, "message", struct.pack(">II", 1, 2**16) + b"{"))
        for _ in range(100):
            for stream in streams:
                with contextlib.suppress(Unavailable):
                    await stream.write(b" ")
            await asyncio.sleep(0.1)
    finally:
        for stream in streams:
            stream.close()


async def slow_streams_of_strangers(founder, _eve):
    """Slow loris by keys made up on the spot."""
    await with_links(founder, [Identity.generate() for _ in range(8)], dribble_streams)


async def slow_streams_of_a_member(founder, eve):
    """Slow loris by a member."""
    await with_links(founder, [eve] * 3, dribble_streams)


async def ask_much(link):
    """Ask as fast as streams can be opened."""
    now = datetime.now(UTC)
    async with asyncio.TaskGroup() as group:
        for kind in list(Kind) * 2:
            said = encode_request(kind, Nothing(), now)
            group.create_task(_ask(link, said))


async def _ask(link, said):
    with contextlib.suppress(Unavailable, LinkDown):
        stream = await open_on(link, "message", struct.pack(">II", 1, len(said)) + said)
        try:
            await stream.write_eof()
            while await stream.read(65536):
                pass
        finally:
            stream.close()


async def requests_of_a_member(founder, eve):
    """More requests than anybody needs."""
    await with_links(founder, [eve] * 3, ask_much)


async def requests_of_strangers(founder, _eve):
    """The same, by keys made up on the spot."""
    await with_links(founder, [Identity.generate() for _ in range(8)], ask_much)


async def oversized(founder, eve):
    """Messages without an end, from a member and from strangers."""

    async def talk_on(link):
        stream = await open_on(link, "message")
        try:
            for _ in range(100):
                await stream.write(struct.pack(">II", 1, 2**30) + b'["' + b"x" * 65536)
        finally:
            stream.close()

    await with_links(founder, [eve, Identity.generate(), Identity.generate()], talk_on)


async def costly(founder, eve):
    """Messages of the largest size that are costly to read."""
    body = ",".join(["1"] * 400_000)

    async def ask(link):
        now = datetime.now(UTC).isoformat()
        said = f'{{"v":2,"kind":"probe","id":"1","sent_at":"{now}","body":{{"words":[{body}]}}}}'
        await _ask(link, said.encode())

    await with_links(founder, [eve, eve, Identity.generate()], ask)


async def frames(founder, eve):
    """Frames that cost nothing to send: signs of life, and streams opened and let go."""

    async def rain(link):
        ping = bytes([Frame.PING]) + bytes(5) + b"\x08" + bytes(8)
        link.mux._outgoing += ping * 2000
        link.flush()
        while link.mux.waiting > 10_000 and link.alive:
            await asyncio.sleep(0.01)

    await with_links(founder, [eve, eve, Identity.generate(), Identity.generate()], rain)


async def datagrams(founder, _eve):
    """Noise at the UDP port, and beginnings of QUIC that lead nowhere."""
    host, _, port = founder.transport.address().addresses[0].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
        noise.bind((HOSTILE_HOST, 0))
        noise.setblocking(False)

        async def send():
            for _ in range(50):
                with contextlib.suppress(BlockingIOError):
                    noise.sendto(b"\xc0\x00\x00\x00\x01\x08" + os.urandom(1194), (host, int(port)))
            await asyncio.sleep(0.005)

        await for_ever(send)


ABUSES = [
    half_open,
    endless_handshakes,
    slow_streams_of_strangers,
    slow_streams_of_a_member,
    requests_of_a_member,
    requests_of_strangers,
    oversized,
    costly,
    frames,
    datagrams,
]


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.__name__)
async def test_an_honest_peer_is_answered_meanwhile(grid, abuse):
    """Whatever one hostile peer, or several strangers, do: members are served by UDP and TLS, and
    memory does not grow without bound."""
    founder, honest, eve = grid
    for member in honest:
        await member.ping(founder)
    before = psutil.Process().memory_info().rss
    hostile = asyncio.create_task(abuse(founder, eve))
    try:
        await asyncio.sleep(1)  # let it get going: there is nothing to wait for
        for _ in range(10):
            for member in honest:
                await member.ping(founder)
            await asyncio.sleep(0.05)
        assert not hostile.done(), hostile.exception()
        assert psutil.Process().memory_info().rss - before < 300 * MB
    finally:
        hostile.cancel()
        await asyncio.gather(hostile, return_exceptions=True)


async def test_a_newcomer_gets_in_though_strangers_hold_on(grid, monkeypatch):
    """Strangers that hold all the links they may have do not keep a newcomer from joining."""
    monkeypatch.setattr("gridcloud.grid.links.STRANGERS_STAY_SECONDS", 0.5)
    monkeypatch.setattr("gridcloud.grid.rates._HANDSHAKES_AT_ONCE", 1000.0)
    founder, _, _ = grid
    newcomer, loris = RealSite(listen=None), [Identity.generate() for _ in range(50)]
    hostile = asyncio.create_task(with_links(founder, loris, dribble_streams))
    try:
        while len(founder.transport._links.keys()) < 45 and not hostile.done():
            await asyncio.sleep(0.05)
        await newcomer.broker.start()
        joined = await newcomer.broker.join(await code(founder), "newcomer", PATIENCE)
        assert joined.name == "foam"
    finally:
        hostile.cancel()
        await asyncio.gather(hostile, return_exceptions=True)
        await newcomer.broker.close()


@pytest.mark.parametrize("alpn", [b"gridcloud/1", b"gridcloud/0", b"h3"])
async def test_an_older_protocol_is_not_spoken_over_quic(grid, alpn):
    """Who knows only an older protocol, or another, is not talked to at all."""
    founder, _, _ = grid
    iroh.uniffi_set_event_loop(asyncio.get_running_loop())
    builder = iroh.EndpointBuilder()
    builder.apply_minimal()
    builder.relay_mode(iroh.RelayMode.disabled())
    builder.bind_addr("127.0.0.1:0")
    endpoint = await builder.bind()
    where = founder.transport.address()
    target = iroh.EndpointAddr(
        iroh.EndpointId.from_bytes(bytes.fromhex(where.key)), None, list(where.addresses)
    )
    try:
        with pytest.raises(iroh.IrohError):
            await asyncio.wait_for(endpoint.connect(target, alpn), PATIENCE)
    finally:
        await endpoint.close()


async def test_an_older_protocol_is_not_spoken_over_tls(grid):
    """The same over TCP: the handshake fails."""
    founder, _, eve = grid
    mine = TlsIdentity(eve)
    mine.client.set_alpn_protocols(["gridcloud-tls/0", "http/1.1"])
    raw = await connect(founder)
    channel = TlsChannel(raw, mine.client, server_side=False)
    with pytest.raises(LinkDown):
        await asyncio.wait_for(channel.handshake(), PATIENCE)
    raw.close()


async def test_a_relay_carries_for_members_only(grid):
    """Neither does a stranger get carried, nor is a member carried to a stranger."""
    founder, honest, eve = grid
    founder.broker.describe("1", relays=True)
    for member in honest:
        await member.ping(founder)
    asks = [
        (Identity.generate(), honest[0].identity.key, False),
        (eve, Identity.generate().key, False),
        (eve, eve.key, False),
        (eve, honest[0].identity.key, True),
    ]
    for who, target, goes in asks:
        link = await link_as(founder, who)
        stream = await open_on(link, "relay", bytes.fromhex(target))
        said = await asyncio.wait_for(read_exactly(stream, 1, founder.identity.key), PATIENCE)
        assert (said == b"\x01") is goes, target
        link.close()
        await link.closed()


def secrets_of(site):
    """Return all that must stay in the state folder of a site: its keys and the API's token."""
    found = [(site.state / "api.token").read_text().strip()]
    for file in (site.state / "keys").rglob("*"):
        if file.is_file() and file.suffix != ".pub":
            lines = file.read_text().splitlines()
            found += [line for line in lines if len(line) >= 40 and "-----" not in line]
    return found


async def _abuse_a_site(where, code):
    """Say everything that is refused, with the code in all places, for a while."""
    peer = PeerAddress(key=where["key"], tls=(where["tls"],))
    document = code.removeprefix(CODE_PREFIX)
    hostile = OverlayTransport(Identity.generate(), listen=None)

    async def handler(_key, _message):
        return b""

    await hostile.start(handler)
    now = datetime.now(UTC)
    presence = sign(
        hostile._identity, Presence(site=hostile._identity.key, addresses=(), issued_at=now)
    )
    asked = refused = 0
    try:
        for turn in range(1500):
            twisted = document[:-4] + f"{turn % 1000:04d}"
            kind = list(Kind)[turn % len(Kind)]
            join = {"invitation": twisted, "site_name": "x", "presence": presence}
            request = {
                "v": 2,
                "kind": kind,
                "id": code[:60],
                "sent_at": datetime.now(UTC).isoformat(),
                "body": join if turn % 2 else {"community": document, code[:40]: code},
            }
            with contextlib.suppress(GridcloudError):
                reply = await hostile.request(peer, json.dumps(request).encode(), 10)
                asked += 1
                refused += not json.loads(reply)["ok"]
                assert document not in reply.decode()
        stream = await hostile.open_stream(peer, "message", 10)
        await stream.write(header("message") + code.encode())
        stream.close()
    finally:
        await hostile.close()
    return asked, refused


def test_a_sites_log_holds_no_secret_and_does_not_fill_up(new_site):
    """A daemon with a token, keys and invitations out is abused: nothing secret is in its log,
    the log stays small, and its own user is served as before."""
    settings = '[api]\nlisten = "127.0.0.1:0"\n[grid]\ntls_listen = "127.0.0.1:0"\n'
    site = new_site("abused", settings)
    site.start()
    site.cli("community", "create", "physics")
    code = site.cli("community", "invite", "physics").stdout.strip()
    assert code.startswith(CODE_PREFIX)
    ports = json.loads(next(site.state.glob("**/ports.json")).read_text())
    key = Identity.load_or_create(site.state / "keys" / "identity.pem").key
    where = {"key": key, "tls": f"127.0.0.1:{ports['grid-tls']}"}
    asked, refused = asyncio.run(_abuse_a_site(where, code))
    assert asked > 100
    assert refused == asked
    began = time.monotonic()
    assert site.cli("community", "members", "physics").returncode == 0
    assert time.monotonic() - began < PATIENCE
    wait_until(lambda: "request refused" in site.log())
    log = site.log()
    hidden = [*secrets_of(site), code, code.removeprefix(CODE_PREFIX), code[-40:]]
    assert len(hidden) > 4
    for secret in hidden:
        assert secret not in log
    assert log.count("request refused") < 700
    assert Path(site.folder / "site.log").stat().st_size < MB
