"""What containers are made of, where engines are found, and how one is talked to and entered."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.data.confined import ConfinedFiles
from gridcloud.errors import (
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NotFound,
    Throttled,
    Unavailable,
)
from gridcloud.executors.executor import Executor
from gridcloud.executors.shells import EnteredShell
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, LoanTerms
from gridcloud.model.need import Need
from gridcloud.model.things import Tags
from gridcloud.providers.base import Capacity, Lender, Provider, ProviderContext
from gridcloud.providers.containers import ContainersProvider, recipe
from gridcloud.providers.containers.engine import Engine
from gridcloud.providers.containers.finding import Address, find_engine
from gridcloud.providers.containers.folders import Facts, Folder
from gridcloud.providers.containers.recipe import ContainersSection, Host, image_name, users
from gridcloud.providers.containers.seccomp import narrowed
from gridcloud.providers.contract import assert_telling
from gridcloud.settings import LendingSettings, SiteSettings
from gridcloud.site.confining import Confining

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECTION = ContainersSection(image="debian:12")
GUEST_IDS = (1_900_000_000, 1_900_000_000)
ROOT = Host(uid=0, gid=0, rootless=False, podman=True)


def lease(role=LeaseRole.OWN, **more):
    if role is LeaseRole.LENT:
        more.setdefault("terms", LoanTerms(processes=99, disk_bytes=2**30))
    return Lease(
        id="abc123",
        role=role,
        state=LeaseState.INTENT,
        provider="box",
        need=Need(cpus=3, memory_bytes=2**30),
        created_at=NOW,
        ends_at=NOW + timedelta(hours=1),
        **more,
    )


def request(made, section=SECTION, host=ROOT, folder=Path("/state/containers/abc123")):
    who = users(host, made.role, GUEST_IDS)
    tags = Tags.of("5e" * 32, made.id, made.ends_at)
    return recipe.create_request(made, section, host, who, tags, folder, (), "debian:12")


HOSTS = st.builds(
    Host,
    uid=st.sampled_from([0, 1000]),
    gid=st.just(1000),
    rootless=st.booleans(),
    podman=st.booleans(),
    selinux=st.booleans(),
)


@given(
    host=HOSTS,
    network=st.sampled_from(["", "none", "host", "mine"]),
    leave=st.booleans(),
    read_only=st.booleans(),
)
def test_a_guest_is_confined_whatever_the_settings_are(host, network, leave, read_only):
    """Never the host's network, a capability, a writable root or more than the lease has."""
    section = SECTION.model_copy(update={"network": network, "read_only": read_only})
    terms = LoanTerms(processes=99, disk_bytes=2**30, network=leave)
    config = request(lease(LeaseRole.LENT, terms=terms), section, host)["HostConfig"]
    assert config["NetworkMode"] != "host"
    assert leave or config["NetworkMode"] == "none"
    assert config["CapDrop"] == ["ALL"]
    assert "no-new-privileges" in config["SecurityOpt"]
    assert config["ReadonlyRootfs"]
    assert config["AutoRemove"]
    assert config["Memory"] == config["MemorySwap"] == 2**30
    assert (config["NanoCpus"], config["PidsLimit"]) == (3 * 10**9, 99)
    assert not host.podman or any("seccomp=" in each for each in config["SecurityOpt"])
    assert not config["Devices"] + config["DeviceRequests"]


@given(host=HOSTS)
def test_a_guest_is_apart_from_its_switch_and_never_roots_equal(host):
    """Where there are two users to be had, the first process and the guest are not the same one;
    a guest of a root's site is nobody on the host."""
    who = users(host, LeaseRole.LENT, GUEST_IDS)
    if host.rootless and not host.podman:
        return  # all that such an engine has is one user, this one
    assert who.switch != who.commands
    if host.uid == 0 and not host.rootless:
        assert who.commands.startswith(str(GUEST_IDS[0]))
        assert who.files == GUEST_IDS


def test_gpus_are_shown_by_what_they_are_called():
    """A path as a device, a CDI name and an engine's own each by their own kind of request."""
    made = recipe.create_request(
        lease(),
        SECTION,
        ROOT,
        users(ROOT, LeaseRole.OWN, GUEST_IDS),
        Tags.of("5e" * 32, "abc123"),
        Path("/f"),
        ("/dev/fuse", "nvidia.com/gpu=1", "0"),
        "x:1",
    )
    config = made["HostConfig"]
    assert [device["PathOnHost"] for device in config["Devices"]] == ["/dev/fuse"]
    assert [(each["Driver"], each["DeviceIDs"]) for each in config["DeviceRequests"]] == [
        ("cdi", ["nvidia.com/gpu=1"]),
        ("nvidia", ["0"]),
    ]


def test_a_folder_with_a_colon_is_refused():
    """It would be read as a mount of something else."""
    with pytest.raises(InvalidSpec, match="colon") as refused:
        request(lease(), folder=Path("/a:b"))
    assert_telling(refused.value)


@pytest.mark.parametrize(
    ("wanted", "meant"),
    [
        ("debian", "debian:latest"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest"),
        ("localhost:5000/a/b:2", "localhost:5000/a/b:2"),
        ("a@sha256:0f", "a@sha256:0f"),
    ],
)
def test_an_image_without_a_tag_means_the_latest(wanted, meant):
    """An engine would fetch every tag there is."""
    assert image_name(wanted) == meant


@pytest.mark.parametrize("wanted", ["", "-x", "a b", "a\n", "a?tag=x", "a&fromSrc=http://x"])
def test_what_is_no_image_is_refused(wanted):
    """It goes into an address, so nothing else may be in it."""
    with pytest.raises(InvalidSpec):
        image_name(wanted)


def test_a_narrowed_profile_allows_nothing_more():
    """Namespaces and mounts go; clone stays for what makes none; the rest is as it was."""
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [
            {"names": ["read", "clone", "unshare", "mount"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["setns"], "action": "SCMP_ACT_ALLOW"},
        ],
    }
    allowed = {
        name: rule.get("args")
        for rule in narrowed(profile)["syscalls"]
        if rule["action"] == "SCMP_ACT_ALLOW"
        for name in rule["names"]
    }
    assert set(allowed) == {"read", "clone"}
    assert allowed["clone"][0]["op"] == "SCMP_CMP_MASKED_EQ"
    assert profile["syscalls"][1]["names"] == ["setns"]


class TestFinding:
    """Where an engine is looked for."""

    def test_what_is_told_goes_first(self, tmp_path):
        """Settings, then DOCKER_HOST, then CONTAINER_HOST."""
        environ = {"DOCKER_HOST": "unix:///d.sock", "CONTAINER_HOST": "unix:///c.sock"}
        assert find_engine("unix:///s.sock", environ, tmp_path).socket == "/s.sock"
        assert find_engine("", environ, tmp_path).socket == "/d.sock"
        del environ["DOCKER_HOST"]
        assert find_engine("", environ, tmp_path).socket == "/c.sock"

    def test_the_docker_context_in_use_is_found(self, tmp_path):
        """By its name's hash, as docker keeps it."""
        folder = tmp_path / ".docker/contexts/meta" / hashlib.sha256(b"mine").hexdigest()
        folder.mkdir(parents=True)
        meta = {"Name": "mine", "Endpoints": {"docker": {"Host": "unix:///m.sock"}}}
        (folder / "meta.json").write_text(json.dumps(meta))
        (tmp_path / ".docker/config.json").write_text('{"currentContext": "mine"}')
        assert find_engine("", {}, tmp_path).socket == "/m.sock"
        with pytest.raises(NotFound, match="'other'") as refused:
            find_engine("", {"DOCKER_CONTEXT": "other"}, tmp_path)
        assert_telling(refused.value)

    def test_a_socket_that_is_there_is_used(self, tmp_path):
        """Podman's of the user before all others."""
        (tmp_path / "podman").mkdir()
        path = tmp_path / "podman/podman.sock"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            found = find_engine("", {"XDG_RUNTIME_DIR": str(tmp_path)}, tmp_path)
        assert found.socket == str(path)

    @pytest.mark.parametrize(
        "told",
        ["ssh://host", "tcp://10.0.0.1:2375", "tcp://localhost", "unix://x", "x", "tcp://[:"],
    )
    def test_an_engine_elsewhere_is_refused(self, told, tmp_path):
        """Folders of this host are mounted, which another would not have."""
        with pytest.raises(InvalidSpec) as refused:
            find_engine(told, {}, tmp_path)
        assert_telling(refused.value)


class _FakeEngine:
    """Answers each request with the next of some raw answers, on a unix socket."""

    def __init__(self, path, *answers):
        self.path = str(path)
        self.answers = list(answers)
        self.asked = []

    async def __aenter__(self):
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return Engine(Address(socket=self.path, told_by="a test"))

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head.split(b" ")[1].decode())
        if b"/_ping" in head:
            answer = ok(b"OK", "Api-Version: 1.41\r\nServer: Libpod/4.3.1\r\n")
        else:
            answer = self.answers.pop(0)
        writer.write(answer)
        writer.close()


def ok(body, headers="", status="200 OK"):
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    return head.encode() + body


class TestEngine:
    """Talking to something that may say anything."""

    async def ask(self, tmp_path, *answers, **more):
        fake = _FakeEngine(tmp_path / "s", *answers)
        async with fake as engine:
            try:
                return await engine.call("GET", "/x", **more)
            finally:
                await engine.close()

    async def test_what_may_pass_is_asked_again(self, tmp_path):
        """A 500, a cut connection and a 429 are, and then the answer counts."""
        throttled = ok(b"{}", "Retry-After: 0\r\n", "429 Too Many Requests")
        answers = (ok(b"{}", status="500 X"), b"", throttled, ok(b'{"a": 1}'))
        assert await self.ask(tmp_path, *answers) == {"a": 1}

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (ok(b'{"message": "no"}', status="404 X"), NotFound),
            (ok(b'{"message": "no"}', status="400 X"), InvalidSpec),
            (ok(b'{"message": "no"}', status="403 X"), Forbidden),
            (ok(b"no", status="503 X"), Unavailable),
            (ok(b"not json"), Unavailable),
            (ok(b"[" * 100000), Unavailable),
            (ok(b"{}", status="429 X"), Throttled),
            (b"hello\r\n\r\n", Unavailable),
        ],
    )
    async def test_every_answer_is_told_in_our_words(self, tmp_path, answer, kind):
        """With a cause, a next step, and whether it may be tried again."""
        with pytest.raises(kind) as refused:
            await self.ask(tmp_path, answer, tries=1)
        assert_telling_or_ends(refused.value)

    async def test_its_words_cannot_steer_a_terminal(self, tmp_path):
        """Nor fill the screen."""
        body = json.dumps({"message": "a\x1b[2Jb\n" + "c" * 10000}).encode()
        with pytest.raises(NotFound) as refused:
            await self.ask(tmp_path, ok(body, status="404 X"), tries=1)
        assert refused.value.message.isprintable()
        assert len(refused.value.message) < 600


def assert_telling_or_ends(error):
    assert isinstance(error, GridcloudError)
    assert error.message.endswith(".")


class TestEnteredShell:
    """The supervisor in a place that is entered; here, a plain process stands for one."""

    @staticmethod
    async def enter(command, descriptors, env):
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            *("-c", command),
            stdin=descriptors[0],
            stdout=descriptors[1],
            stderr=descriptors[2],
        )
        return await process.wait()

    async def test_the_supervisor_answers(self, tmp_path):
        """Its text goes in, its frames come back."""
        executor = Executor(EnteredShell(self.enter), str(tmp_path))
        assert (await executor.probe())["cpus"] > 0
        assert await executor.prepare("job") == str(tmp_path / "job/work")
        assert await executor.states() == {"job": "prepared"}

    async def test_a_place_that_is_gone_is_told_for_good(self, tmp_path):
        """With the reason that its provider gave."""

        async def gone(command, descriptors, env):
            raise NotFound("The container has ended: by hand.")

        with pytest.raises(NotFound, match="by hand"):
            await Executor(EnteredShell(gone), str(tmp_path)).probe()

    async def test_one_that_cannot_be_reached_may_be_tried_again(self, tmp_path):
        """It may be there still."""

        async def away(command, descriptors, env):
            raise Unavailable("The engine is away.")

        with pytest.raises(Unavailable):
            await Executor(EnteredShell(away), str(tmp_path)).probe()

    async def test_a_place_without_python_is_told(self, tmp_path):
        """And what to do."""

        async def bare(command, descriptors, env):
            os.write(descriptors[2], b"sh: python3: not found\n")
            return 127

        with pytest.raises(NotFound, match="no python3"):
            await Executor(EnteredShell(bare), str(tmp_path)).probe()


class TestConfinedFiles:
    """Files in a folder that somebody else writes to."""

    @pytest.fixture
    def home(self, tmp_path):
        (tmp_path / "home/jobs/work").mkdir(parents=True)
        (tmp_path / "secret").write_text("deep")
        return tmp_path / "home"

    async def test_files_and_folders_go_in_and_out(self, home, tmp_path):
        """Whole, with modes, by the name the home has for those inside."""
        files = ConfinedFiles(home, "/home/guest")
        (tmp_path / "in/deep").mkdir(parents=True)
        (tmp_path / "in/deep/tool").write_text("x")
        (tmp_path / "in/deep/tool").chmod(0o755)
        await files.put(tmp_path / "in", "/home/guest/jobs/work")
        await files.put(tmp_path / "in", "/home/guest/jobs/work")
        there = home / "jobs/work/in/deep/tool"
        assert there.stat().st_mode & 0o777 == 0o755
        await files.get("/home/guest/jobs/work/in/deep/tool", tmp_path / "back", 1)
        assert (tmp_path / "back").read_text() == "x"

    @pytest.mark.parametrize("link", ["../../../secret", "/", ".."])
    async def test_no_link_is_followed(self, home, tmp_path, link):
        """Neither a file that is one nor a folder on the way."""
        files = ConfinedFiles(home, "/home/guest")
        (home / "jobs/work/out").symlink_to(link)
        for source in ("out", f"out{tmp_path}/secret", "out/secret"):
            with pytest.raises(GridcloudError):
                await files.get(f"/home/guest/jobs/work/{source}", tmp_path / "back", 4)
        assert not (tmp_path / "back").exists()
        with pytest.raises(GridcloudError):
            await files.put(tmp_path / "secret", "/home/guest/jobs/work/out")

    @pytest.mark.parametrize(
        "path", ["/etc/passwd", "/home/guest/../x", "/home/guestx/y", "jobs", "/home/guest"]
    )
    async def test_only_what_is_in_the_home_is_named(self, home, tmp_path, path):
        """Whatever the supervisor's frames say."""
        with pytest.raises(InvalidSpec):
            await ConfinedFiles(home, "/home/guest").get(path, tmp_path / "back", 1)


class TestFolders:
    """What a container has on the host."""

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".x", "a\0"])
    def test_a_lease_cannot_name_another_folder(self, tmp_path, name):
        """Its name comes from peers."""
        with pytest.raises(NotFound):
            Folder(tmp_path, name)

    def test_facts_and_end_are_kept(self, tmp_path):
        """For a site that was started anew."""
        folder = Folder(tmp_path, "abc")
        facts = Facts(user="1:1", home="/home/guest", role=LeaseRole.LENT, disk_bytes=5)
        folder.prepare(facts, NOW, None)
        assert Folder(tmp_path, "abc").facts() == facts
        assert folder.end() == NOW
        folder.move_end(NOW + timedelta(hours=1))
        assert folder.end() == NOW + timedelta(hours=1)
        folder.remove()
        folder.remove()
        with pytest.raises(NotFound):
            folder.facts()
        with pytest.raises(NotFound):
            folder.move_end(NOW)


class _FakeLender(Provider, Lender):
    """Confines in name only."""

    kind = "fake"

    def __init__(self, name, problem="", isolation="fake"):
        super().__init__(name, {}, context())
        self.problem = problem
        self.isolation = isolation
        self.ended_leases = []

    async def capacity(self):
        return Capacity(resources=Need().resources)

    async def launch(self, lease):
        raise NotImplementedError

    async def terminate(self, lease_id):
        self.ended_leases.append(lease_id)

    async def made(self):
        return []

    async def enter(self, lease_id, command, descriptors, env):
        raise NotImplementedError

    async def ended(self, lease_id):
        return ""

    def home(self, lease_id):
        return Path("/")

    def shown_as(self, lease_id):
        return "/"

    async def extend(self, lease_id, ends_at):
        return

    async def lending_problem(self):
        return self.problem


class _Live:
    def __init__(self, isolation):
        self.current = SiteSettings(name="x", lending=LendingSettings(isolation=isolation))


def context(state=Path("/nonesuch")):
    return ProviderContext("5e" * 32, state, LendingSettings(), probe=None)


@pytest.mark.parametrize(
    ("isolation", "problem", "chosen"),
    [
        ("auto", "", "bubblewrap"),
        ("auto", "No bubblewrap.", "container"),
        ("container", "", "container"),
        ("bubblewrap", "No bubblewrap.", ""),
        ("box", "", "container"),
        ("other", "", ""),
    ],
)
async def test_the_owner_says_what_confines_guests(isolation, problem, chosen):
    """By default the host's own sandbox, and a container where that does not work."""
    providers = {
        "box": _FakeLender("box", isolation="container"),
        "local": _FakeLender("local", problem, "bubblewrap"),
    }
    confining = Confining(providers, _Live(isolation))
    assert await confining.isolation() == chosen
    assert bool(await confining.problem()) == (not chosen)


async def test_a_loan_that_was_cut_off_is_removed_wherever_it_may_be():
    """Nobody knows yet which provider it was at."""
    providers = {"box": _FakeLender("box"), "local": _FakeLender("local")}
    await Confining(providers, _Live("auto")).terminate(lease(LeaseRole.LENT))
    assert [each.ended_leases for each in providers.values()] == [["abc123"]] * 2


async def test_plans_do_not_wait_for_an_engine_that_is_away(tmp_path):
    """The problem is told, at once and without an error."""
    section = {"image": "x", "engine": f"unix://{tmp_path}/none"}
    provider = ContainersProvider("box", section, context(tmp_path))
    async with asyncio.timeout(5):
        capacity = await provider.capacity()
    assert "does not answer" in capacity.problem
    assert not capacity.known
    await provider.close()
