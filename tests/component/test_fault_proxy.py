"""The proxy that hurts what passes to a cloud's API, in front of a small server."""

import asyncio
import contextlib
import dataclasses
import urllib.error
import urllib.request

import aiohttp
import pytest
from aiohttp import web

from testbeds.fault_proxy import CALM, FaultProxy, in_a_thread


def only(**chances):
    """Return faults of which only these happen."""
    return dataclasses.replace(CALM, **chances)


@contextlib.asynccontextmanager
async def api(unix=None):
    """Serve a list that can be added to; it also speaks websocket."""
    things = []

    async def listed(request):
        return web.json_response(things)

    async def add(request):
        things.append(await request.text())
        return web.json_response(len(things), status=201)

    async def echo(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data.upper())
        return socket

    app = web.Application()
    app.add_routes([web.get("/things", listed), web.post("/things", add), web.get("/talk", echo)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.UnixSite(runner, str(unix)) if unix else web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield things, f"unix://{unix}" if unix else f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def hurt(**chances):
    """Give the server's things, the proxy in front of it, and a client of that."""
    async with (
        api() as (things, url),
        FaultProxy(url, faults=only(**chances)) as proxy,
        aiohttp.ClientSession(proxy.url) as client,
    ):
        yield things, proxy, client


async def add(client, text="a", **options):
    """Add one thing; return the answer's status."""
    async with client.post("/things", data=text, **options) as answer:
        return answer.status


async def test_without_faults_all_passes_unchanged():
    """Requests, answers, chunked bodies and a hundred kilobytes pass as they are."""

    async def chunks():
        yield b"b" * 100_000
        yield b"c"

    async with hurt() as (things, proxy, client):
        assert await add(client) == 201
        assert await add(client, chunks()) == 201
        async with client.get("/things") as answer:
            assert await answer.json() == things == ["a", "b" * 100_000 + "c"]
        assert (proxy.passed, proxy.hurt) == (3, [])


async def test_an_error_before_is_not_carried_out():
    """Nothing reaches the API."""
    async with hurt(error_before=1) as (things, _, client):
        assert await add(client) in {500, 503}
        assert things == []


async def test_an_error_after_is_carried_out():
    """The API did it, and the answer says that it failed."""
    async with hurt(error_after=1) as (things, _, client):
        assert await add(client) in {500, 503}
        assert things == ["a"]


async def test_a_cut_is_not_carried_out():
    """The connection breaks before anything was passed on."""
    async with hurt(cut_before=1) as (things, _, client):
        with pytest.raises(aiohttp.ClientConnectionError):
            await add(client)
        assert things == []


async def test_a_withheld_answer_was_carried_out():
    """The API did it, and no answer ever comes."""
    async with hurt(withheld=1, withheld_seconds=0.05) as (things, _, client):
        with pytest.raises(aiohttp.ClientConnectionError):
            await add(client)
        assert things == ["a"]


async def test_throttling_says_when_to_come_back():
    """429 with Retry-After, and nothing was done."""
    async with hurt(throttled=1, retry_after="7") as (things, _, client):
        async with client.post("/things", data="a") as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
        assert things == []


async def test_a_duplicated_request_is_carried_out_twice():
    """The second answer is the one that is given."""
    async with hurt(duplicated=1) as (things, _, client):
        async with client.post("/things", data="a") as answer:
            assert await answer.json() == 2
        assert things == ["a", "a"]


async def test_a_stale_list_is_one_of_a_moment_ago():
    """What was made since the last look is not shown, until it is old enough."""
    async with hurt(stale=1, stale_seconds=60) as (things, proxy, client):
        for _ in range(2):
            assert await add(client) == 201
            async with client.get("/things") as answer:
                assert await answer.json() == ["a"]
        proxy.calm()
        async with client.get("/things") as answer:
            assert await answer.json() == things == ["a", "a"]


async def test_the_same_seed_hurts_the_same():
    """What happens follows from the seed, not from the order in which requests come."""

    async def campaign(seed, *, backwards):
        async with api() as (_, url), FaultProxy(url, seed) as proxy:
            async with aiohttp.ClientSession(proxy.url) as client:
                for turn in range(60):
                    with contextlib.suppress(aiohttp.ClientConnectionError, TimeoutError):
                        method = ("GET", "POST")[(turn % 2) ^ backwards]
                        patience = aiohttp.ClientTimeout(total=0.05)
                        await (await client.request(method, "/things", timeout=patience)).read()
            return sorted(one for one in proxy.hurt if one[0] != "stale")

    assert await campaign(3, backwards=False) == await campaign(3, backwards=True)
    assert await campaign(3, backwards=False) != await campaign(4, backwards=False)


async def test_what_is_spared_is_never_hurt():
    """A predicate keeps some requests out of it."""
    async with api() as (things, url), FaultProxy(url, faults=only(error_before=1)) as proxy:
        proxy.spare = lambda method, target: method == "POST"
        async with aiohttp.ClientSession(proxy.url) as client:
            assert await add(client) == 201
            assert (await client.get("/things")).status in {500, 503}
        assert things == ["a"]


async def test_an_api_that_is_away_and_back():
    """While it is down every connection is cut."""
    async with hurt() as (_, proxy, client):
        proxy.down = True
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get("/things")
        proxy.calm()
        assert (await client.get("/things")).status == 200


async def test_unix_sockets_on_both_sides(tmp_path):
    """As for LXD and podman."""
    async with api(tmp_path / "api") as (things, url):
        async with FaultProxy(url, listen=tmp_path / "proxy", faults=CALM) as proxy:
            connector = aiohttp.UnixConnector(str(proxy.socket))
            async with aiohttp.ClientSession("http://api", connector=connector) as client:
                assert await add(client) == 201
        assert things == ["a"]
        assert not (tmp_path / "proxy").exists()


async def test_upgraded_connections_pass_through():
    """A websocket works across it."""
    async with hurt() as (_, _, client), client.ws_connect("/talk") as socket:
        await socket.send_str("hello")
        assert await socket.receive_str(timeout=5) == "HELLO"


async def test_answers_can_be_rewritten():
    """Addresses in the bodies of answers can be led through the proxy."""
    async with api() as (things, url), FaultProxy(url, faults=CALM) as proxy:
        proxy.rewrite = lambda body: body.replace(b"here", b"elsewhere")
        things.append("here")
        async with aiohttp.ClientSession(proxy.url) as client:
            assert await (await client.get("/things")).json() == ["elsewhere"]


async def test_it_serves_a_test_without_a_loop():
    """In a thread of its own it does the same."""

    def work(url):
        with in_a_thread(FaultProxy(url, faults=only(error_before=1))) as proxy:
            with pytest.raises(urllib.error.HTTPError) as told:
                urllib.request.urlopen(f"{proxy.url}/things", timeout=5)
            told.value.close()
            proxy.calm()
            with urllib.request.urlopen(f"{proxy.url}/things", timeout=5) as answer:
                return answer.read()

    async with api() as (_, url):
        assert await asyncio.to_thread(work, url) == b"[]"
