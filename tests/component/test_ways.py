"""SSH to a lender's gateway, straight or in a stream of the grid: the locks are the same."""

import asyncio
import contextlib
import os
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.access import keys
from gridcloud.access.certificates import UserCA
from gridcloud.access.connect import Credentials, UnexpectedHost
from gridcloud.errors import Forbidden, TimedOut, Unavailable
from gridcloud.site import entrance, gateway, ways
from gridcloud.site.entrance import Entrance
from gridcloud.site.gateway import CONNECTIONS_PER_LEASE_LIMIT, Gateway
from gridcloud.site.ways import Ways
from testbeds.byte_streams import MemoryOverlay

LENDER, BORROWER, OTHER = "1a" * 32, "2b" * 32, "3c" * 32


class PlainGuest:
    """A guest whose sandbox is no sandbox."""

    shown_as = "/home/guest"
    machine = None

    def __init__(self, home):
        self.home = home
        self.ends_at = datetime.now(UTC) + timedelta(hours=1)

    async def run(self, command, stdin_fd, stdout_fd, stderr_fd, env):
        streams = {"stdin": stdin_fd, "stdout": stdout_fd, "stderr": stderr_fd}
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", command, cwd=self.home, **streams
        )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


class Lender:
    """A gateway with its entrance; ``lent`` says which leases are whose."""

    def __init__(self, folder):
        self.lent = {BORROWER: {"lease1"}}
        self.guest = PlainGuest(folder)
        self.ca = UserCA(keys.ephemeral())
        self.gateway = Gateway(keys.ephemeral(), self.ca, self, host="127.0.0.1")
        self.entrance = Entrance(lambda: self.gateway, lambda key: self.lent.get(key, set()))
        self.key = keys.ephemeral()

    def find(self, lease_id):
        return self.guest if any(lease_id in ids for ids in self.lent.values()) else None

    def credentials(self, lease_id="lease1", **options):
        now = datetime.now(UTC)
        certificate = self.ca.issue(
            keys.public_line(self.key), lease_id, now, now + timedelta(hours=1), **options
        )
        return Credentials(key=self.key, certificate=certificate)

    def endpoint(self, lease_id="lease1", **changes):
        found = self.gateway.endpoint(lease_id, "127.0.0.1")
        return found.model_copy(update=changes)

    def ways(self, key=BORROWER, **options):
        """Return a borrower's ways, and the grid that they go by."""
        overlay = MemoryOverlay(key, self.entrance.accept)
        return Ways(overlay, **options), overlay


@pytest.fixture
async def lender(tmp_path):
    made = Lender(tmp_path)
    await made.gateway.start()
    yield made
    await made.gateway.close()
    async with asyncio.timeout(20):
        while len(asyncio.all_tasks()) > 1:  # none of ours is left behind
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def somebody(answer=b""):
    """Another server, that says this or keeps silent; yields its port and who came."""
    came, over = [], asyncio.Event()

    async def serve(_reader, writer):
        came.append(writer)
        writer.write(answer)
        await over.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], came
    finally:
        over.set()
        server.close()
        await server.wait_closed()


def closed_port():
    """A port where nobody answers: it needs rights, and nothing in the tests has it."""
    return 1


async def says(connection, command="echo hi"):
    async with connection:
        return (await connection.run(command)).stdout.strip()


# The way


async def test_straight_where_that_works(lender):
    """No stream is opened for what can be dialled."""
    found, overlay = lender.ways()
    assert await says(await found.connect(LENDER, lender.endpoint(), lender.credentials())) == "hi"
    assert overlay.opened == []


async def test_by_a_stream_where_there_is_no_address(lender, tmp_path):
    """Commands, large files and the end of both pass as they do straight."""
    found, overlay = lender.ways()
    content = os.urandom(5 * 2**20)
    (tmp_path / "a").write_bytes(content)
    connection = await found.connect(LENDER, lender.endpoint(host=""), lender.credentials())
    async with connection:
        done = await connection.run("cat; exit 3", input="through")
        assert (done.stdout, done.exit_status) == ("through", 3)
        async with connection.start_sftp_client() as sftp:
            await sftp.put(str(tmp_path / "a"), "b")
            await sftp.get("b", str(tmp_path / "c"))
    assert (tmp_path / "c").read_bytes() == content
    assert overlay.opened == [(LENDER, "gateway")]


async def test_by_a_stream_where_the_port_refuses(lender):
    """At once, without waiting for anything."""
    found, overlay = lender.ways()
    nowhere = lender.endpoint(port=closed_port())
    assert await says(await found.connect(LENDER, nowhere, lender.credentials())) == "hi"
    assert overlay.opened == [(LENDER, "gateway")]


async def test_what_worked_is_tried_first_for_a_while(lender, monkeypatch):
    """Who had to wait for a silent address once does not again, until it is time to look anew."""
    monkeypatch.setattr(ways, "HEAD_START_SECONDS", 0.05)
    clock = [100.0]
    found, overlay = lender.ways(now=lambda: clock[0])
    async with somebody() as (port, came):
        silent = lender.endpoint(port=port)
        for wait, visits in ((0, 1), (1, 1), (ways.REMEMBERED_SECONDS, 2)):
            clock[0] += wait
            monkeypatch.setattr(ways, "HEAD_START_SECONDS", 0.05 if visits > len(came) else 60)
            assert await says(await found.connect(LENDER, silent, lender.credentials())) == "hi"
            assert len(came) == visits
    assert len(overlay.opened) == 3


async def test_an_instant_away_does_not_change_the_way(lender):
    """Where the port answered before, it is dialled first again as soon as it is back."""
    found, overlay = lender.ways()
    endpoint, credentials = lender.endpoint(), lender.credentials()
    assert await says(await found.connect(LENDER, endpoint, credentials)) == "hi"
    port = lender.gateway.port
    await lender.gateway.close()
    away = lender.gateway
    lender.gateway = Gateway(away._host_key, lender.ca, lender, host="127.0.0.1")
    await lender.gateway.start()
    assert await says(await found.connect(LENDER, endpoint, credentials)) == "hi"
    assert len(overlay.opened) == 1
    await lender.gateway.close()
    lender.gateway = Gateway(away._host_key, lender.ca, lender, host="127.0.0.1", port=port)
    await lender.gateway.start()
    assert await says(await found.connect(LENDER, endpoint, credentials)) == "hi"
    assert len(overlay.opened) == 1


async def test_another_server_at_the_address_is_left_alone(lender):
    """As where private addresses are the same at both ends: nobody logs in, the stream serves."""
    stranger = Gateway(keys.ephemeral(), lender.ca, lender, host="127.0.0.1")
    await stranger.start()
    found, overlay = lender.ways()
    there = lender.endpoint(port=stranger.port)
    assert await says(await found.connect(LENDER, there, lender.credentials())) == "hi"
    assert len(overlay.opened) == 1
    await stranger.close()


# The locks


async def test_host_keys_are_verified_in_a_stream_too(lender):
    """The grid proves the site; the gateway still has to show the key of the lease."""
    found, _ = lender.ways()
    other = (keys.public_line(keys.ephemeral()),)
    for host in ("", "127.0.0.1"):
        with pytest.raises(UnexpectedHost):
            endpoint = lender.endpoint(host=host, host_keys=other)
            await found.connect(LENDER, endpoint, lender.credentials())


async def test_a_certificate_is_needed_in_a_stream_too(lender):
    """Whoever comes by a stream, with whatever key."""
    found, _ = lender.ways()
    for credentials in (Credentials(key=lender.key), Credentials(key=keys.ephemeral())):
        with pytest.raises(Forbidden, match="does not let"):
            await found.connect(LENDER, lender.endpoint(host=""), credentials)


async def test_without_a_lease_nobody_comes_in(lender):
    """Nor while nothing is lent; that is told, and is the end of it."""
    stranger, _ = lender.ways(OTHER)
    with pytest.raises(Forbidden, match="no live lease"):
        await stranger.connect(LENDER, lender.endpoint(host=""), lender.credentials())
    found, _ = lender.ways()
    lender.lent.clear()
    with pytest.raises(Forbidden, match="no live lease"):
        await found.connect(LENDER, lender.endpoint(host=""), lender.credentials())
    closed = Entrance(lambda: None, lambda key: {"lease1"})
    nothing = Ways(MemoryOverlay(BORROWER, closed.accept))
    with pytest.raises(Forbidden, match="no live lease"):
        await nothing.connect(LENDER, lender.endpoint(host=""), lender.credentials())


async def test_a_lease_of_another_is_not_entered(lender):
    """Not even with that one's certificate: a stream is good for its own owner's leases."""
    lender.lent[OTHER] = {"lease2"}
    other, _ = lender.ways(OTHER)
    with pytest.raises(Forbidden, match="does not let"):
        await other.connect(LENDER, lender.endpoint(host=""), lender.credentials())
    theirs = lender.endpoint("lease2", host="")
    assert await says(await other.connect(LENDER, theirs, lender.credentials("lease2"))) == "hi"


async def test_streams_are_bounded_for_each_peer(lender):
    """Who opens many and says nothing keeps itself out, and nobody else."""
    found, overlay = lender.ways()
    lender.lent[OTHER] = {"lease2"}
    idle = [
        await overlay.open_stream(LENDER, entrance.SERVICE, 1)
        for _ in range(CONNECTIONS_PER_LEASE_LIMIT)
    ]
    for one in idle:
        assert await one.read(1) == entrance.WELCOME
    endpoint, credentials = lender.endpoint(host=""), lender.credentials()
    with pytest.raises(Unavailable, match="no more connections"):
        await found.connect(LENDER, endpoint, credentials)
    other, _ = lender.ways(OTHER)
    theirs = lender.endpoint("lease2", host="")
    assert await says(await other.connect(LENDER, theirs, lender.credentials("lease2"))) == "hi"
    for one in idle:
        one.close()
    await asyncio.gather(*overlay.tasks)
    assert await says(await found.connect(LENDER, endpoint, credentials)) == "hi"


async def test_strangers_at_the_port_do_not_keep_borrowers_out(lender, monkeypatch):
    """However many dial the port without logging in: who comes by a stream is known already."""
    monkeypatch.setattr(gateway, "PENDING_LOGINS_LIMIT", 0)
    found, overlay = lender.ways()
    assert await says(await found.connect(LENDER, lender.endpoint(), lender.credentials())) == "hi"
    assert len(overlay.opened) == 1


async def test_a_certificate_for_certain_networks_is_no_use_in_a_stream(lender):
    """It names addresses, and a stream comes from none."""
    found, _ = lender.ways()
    credentials = lender.credentials(source_address=["127.0.0.1"])
    with pytest.raises((Forbidden, Unavailable)):
        await found.connect(LENDER, lender.endpoint(host=""), credentials)
    assert await says(await found.connect(LENDER, lender.endpoint(), credentials)) == "hi"


async def test_a_lease_that_ends_ends_its_stream(lender):
    """The connection is cut, and what carried it is let go of on both sides."""
    found, overlay = lender.ways()
    connection = await found.connect(LENDER, lender.endpoint(host=""), lender.credentials())
    async with connection:
        process = await connection.create_process("sleep 1000")
        lender.lent.clear()
        await lender.gateway.cut("lease1")
        await asyncio.wait_for(process.wait_closed(), 20)
        await asyncio.wait_for(connection.wait_closed(), 20)
    await asyncio.wait_for(asyncio.gather(*overlay.tasks), 20)


async def test_closing_lets_go_of_everything(lender):
    """A site that stops breaks what it still has open."""
    found, overlay = lender.ways()
    connection = await found.connect(LENDER, lender.endpoint(host=""), lender.credentials())
    await found.close()
    await asyncio.wait_for(connection.wait_closed(), 20)
    await asyncio.wait_for(asyncio.gather(*overlay.tasks), 20)


# When the lender is away, or means harm


async def test_no_way_at_all_is_told(lender):
    """Both causes, and that it may be tried again."""

    class Nowhere:
        async def open_stream(self, peer, service, timeout):
            raise Unavailable("The peer could not be reached.")

    found = Ways(Nowhere())
    with pytest.raises(Unavailable, match=r"refused.*could not be reached\.") as told:
        await found.connect(LENDER, lender.endpoint(port=closed_port()), lender.credentials())
    assert told.value.retryable


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n", b"\0" * 100])
async def test_nonsense_from_a_lender_is_no_connection(lender, answer):
    """Neither its end, nor other bytes, nor SSH without a welcome."""

    async def accept(_key, stream):
        with contextlib.closing(stream):
            if answer:
                await stream.write(answer)
            await stream.write_eof()

    found = Ways(MemoryOverlay(BORROWER, accept))
    with pytest.raises(Unavailable, match="broke off"):
        await found.connect(LENDER, lender.endpoint(host=""), lender.credentials())


async def test_a_lender_that_says_nothing_does_not_hold_us(lender, monkeypatch):
    """Neither before its welcome, nor after."""
    monkeypatch.setattr(ways, "STREAM_TIMEOUT_SECONDS", 0.05)
    silent = Ways(MemoryOverlay(BORROWER, lambda key, stream: stream.read(1)))
    with pytest.raises(TimedOut, match="did not answer"):
        await silent.connect(LENDER, lender.endpoint(host=""), lender.credentials())

    async def welcome(_key, stream):
        await stream.write(entrance.WELCOME)
        with contextlib.suppress(Unavailable):
            while await stream.read(2**16):
                pass

    polite = Ways(MemoryOverlay(BORROWER, welcome))
    monkeypatch.setattr(ways, "SSH_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(TimedOut, match="did not answer"):
        await polite.connect(LENDER, lender.endpoint(host=""), lender.credentials())
    await polite.close()
