"""Every provider keeps the same promises: `gridcloud.providers.contract`, run for each."""

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from gridcloud.access import keys
from gridcloud.errors import Forbidden, InvalidSpec, NoCapacity, Unavailable
from gridcloud.model.lease import LeaseRole
from gridcloud.providers import registry
from gridcloud.providers.base import MachineFacts, ProviderContext
from gridcloud.providers.contract import NAME, ProviderContract, assert_telling
from gridcloud.providers.local import LocalProvider, bubblewrap
from gridcloud.providers.ssh import SSHProvider
from gridcloud.settings import LendingSettings
from gridcloud.site.keyring import Keyring
from gridcloud.site.reaching import Reaching
from testbeds import sshd as testbed
from testbeds.memory_provider import MemoryProvider


class TestMemory(ProviderContract):
    """The in-memory twin."""

    bad_sections = [({"cpus": 0}, "cpus"), ({"cpus": "many"}, "cpus"), ({"machines": -1}, "mach")]

    @pytest.fixture
    def make(self, context):
        cloud = {}

        def make(section=None):
            return MemoryProvider(NAME, section or {}, context, cloud)

        return make

    async def test_a_full_cloud_has_no_capacity(self, make, new_lease):
        """The error says that it may pass, and why."""
        provider = make({"machines": 0})
        with pytest.raises(NoCapacity) as refused:
            await provider.launch(new_lease())
        assert refused.value.retryable
        assert_telling(refused.value)


class _Local(ProviderContract):
    bad_sections = [
        ({"cpus": 0}, "cpus"),
        ({"memory": "lots"}, "memory"),
        ({"memory": "1K"}, "memory"),
        ({"gpus": -1}, "gpus"),
    ]

    @pytest.fixture
    def make(self, context):
        def make(section=None):
            return LocalProvider(NAME, section or {}, context)

        return make


class TestLocalOwn(_Local):
    """This host for its own user: nothing is made but a folder."""

    tags_what_it_makes = False

    async def check_works(self, machine):
        assert os.access(machine.folder, os.W_OK)


@pytest.mark.component
@pytest.mark.skipif(bool(bubblewrap.probe()), reason="needs bubblewrap")
class TestLocalLent(_Local):
    """This host for a guest: a sandbox for each lease."""

    role = LeaseRole.LENT

    @pytest.fixture
    def state_folder(self):
        # Sockets want short paths.
        folder = Path(tempfile.mkdtemp(prefix="gridcloud-contract-"))
        yield folder
        shutil.rmtree(folder)

    @pytest.fixture
    def make(self, context):
        made = []

        def make(section=None):
            made.append(LocalProvider(NAME, section or {}, context))
            return made[-1]

        self.entered = make
        return make

    async def check_works(self, machine):
        provider = self.entered()
        with Path(os.devnull).open("r+b") as null:
            streams = (null.fileno(),) * 3
            assert await provider.enter(machine.lease_id, "exit 7", streams, {}) == 7

    async def check_gone(self, machine):
        assert not self.entered().home(machine.lease_id).exists()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A real sshd, and a key file that it lets in."""
    key = keys.ephemeral()
    identity = tmp_path_factory.mktemp("id") / "key"
    identity.touch(0o600)
    identity.write_bytes(key.export_private_key("openssh"))
    with testbed.sshd(authorized=[keys.public_line(key)], host="127.0.0.31") as machine:
        yield machine, identity


@pytest.mark.component
@pytest.mark.skipif(not testbed.available(), reason="needs an OpenSSH server")
class TestSSH(ProviderContract):
    """A plain machine: a real sshd."""

    tags_what_it_makes = False
    bad_sections = [
        ({"host": "h", "user": "u"}, "host_keys"),
        ({"user": "u", "host_keys": ["ssh-ed25519 AAAA"]}, "host"),
        ({"host": "h", "user": "u", "host_keys": []}, "host_keys"),
        ({"host": "h", "user": "u", "host_keys": "ssh-ed25519 AAAA"}, "host_keys"),
        ({"host": "h", "user": "u", "host_keys": ["SHA256:abc"]}, "host_keys"),
        ({"host": "h", "user": "u", "host_keys": ["ssh-ed25519 AAAA"], "port": 0}, "port"),
        ({"host": "-oX", "user": "u", "host_keys": ["ssh-ed25519 AAAA"]}, "host"),
        ({"host": "h", "user": "-l", "host_keys": ["ssh-ed25519 AAAA"]}, "user"),
        ({"host": "h", "user": "u", "host_keys": ["ssh-ed25519 AAAA"], "cpus": 0}, "cpus"),
    ]

    @pytest.fixture
    def probe(self, tmp_path):
        return Reaching(Keyring(tmp_path / "keys"), {}).probe

    @pytest.fixture
    def good(self, machine):
        there, identity = machine
        return {
            "host": there.host,
            "port": there.port,
            "user": there.user,
            "host_keys": [there.host_key_line],
            "identity": str(identity),
        }

    @pytest.fixture
    def make(self, context, good):
        def make(section=None):
            return SSHProvider(NAME, good if section is None else section, context)

        return make

    async def check_works(self, machine):
        assert machine.endpoint

    async def test_wrong_identity_is_a_problem_that_is_told(self, make, good, tmp_path):
        """Whoever checks it learns why nobody is let in; nothing is raised."""
        wrong = tmp_path / "wrong"
        wrong.touch(0o600)
        wrong.write_bytes(keys.ephemeral().export_private_key("openssh"))
        capacity = await make(good | {"identity": str(wrong)}).check()
        assert "does not let" in capacity.problem

    async def test_a_changed_key_is_a_problem_that_is_told(self, make, good):
        """Both fingerprints are named."""
        expected = keys.public_line(keys.ephemeral())
        capacity = await make(good | {"host_keys": [expected]}).check()
        assert keys.fingerprint(expected) in capacity.problem
        assert keys.fingerprint(good["host_keys"][0]) in capacity.problem


async def test_ssh_capacity_never_waits_for_a_second_look(tmp_path):
    """Once it is known, a machine that hangs holds up nobody's plan."""
    looks = []

    async def probe(endpoint, identity):
        looks.append(endpoint.host)
        if len(looks) > 1:
            await asyncio.Event().wait()
        return MachineFacts(python="3.11.2", cpus=4, memory_bytes=2**33, gpus=0, hostname="h")

    context = ssh_context(tmp_path, probe)
    section = {"host": "h", "user": "u", "host_keys": ["ssh-ed25519 AAAA"]}
    provider = SSHProvider(NAME, section, context)
    first = await provider.capacity()
    provider._known_until = 0.0
    assert await provider.capacity() == first
    assert await provider.capacity() == first
    await asyncio.sleep(0)
    assert len(looks) == 2
    await provider.close()


async def test_ssh_many_plans_share_one_look(tmp_path):
    """Ten who ask at once log in once."""
    looks = []

    async def probe(endpoint, identity):
        looks.append(endpoint.host)
        await asyncio.sleep(0.01)
        raise Forbidden("No.", hint="Ask.")

    section = {"host": "h", "user": "u", "host_keys": ["ssh-ed25519 AAAA"], "cpus": 2}
    provider = SSHProvider(NAME, section, ssh_context(tmp_path, probe))
    found = await asyncio.gather(*(provider.capacity() for _ in range(10)))
    assert {(c.problem, c.resources.cpus) for c in found} == {("No. Ask.", 2)}
    assert len(looks) == 1


def ssh_context(tmp_path, probe):
    return ProviderContext(
        site_key="5e" * 32, state_folder=tmp_path, lending=LendingSettings(), probe=probe
    )


class _Entry:
    """An entry point as a broken or a hostile plug-in would have it."""

    name, value = "odd", "odd_package:Provider"

    def __init__(self, loaded):
        self.load = loaded


def _cannot_be_imported():
    raise ImportError("No module named 'odd_sdk'")


def _fails(*_):
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (_cannot_be_imported, "odd_sdk"),
        (lambda: _fails, "boom"),
        (lambda: lambda *_: object(), "is no provider"),
    ],
)
def test_a_broken_plugin_is_told_with_its_cause(monkeypatch, tmp_path, load, words):
    """It never takes the site down, nor goes unsaid."""
    monkeypatch.setattr(registry, "entry_points", lambda **_: [_Entry(load)])
    with pytest.raises(Unavailable, match=words) as told:
        registry.make("x", "odd", {}, ssh_context(tmp_path, None))
    assert_telling(told.value)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("x", "cloud9", "cloud9"),
        ("x", "", "lacks its kind"),
        ("a/b", "ssh", "a/b"),
        ("", "ssh", "name"),
    ],
)
def test_an_unknown_kind_or_name_is_refused(tmp_path, name, kind, words):
    """With the kinds that there are, or what a name may be."""
    with pytest.raises(InvalidSpec, match=words) as told:
        registry.make(name, kind, {}, ssh_context(tmp_path, None))
    assert_telling(told.value)
