"""What every transport keeps, run against the real one on loopback and its in-memory twin."""

import asyncio
import contextlib
import heapq
import itertools

import pytest

from gridcloud.errors import Conflict, GridcloudError, InvalidSpec, TimedOut, Unavailable
from gridcloud.grid.identity import Identity
from gridcloud.grid.memory_transport import Link, MemoryNetwork
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.transport import MAX_MESSAGE_BYTES, Path, PeerAddress


async def echo(key: str, message: bytes) -> bytes:
    return key.encode() + b"|" + message


class Hidden(OverlayTransport):
    """A site that nobody can dial: it holds a link to one helper, which relays."""

    def __init__(self, identity, helper):
        super().__init__(identity, listen=None)
        self._helper = helper

    async def start(self, handler):
        await super().start(handler)
        helper = self._helper.address()
        if helper.tls:
            self.settle(Neighbourhood(relays_for=lambda _: [helper], anchors=lambda: [helper]))
            await asyncio.wait_for(self._links.arrival(helper.key), 10)


@pytest.fixture(params=["udp", "tls", "relayed", "memory"])
async def make(request):
    """Returns a function that makes a transport, closed at the end of the test."""
    network = MemoryNetwork(seed=1)
    helper = OverlayTransport(Identity.generate(), listen=None, tls_listen="127.0.0.1:0")
    made = [helper]

    def one(identity: Identity | None = None):
        identity = identity or Identity.generate()
        match request.param:
            case "udp":
                transport = OverlayTransport(identity)
            case "tls":
                transport = OverlayTransport(identity, listen=None, tls_listen="127.0.0.1:0")
            case "relayed":
                transport = Hidden(identity, helper)
            case _:
                transport = network.node(identity.key)
        made.append(transport)
        return transport

    if request.param == "relayed":
        await helper.start(echo)
        helper.settle(Neighbourhood(may_relay=lambda _source, _target: True))
    yield one
    for transport in reversed(made):
        await transport.close()


@pytest.fixture
async def pair(make):
    one, other = make(), make()
    await one.start(echo)
    await other.start(echo)
    return one, other


async def test_the_reply_comes_back_and_the_handler_knows_who_asked(pair):
    """The handler is given the asker's true key."""
    one, other = pair
    reply = await one.request(other.address(), b"hello", 5)
    assert reply == one.address().key.encode() + b"|hello"
    assert await other.request(one.address(), b"", 5) == other.address().key.encode() + b"|"


async def test_a_message_of_the_full_size_passes_and_a_larger_is_refused(make):
    """One MiB passes both ways unharmed; more is refused before it is sent."""
    one, other = make(), make()

    async def same(_key, message):
        return message

    await one.start(same)
    await other.start(same)
    largest = bytes(range(256)) * (MAX_MESSAGE_BYTES // 256)
    assert await one.request(other.address(), largest, 20) == largest
    with pytest.raises(InvalidSpec):
        await one.request(other.address(), largest + b"!", 20)


async def test_requests_pass_one_another(make):
    """A slow request does not hold up a fast one to the same peer."""
    one, other = make(), make()
    let_go = asyncio.Event()

    async def handler(_key, message):
        if message == b"slow":
            await let_go.wait()
        return message

    await one.start(handler)
    await other.start(handler)
    slow = asyncio.create_task(one.request(other.address(), b"slow", 30))
    many = (one.request(other.address(), b"%d" % n, 30) for n in range(10))
    assert await asyncio.gather(*many) == [b"%d" % n for n in range(10)]
    assert not slow.done()
    let_go.set()
    assert await slow == b"slow"


async def test_a_slow_answer_is_timed_out_and_the_connection_still_works(make):
    """Waiting ends at the timeout; the next request to the same peer is served."""
    one, other = make(), make()

    async def handler(_key, message):
        if message == b"never":
            await asyncio.Event().wait()
        return message

    await one.start(handler)
    await other.start(handler)
    with pytest.raises(TimedOut):
        await one.request(other.address(), b"never", 0.3)
    assert await one.request(other.address(), b"now", 5) == b"now"


async def test_a_handler_at_fault_costs_one_request(make):
    """An exception or an oversized reply drops that request only, and none beside it."""
    one, other = make(), make()
    let_go, heard = asyncio.Event(), []

    async def handler(_key, message):
        heard.append(message)
        if message == b"slow":
            await let_go.wait()
        if message == b"bad":
            raise ValueError("a fault")
        return b"x" * (MAX_MESSAGE_BYTES + 1) if message == b"huge" else message

    await one.start(handler)
    await other.start(handler)
    assert await one.request(other.address(), b"good", 5) == b"good"
    slow = asyncio.create_task(one.request(other.address(), b"slow", 30))
    for bad in (b"bad", b"huge"):
        with pytest.raises(Unavailable):
            await one.request(other.address(), bad, 5)
    let_go.set()
    assert await slow == b"slow"
    assert heard.count(b"slow") == 1


async def test_another_site_at_the_address_is_not_taken_for_the_peer(pair):
    """A wrong key at a right address never gets the message."""
    one, other = pair
    impostor = PeerAddress(key=Identity.generate().key, addresses=other.address().addresses)
    with pytest.raises(Unavailable):
        await one.request(impostor, b"secret", 0.5)


async def test_a_peer_without_addresses_is_unavailable(pair):
    """No address known is an error with a cause, not a hang."""
    one, _ = pair
    with pytest.raises(Unavailable):
        await one.request(PeerAddress(key=Identity.generate().key), b"", 0.5)


async def test_a_peer_that_closed_is_unavailable_and_reached_again_once_back(make):
    """A kept connection to a peer that went and came back is replaced by itself."""
    identity = Identity.generate()
    one, other = make(), make(identity)
    await one.start(echo)
    await other.start(echo)
    await one.request(other.address(), b"1", 5)
    where = other.address()
    await other.close()
    with pytest.raises(Unavailable):
        await one.request(where, b"2", 0.5)
    again = make(identity)
    await again.start(echo)
    assert (await one.request(again.address(), b"3", 10)).endswith(b"|3")


async def test_starting_twice_is_a_conflict_and_closing_twice_is_not(make):
    """A transport has one handler; close is idempotent."""
    one = make()
    await one.start(echo)
    with pytest.raises(Conflict):
        await one.start(echo)
    await one.close()
    await one.close()


async def test_closing_ends_what_is_under_way(make):
    """No handler outlives its transport."""
    one, other = make(), make()
    started, ended = asyncio.Event(), asyncio.Event()

    async def handler(_key, _message):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await one.start(echo)
    await other.start(handler)
    asking = asyncio.create_task(one.request(other.address(), b"", 1.5))
    await asyncio.wait_for(started.wait(), 5)
    await other.close()
    assert ended.is_set()
    with pytest.raises((Unavailable, TimedOut)):
        await asking


class TestUdp:
    """What only the real one over iroh does."""

    async def test_garbage_and_half_open_connections_do_not_end_the_listening(self):
        """Bad packets, and a stranger with another protocol, leave the accept loop alive."""
        one, other = OverlayTransport(Identity.generate()), OverlayTransport(Identity.generate())
        await one.start(echo)
        await other.start(echo)
        try:
            host, port = other.address().addresses[0].split(":")
            loop = asyncio.get_running_loop()
            noise, _ = await loop.create_datagram_endpoint(
                asyncio.DatagramProtocol, remote_addr=(host, int(port))
            )
            for n in range(50):
                noise.sendto(bytes([0xC0 | n % 16]) + b"\0\0\0\1" + bytes(1200))
            noise.close()
            await stranger(other.address())
            assert await one.request(other.address(), b"hello", 5)
        finally:
            await one.close()
            await other.close()

    async def test_a_specific_address_is_the_only_one_listened_on(self):
        """Loopback means loopback in both IP families."""
        transport = OverlayTransport(Identity.generate(), "127.0.0.1:0")
        await transport.start(echo)
        try:
            bound = transport._udp._endpoint.bound_sockets()
            assert all(each.startswith(("127.0.0.1:", "[::1]:")) for each in bound)
        finally:
            await transport.close()

    async def test_a_port_in_use_is_named(self):
        """The error says which address could not be had."""
        one = OverlayTransport(Identity.generate())
        await one.start(echo)
        taken = one.address().addresses[0]
        try:
            with pytest.raises(Unavailable, match=taken):
                await OverlayTransport(Identity.generate(), taken).start(echo)
        finally:
            await one.close()

    @pytest.mark.parametrize("listen", ["", "4433", "localhost:1", "1.2.3.4:99999", "1.2.3.4"])
    async def test_a_malformed_address_is_refused(self, listen):
        """Both listen and advertise want IP:PORT."""
        with pytest.raises(InvalidSpec):
            OverlayTransport(Identity.generate(), listen)
        with pytest.raises(InvalidSpec):
            OverlayTransport(Identity.generate(), advertise=[listen])
        with pytest.raises(InvalidSpec):
            OverlayTransport(Identity.generate(), tls_advertise=[listen])

    async def test_a_connection_fallen_silent_is_dialled_anew(self):
        """A peer that vanished without a word and came back is reached within one request."""
        identity = Identity.generate()
        one, other = OverlayTransport(Identity.generate()), OverlayTransport(identity)
        await one.start(echo)
        await other.start(echo)
        try:
            await one.request(other.address(), b"1", 5)
            one._links.close()
            one._links.add(SilentLink(identity.key))
            assert (await one.request(other.address(), b"2", 2)).endswith(b"|2")
        finally:
            await one.close()
            await other.close()


class SilentLink:
    """Stands for a kept link whose other end is gone: takes all, gives nothing."""

    alive = True
    dialled = True

    def __init__(self, key):
        self.key = key

    def path(self):
        return Path(how="direct")

    def observed(self):
        return ""

    def received(self):
        return 1

    def nudge(self):
        pass

    def close(self):
        self.alive = False

    async def open(self):
        await asyncio.Event().wait()


async def stranger(address: PeerAddress) -> None:
    """Connect with another protocol's name; it is turned away."""
    from iroh import iroh_ffi as iroh

    builder = iroh.EndpointBuilder()
    builder.apply_minimal()
    builder.relay_mode(iroh.RelayMode.disabled())
    builder.bind_addr("127.0.0.1:0")
    endpoint = await builder.bind()
    peer = iroh.EndpointAddr(
        iroh.EndpointId.from_bytes(bytes.fromhex(address.key)), None, list(address.addresses)
    )
    with contextlib.suppress(iroh.IrohError):
        await endpoint.connect(peer, b"another/1")
    await endpoint.close()


class VirtualTime:
    """A sleep that takes no time: whoever sleeps is woken in order, once nothing else goes on."""

    def __init__(self):
        self.now = 0.0
        self._sleeping = []
        self._count = itertools.count()

    async def __call__(self, seconds):
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleeping, (self.now + seconds, next(self._count), woken))
        await woken

    async def run(self):
        while True:
            for _ in range(50):
                await asyncio.sleep(0)
            if self._sleeping:
                at, _, woken = heapq.heappop(self._sleeping)
                if not woken.done():
                    self.now = at
                    woken.set_result(None)


@pytest.fixture
async def time():
    virtual = VirtualTime()
    running = asyncio.create_task(virtual.run())
    yield virtual
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


class TestMemory:
    """What only the twin does."""

    async def outcomes(self, seed, link):
        """Ask 40 times over a bad link; return what became of each."""
        network = MemoryNetwork(seed)
        one, other = network.node("1" * 64), network.node("2" * 64)
        await one.start(echo)
        await other.start(echo)
        network.set_link(link, "1" * 64, "2" * 64)
        found = []
        for _ in range(40):
            try:
                await one.request(other.address(), b"x", 0.01)
                found.append("answered")
            except GridcloudError as error:
                found.append(error.code)
        await one.close()
        await other.close()
        return found

    async def test_the_same_seed_loses_the_same_messages(self):
        """A run can be replayed; another seed runs otherwise."""
        link = Link(loss=0.4)
        first = await self.outcomes(7, link)
        assert first == await self.outcomes(7, link)
        assert first != await self.outcomes(8, link)
        assert {"answered", "timed-out"} == set(first)

    async def test_a_duplicate_is_handled_twice(self):
        """Duplication reaches the handler, so that idempotence can be tested."""
        network = MemoryNetwork(seed=1)
        one, other = network.node("1" * 64), network.node("2" * 64)
        heard = []

        async def handler(_key, message):
            heard.append(message)
            return b""

        await one.start(echo)
        await other.start(handler)
        network.set_link(Link(duplicate=1.0))
        await one.request(other.address(), b"x", 5)
        await asyncio.sleep(0)
        assert heard == [b"x", b"x"]

    async def test_a_partition_is_silent_and_heals(self, time):
        """Parted nodes do not hear one another; nodes of one side do."""
        network = MemoryNetwork(seed=1, sleep=time)
        nodes = [network.node(digit * 64) for digit in "123"]
        for node in nodes:
            await node.start(echo)
        network.partition([nodes[0].address().key])
        with pytest.raises(Unavailable):
            await nodes[0].request(nodes[1].address(), b"", 30)
        network.heal()
        assert await nodes[0].request(nodes[1].address(), b"", 30)

    async def test_a_killed_node_is_silent_until_it_is_started_again(self, time):
        """A crash is noticed by silence only."""
        network = MemoryNetwork(seed=1, sleep=time)
        one, other = network.node("1" * 64), network.node("2" * 64)
        await one.start(echo)
        await other.start(echo)
        await network.kill("2" * 64)
        with pytest.raises(Unavailable):
            await one.request(other.address(), b"", 30)
        assert time.now == 30
        await network.restart("2" * 64)
        assert await one.request(other.address(), b"", 30)
