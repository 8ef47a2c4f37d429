"""The overlay: which way a peer is reached, streams, bounds, and what one peer can do to others."""

import asyncio
import contextlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.errors import Conflict, InvalidSpec, TimedOut, Unavailable
from gridcloud.grid.addresses import own_hosts, parse_listen
from gridcloud.grid.dialling import Memory, Reviews, Way, first_of
from gridcloud.grid.identity import Identity
from gridcloud.grid.links import LinkDown, LinkTable
from gridcloud.grid.messaging import Answering
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.punching import Meeting, Places, Punching, _hear
from gridcloud.grid.rates import Buckets, Door, TokenBucket
from gridcloud.grid.transport import Path, PeerAddress

PATIENCE = 10


async def echo(key, message):
    return key[:8].encode() + b"|" + message


async def echo_stream(_key, stream):
    while data := await stream.read(65536):
        await stream.write(data)
    await stream.write_eof()


@pytest.fixture
async def new():
    """Returns a function that makes and starts a transport."""
    made = []

    async def make(handler=echo, identity=None, **options):
        one = OverlayTransport(identity or Identity.generate(), **options)
        made.append(one)
        one.serve("echo", echo_stream)
        await one.start(handler)
        return one

    yield make
    for one in made:
        await one.close()


TLS = {"listen": None, "tls_listen": "127.0.0.1:0"}


class TestReaching:
    """Which way is taken."""

    async def test_a_peer_that_dialled_is_asked_over_its_link(self, new):
        """A site without any address is reached while it holds a link."""
        inside, outside = await new(listen=None), await new(**TLS)
        await inside.request(outside.address(), b"", PATIENCE)
        nowhere = PeerAddress(key=inside.address().key)
        assert inside.address() == nowhere
        assert (await outside.request(nowhere, b"x", PATIENCE)).endswith(b"|x")

    async def test_udp_is_preferred_and_tls_taken_where_it_fails(self, new):
        """The carriers are chosen by themselves, and the path says which it was."""
        one, both = await new(), await new(tls_listen="127.0.0.1:0")
        where = both.address()
        assert where.addresses
        assert where.tls
        await one.request(where, b"", PATIENCE)
        assert one.path(where.key).how == "direct"
        assert one.path(where.key).rtt_seconds is not None
        other = await new()
        dead = where.model_copy(update={"addresses": ("127.0.0.1:1",)})
        await other.request(dead, b"", PATIENCE)
        assert other.path(where.key).how == "tls"
        assert other.path(Identity.generate().key) is None

    async def test_a_host_without_udp_sockets_takes_part_over_tls(self, new, monkeypatch):
        """Where they cannot even be made the site still starts, listens and asks."""

        async def none(_self):
            raise Unavailable("The grid cannot listen.")

        monkeypatch.setattr("gridcloud.grid.iroh_link.IrohCarrier.start", none)
        monkeypatch.setattr("gridcloud.grid.overlay.has_udp", lambda: False)
        one, other = await new(tls_listen="127.0.0.1:0"), await new(tls_listen="127.0.0.1:0")
        assert one.address().addresses == ()
        assert await one.request(other.address(), b"", PATIENCE)

    async def test_a_dial_given_up_by_its_asker_goes_on_for_the_next(self, new):
        """A short time-out does not keep a slow way from ever being found."""
        one, other = await new(), await new(**TLS)
        slow = other.address().model_copy(update={"addresses": ("127.0.0.1:1",)})
        with pytest.raises(Unavailable):
            await one.request(slow, b"", 0.2)
        await asyncio.wait_for(one._links.arrival(slow.key), PATIENCE)
        assert await one.request(slow, b"", 1)

    async def test_a_better_way_is_found_while_another_works(self, new, monkeypatch):
        """What was reached over TLS is reached straight once UDP passes, without being asked."""
        monkeypatch.setattr("gridcloud.grid.dialling._REVIEW_AFTER", 0.0)
        one, other = await new(), await new(tls_listen="127.0.0.1:0")
        where = other.address()
        await one.request(where.model_copy(update={"addresses": ()}), b"", PATIENCE)
        assert one.path(where.key).how == "tls"
        better = asyncio.ensure_future(one._links.arrival(where.key))
        for _ in range(2):
            await one.request(where, b"", PATIENCE)
        await asyncio.wait_for(better, PATIENCE)
        assert one.path(where.key).how == "direct"

    async def test_nothing_listens_on_tcp_unless_told(self, new):
        """The second carrier opens no port by itself."""
        assert (await new()).address().tls == ()

    async def test_a_relay_that_is_not_ours_is_never_asked(self, new):
        """A peer cannot make this site open connections to URLs of its choice."""
        one = await new()
        peer = PeerAddress(key=Identity.generate().key, relay_urls=("https://192.0.2.1/",))
        with pytest.raises(Unavailable, match="no address"):
            await one.request(peer, b"", 2)

    async def test_the_relays_it_uses_are_told_to_peers(self, new):
        """They are part of the address; a malformed one is an error at once."""
        one = await new(relays=["https://127.0.0.1:1/"])
        assert one.address().relay_urls == ("https://127.0.0.1:1/",)
        with pytest.raises(InvalidSpec):
            await new(relays=["nonsense"])


class TestReviews:
    """When a better way is looked for."""

    def test_a_way_around_is_looked_at_soon_and_then_ever_less(self):
        """Two sites that met through a third soon try again to meet without it."""
        now = 0.0
        reviews = Reviews(lambda: now)
        assert not reviews.due("k")
        times = []
        while now < 1000:
            now += 1
            if reviews.due("k"):
                reviews.done("k", straight=False)
                times.append(now)
        assert times == [5, 15, 35, 75, 155, 315, 615, 915]

    def test_a_straight_way_is_left_alone(self):
        """And once it is no longer straight, it is looked at soon again."""
        now = 0.0
        reviews = Reviews(lambda: now)
        assert not reviews.due("k")
        now = 6.0
        reviews.done("k", straight=True)
        now = 300.0
        assert not reviews.due("k")
        now = 306.0
        assert reviews.due("k")
        reviews.done("k", straight=False)
        now = 316.0
        assert reviews.due("k")


class TestMemory:
    """What is tried first."""

    def test_the_best_way_begins_and_the_others_follow(self):
        """Each next way begins a moment later."""
        plan = Memory().plan("k", list(Way))
        assert plan == [(0.0, Way.UDP), (1.0, Way.TLS), (2.0, Way.HELPED)]
        assert Memory().plan("k", [Way.HELPED]) == [(0.0, Way.HELPED)]

    def test_what_worked_last_begins_at_once_and_the_better_still_is_tried(self):
        """A site behind a firewall does not wait again and again; nor does it forget UDP."""
        memory = Memory()
        memory.note("k", Way.HELPED)
        assert memory.plan("k", list(Way)) == [
            (0.0, Way.UDP),
            (0.0, Way.HELPED),
            (1.0, Way.TLS),
        ]

    def test_where_udp_failed_with_one_tls_begins_at_once_with_others(self):
        """The first contact with many peers is not slowed for each."""
        memory = Memory()
        memory.note("one", Way.TLS)
        assert (0.0, Way.TLS) in memory.plan("another", list(Way))
        memory.note("one", Way.UDP)
        assert (1.0, Way.TLS) in memory.plan("another", list(Way))

    async def test_the_next_attempt_begins_when_the_first_failed(self):
        """Nobody waits for a head start that is of no use."""

        async def fails():
            raise Unavailable("It is down.")

        async def works():
            return "link"

        async with asyncio.timeout(PATIENCE):
            assert await first_of([(0.0, fails), (3600.0, works)]) == "link"

    async def test_all_causes_are_told_when_all_fail(self):
        """The error names each way that was tried."""

        async def one():
            raise Unavailable("One is down.")

        async def other():
            raise LinkDown("The other too.")

        with pytest.raises(Unavailable, match=r"One is down\. The other too\."):
            await first_of([(0.0, one), (0.0, other)], asyncio.Future())

    async def test_what_lost_is_given_up(self):
        """No attempt outlives the race."""
        ended = asyncio.Event()

        async def slow():
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async def quick():
            await asyncio.sleep(0)
            return "link"

        assert await first_of([(0.0, slow), (0.0, quick)]) == "link"
        assert ended.is_set()


class TestStreams:
    """What is served beside messages."""

    @pytest.mark.parametrize("options", [{}, TLS], ids=["udp", "tls"])
    async def test_a_stream_carries_much_both_ways(self, new, options):
        """In order, whole, and the end is seen."""
        one, other = await new(**options), await new(**options)
        stream = await one.open_stream(other.address(), "echo", PATIENCE)
        sent = bytes(range(256)) * 2000

        async def give():
            await stream.write(sent)
            await stream.write_eof()

        giving = asyncio.create_task(give())
        got = bytearray()
        while data := await stream.read(10_000):
            got += data
        await giving
        assert got == sent
        stream.close()
        stream.close()

    @pytest.mark.parametrize("options", [{}, TLS], ids=["udp", "tls"])
    async def test_a_stream_let_go_of_is_broken_not_ended(self, new, options):
        """The other end never takes a part for the whole."""
        one, other = await new(**options), await new(**options)
        came = asyncio.get_running_loop().create_future()

        async def whole(_key, stream):
            try:
                while await stream.read(100):
                    pass
                came.set_result("ended")
            except Unavailable:
                came.set_result("broken")

        other.serve("whole", whole)
        stream = await one.open_stream(other.address(), "whole", PATIENCE)
        await stream.write(b"a part")
        stream.close()
        assert await asyncio.wait_for(came, PATIENCE) == "broken"
        with pytest.raises(Unavailable):
            await stream.read(1)

    async def test_a_service_that_is_not_there_is_told(self, new):
        """The opener learns it at once, by name."""
        one, other = await new(), await new()
        with pytest.raises(Unavailable, match="'nothing'"):
            await one.open_stream(other.address(), "nothing", PATIENCE)

    async def test_names_of_services_are_checked(self, new):
        """Bad names and second acceptors are refused where they are given."""
        one = await new()
        for name in ("", "Upper", "x" * 16, "a b"):
            with pytest.raises(InvalidSpec):
                one.serve(name, echo_stream)
            with pytest.raises(InvalidSpec):
                await one.open_stream(one.address(), name, 1)
        with pytest.raises(Conflict):
            one.serve("echo", echo_stream)

    async def test_a_stream_that_never_says_what_it_wants_is_dropped(self, new, monkeypatch):
        """A peer that opens and is silent costs a bounded time, and hurts no message."""
        monkeypatch.setattr("gridcloud.grid.streams._HEADER_TIMEOUT", 0.1)
        one, other = await new(**TLS), await new(**TLS)
        await one.request(other.address(), b"", PATIENCE)
        link = one._links.best(other.address().key)
        mute = [await link.open() for _ in range(20)]
        assert await one.request(other.address(), b"", PATIENCE)
        for stream in mute:
            with pytest.raises(Unavailable):
                await asyncio.wait_for(stream.read(1), PATIENCE)

    async def test_one_peer_takes_only_its_share_of_streams(self, new, monkeypatch):
        """What is over is broken at once, and another peer is served as ever."""
        monkeypatch.setattr("gridcloud.grid.streams._MAX_STREAMS_PER_PEER", 2)
        greedy, modest, other = await new(**TLS), await new(**TLS), await new(**TLS)
        held = [await greedy.open_stream(other.address(), "echo", PATIENCE) for _ in range(2)]
        with pytest.raises(Unavailable):
            await greedy.open_stream(other.address(), "echo", 2)
        assert await modest.request(other.address(), b"", PATIENCE)
        for stream in held:
            stream.close()


async def test_one_peer_cannot_hold_all_places_of_the_handler():
    """While one peer's slow requests wait, another's is answered."""
    let_go, answered = asyncio.Event(), []

    async def handler(key, message):
        if message == b"slow":
            await let_go.wait()
        answered.append(key)
        return b""

    links = LinkTable(lambda key: key != "stranger")
    answering = Answering(handler, lambda key: key != "stranger", links, lambda _key: 0.0)
    slow = [
        asyncio.create_task(answering.accept(Line(key), Asked(b"slow")))
        for key in ["greedy"] * 200 + ["stranger"] * 200
    ]
    await asyncio.sleep(0)
    modest = Asked(b"quick")
    await asyncio.wait_for(answering.accept(Line("modest"), modest), PATIENCE)
    assert answered == ["modest"]
    assert modest.said == frame(1, b"")
    let_go.set()
    await asyncio.gather(*slow)
    assert len(answered) == 401


def frame(number, message):
    return struct.pack(">II", number, len(message)) + message


class Line:
    """What Answering needs of a link."""

    def __init__(self, key):
        self.key = key


class Asked:
    """A stream on which messages come one after the other, in pieces of a few bytes."""

    def __init__(self, *messages, piece=7):
        self._left = b"".join(frame(number, each) for number, each in enumerate(messages, 1))
        self._piece = piece
        self.said = b""

    async def read(self, limit):
        size = min(limit, self._piece)
        data, self._left = self._left[:size], self._left[size:]
        return data

    async def write(self, data):
        self.said += data

    def close(self):
        pass


class TestChannels:
    """Many messages over one stream."""

    async def test_a_message_costs_no_stream_of_its_own(self, new):
        """Of a hundred messages over a link, the first opens a stream and the rest use it."""
        opened = []
        one, other = await new(), await new()
        await one.request(other.address(), b"", PATIENCE)
        link = one._links.best(other.address().key)
        link.open, open_one = None, link.open
        link.open = lambda: (opened.append(1), open_one())[1]
        answers = await asyncio.gather(
            *(one.request(other.address(), b"%d" % number, PATIENCE) for number in range(100))
        )
        assert [answer.partition(b"|")[2] for answer in answers] == [
            b"%d" % number for number in range(100)
        ]
        assert not opened

    async def test_who_gives_up_waiting_leaves_the_stream_to_others(self, new):
        """A late answer is nobody's, and the next message is answered as ever."""
        let_go = asyncio.Event()

        async def handler(_key, message):
            if message == b"slow":
                await let_go.wait()
            return message

        one, other = await new(), await new(handler)
        with pytest.raises(TimedOut):
            await one.request(other.address(), b"slow", 0.5)
        assert await one.request(other.address(), b"quick", PATIENCE) == b"quick"
        let_go.set()
        assert await one.request(other.address(), b"again", PATIENCE) == b"again"

    async def test_what_was_asked_is_carried_out_though_the_asker_is_gone(self, new):
        """A handler is not cut off in the middle because nobody waits for its answer any more."""
        begun, let_go, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def handler(_key, message):
            begun.set()
            await let_go.wait()
            done.set()
            return message

        one, other = await new(), await new(handler)
        asking = asyncio.create_task(one.request(other.address(), b"", PATIENCE))
        await begun.wait()
        await one.close()
        await asyncio.gather(asking, return_exceptions=True)
        let_go.set()
        await asyncio.wait_for(done.wait(), PATIENCE)

    async def test_a_stream_that_was_ended_is_opened_anew(self, new):
        """The peer may end it, as when it is short of memory; the message is sent once more."""
        one, other = await new(**TLS), await new(**TLS)
        await one.request(other.address(), b"", PATIENCE)
        for channel in list(one._channels._channels.values()):
            channel._stream.close()
        assert await one.request(other.address(), b"again", PATIENCE)

    @pytest.mark.parametrize(
        "answer",
        [frame(99, b"x"), struct.pack(">II", 1, 2**30), frame(1, b"x") * 2, b"\0\0\0"],
        ids=["not asked for", "too long", "twice", "half a head"],
    )
    async def test_a_peer_that_answers_nonsense_breaks_its_own_stream(self, new, answer):
        """Whoever waits on that stream is told; no memory is kept for what was not asked."""

        async def nonsense(_link, stream):
            await stream.read(100)
            await stream.write(answer)
            await stream.write_eof()

        one, other = await new(**TLS), await new(**TLS)
        other._services._acceptors["message"] = nonsense
        if answer == frame(1, b"x") * 2:
            assert await one.request(other.address(), b"", PATIENCE) == b"x"
        else:
            with pytest.raises(Unavailable):
                await one.request(other.address(), b"", PATIENCE)
        await asyncio.sleep(0)
        (channel,) = one._channels._channels.values()
        async with asyncio.timeout(PATIENCE):
            while not channel.broken:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("piece", [1, 3, 8, 64 * 1024])
async def test_messages_are_read_however_they_come_apart(piece):
    """Heads and bodies may come in any pieces; each message is answered by its number."""

    async def handler(_key, message):
        return message[::-1]

    answering = Answering(handler, lambda _key: True, LinkTable(lambda _key: True), lambda _: 0.0)
    asked = Asked(b"abc", b"", b"de" * 100, piece=piece)
    await answering.accept(Line("k"), asked)
    answers = {asked.said[at : at + 4] for at in range(len(asked.said) - 3)}
    assert {struct.pack(">I", number) for number in (1, 2, 3)} <= answers
    assert b"cba" in asked.said
    assert b"ed" * 100 in asked.said


@given(st.binary(max_size=200) | st.builds(bytes, st.just(10_000)))
def test_nonsense_about_a_meeting_is_an_error_and_no_fault(said):
    """Whatever a peer says where addresses are expected, it is refused as what it is."""

    class Said:
        def __init__(self):
            self._left = [said, b""] if said else [b""]

        async def read(self, _limit):
            return self._left.pop(0)

    for kind in (Meeting, Places):
        with pytest.raises(Unavailable, match=r"declined|nonsense|too much"):
            asyncio.run(_hear(Said(), "0" * 64, kind))


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "127.0.0.1:1", "224.0.0.1:1", "169.254.0.1:9", "44.1.1.1:0", "x"]
)
async def test_where_one_is_seen_must_make_sense(address):
    """A peer that says one is seen at an address nobody can have is not believed."""

    class Teller:
        alive, key = True, "0" * 64

        async def open(self):
            return Answer()

    class Answer:
        def __init__(self):
            said = {"addresses": [address]}
            self._left = [json.dumps(said).encode(), b""]

        async def read(self, _limit):
            return self._left.pop(0)

        async def write(self, _data):
            pass

        async def write_eof(self):
            pass

        def close(self):
            pass

    async with asyncio.timeout(PATIENCE):
        assert await Punching.observe(None, Teller()) == ""


class FakeLink:
    """Stands for a link of a kind."""

    def __init__(self, key, how="direct"):
        self.key, self.how, self.alive, self.dialled = key, how, True, True

    def path(self):
        return Path(how=self.how)

    def observed(self):
        return ""

    def close(self):
        self.alive = False


class TestLinks:
    """Which links are kept."""

    def table(self, **options):
        self.now = 0.0
        return LinkTable(options.pop("knows", lambda _key: True), clock=lambda: self.now, **options)

    def test_straight_goes_before_relayed_and_newer_before_older(self):
        """The best of several links is used."""
        links = self.table()
        relayed, old, fresh = FakeLink("a", "relayed"), FakeLink("a"), FakeLink("a")
        for link in (old, fresh, relayed):
            links.add(link)
        assert links.best("a") is fresh
        fresh.close()
        assert links.best("a") is old
        links.drop(old)
        assert links.best("a") is relayed

    def test_the_one_used_least_lately_goes_and_none_in_use(self):
        """A full table makes room, but not at the cost of work under way."""
        links = self.table(most=2)
        busy, idle = FakeLink("a"), FakeLink("b")
        for link in (busy, idle):
            self.now += 1
            assert links.add(link)
        with links.using(busy):
            assert links.add(FakeLink("c"))
            assert not idle.alive
            with links.using(links.best("c")):
                assert not links.add(FakeLink("d"))
        assert busy.alive

    def test_strangers_never_crowd_out_members(self):
        """However many keys are made up, links to members stay."""
        links = self.table(most=10, most_of_strangers=3, knows=lambda key: key.startswith("m"))
        members = [FakeLink(f"m{n}") for n in range(7)]
        for link in members:
            assert links.add(link)
        for n in range(50):
            self.now += 1
            links.add(FakeLink(f"s{n}"))
        assert all(link.alive for link in members)
        assert len(links.keys()) <= 10
        assert links.add(FakeLink("m7"))

    def test_strangers_share_a_small_part(self):
        """They get no more of a table that has room than is set aside for them."""
        links = self.table(most=100, most_of_strangers=3, knows=lambda _key: False)
        for n in range(20):
            self.now += 1
            links.add(FakeLink(f"s{n}"))
        assert len(links.keys()) == 3

    def test_links_to_one_peer_are_bounded(self):
        """A peer that dials again and again replaces its own links."""
        links = self.table()
        kept = [FakeLink("a") for _ in range(9)]
        for link in kept:
            self.now += 1
            assert links.add(link)
        assert [link.alive for link in kept] == [False] + [True] * 8

    def test_what_nobody_used_for_long_is_closed(self):
        """But not what is in use."""
        links = self.table()
        idle, busy = FakeLink("a"), FakeLink("b")
        links.add(idle)
        links.add(busy)
        with links.using(busy):
            self.now = 3600.0
            links.close_idle()
        assert not idle.alive
        assert links.keys() == ["b"]


class TestRates:
    """How much one may ask."""

    @given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 20)), max_size=50))
    def test_no_more_than_rate_and_burst_passes(self, steps):
        """However it is asked, within any time passes at most what the bucket says."""
        bucket, now, passed = TokenBucket(10, 20, 0), 0.0, 0.0
        for pause, amount in steps:
            now += pause
            if bucket.try_take(amount, now):
                passed += amount
            assert passed <= 20 + 10 * now + 1e-6

    def test_credit_is_paid_by_waiting(self):
        """What is taken beyond the burst says how long to wait."""
        bucket = TokenBucket(10, 20, 0)
        assert bucket.take(20, 0) == 0
        assert bucket.take(30, 0) == 3
        assert bucket.take(0, 3) == 0

    def test_names_are_forgotten_not_heaped_up(self):
        """Made-up names do not fill the memory."""
        buckets = Buckets(1, 1, most=3)
        for n in range(100):
            buckets.of(str(n), 0)
        assert len(buckets._buckets) == 3

    def test_one_host_cannot_hold_the_door(self):
        """Its handshakes that never end leave room for others; IPv6 counts by network."""
        door = Door(clock=lambda: 0.0)
        with contextlib.ExitStack() as held:
            many = [held.enter_context(door.enter(f"[2001:db8::{n:x}]")) for n in range(1, 100)]
            assert sum(many) == 32
            with door.enter("192.0.2.1") as admitted:
                assert admitted
        with door.enter("2001:db8::1") as admitted:
            assert admitted


def test_own_hosts_are_those_listened_on():
    """A specific address is the only one told; any address means those this host has."""
    assert [str(host) for host in own_hosts(parse_listen("127.0.0.1:1")[0])] == ["127.0.0.1"]
    found = [str(host) for host in own_hosts(parse_listen("0.0.0.0:1")[0], ["192.0.2.9:1"])]
    assert "192.0.2.9" in found
    assert "0.0.0.0" not in found


class TestMeeting:
    """Being introduced, on one host: the parts that need no NAT."""

    async def met(self, new, **policy):
        helper, one, other = await new(), await new(), await new()
        helper.settle(Neighbourhood(**policy))
        where = helper.address()
        for site in (one, other):
            site.settle(Neighbourhood(relays_for=lambda _: [where], anchors=lambda: [where]))
            await asyncio.wait_for(helper._links.arrival(site.address().key), PATIENCE)
        return helper, one, other

    async def test_introduced_sites_link_straight(self, new):
        """Neither knows where the other is; the helper tells both."""
        _, one, other = await self.met(new, may_introduce=lambda _s, _t: True)
        unknown = PeerAddress(key=other.address().key)
        assert await one.request(unknown, b"", PATIENCE)
        assert one.path(unknown.key).how == "direct"

    async def test_nobody_is_introduced_against_policy(self, new):
        """A helper tells nobody where others are unless it may."""
        _, one, other = await self.met(new)
        with pytest.raises(Unavailable, match="declined"):
            await one.request(PeerAddress(key=other.address().key), b"", PATIENCE)

    async def test_a_site_meets_no_strangers(self, new):
        """A helper cannot make a site send packets to whom it does not know."""
        _, one, other = await self.met(new, may_introduce=lambda _s, _t: True)
        other.settle(Neighbourhood(knows=lambda _key: False))
        with pytest.raises(Unavailable, match="declined"):
            await one.request(PeerAddress(key=other.address().key), b"", PATIENCE)
