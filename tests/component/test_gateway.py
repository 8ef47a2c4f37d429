"""The gateway: who gets in, what they may do there, and that it all ends with the lease.

Real OpenSSH and asyncssh clients against the real gateway; only the sandbox is a stand-in that
runs commands as plain processes.
"""

import asyncio
import contextlib
import hashlib
import inspect
import os
import shutil
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncssh
import psutil
import pytest

from gridcloud.access import keys
from gridcloud.access.certificates import UserCA
from gridcloud.access.connect import Credentials, connect
from gridcloud.access.sftp_server import ConfinedSFTPServer
from gridcloud.errors import Forbidden, GridcloudError, Unavailable
from gridcloud.model.lease import Endpoint
from gridcloud.site import gateway as module
from gridcloud.site.gateway import Gateway
from testbeds import sshd as testbed

pytestmark = pytest.mark.component
needs_openssh = pytest.mark.skipif(
    not (shutil.which("ssh") and shutil.which("sftp")), reason="needs the OpenSSH client"
)


class PlainGuest:
    """A guest whose sandbox is no sandbox."""

    def __init__(self, home, machine=None):
        self.home = home
        self.shown_as = "/home/guest"
        self.machine = machine
        self.ends_at = datetime.now(UTC) + timedelta(hours=1)
        self.envs = []
        self.pids = []
        self.statuses = []

    async def run(self, command, stdin_fd, stdout_fd, stderr_fd, env):
        self.envs.append(dict(env))
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            command,
            stdin=stdin_fd,
            stdout=stdout_fd,
            stderr=stderr_fd,
            cwd=self.home,
            start_new_session=True,
        )
        self.pids.append(process.pid)
        try:
            status = await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        self.statuses.append(status)
        return status


class Leases(dict):
    """Live leases by id."""

    def find(self, lease_id):
        return self.get(lease_id)


class Scene:
    """A gateway with one lease, and what its holder has."""

    def __init__(self, gateway, leases, ca, folder):
        self.gateway = gateway
        self.leases = leases
        self.ca = ca
        self.folder = folder
        self.guest = leases["lease1"]
        self.home = self.guest.home
        self.key = keys.ephemeral()

    def certificate(self, lease_id="lease1", *, ca=None, start=0, end=600, **options):
        now = datetime.now(UTC)
        return (ca or self.ca).issue(
            keys.public_line(self.key),
            lease_id,
            now + timedelta(seconds=start),
            now + timedelta(seconds=end),
            **options,
        )

    def credentials(self, certificate=None):
        return Credentials(key=self.key, certificate=certificate or self.certificate())

    def endpoint(self, lease_id="lease1"):
        return self.gateway.endpoint(lease_id, "127.0.0.1")

    async def connect(self, certificate=None, lease_id="lease1"):
        return await connect(self.endpoint(lease_id), self.credentials(certificate))

    @contextlib.asynccontextmanager
    async def sftp(self):
        async with await self.connect() as connection, connection.start_sftp_client() as client:
            yield client

    async def openssh(self, program, *arguments, content=b"", options=(), certificate=None):
        """Run ssh or sftp with the lease's certificate; return status, output and errors."""
        identity = self.folder / "id"
        if not identity.exists():
            identity.touch(0o600)
            identity.write_bytes(self.key.export_private_key("openssh"))
        (self.folder / "id-cert.pub").write_text((certificate or self.certificate()) + "\n")
        known = self.folder / "known_hosts"
        known.write_text(f"[127.0.0.1]:{self.gateway.port} {self.gateway.host_key_line}\n")
        set_options = (
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={known}",
            f"Port={self.gateway.port}",
            *options,
        )
        process = await asyncio.create_subprocess_exec(
            program,
            *("-F", "none", "-i", identity),
            *(part for option in set_options for part in ("-o", option)),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, errors = await asyncio.wait_for(process.communicate(content), 60)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode, output, errors

    async def ssh(self, *arguments, **kwargs):
        return await self.openssh("ssh", "lease1@127.0.0.1", *arguments, **kwargs)


@pytest.fixture
async def scene(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    leases = Leases(lease1=PlainGuest(home))
    ca = UserCA(keys.ephemeral())
    gateway = Gateway(tmp_path / "host_key", ca, leases, host="127.0.0.1")
    await gateway.start()
    yield Scene(gateway, leases, ca, tmp_path)
    await gateway.close()
    left = [pid for guest in leases.values() for pid in guest.pids if psutil.pid_exists(pid)]
    assert not left, "a command outlived the gateway"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def buffered(gateway):
    """How much the gateway has sent that its clients have not taken."""
    return sum(
        channel.get_write_buffer_size()
        for one in gateway.standing
        for channel in one._connection._channels.values()
    )


async def until(condition):
    """Wait for what must come soon."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


# Who gets in


async def test_certificate_of_the_lease_gets_in(scene):
    """The holder of the lease's certificate runs commands in the guest's place."""
    async with await scene.connect() as connection:
        assert (await connection.run("pwd")).stdout.strip() == str(scene.home)


@needs_openssh
async def test_openssh_gets_in(scene):
    """A plain ssh command works, with output and errors apart and the status passed on."""
    status, output, errors = await scene.ssh("echo out; echo err >&2; exit 7")
    assert (status, output, errors) == (7, b"out\n", b"err\n")


def refused_certificates(scene):
    other_ca = UserCA(keys.ephemeral())
    nobody = scene.ca._key.generate_user_certificate(
        keys.parse_public(keys.public_line(scene.key)), "lease1", principals=[]
    )
    host = scene.ca._key.generate_host_certificate(
        keys.parse_public(keys.public_line(scene.key)), "lease1", principals=["lease1"]
    )
    return {
        "expired": scene.certificate(start=-600, end=-1),
        "not yet valid": scene.certificate(start=600, end=1200),
        "of another lease": scene.certificate("lease2"),
        "of another authority": scene.certificate(ca=other_ca),
        "for nobody in particular": nobody.export_certificate().decode(),
        "of a host": host.export_certificate().decode(),
        "for another address": scene.certificate(source_address=["192.0.2.7"]),
    }


async def test_every_other_certificate_is_refused(scene):
    """Time, lease, authority, principal, kind and address must all be right."""
    scene.leases["lease2"] = PlainGuest(scene.home)
    for why, certificate in refused_certificates(scene).items():
        with pytest.raises(Forbidden):
            async with await scene.connect(certificate):
                pytest.fail(f"a certificate {why} got in")


@needs_openssh
async def test_openssh_with_another_leases_certificate_is_refused(scene):
    """The same rules hold for a client that is not ours."""
    status, _, errors = await scene.ssh("true", certificate=scene.certificate("lease2"))
    assert status == 255
    assert b"Permission denied" in errors


async def test_plain_keys_and_passwords_are_refused(scene):
    """Nothing but a certificate: not its bare key, not the authority's own, not a password."""
    for key in (scene.key, scene.ca._key):
        with pytest.raises(Forbidden):
            await connect(scene.endpoint(), Credentials(key=key))
    with pytest.raises(asyncssh.PermissionDenied):
        await asyncssh.connect(
            "127.0.0.1",
            scene.gateway.port,
            username="lease1",
            password="lease1",
            known_hosts=None,
            client_keys=None,
            config=None,
        )


@pytest.mark.parametrize("name", ["lease9", "*", "", "lease1\n", "../lease1", "root"])
async def test_unknown_lease_is_refused(scene, name):
    """A name that is no live lease gets nowhere, even with a certificate of ours."""
    with pytest.raises(GridcloudError):
        await scene.connect(lease_id=name)


async def test_released_lease_is_refused(scene):
    """A lease given back opens nothing any more, though its certificate is still valid."""
    del scene.leases["lease1"]
    with pytest.raises(Forbidden):
        await scene.connect()


async def test_ended_lease_is_refused(scene):
    """The lease's own end counts, whatever the certificate says."""
    scene.guest.ends_at = datetime.now(UTC) - timedelta(seconds=1)
    with pytest.raises(Forbidden):
        await scene.connect()


# The end of a lease


async def test_connection_is_cut_at_the_leases_end(scene):
    """When the lease ends, the connection ends, and what ran over it is gone."""
    scene.guest.ends_at = datetime.now(UTC) + timedelta(seconds=1)
    async with await scene.connect() as connection:
        process = await connection.create_process("sleep 1000")
        await until(lambda: scene.guest.pids)
        await asyncio.wait_for(connection.wait_closed(), 20)
        await until(lambda: not psutil.pid_exists(scene.guest.pids[0]))
        assert process.exit_status is None
    assert not scene.guest.statuses


async def test_renewed_lease_keeps_its_connection(scene):
    """A lease that was renewed meanwhile is not cut at its old end."""
    scene.guest.ends_at = datetime.now(UTC) + timedelta(seconds=0.5)
    async with await scene.connect() as connection:
        scene.guest.ends_at += timedelta(hours=1)
        await asyncio.sleep(0.8)
        assert (await connection.run("echo on")).stdout == "on\n"


async def test_lease_given_back_is_noticed_without_a_word(scene, monkeypatch):
    """Even if nobody tells the gateway, a connection does not outlive its lease for long."""
    monkeypatch.setattr(module, "_LOOK_AGAIN_SECONDS", 0.05)
    async with await scene.connect() as connection:
        del scene.leases["lease1"]
        await asyncio.wait_for(connection.wait_closed(), 20)


async def test_cut_ends_one_lease_alone(scene):
    """Cutting ends the commands before it returns, and leaves other leases alone."""
    other = scene.leases["lease2"] = PlainGuest(scene.home)
    async with (
        await scene.connect() as mine,
        await scene.connect(scene.certificate("lease2"), "lease2") as theirs,
    ):
        await mine.create_process("sleep 1000")
        await theirs.create_process("sleep 1000")
        await until(lambda: scene.guest.pids and other.pids)
        scene.leases.pop("lease1")
        await scene.gateway.cut("lease1")
        assert not psutil.pid_exists(scene.guest.pids[0])
        await asyncio.wait_for(mine.wait_closed(), 20)
        assert psutil.pid_exists(other.pids[0])
        assert (await theirs.run("echo on")).stdout == "on\n"
        await scene.gateway.cut("lease1")


async def test_new_channel_needs_a_live_lease(scene):
    """A standing connection opens no new session once the lease is gone."""
    async with await scene.connect() as connection:
        del scene.leases["lease1"]
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.run("true")


# Commands


async def test_bytes_pass_unharmed_and_both_ends_close(scene):
    """Every byte value goes in and out; the end of input reaches the command."""
    content = bytes(range(256)) * 1000 + b"no newline at the end"
    async with await scene.connect() as connection:
        done = await connection.run("cat; printf '\\377\\000' >&2", input=content, encoding=None)
    assert done.stdout == content
    assert done.stderr == b"\xff\x00"
    assert done.exit_status == 0


async def test_status_and_signal_are_passed_on(scene):
    """How a command ended is told as it was."""
    async with await scene.connect() as connection:
        assert (await connection.run("exit 255")).exit_status == 255
        assert (await connection.run("kill -TERM $$")).exit_signal[0] == "TERM"
        assert (await connection.run("no-such-program")).exit_status == 127


@needs_openssh
async def test_much_output_and_input_are_complete(scene):
    """20 MB each way through OpenSSH arrive whole."""
    content = os.urandom(2**20) * 20
    status, output, _ = await scene.ssh("cat", content=content)
    assert status == 0
    assert hashlib.sha256(output).digest() == hashlib.sha256(content).digest()


async def test_slow_reader_holds_the_command_back(scene):
    """A client that does not read stops the command, not the gateway's memory."""
    async with await scene.connect() as connection:
        process = await connection.create_process("yes", encoding=None, window=65536)
        await process.stdout.read(1)
        await until(lambda: buffered(scene.gateway))
        await asyncio.sleep(0.3)
        assert buffered(scene.gateway) < 2 * 2**20
        assert (await connection.run("echo still here")).stdout == "still here\n"
        process.close()
    await until(lambda: not psutil.pid_exists(scene.guest.pids[0]))


async def test_command_that_does_not_read_holds_its_client_back(scene):
    """Input nobody reads stays with who sends it: the gateway takes some windows of it at most."""
    async with await scene.connect() as connection:
        process = await connection.create_process("sleep 1000", encoding=None)
        process.stdin.write(bytes(40 * 2**20))
        await until(lambda: process.channel.get_write_buffer_size() < 36 * 2**20)
        await asyncio.sleep(0.3)
        assert process.channel.get_write_buffer_size() > 20 * 2**20
        process.channel.abort()
    await until(lambda: not psutil.pid_exists(scene.guest.pids[0]))


async def test_output_that_comes_after_the_end_is_waited_for(scene):
    """As with sshd, what a command left behind may still write to its output."""
    async with await scene.connect() as connection:
        done = await connection.run("(sleep 0.2; echo late) & echo early; exit 5")
    assert (done.stdout, done.exit_status) == ("early\nlate\n", 5)


async def test_command_that_does_not_read_ends_all_the_same(scene):
    """Input nobody reads blocks neither the command's end nor the connection."""
    async with await scene.connect() as connection:
        process = await connection.create_process("exit 3", encoding=None)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"x" * 5_000_000)
        assert (await process.wait()).exit_status == 3
        assert (await connection.run("echo on")).stdout == "on\n"


async def test_command_ends_when_its_client_goes(scene):
    """A client that vanishes leaves no command behind."""
    connection = await scene.connect()
    await connection.create_process("sleep 1000")
    await until(lambda: scene.guest.pids)
    connection.abort()
    await connection.wait_closed()
    await until(lambda: not psutil.pid_exists(scene.guest.pids[0]))


@needs_openssh
async def test_shell_without_a_terminal(scene):
    """A shell reads its commands from its input; a terminal is refused to who insists on one."""
    status, output, _ = await scene.ssh(content=b"echo hello; exit 4\n")
    assert (status, output) == (4, b"hello\n")
    status, output, errors = await scene.ssh("-tt", "echo hello")
    assert (status, output) == (255, b"")
    assert b"PTY allocation request failed" in errors


@needs_openssh
async def test_environment_is_let_through_by_name(scene):
    """Language and our own names pass; what changes how programs are loaded does not."""
    options = ("SetEnv=LANG=C.UTF-8 GRIDCLOUD_JOB=j1 LD_PRELOAD=/x.so PATH=/x PYTHONPATH=/x",)
    status, _, _ = await scene.ssh("true", options=options)
    assert status == 0
    assert scene.guest.envs == [{"LANG": "C.UTF-8", "GRIDCLOUD_JOB": "j1"}]


async def test_sandbox_that_cannot_run_says_why(scene):
    """The cause of a failure in the sandbox reaches the user, and the connection stays."""

    async def fail(*_):
        raise Unavailable("The sandbox is gone.", hint="Ask for a new lease.")

    scene.guest.run = fail
    async with await scene.connect() as connection:
        done = await connection.run("true")
        assert done.exit_status == 255
        assert "The sandbox is gone. Ask for a new lease." in done.stderr
        assert (await connection.run("a\0b")).exit_status == 255


async def test_many_commands_at_once_and_no_more(scene, monkeypatch):
    """Sessions of one connection run side by side, up to a bound."""
    monkeypatch.setattr(module, "SESSIONS_PER_CONNECTION_LIMIT", 8)
    async with await scene.connect() as connection:
        held = [await connection.create_process("cat") for _ in range(8)]
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.run("true")
        for process in held:
            process.stdin.write_eof()
            assert (await process.wait()).exit_status == 0
        assert (await connection.run("true")).exit_status == 0


async def test_connections_are_bounded(scene, monkeypatch):
    """Neither one lease nor strangers can take up the gateway."""
    monkeypatch.setattr(module, "CONNECTIONS_PER_LEASE_LIMIT", 1)
    async with await scene.connect() as connection:
        with contextlib.suppress(GridcloudError):
            second = await scene.connect()
            await asyncio.wait_for(second.wait_closed(), 20)
        assert (await connection.run("true")).exit_status == 0
    monkeypatch.setattr(module, "PENDING_LOGINS_LIMIT", 2)
    await until(lambda: not scene.gateway.pending)
    strangers = [await asyncio.open_connection("127.0.0.1", scene.gateway.port) for _ in range(2)]
    await until(lambda: scene.gateway.pending == 2)
    with pytest.raises(GridcloudError):
        await scene.connect()
    for _, writer in strangers:
        writer.close()
        await writer.wait_closed()
    await until(lambda: not scene.gateway.pending)
    async with await scene.connect() as connection:
        assert (await connection.run("true")).exit_status == 0


async def test_stranger_who_never_logs_in_is_hung_up_on(tmp_path, monkeypatch):
    """A connection without a login does not stand for long."""
    monkeypatch.setattr(module, "LOGIN_SECONDS", 0.2)
    gateway = Gateway(keys.ephemeral(), UserCA(keys.ephemeral()), Leases(), host="127.0.0.1")
    reader, writer = await asyncio.open_connection("127.0.0.1", await gateway.start())
    with contextlib.suppress(ConnectionError):
        assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"SSH-2.0-gridcloud\r\n")
    writer.close()
    await gateway.close()


async def test_port_in_use_is_told(scene):
    """A second gateway on the same port says so."""
    second = Gateway(
        keys.ephemeral(), scene.ca, scene.leases, host="127.0.0.1", port=scene.gateway.port
    )
    with pytest.raises(Unavailable, match="cannot listen"):
        await second.start()
    await second.close()


async def test_host_key_survives_a_restart(scene):
    """The key that leases name is the one shown after a restart, too."""
    again = Gateway(scene.folder / "host_key", scene.ca, scene.leases)
    assert again.host_key_line == scene.gateway.host_key_line
    assert scene.endpoint() == Endpoint(
        host="127.0.0.1",
        port=scene.gateway.port,
        user="lease1",
        host_keys=(scene.gateway.host_key_line,),
    )


# Going on


@needs_openssh
@pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server")
async def test_jump_leads_to_the_leased_machine_alone(scene):
    """Through the gateway one reaches the lease's machine, and no other place behind it."""
    with testbed.sshd(trusted_ca=scene.ca.trusted_line(), principals=["lease1"]) as machine:
        behind = Endpoint(
            host=machine.host,
            port=machine.port,
            user=machine.user,
            host_keys=(machine.host_key_line,),
            gateway=scene.endpoint(),
        )
        certificate = scene.certificate(port_forwarding=True)
        with pytest.raises(Forbidden, match="does not allow going on"):
            await connect(behind, scene.credentials(certificate))
        scene.guest.machine = (machine.host, machine.port)
        async with await connect(behind, scene.credentials(certificate)) as connection:
            assert (await connection.run("id -un")).stdout.strip() == machine.user
            scene.leases.pop("lease1")
            await scene.gateway.cut("lease1")
            await asyncio.wait_for(connection.wait_closed(), 20)
        scene.leases["lease1"] = scene.guest
        with pytest.raises(Forbidden, match="going on"):  # the certificate must allow it, too
            await connect(behind, scene.credentials())
        status, output, _ = await scene.ssh(
            "-W", f"{machine.host}:{machine.port}", certificate=certificate
        )
        assert output.startswith(b"SSH-2.0-OpenSSH")
        for elsewhere in (f"127.0.0.1:{scene.gateway.port}", f"{machine.host}:1", "localhost:22"):
            status, output, errors = await scene.ssh("-W", elsewhere, certificate=certificate)
            assert (status, output) == (255, b"")
            assert b"administratively prohibited" in errors


async def test_no_other_forwarding(scene):
    """No listening on the gateway, no unix sockets, no agent, even if the certificate allows."""
    async with await scene.connect(scene.certificate(port_forwarding=True)) as connection:
        with pytest.raises(asyncssh.ChannelListenError):
            await connection.start_server(lambda *_: True, "127.0.0.1", 0)
        with pytest.raises(asyncssh.ChannelListenError):
            await connection.start_unix_server(lambda *_: True, str(scene.folder / "socket"))
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_unix_connection("/var/run/docker.sock")
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_connection("127.0.0.1", scene.gateway.port)
        for subsystem in ("netconf", "shell", "SFTP"):
            with pytest.raises(asyncssh.ChannelOpenError):
                await connection.create_process(subsystem=subsystem)


# Files


async def test_files_go_in_and_out_intact(scene, tmp_path):
    """20 MB up and down keep every byte, under the path the sandbox has."""
    content = os.urandom(2**20) * 20
    (tmp_path / "a").write_bytes(content)
    async with scene.sftp() as sftp:
        assert await sftp.getcwd() == "/home/guest"
        await sftp.makedirs("/home/guest/jobs/x")
        await sftp.put(tmp_path / "a", "/home/guest/jobs/x/a", preserve=True)
        assert (scene.home / "jobs/x/a").read_bytes() == content
        await sftp.get("jobs/x/a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content


@needs_openssh
async def test_openssh_sftp_works(scene, tmp_path):
    """The plain sftp program lists, makes, moves, stores and fetches."""
    (tmp_path / "a").write_bytes(os.urandom(300_000))
    script = f"""
        ls -la /
        mkdir /home/guest/d
        put {tmp_path}/a d/a
        rename d/a d/b
        chmod 640 d/b
        get /home/guest/d/b {tmp_path}/c
        ls -l /home/guest/d
        df
    """
    status, output, errors = await scene.openssh(
        "sftp", "-b", "-", "lease1@127.0.0.1", content=script.encode()
    )
    assert status == 0, errors
    assert b"home" in output
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    assert (scene.home / "d/b").stat().st_mode & 0o777 == 0o640


async def test_odd_names_survive(scene):
    """Names that are no text, or look like options or patterns, are just names."""
    odd = [b"\xff\xfe", "ünïcödé ☃".encode(), b"-rf *", b"a\nb", b" ", b"~root", b"x" * 255]
    async with (
        await scene.connect() as connection,
        connection.start_sftp_client(path_encoding=None) as sftp,
    ):
        for name in odd:
            async with sftp.open(name, "wb") as file:
                await file.write(name)
        assert sorted(await sftp.listdir(b".")) == sorted([b".", *odd])
        for name in odd:
            async with sftp.open(b"/home/guest/" + name, "rb") as file:
                assert await file.read() == name
        for bad in (b"x" * 256, b"a\0b", b"a/" * 4000):
            with pytest.raises(asyncssh.SFTPError):
                await sftp.stat(bad)


async def test_nothing_outside_the_home_exists(scene, tmp_path):
    """Dots and absolute paths find nothing, and the real path of the home means nothing."""
    (tmp_path / "secret").write_text("outside")
    paths = ["../secret", "/home/guest/../../secret", "/etc/passwd", str(tmp_path / "secret")]
    paths += [str(scene.home), "//etc/passwd", "/home/guestx", "/home/../etc", "/home/guest2/x"]
    async with scene.sftp() as sftp:
        for path in paths:
            for call in (sftp.stat, sftp.lstat, sftp.remove, sftp.rmdir, sftp.mkdir, sftp.listdir):
                with pytest.raises(asyncssh.SFTPNoSuchFile):
                    await call(path)
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await sftp.open(path, "wb")
            with pytest.raises(asyncssh.SFTPNoSuchFile):
                await sftp.chmod(path, 0o777)
        assert await sftp.realpath("../../etc/./passwd") == "/etc/passwd"
        assert sorted(await sftp.listdir("/")) == [".", "home"]
        assert sorted(await sftp.listdir("/home")) == [".", "guest"]
        assert await sftp.isdir("/home")
        with pytest.raises(asyncssh.SFTPError):
            await sftp.rmdir("/home/guest")
    assert (tmp_path / "secret").read_text() == "outside"


async def test_no_link_leads_out(scene, tmp_path):
    """Links the guest planted are not followed, and none can be made; asyncssh's own server
    is left by the last of these."""
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "dir").mkdir()
    (scene.home / "link").symlink_to("../secret")
    (scene.home / "up").symlink_to("..")
    (scene.home / "sub").mkdir()
    async with scene.sftp() as sftp:
        for path in ("link", "up/secret", "up/home/link"):
            for mode in ("rb", "wb", "ab", "r+b"):
                with pytest.raises(asyncssh.SFTPError):
                    await sftp.open(path, mode)
            with pytest.raises(asyncssh.SFTPError):
                await sftp.chmod(path, 0o777)
            with pytest.raises(asyncssh.SFTPError):
                await sftp.truncate(path, 0)
        with pytest.raises(asyncssh.SFTPError):
            await sftp.listdir("up")
        with pytest.raises(asyncssh.SFTPError):
            await sftp.rename("sub", "up/dir/sub")
        assert await sftp.readlink("link") == "../secret"
        with pytest.raises(asyncssh.SFTPPermissionDenied):
            await sftp.link("link", "hard")
        for target in ("../secret", "/home/guest/x", "x"):
            with pytest.raises(asyncssh.SFTPPermissionDenied):
                await sftp.symlink(target, "sub/new")
        await sftp.rename("link", "sub/link")
        with pytest.raises(asyncssh.SFTPError):
            await sftp.open("sub/link", "rb")
        await sftp.remove("sub/link")
    assert (tmp_path / "secret").read_text() == "outside"
    assert not names(tmp_path / "dir")


async def test_race_against_the_server_is_never_won(scene, tmp_path):
    """A guest that swaps a folder for a link all the time gets nothing in or out."""
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").write_text("outside")
    (scene.home / "d").mkdir()
    (scene.home / "d" / "file").write_text("inside")
    (scene.home / "trap").symlink_to("../dir")
    stop = threading.Event()

    def swap():
        home = scene.home
        while not stop.is_set():
            (home / "d").rename(home / "aside")
            (home / "trap").rename(home / "d")
            (home / "d").rename(home / "trap")
            (home / "aside").rename(home / "d")

    racer = threading.Thread(target=swap)
    racer.start()
    try:
        async with scene.sftp() as sftp:
            for _ in range(200):
                with contextlib.suppress(asyncssh.SFTPError):
                    async with sftp.open("d/file", "rb") as file:
                        assert await file.read() == b"inside"
                    async with sftp.open("d/new", "wb") as file:
                        await file.write(b"x")
                    await sftp.posix_rename("d/new", "d/newer")
    finally:
        stop.set()
        racer.join()
    assert names(tmp_path / "dir") == ["file"]
    assert (tmp_path / "dir" / "file").read_text() == "outside"


async def test_owner_and_set_user_id_cannot_be_set(scene):
    """SFTP leaves nothing that runs as, or belongs to, anyone else."""
    (scene.home / "file").write_text("x")
    async with scene.sftp() as sftp:
        await sftp.chmod("file", 0o4755)
        assert (scene.home / "file").stat().st_mode & 0o7777 == 0o755
        with pytest.raises(asyncssh.SFTPPermissionDenied):
            await sftp.chown("file", 12345, 12345)


async def test_pipe_in_the_home_blocks_nobody(scene):
    """A pipe the guest made is refused, and the gateway goes on serving."""
    os.mkfifo(scene.home / "pipe")
    async with scene.sftp() as sftp:
        for mode in ("rb", "wb"):
            with pytest.raises(asyncssh.SFTPError):
                await sftp.open("pipe", mode)
        assert await sftp.listdir() == [".", "pipe"]


async def test_open_files_are_bounded(scene, monkeypatch):
    """One session cannot use up the site's descriptors."""
    from gridcloud.access import sftp_server

    monkeypatch.setattr(sftp_server, "_OPEN_FILES_LIMIT", 3)
    (scene.home / "file").write_text("x")
    async with scene.sftp() as sftp:
        held = [await sftp.open("file", "rb") for _ in range(3)]
        with pytest.raises(asyncssh.SFTPError):
            await sftp.open("file", "rb")
        for file in held:
            await file.close()
        async with sftp.open("file", "rb") as file:
            assert await file.read() == b"x"


async def test_sessions_leave_no_descriptor(scene):
    """Ended and broken-off sessions give back all they had open."""
    (scene.home / "file").write_bytes(b"x" * 100_000)

    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    async with await scene.connect() as connection:
        await connection.run("true")
    await until(lambda: not scene.gateway.standing)
    before = count()
    for _ in range(3):
        connection = await scene.connect()
        sftp = await connection.start_sftp_client()
        await sftp.open("file", "rb")
        await connection.create_process("cat")
        await connection.run("echo x")
        connection.abort()
        await connection.wait_closed()
    await until(lambda: not scene.gateway.standing and count() <= before)


async def test_without_a_home_there_is_no_sftp(scene):
    """A lease of a machine behind the gateway shows no files of the gateway's host."""
    scene.guest.home = None
    async with await scene.connect() as connection:
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.start_sftp_client()
        scene.guest.home = scene.folder / "missing"
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.start_sftp_client()
        scene.guest.home = scene.home
        async with connection.start_sftp_client() as sftp:
            assert await sftp.listdir() == ["."]


async def test_sending_without_reading_does_not_fill_the_memory(scene):
    """A client that asks and asks, and never reads, is made to wait."""
    size = 64 * 2**20
    with (scene.home / "big").open("wb") as file:
        file.truncate(size)
    async with await scene.connect() as connection:
        writer, reader, _ = await connection.open_session(
            subsystem="sftp", encoding=None, window=65536
        )

        def packet(*parts):
            body = b"".join(parts)
            return len(body).to_bytes(4, "big") + body

        def text(value):
            return len(value).to_bytes(4, "big") + value

        writer.write(packet(b"\x01", (3).to_bytes(4, "big")))
        writer.write(packet(b"\x03", bytes(4), text(b"big"), (1).to_bytes(4, "big"), bytes(4)))
        await reader.read(1)
        for number in range(200):  # 200 × 1 MiB asked for
            ask = (number.to_bytes(4, "big"), text(bytes(4)), bytes(8), (2**20).to_bytes(4, "big"))
            writer.write(packet(b"\x05", *ask))
        await until(lambda: buffered(scene.gateway))
        await asyncio.sleep(0.2)
        assert buffered(scene.gateway) < 3 * 2**20
        writer.channel.abort()


def test_every_operation_of_the_sftp_server_is_our_own():
    """A method that a newer asyncssh adds cannot open a way past the confinement unnoticed."""
    harmless = {"convert_attrs", "format_longname"}  # work on values, never on files
    inherited = {
        name
        for name, _ in inspect.getmembers(asyncssh.SFTPServer, inspect.isfunction)
        if not name.startswith("_") and name not in vars(ConfinedSFTPServer)
    }
    assert inherited == harmless
    private = {
        name
        for name, _ in inspect.getmembers(asyncssh.SFTPServer, inspect.isfunction)
        if name.startswith("_") and not name.startswith("__")
    }
    assert private == {"_to_sftpname"}  # goes through our lstat
