"""Containers on a real podman: the provider's contract, own jobs, and who tries to get out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gridcloud.errors import (
    Conflict,
    GridcloudError,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Unavailable,
)
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, LoanTerms
from gridcloud.model.machine import MachineOrder, VolumeMount
from gridcloud.model.need import Need
from gridcloud.model.things import Tags
from gridcloud.providers.base import ProviderContext
from gridcloud.providers.containers import ContainersProvider
from gridcloud.providers.contract import NAME, ProviderContract, assert_telling
from gridcloud.settings import LendingSettings
from testbeds import podman as testbed
from testbeds.fault_proxy import FaultProxy
from testbeds.faults import Subject, hurt, seeds

pytestmark = [
    pytest.mark.xdist_group("podman"),
    pytest.mark.skipif(bool(testbed.missing()), reason=testbed.missing() or "podman"),
]

SITE = "5e" * 32
PATIENCE = 60.0


@pytest.fixture(scope="session")
def engine():
    """One podman for all tests here; each looks after its own containers."""
    with testbed.podman() as engine:
        yield engine


@pytest.fixture
def state_folder():
    """A folder with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="gridcloud-containers-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def section(engine):
    """Good settings: no network, as there is no other in the testbed."""
    return {"image": testbed.IMAGE, "engine": engine.address, "network": "none"}


def new_context(state_folder, site=SITE, making=None):
    return ProviderContext(
        site_key=site,
        state_folder=state_folder,
        lending=LendingSettings(enabled=True),
        probe=None,
        making=making,
    )


def new_lease(role=LeaseRole.OWN, need=None, minutes=10.0, **more):
    now = datetime.now(UTC)
    if role is LeaseRole.LENT:
        more.setdefault("terms", LoanTerms(processes=64, disk_bytes=2**26))
    return Lease(
        id=new_id(16),
        role=role,
        state=LeaseState.INTENT,
        provider=NAME,
        need=need or Need(memory_bytes=2**27),
        created_at=now,
        ends_at=None if minutes is None else now + timedelta(minutes=minutes),
        **more,
    )


@pytest.fixture
async def provider(section, state_folder):
    """A provider with a site of its own, and nothing left of it in the end."""
    made = ContainersProvider(NAME, section, new_context(state_folder, new_id(64)))
    yield made
    for lease_id in await made.made():
        await made.terminate(lease_id)
    await made.close()


async def run_in(provider, lease_id, command, stdin=b"", env=None):
    """Return exit status, stdout and stderr of a command line in a container."""
    with tempfile.TemporaryFile() as given, contextlib.ExitStack() as stack:
        given.write(stdin)
        given.seek(0)
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        streams = (given.fileno(), out.fileno(), err.fileno())
        async with asyncio.timeout(PATIENCE):
            status = await provider.enter(lease_id, command, streams, env or {})
        out.seek(0), err.seek(0)
        return status, out.read(), err.read()


async def until(condition):
    """Wait for what becomes true by itself."""
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.1)


class _Containers(ProviderContract):
    bad_sections = [
        ({}, "image"),
        ({"image": "x y"}, "image"),
        ({"image": "x", "cpus": 0}, "cpus"),
        ({"image": "x", "memory": "1K"}, "memory"),
        ({"image": "x", "gpus": ["a", "a"]}, "gpus"),
        ({"image": "x", "network": "a b"}, "network"),
        ({"image": "x", "lingers": "0s"}, "lingers"),
    ]

    @pytest.fixture
    def state_folder(self, state_folder):
        return state_folder

    @pytest.fixture
    def make(self, context, section):
        def make(told=None):
            return ContainersProvider(NAME, section if told is None else told, context)

        self.make_another = make
        return make

    async def check_works(self, machine):
        another = self.make_another()
        assert (await run_in(another, machine.lease_id, "exit 7"))[0] == 7
        await another.close()

    async def check_gone(self, machine):
        another = self.make_another()
        assert await another.ended(machine.lease_id)
        assert not another.home(machine.lease_id).exists()
        await another.close()


class TestOwnContainers(_Containers):
    """Containers for the owner's jobs."""


class TestLentContainers(_Containers):
    """Containers that confine guests."""

    role = LeaseRole.LENT


class TestEntering:
    """Commands in a container."""

    async def test_streams_and_status_are_the_commands_own(self, provider):
        """Input, both outputs and the environment pass; a status and a signal come back."""
        lease = new_lease()
        await provider.launch(lease)
        told = await run_in(
            provider, lease.id, 'cat; echo "$WORD" >&2; pwd; exit 3', b"in\n", {"WORD": "hey"}
        )
        assert told == (3, f"in\n{provider.home(lease.id)}\n".encode(), b"hey\n")
        status, _, _ = await run_in(provider, lease.id, "kill -TERM $$")
        assert status == 128 + 15

    async def test_much_passes_whole(self, provider):
        """Megabytes go through in both directions, however slowly they are read."""
        lease = new_lease()
        await provider.launch(lease)
        data = os.urandom(3 * 2**20)
        assert await run_in(provider, lease.id, "cat", data) == (0, data, b"")

    async def test_one_that_is_gone_says_why(self, provider, engine):
        """Whoever removes a container by hand is told of to those who want to enter it."""
        lease = new_lease()
        await provider.launch(lease)
        [name] = engine.labelled(f"gridcloud-lease={lease.id}")
        engine.cli("rm", "--force", "--time", "0", name)
        with pytest.raises(NotFound, match="somebody removed it"):
            await run_in(provider, lease.id, "true")
        assert await provider.ended(lease.id)
        await provider.terminate(lease.id)
        assert await provider.made() == []

    async def test_the_home_is_shared_with_the_host(self, provider):
        """What a job writes at home lies on this host, at the same path."""
        lease = new_lease()
        machine = await provider.launch(lease)
        assert machine.folder == f"{provider.home(lease.id)}/jobs"
        await run_in(provider, lease.id, "echo hello >file")
        assert (provider.home(lease.id) / "file").read_text() == "hello\n"


class TestConfinement:
    """What a guest's container keeps its guest from."""

    @pytest.fixture
    async def guest(self, provider):
        """A guest, and how it runs a command."""
        lease = new_lease(LeaseRole.LENT)
        await provider.launch(lease)

        async def run(command):
            return await run_in(provider, lease.id, command)

        return run

    async def test_nothing_of_the_host_is_seen(self, guest, provider):
        """Neither the site's state nor its processes nor its files; no way up by links."""
        state = provider.context.state_folder
        secret = state / "secret"
        secret.write_text("deep")
        for attempt in (
            f"cat {secret}",
            f"ls {state}",
            f"cat /proc/1/root{secret}",
            f"cat /proc/self/root{secret}",
            f"cd /home/guest && cat ../../..{secret}",
            "cat /etc/shadow",
            "ls /proc/1/root/",
        ):
            status, out, _ = await guest(attempt)
            assert status != 0, attempt
            assert b"deep" not in out
        _, out, _ = await guest("ls /proc | grep -c '^[0-9]'")
        assert int(out) < 10

    async def test_it_has_no_power(self, guest):
        """No capability, not even by a set-user-id program; a user who is nobody on the host."""
        _, out, _ = await guest("id -u; grep -E 'Cap(Eff|Prm|Bnd)|NoNewPrivs' /proc/self/status")
        uid, *lines = out.decode().split("\n")
        assert int(uid) >= 0x7000_0000 or os.geteuid()
        assert all(line.split()[1].strip("0") == "" for line in lines if line.startswith("Cap"))
        assert "NoNewPrivs:\t1" in lines
        for attempt in (
            "mount -t tmpfs none /mnt",
            "unshare --user --map-root-user true",
            "mknod /tmp/disk b 8 0",
            "chroot / true",
            "touch /etc/here",
            "touch /run/gridcloud/ends-at",
            "echo 1 >/proc/sys/kernel/panic",
            "dmesg",
        ):
            assert (await guest(f"{attempt} 2>/dev/null"))[0] != 0, attempt

    async def test_it_cannot_reach_its_switch(self, guest):
        """The first process, which ends it all in time, can be neither stopped nor read."""
        for attempt in ("kill -STOP 1", "kill -KILL 1", "cat /proc/1/environ", "cat /proc/1/mem"):
            status, _, errors = await guest(attempt)
            assert status != 0, attempt
            assert b"not permitted" in errors or b"ermission denied" in errors

    async def test_without_leave_there_is_no_network(self, guest):
        """Only its own loopback, where nobody listens."""
        _, out, _ = await guest("cat /proc/net/dev | grep -c : ; ls /sys/class/net")
        assert out.split()[0] == b"1"
        assert b"lo" in out

    async def test_processes_are_bounded(self, guest):
        """A fork bomb ends with the bound of its own loan."""
        _, out, errors = await guest(
            "for i in $(seq 200); do sleep 30 & done 2>&1; ls /proc | grep -c '^[0-9]'"
        )
        assert b"esource temporarily unavailable" in out + errors or b"fork" in out + errors

    async def test_disk_is_bounded(self, provider):
        """One who fills the disk loses the place, and is told so."""
        terms = LoanTerms(processes=64, disk_bytes=2**22)
        lease = new_lease(LeaseRole.LENT, terms=terms)
        await provider.launch(lease)
        for number in range(4):
            await run_in(provider, lease.id, f"head -c 3000000 /dev/zero >f{number}")

        async def over():
            return "of disk" in await provider.ended(lease.id)

        await until(over)
        with pytest.raises(NotFound, match="MiB of disk"):
            await run_in(provider, lease.id, "true")


class TestBounds:
    """What a container gets, and when it ends."""

    async def test_memory_is_bounded_and_told(self, provider):
        """What takes more than the lease has is killed, and the reason can be learnt."""
        lease = new_lease()
        await provider.launch(lease)
        assert await provider.overrun(lease.id) == ""
        status, _, _ = await run_in(
            provider, lease.id, "python3 -c 'x = bytearray(2**30)'; echo $? >status; exit 9"
        )
        assert status == 9
        assert (provider.home(lease.id) / "status").read_text() == "137\n"
        assert "more memory than its lease" in await provider.overrun(lease.id)

    async def test_it_ends_by_itself(self, provider, engine, section):
        """With nobody there to end it, a container is gone soon after its lease's end."""
        lease = new_lease(minutes=1 / 6)
        one = ContainersProvider(NAME, section, provider.context)
        await one.launch(lease)
        await one.close()

        async def gone():
            return not engine.labelled(f"gridcloud-lease={lease.id}")

        await until(gone)
        assert await provider.ended(lease.id) == "The lease has come to its end."

    async def test_its_end_can_be_moved(self, provider, engine):
        """Later, and then it lives on; or earlier, and then it goes."""
        lease = new_lease(minutes=1 / 4)
        await provider.launch(lease)
        later = lease.model_copy(update={"ends_at": datetime.now(UTC) + timedelta(hours=1)})
        await provider.lengthen(later)
        await asyncio.sleep((lease.ends_at - datetime.now(UTC)).total_seconds() + 5)
        assert (await run_in(provider, lease.id, "exit 5"))[0] == 5
        await provider.extend(lease.id, datetime.now(UTC))

        async def gone():
            return not engine.labelled(f"gridcloud-lease={lease.id}")

        await until(gone)

    async def test_without_an_end_it_lasts_as_long_as_its_site(self, section, state_folder, engine):
        """A site that lives moves the end again and again; once it is gone, the container goes."""
        context = new_context(state_folder, new_id(64))
        provider = ContainersProvider(NAME, section | {"lingers": "6s"}, context)
        lease = new_lease(minutes=None)
        await provider.launch(lease)
        await asyncio.sleep(10)
        assert (await run_in(provider, lease.id, "exit 5"))[0] == 5
        await provider.close()

        async def gone():
            return not engine.labelled(f"gridcloud-lease={lease.id}")

        await until(gone)
        next_one = ContainersProvider(NAME, section, context)
        await next_one.terminate(lease.id)
        await next_one.close()

    async def test_gpus_are_given_to_one_lease_each(self, section, state_folder):
        """Devices named in the settings are shown to who has them, and to nobody else."""
        devices = ["/dev/full", "/dev/fuse"]
        context = new_context(state_folder, new_id(64))
        provider = ContainersProvider(NAME, section | {"gpus": devices}, context)
        assert (await provider.capacity()).resources.gpus == 2
        need = Need(memory_bytes=2**27, gpus=1)
        leases = [new_lease(need=need) for _ in range(3)]
        await asyncio.gather(*(provider.launch(lease) for lease in leases[:2]))
        with pytest.raises(NoCapacity, match="0 of 1 GPUs"):
            await provider.launch(leases[2])
        seen = [(await run_in(provider, lease.id, "ls /dev/fuse"))[0] == 0 for lease in leases[:2]]
        assert sorted(seen) == [False, True]
        for lease in leases:
            await provider.terminate(lease.id)
        await provider.close()

    async def test_volumes_outlive_containers(self, provider, engine):
        """One is made when it has a size, keeps what was written, and must be there without."""

        def wanting(size):
            volume = VolumeMount(name="data", size_bytes=size, path="/data")
            return new_lease(order=MachineOrder(volumes=(volume,)))

        with pytest.raises(InvalidSpec, match="no volume 'data'") as refused:
            await provider.launch(wanting(0))
        assert_telling(refused.value)
        one, other = wanting(2**20), wanting(0)
        await provider.launch(one)
        assert (await run_in(provider, one.id, "echo kept >/data/file"))[0] == 0
        await provider.terminate(one.id)
        await provider.launch(other)
        assert (await run_in(provider, other.id, "cat /data/file"))[1] == b"kept\n"
        (volume,) = await provider.volumes()
        assert (volume.name, volume.size_bytes, volume.attached_to) == ("data", 2**20, other.id)
        assert datetime.now(UTC) - timedelta(minutes=5) < volume.created_at <= datetime.now(UTC)
        with pytest.raises(Conflict, match="in use") as refused:
            await provider.remove_volume("data")
        assert_telling(refused.value)
        await provider.terminate(other.id)
        assert (await provider.volumes())[0].attached_to == ""
        await provider.remove_volume("data")
        assert await provider.volumes() == []

    async def test_volumes_are_made_and_removed_without_containers(self, provider):
        """Each name once; what is not there is told with what is."""
        await provider.make_volume("data", 2**20)
        with pytest.raises(Conflict, match="already"):
            await provider.make_volume("data", 2**20)
        with pytest.raises(NotFound, match="no volume 'date'") as refused:
            await provider.remove_volume("date")
        assert "data" in refused.value.hint
        await provider.remove_volume("data")

    async def test_sites_at_one_engine_know_of_one_another(self, section, state_folder, provider):
        """Of a volume, and of a container; and each lists only what is its own."""
        other = ContainersProvider(NAME, section, new_context(state_folder / "other", new_id(64)))
        try:
            await other.make_volume("data", 2**20)
            sites = await provider.sites()
            assert Tags.of(other.context.site_key, "").site in sites
            assert await provider.volumes() == []
            lease = new_lease()
            await provider.launch(lease)
            assert Tags.of(provider.context.site_key, "").site in await other.sites()
            assert await other.made() == []
            await provider.terminate(lease.id)
        finally:
            await other.remove_volume("data")
            await other.close()


class TestTroubles:
    """What goes wrong with engines and images."""

    async def test_an_image_that_cannot_be_had_is_told(self, provider):
        """With the registry's own words; nothing is left of the launch."""
        lease = new_lease(order=MachineOrder(image="localhost:1/no/such:thing"))
        with pytest.raises(NotFound, match="localhost:1/no/such:thing") as refused:
            await provider.launch(lease)
        assert_telling(refused.value)
        assert await provider.made() == []

    async def test_images_need_not_be_fetched(self, section, state_folder):
        """With pull = false only what is here is used."""
        provider = ContainersProvider(
            NAME, section | {"pull": False, "image": "no/such"}, new_context(state_folder)
        )
        with pytest.raises(NotFound, match="none are fetched") as refused:
            await provider.launch(new_lease())
        assert_telling(refused.value)
        assert "is not here yet" in await provider.lending_problem()
        assert "none are fetched" in (await provider.check()).problem
        await provider.close()

    async def test_an_image_without_a_shell_is_told(self, provider, engine, tmp_path):
        """And what an image must have."""
        (tmp_path / "file").write_text("x")
        archive = shutil.make_archive(str(tmp_path / "image"), "tar", tmp_path, "file")
        engine.cli("import", archive, "localhost/bare:1")
        try:
            lease = new_lease(order=MachineOrder(image="localhost/bare:1"))
            with pytest.raises(InvalidSpec, match="no /bin/sh") as refused:
                await provider.launch(lease)
            assert_telling(refused.value)
            assert await provider.made() == []
            checked = ContainersProvider(
                NAME, provider_section(provider) | {"image": "localhost/bare:1"}, provider.context
            )
            assert "no /bin/sh" in (await checked.check()).problem
            await checked.close()
        finally:
            engine.cli("rmi", "--force", "localhost/bare:1")

    async def test_an_engine_that_is_away_is_a_problem_that_is_told(self, section, state_folder):
        """Plans learn it quickly; a launch says it, and may be tried again."""
        away = section | {"engine": f"unix://{state_folder}/nobody.sock"}
        provider = ContainersProvider(NAME, away, new_context(state_folder))
        began = time.monotonic()
        capacity = await provider.capacity()
        assert time.monotonic() - began < 2
        assert "does not answer" in capacity.problem
        with pytest.raises(Unavailable) as refused:
            await provider.launch(new_lease())
        assert_telling(refused.value)
        await provider.close()

    async def test_a_container_of_somebody_else_is_left_alone(self, provider, engine):
        """A name that is taken by another is told, and what has it stays."""
        lease = new_lease()
        name = f"gridcloud-{provider.context.site_key[:12]}-{lease.id}"
        engine.cli("create", "--name", name, "--network", "none", testbed.IMAGE, "true")
        try:
            with pytest.raises(GridcloudError, match="not this site's"):
                await provider.launch(lease)
            assert engine.cli("ps", "--all", "--filter", f"name={name}", "-q").stdout
        finally:
            engine.cli("rm", "--force", name)


def provider_section(provider):
    """Return the section a provider was made from."""
    section = provider.section
    return {"image": section.image, "engine": section.engine, "network": section.network}


@pytest.mark.parametrize("seed", seeds())
@pytest.mark.timeout(240)
async def test_faults_leave_nothing(seed, section, state_folder, engine):
    """However the engine's answers are hurt, and whenever the site dies, all goes in the end."""
    site = new_id(64)
    async with FaultProxy(engine.address, seed=seed, listen=state_folder / "api.sock") as proxy:
        killed = []

        def make():
            told = section | {"engine": proxy.url}
            return ContainersProvider(NAME, told, new_context(state_folder, site))

        def kill(provider):
            killed.append(provider)
            provider._containers.reach = cut_off

        async def left():
            label = f"gridcloud-site={site[:32]}"
            folder = state_folder / "containers"
            there = await asyncio.to_thread(engine.labelled, label)
            return there + (list(folder.iterdir()) if folder.exists() else [])

        def lease():
            role = LeaseRole.LENT if seed % 2 else LeaseRole.OWN
            return new_lease(role, Need(memory_bytes=2**26))

        await hurt(
            seed,
            Subject(
                make=make,
                new_lease=lease,
                left=left,
                kill=kill,
                calm=proxy.calm,
                launch_seconds=1.0,
                settles_seconds=0.3,
                leases=2,
            ),
        )


async def cut_off():
    """Stand for an engine that a killed process cannot ask any more."""
    raise Unavailable("This site was killed.", hint="It cannot go on.")
