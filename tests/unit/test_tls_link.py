"""TLS between two proved sites: who gets in, who does not, and what nobody on the way can do."""

import asyncio
import os
import socket
import ssl
from pathlib import Path

import pytest

from gridcloud.errors import Unavailable
from gridcloud.grid.identity import Identity
from gridcloud.grid.links import LinkDown
from gridcloud.grid.mux import Frame
from gridcloud.grid.mux_link import MuxLink
from gridcloud.grid.rates import Door
from gridcloud.grid.streams import read_to_end
from gridcloud.grid.tls_channel import TlsIdentity, answer_over, dial_over
from gridcloud.grid.tls_link import TcpStream, TlsCarrier
from gridcloud.grid.transport import PeerAddress

PATIENCE = 10


@pytest.fixture
def mine():
    return TlsIdentity(Identity.generate())


@pytest.fixture
def yours():
    return TlsIdentity(Identity.generate())


@pytest.fixture
async def pipe():
    """Returns a function that makes two connected byte streams."""
    made = []

    async def make():
        ends = []
        for end in socket.socketpair():
            end.setblocking(False)
            ends.append(TcpStream(*await asyncio.open_connection(sock=end)))
        made.extend(ends)
        return ends

    yield make
    for end in made:
        end.close()
    await asyncio.sleep(0)


@pytest.fixture
async def carrier(yours):
    """Returns a listening carrier; `came` holds the links that came in."""
    came = asyncio.Queue()
    one = TlsCarrier(yours, "127.0.0.1:0", (), Door(), came.put_nowait)
    await one.start()
    one.came = came
    yield one
    await one.close()
    while not came.empty():
        came.get_nowait().close()


async def meet(here, there, mine, yours, key):
    """Have two ends shake hands; whoever gives up closes its end, as the carriers do."""

    async def closing(work, end):
        try:
            return await work
        except LinkDown:
            end.close()
            raise

    return await both(
        closing(dial_over(here, mine, key), here), closing(answer_over(there, yours), there)
    )


async def both(one, other):
    return await asyncio.wait_for(asyncio.gather(one, other, return_exceptions=True), PATIENCE)


async def test_both_ends_learn_the_true_key_of_the_other(mine, yours, pipe):
    """The dialler gets whom it wants, the other the key that was proved."""
    here, there = await pipe()
    dialled, answered = await meet(here, there, mine, yours, yours.identity.key)
    assert dialled.peer_key() == yours.identity.key
    assert answered[1] == mine.identity.key


async def test_another_site_is_not_taken_for_the_one_wanted(mine, yours, pipe):
    """A true certificate of another key is refused before anything is said."""
    here, there = await pipe()
    dialled, answered = await meet(here, there, mine, yours, Identity.generate().key)
    assert isinstance(dialled, LinkDown)
    assert "another site" in str(dialled)
    assert isinstance(answered, LinkDown)


class Impostor(Identity):
    """Shows another's key and signs with its own."""

    def __init__(self, shown, signer):
        self._shown, self._signer = shown, signer

    @property
    def key(self):
        return self._shown.key

    @property
    def secret_bytes(self):
        return self._signer.secret_bytes

    def sign(self, message):
        return self._signer.sign(message)


async def test_a_key_that_is_claimed_but_not_proved_is_refused(yours, pipe):
    """Nobody gets in as somebody else."""
    liar = TlsIdentity(Impostor(Identity.generate(), Identity.generate()))
    here, there = await pipe()
    dialled, answered = await meet(here, there, liar, yours, yours.identity.key)
    assert isinstance(answered, LinkDown)
    assert "did not prove" in str(answered)
    assert isinstance(dialled, LinkDown)


async def test_a_proof_made_for_one_site_does_not_open_another(mine, yours, pipe):
    """A site that is dialled cannot pass the dialler's proof on and get in elsewhere as it."""
    signed = []

    class Noting(Identity):
        def __init__(self, inner):
            self._inner = inner

        key = property(lambda self: self._inner.key)
        secret_bytes = property(lambda self: self._inner.secret_bytes)

        def sign(self, message):
            signed.append(message)
            return self._inner.sign(message)

    here, there = await pipe()
    await both(
        dial_over(here, TlsIdentity(Noting(mine.identity)), yours.identity.key),
        answer_over(there, yours),
    )
    assert bytes.fromhex(yours.identity.key) in signed[0]
    assert bytes.fromhex(mine.identity.key) in signed[0]


async def test_its_own_key_coming_back_is_refused(mine, pipe):
    """A connection to oneself, or a copy of one's key, is no peer."""
    here, there = await pipe()
    _, answered = await meet(here, there, mine, mine, mine.identity.key)
    assert isinstance(answered, LinkDown)


async def test_older_tls_is_refused(mine, yours, carrier):
    """There is no way down to a weaker protocol."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    host, port = carrier.addresses()[0].split(":")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection(host, int(port), ssl=context)


async def test_one_bit_altered_on_the_way_ends_the_link(mine, yours, pipe):
    """Who carries the bytes cannot alter them unnoticed."""
    here, near = await pipe()
    far, there = await pipe()
    alter = asyncio.Event()

    async def carry(source, target):
        while data := await source.read(65536):
            await target.write(bytes([*data[:-1], data[-1] ^ 1]) if alter.is_set() else data)

    carrying = [asyncio.ensure_future(carry(near, far)), asyncio.ensure_future(carry(far, near))]
    dialled, answered = await meet(here, there, mine, yours, yours.identity.key)
    alter.set()
    await dialled.write(b"a secret")
    with pytest.raises(LinkDown):
        await asyncio.wait_for(answered[0].read(), PATIENCE)
    for task in carrying:
        task.cancel()
    await asyncio.gather(*carrying, return_exceptions=True)


async def test_what_passes_shows_nothing_of_what_is_said(mine, yours, pipe):
    """Neither the words nor the dialler's key are on the wire."""
    here, near = await pipe()
    far, there = await pipe()
    wire = bytearray()

    async def carry(source, target):
        while data := await source.read(65536):
            wire.extend(data)
            await target.write(data)

    carrying = [asyncio.ensure_future(carry(near, far)), asyncio.ensure_future(carry(far, near))]
    dialled, answered = await meet(here, there, mine, yours, yours.identity.key)
    await dialled.write(b"a secret that nobody sees")
    assert await asyncio.wait_for(answered[0].read(), PATIENCE) == b"a secret that nobody sees"
    assert b"a secret" not in wire
    assert bytes.fromhex(mine.identity.key) not in wire
    for task in carrying:
        task.cancel()
    await asyncio.gather(*carrying, return_exceptions=True)


def test_the_secret_key_stays_in_memory(tmp_path, monkeypatch):
    """Making the TLS contexts writes no file and leaves no descriptor open."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = len(list(Path("/proc/self/fd").iterdir()))
    TlsIdentity(Identity.generate())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not list(Path(tmp_path).iterdir())


async def test_links_carry_streams_both_ways(mine, yours, carrier):
    """Whoever dialled, either end opens; the ends and the bytes are right."""
    out = await TlsCarrier(mine, None, (), Door(), lambda link: None).dial(
        PeerAddress(key=yours.identity.key, tls=carrier.addresses())
    )
    back = await asyncio.wait_for(carrier.came.get(), PATIENCE)
    assert back.key == mine.identity.key
    for opener, taker in ((out, back), (back, out)):
        stream = await opener.open()
        taken = await taker.accept()
        big = os.urandom(300_000)

        async def give(stream=stream, big=big):
            await stream.write(big)
            await stream.write_eof()

        _, got = await both(give(), read_to_end(taken, 10**6, "0" * 64))
        assert got == big
        taken.close()
    out.close()


async def test_a_dead_address_does_not_hold_up_a_live_one(mine, yours, carrier):
    """Addresses are tried one behind the other, and the first that has the key is taken."""
    silent = socket.create_server(("127.0.0.1", 0))
    where = f"127.0.0.1:{silent.getsockname()[1]}"
    peer = PeerAddress(key=yours.identity.key, tls=(where, "127.0.0.1:1", *carrier.addresses()))
    link = await asyncio.wait_for(
        TlsCarrier(mine, None, (), Door(), lambda link: None).dial(peer), 5
    )
    assert link.key == yours.identity.key
    link.close()
    silent.close()


async def test_an_unreachable_peer_says_why(mine):
    """The error names the addresses and the causes."""
    dialler = TlsCarrier(mine, None, (), Door(), lambda link: None)
    key = Identity.generate().key
    with pytest.raises(Unavailable, match=r"127.0.0.1:1: .*refused"):
        await dialler.dial(PeerAddress(key=key, tls=("127.0.0.1:1",)))


async def test_a_port_in_use_is_named(carrier, mine):
    """The error says which address could not be had, and how to set another."""
    taken = carrier.addresses()[0]
    with pytest.raises(Unavailable, match=taken):
        await TlsCarrier(mine, taken, (), Door(), lambda link: None).start()


async def test_noise_and_half_open_connections_do_not_keep_others_out(mine, yours, carrier):
    """A peer that says nonsense, or nothing, costs its own connection only."""
    host, port = carrier.addresses()[0].split(":")
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(os.urandom(4096))
    link = await asyncio.wait_for(
        TlsCarrier(mine, None, (), Door(), lambda link: None).dial(
            PeerAddress(key=yours.identity.key, tls=carrier.addresses())
        ),
        PATIENCE,
    )
    link.close()
    for _, one in [*idle, (None, writer)]:
        one.transport.abort()


class Channel:
    """Stands for a TLS channel: what is put in is read, what is written is kept."""

    def __init__(self):
        self.incoming = asyncio.Queue()
        self.written = bytearray()
        self.closed = False

    async def read(self):
        data = await self.incoming.get()
        if not data:
            raise LinkDown("the other end closed it")
        return data

    async def write(self, data):
        self.written += data

    def close(self):
        self.closed = True


async def test_a_peer_that_breaks_the_rules_loses_its_link():
    """A bad frame ends the link and everything on it, at once."""
    channel = Channel()
    link = MuxLink(channel, "0" * 64, dialled=True, how="tls")
    stream = await link.open()
    reading = asyncio.ensure_future(stream.read(10))
    channel.incoming.put_nowait(b"\xff" * 100)
    with pytest.raises(Unavailable, match="broke the rules"):
        await asyncio.wait_for(reading, PATIENCE)
    assert channel.closed
    assert not link.alive
    with pytest.raises(LinkDown):
        await link.open()
    with pytest.raises(LinkDown):
        await link.accept()


async def test_a_peer_that_asks_on_and_takes_nothing_is_given_up():
    """What waits to be sent to one peer stays bounded."""
    channel = Channel()
    held = asyncio.Event()

    async def never(_data):
        await held.wait()

    channel.write = never
    link = MuxLink(channel, "0" * 64, dialled=True, how="tls")
    link.flush()
    while link.mux.waiting:
        await asyncio.sleep(0)  # the first bytes are with the writer, which hangs
    link.mux._outgoing += bytes(5 * 1024 * 1024)
    channel.incoming.put_nowait(bytes([Frame.PING]) + bytes(5) + b"\x08" + bytes(8))
    await asyncio.wait_for(link.closed(), PATIENCE)
    assert "takes nothing" in link.cause


async def test_the_time_there_and_back_is_known(mine, yours, carrier):
    """A link measures it when it is made."""
    link = await TlsCarrier(mine, None, (), Door(), lambda link: None).dial(
        PeerAddress(key=yours.identity.key, tls=carrier.addresses())
    )
    other = await asyncio.wait_for(carrier.came.get(), PATIENCE)
    stream = await link.open()
    taken = await other.accept()
    await taken.write(b"x")
    await stream.read(1)
    assert link.path().how == "tls"
    assert 0 <= link.path().rtt_seconds < PATIENCE
    link.close()
