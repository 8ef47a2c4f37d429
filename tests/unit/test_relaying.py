"""Relaying: who is relayed for whom, within which bounds, and what the relaying site sees."""

import asyncio

import pytest

from gridcloud.errors import Unavailable
from gridcloud.grid.identity import Identity
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.rates import TokenBucket
from gridcloud.grid.relaying import Relaying
from gridcloud.grid.transport import PeerAddress

PATIENCE = 10


async def echo(key, message):
    return key[:8].encode() + b"|" + message


async def echo_stream(_key, stream):
    while data := await stream.read(65536):
        await stream.write(data)
    await stream.write_eof()


@pytest.fixture
async def helper():
    one = OverlayTransport(Identity.generate(), listen=None, tls_listen="127.0.0.1:0")
    await one.start(echo)
    one.settle(Neighbourhood(may_relay=lambda _source, _target: True))
    yield one
    await one.close()


@pytest.fixture
async def hidden(helper):
    """Returns a function that makes a site nobody can dial, linked to the helper."""
    made = []

    async def make():
        one = OverlayTransport(Identity.generate(), listen=None)
        made.append(one)
        one.serve("echo", echo_stream)
        await one.start(echo)
        where = helper.address()
        one.settle(Neighbourhood(relays_for=lambda _: [where], anchors=lambda: [where]))
        await asyncio.wait_for(helper._links.arrival(one.address().key), PATIENCE)
        return one

    yield make
    for one in made:
        await one.close()


async def test_two_hidden_sites_talk_through_a_third(hidden, helper):
    """Each has the other's proved key, and says through whom it is reached."""
    one, other = await hidden(), await hidden()
    me = one.address().key
    assert await one.request(other.address(), b"hi", PATIENCE) == f"{me[:8]}|hi".encode()
    path = one.path(other.address().key)
    assert (path.how, path.via) == ("relayed", helper.address().key)
    assert str(path) == f"relayed by {helper.address().key[:8]}"
    assert await other.request(one.address(), b"back", PATIENCE)


async def test_the_relaying_site_sees_nothing_of_what_it_carries(hidden, helper, monkeypatch):
    """Neither messages nor replies pass it in the clear."""
    seen = bytearray()
    copy = Relaying._copy

    class Watched:
        def __init__(self, stream):
            self._stream = stream

        async def read(self, limit):
            data = await self._stream.read(limit)
            seen.extend(data)
            return data

    monkeypatch.setattr(
        Relaying, "_copy", lambda self, source, target: copy(self, Watched(source), target)
    )
    one, other = await hidden(), await hidden()
    assert await one.request(other.address(), b"a secret", PATIENCE)
    assert len(seen) > 100
    assert b"a secret" not in seen


async def test_a_byte_altered_by_the_relaying_site_is_noticed(hidden, helper, monkeypatch):
    """What it changes never arrives: the link breaks."""
    alter = asyncio.Event()
    copy = Relaying._copy

    class Altered:
        def __init__(self, stream):
            self._stream = stream

        async def read(self, limit):
            data = await self._stream.read(limit)
            return bytes([*data[:-1], data[-1] ^ 1]) if data and alter.is_set() else data

    monkeypatch.setattr(
        Relaying, "_copy", lambda self, source, target: copy(self, Altered(source), target)
    )
    heard = []
    one, other = await hidden(), await hidden()
    await one.request(other.address(), b"whole", PATIENCE)

    async def note(key, stream):
        heard.append(await stream.read(100))

    other.serve("note", note)
    alter.set()
    with pytest.raises(Unavailable):
        await one.open_stream(other.address(), "note", 3)
    assert not heard


@pytest.mark.parametrize("policy", [Neighbourhood(), Neighbourhood(may_relay=lambda s, t: s == t)])
async def test_nobody_is_relayed_against_policy(hidden, helper, policy):
    """It is off until said otherwise, and the refusal says so."""
    one, other = await hidden(), await hidden()
    helper.settle(policy)
    with pytest.raises(Unavailable, match="does not relay between the two"):
        await one.request(other.address(), b"hi", PATIENCE)


async def test_policy_is_asked_with_both_proved_keys(hidden, helper):
    """It may tell who asks, and for whom."""
    asked = []
    helper.settle(Neighbourhood(may_relay=lambda *keys: bool(asked.append(keys)) or True))
    one, other = await hidden(), await hidden()
    await one.request(other.address(), b"hi", PATIENCE)
    assert asked == [(one.address().key, other.address().key)]


async def test_a_site_that_is_not_linked_to_the_helper_is_told_of(hidden, helper):
    """The helper does not go looking for anyone."""
    one = await hidden()
    with pytest.raises(Unavailable, match="no link to that site"):
        await one.request(PeerAddress(key=Identity.generate().key), b"hi", PATIENCE)


async def test_one_source_is_relayed_to_a_bounded_number(hidden, helper, monkeypatch):
    """What is too many is refused, and what was there goes on."""
    monkeypatch.setattr("gridcloud.grid.relaying._MAX_RELAYED_PER_SOURCE", 1)
    one, first, second = [await hidden() for _ in range(3)]
    assert await one.request(first.address(), b"hi", PATIENCE)
    with pytest.raises(Unavailable, match="as much as it may"):
        await one.request(second.address(), b"hi", PATIENCE)
    assert await one.request(first.address(), b"hi", PATIENCE)
    assert await second.request(first.address(), b"hi", PATIENCE)


async def test_what_is_relayed_is_slowed_to_its_rate(hidden, helper, monkeypatch):
    """The relaying site waits as its rate demands, for all it carries together."""
    pauses = []
    take = TokenBucket.take

    def noted(self, amount, now):
        pause = take(self, amount, now)
        pauses.append(pause)
        return 0.0

    one, other = await hidden(), await hidden()
    helper.settle(Neighbourhood(may_relay=lambda _s, _t: True, relay_bytes_per_second=100_000))
    await one.request(other.address(), b"hi", PATIENCE)
    monkeypatch.setattr(TokenBucket, "take", noted)
    await one.request(other.address(), bytes(500_000), PATIENCE)
    assert max(pauses) > 3.5


async def test_when_the_helper_goes_the_link_breaks(hidden, helper):
    """Nobody hangs on a relay that is gone."""
    one, other = await hidden(), await hidden()
    stream = await one.open_stream(other.address(), "echo", PATIENCE)
    await stream.write(b"x")
    assert await stream.read(1) == b"x"
    await helper.close()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(stream.read(1), PATIENCE)
