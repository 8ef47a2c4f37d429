"""Connections to a real sshd: only where the pinned host key is, with every failure named."""

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gridcloud.access import connect as module
from gridcloud.access import keys
from gridcloud.access.certificates import UserCA
from gridcloud.access.connect import Credentials, connect, fetch_host_keys
from gridcloud.errors import Forbidden, InvalidSpec, TimedOut, Unavailable
from gridcloud.model.lease import Endpoint
from testbeds import sshd as testbed

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server"),
]


@pytest.fixture(scope="module")
def key():
    return keys.ephemeral()


@pytest.fixture(scope="module")
def ca():
    return UserCA(keys.ephemeral())


@pytest.fixture(scope="module")
def machine(key, ca):
    with testbed.sshd(
        authorized=[keys.public_line(key)], trusted_ca=ca.trusted_line(), principals=["lease1"]
    ) as machine:
        yield machine


def endpoint(machine, **changes):
    known = {
        "host": machine.host,
        "port": machine.port,
        "user": machine.user,
        "host_keys": (machine.host_key_line,),
    }
    return Endpoint(**(known | changes))


def logins(machine):
    """What the server's log says of authentication."""
    return [
        line
        for line in machine.log.read_text().splitlines()
        if "Accepted" in line or "Failed" in line or "publickey" in line or "userauth" in line
    ]


async def test_known_host_and_key_get_in(machine, key):
    """With the right host key and a known key a command runs as the user."""
    async with await connect(endpoint(machine), Credentials(key=key)) as connection:
        assert (await connection.run("id -un")).stdout.strip() == machine.user


async def test_certificate_gets_in_until_it_ends(machine, ca):
    """A machine that trusts the CA lets the lease's certificate in, and not one that ended."""
    mine = keys.ephemeral()
    now = datetime.now(UTC)
    good = ca.issue(keys.public_line(mine), "lease1", now, now + timedelta(minutes=5))
    other = ca.issue(keys.public_line(mine), "lease2", now, now + timedelta(minutes=5))
    past = now - timedelta(hours=1)
    ended = ca.issue(keys.public_line(mine), "lease1", past, past + timedelta(minutes=5))
    async with await connect(endpoint(machine), Credentials(key=mine, certificate=good)) as found:
        assert (await found.run("true")).exit_status == 0
    for refused in (other, ended):
        with pytest.raises(Forbidden, match="does not let"):
            await connect(endpoint(machine), Credentials(key=mine, certificate=refused))


async def test_identity_file_gets_in(machine, key, tmp_path):
    """A key in a file serves as well as one in memory."""
    path = tmp_path / "id"
    path.touch(0o600)
    path.write_bytes(key.export_private_key("openssh"))
    async with await connect(endpoint(machine), Credentials(identity_file=path)) as connection:
        assert (await connection.run("true")).exit_status == 0


async def test_changed_host_key_is_refused_before_authentication(machine, key):
    """A server with another key learns nothing: no authentication is tried, both keys are told."""
    expected = keys.public_line(keys.ephemeral())
    before = logins(machine)
    with pytest.raises(Forbidden, match="changed: expected") as failed:
        await connect(endpoint(machine, host_keys=(expected,)), Credentials(key=key))
    assert keys.fingerprint(expected) in failed.value.message
    assert keys.fingerprint(machine.host_key_line) in failed.value.message
    assert "legitimate" in failed.value.hint
    assert logins(machine) == before


async def test_server_without_a_key_of_the_pinned_kind_counts_as_changed(machine, key):
    """A server that shows only another kind of key is told as a changed key, with its key."""
    import asyncssh

    expected = keys.public_line(asyncssh.generate_private_key("ecdsa-sha2-nistp256"))
    with pytest.raises(Forbidden, match="changed: expected") as failed:
        await connect(endpoint(machine, host_keys=(expected,)), Credentials(key=key))
    assert keys.fingerprint(machine.host_key_line) in failed.value.message


async def test_known_hosts_of_the_user_are_not_believed(machine, key, tmp_path, monkeypatch):
    """What the user's own SSH set-up trusts or configures has no say."""
    ssh = tmp_path / ".ssh"
    ssh.mkdir(mode=0o700)
    (ssh / "known_hosts").write_text(f"[{machine.host}]:{machine.port} {machine.host_key_line}\n")
    (ssh / "config").write_text("Host *\n  User nobody\n  HostName 192.0.2.1\n  Port 1\n")
    (ssh / "id_ed25519").touch(0o600)
    (ssh / "id_ed25519").write_bytes(key.export_private_key("openssh"))
    monkeypatch.setenv("HOME", str(tmp_path))
    other = keys.public_line(keys.ephemeral())
    with pytest.raises(Forbidden, match="changed"):
        await connect(endpoint(machine, host_keys=(other,)), Credentials(key=key))
    with pytest.raises(Forbidden, match="does not let"):
        await connect(endpoint(machine), Credentials(key=keys.ephemeral()))
    async with await connect(endpoint(machine), Credentials(key=key)) as connection:
        assert (await connection.run("id -un")).stdout.strip() == machine.user


async def test_no_known_host_key_is_no_connection(machine, key):
    """Nothing is trusted on first use."""
    with pytest.raises(Forbidden, match="No host key"):
        await connect(endpoint(machine, host_keys=()), Credentials(key=key))


async def test_nothing_to_log_in_with(machine):
    """Without credentials no key is found by itself."""
    with pytest.raises(InvalidSpec, match="No SSH key"):
        await connect(endpoint(machine), Credentials())


async def test_wrong_user_or_key_is_told(machine, key):
    """A refused login names the user and the place."""
    with pytest.raises(Forbidden, match="does not let 'nobody-here' in"):
        await connect(endpoint(machine, user="nobody-here"), Credentials(key=key))
    with pytest.raises(Forbidden, match="does not let"):
        await connect(endpoint(machine), Credentials(key=keys.ephemeral()))


async def test_closed_port_is_told(machine, key):
    """A port without a server is told with its address, not as a traceback."""
    with socket.socket() as taken:
        taken.bind((machine.host, 0))  # bound, not listening: nobody else gets it meanwhile
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"{machine.host}:{port}: connection refused"):
            await connect(endpoint(machine, port=port), Credentials(key=key))
        with pytest.raises(Unavailable, match="refused"):
            await fetch_host_keys(machine.host, port)


@contextlib.asynccontextmanager
async def speaking(text):
    """A server that says this and nothing more."""
    ends = asyncio.Event()

    async def answer(_reader, writer):
        writer.write(text)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
            if text:
                writer.close()
            await ends.wait()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        ends.set()
        server.close()
        await server.wait_closed()


async def test_silent_server_times_out(machine, key):
    """A server that takes the connection and never speaks does not hold us for ever."""
    async with speaking(b"") as port:
        silent = endpoint(machine, host="127.0.0.1", port=port)
        with pytest.raises(TimedOut, match=r"did not answer within 0\.3 s"):
            await connect(silent, Credentials(key=key), timeout=0.3)
        with pytest.raises(TimedOut, match="did not show"):
            await fetch_host_keys("127.0.0.1", port, timeout=0.3)
        behind = endpoint(machine, gateway=silent)
        with pytest.raises(TimedOut, match=rf"127\.0\.0\.1:{port} did not answer"):
            await connect(behind, Credentials(key=key), timeout=0.3)


async def test_something_else_than_ssh_is_told(machine, key):
    """A web server at the port is not taken for a network failure without a cause."""
    async with speaking(b"HTTP/1.0 400 Bad Request\r\n\r\n") as port:
        with pytest.raises(Unavailable, match="could not be reached by SSH"):
            await connect(endpoint(machine, host="127.0.0.1", port=port), Credentials(key=key))


async def test_unknown_name_is_told(machine, key):
    """A host name that means nothing is told as such."""
    with pytest.raises(Unavailable, match=r"nowhere\.invalid:22 could not be resolved"):
        await connect(
            endpoint(machine, host="nowhere.invalid", port=22), Credentials(key=key), timeout=20
        )


async def test_names_that_cannot_be_are_told(machine, key):
    """A host or user name that is none is bad input, not a failure of ours."""
    for changes in ({"user": "a\nb"}, {"host": "x" * 64 + ".invalid"}, {"host": ""}):
        with pytest.raises((InvalidSpec, Unavailable)):
            await connect(endpoint(machine, **changes), Credentials(key=key))
    with pytest.raises((InvalidSpec, Unavailable)):
        await fetch_host_keys("x" * 64 + ".invalid")


async def test_host_keys_can_be_shown_at_first_contact(machine):
    """What a person is to compare is what the server really has."""
    assert await fetch_host_keys(machine.host, machine.port) == [machine.host_key_line]


@pytest.mark.skipif(not shutil.which("ssh-agent"), reason="needs ssh-agent")
async def test_agent_is_asked_only_if_named(machine, key, tmp_path, monkeypatch):
    """An agent's keys get in when the agent is named, and are left alone when it only runs."""
    with tempfile.TemporaryDirectory() as short:  # a socket's path must be short
        socket_path = f"{short}/agent"
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket_path], stdout=subprocess.DEVNULL)
        try:
            identity = tmp_path / "id"
            identity.touch(0o600)
            identity.write_bytes(key.export_private_key("openssh"))
            monkeypatch.setenv("SSH_AUTH_SOCK", socket_path)
            async with asyncio.timeout(20):
                while not Path(socket_path).exists():
                    await asyncio.sleep(0.01)
            subprocess.run(["ssh-add", "-q", identity], check=True)
            with pytest.raises(Forbidden):
                await connect(endpoint(machine), Credentials(key=keys.ephemeral()))
            async with await connect(endpoint(machine), Credentials(agent=socket_path)) as found:
                assert (await found.run("true")).exit_status == 0
        finally:
            agent.kill()
            agent.wait()


async def test_missing_agent_is_told(machine, tmp_path):
    """An agent that is not there is told as the cause."""
    with pytest.raises(Unavailable, match="agent"):
        await connect(endpoint(machine), Credentials(agent=str(tmp_path / "none")))


async def test_connection_through_a_jump_host_ends_with_it(machine, key, monkeypatch):
    """Both hops are verified, and the connection to the gateway goes with the one beyond."""
    gateways = []

    class Recording(module._Tunnel):
        def __init__(self, gateway):
            gateways.append(gateway)
            super().__init__(gateway)

    monkeypatch.setattr(module, "_Tunnel", Recording)
    hop = endpoint(machine)
    connection = await connect(endpoint(machine, gateway=hop), Credentials(key=key))
    assert (await connection.run("true")).exit_status == 0
    connection.close()
    await connection.wait_closed()
    await asyncio.wait_for(gateways[0].wait_closed(), 20)
    other = (keys.public_line(keys.ephemeral()),)
    for wrong in (
        endpoint(machine, host_keys=other, gateway=hop),
        endpoint(machine, gateway=endpoint(machine, host_keys=other)),
    ):
        with pytest.raises(Forbidden, match="changed"):
            await connect(wrong, Credentials(key=key))
    assert len(gateways) == 2
    await asyncio.wait_for(gateways[1].wait_closed(), 20)


async def test_large_files_pass_over_sftp_unharmed(machine, key, tmp_path):
    """The large window reaches SFTP, and content survives."""
    content = bytes(range(256)) * 40_000
    (tmp_path / "a").write_bytes(content)
    async with (
        await connect(endpoint(machine), Credentials(key=key)) as connection,
        connection.start_sftp_client() as sftp,
    ):
        assert sftp._handler._reader.channel.get_recv_window() == 32 * 2**20
        await sftp.put(str(tmp_path / "a"), "a")
        await sftp.get("a", str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == content


@pytest.mark.skipif(testbed.os.geteuid() != 0, reason="a network namespace needs root")
async def test_machine_in_its_own_network(key):
    """The testbed's other machine is really elsewhere: own address, own host name."""
    with testbed.sshd(network=True, authorized=[keys.public_line(key)]) as other:
        async with await connect(endpoint(other), Credentials(key=key)) as connection:
            assert (await connection.run("hostname")).stdout.strip() == "another"
        assert other.host.startswith("10.213.")
