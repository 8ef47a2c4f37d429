"""The LXD provider against a real LXD: its contracts, faults, quotas, and an LXD that is away.

Instances here are of an image that does nothing, so they come and go in a moment; machines that
boot are in test_lxd_machines.py.
"""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import Forbidden, InvalidSpec, NoCapacity, NotFound, Unavailable
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.clouds import Condition
from gridcloud.providers.cloud.contract import (
    SITE,
    CloudContract,
    MachineProviderContract,
    MakingForTests,
)
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.contract import NAME
from gridcloud.providers.lxd import LXDProvider
from gridcloud.providers.lxd.cloud import LXDCloud
from gridcloud.providers.lxd.section import LXDSection
from gridcloud.settings import LendingSettings
from testbeds.fault_proxy import CALM, FaultProxy, Faults
from testbeds.faults import Subject, hurt, seeds

pytestmark = [pytest.mark.xdist_group("lxd"), pytest.mark.timeout(900)]
SHAPES = {
    "small": {"cpus": 1, "memory": "128MiB"},
    "large": {"cpus": 2, "memory": "256MiB"},
}


def section(project, **more):
    """Return settings for a project of the testbed."""
    told = {"socket": str(project.socket), "project": project.name, "shapes": SHAPES}
    return told | {"image": project.image("tiny"), **more}


def cloud_of(project, **more):
    """Return a cloud over a project of the testbed."""
    return LXDCloud(read_section(LXDSection, NAME, section(project, **more)), SITE)


class Addressed(LXDCloud):
    """A cloud whose instances, which have none, are shown with an address."""

    async def server(self, lease_id):
        found = await super().server(lease_id)
        if found is None or found.condition is not Condition.RUNNING:
            return found
        return found.model_copy(update={"address": "192.0.2.1"})


class Answering(CloudProvider):
    """A provider whose machines answer at once."""

    kind = "lxd"

    def __init__(self, told, context):
        async def reach(host, port):
            pass

        own = read_section(LXDSection, NAME, told)
        super().__init__(NAME, own, context, Addressed(own, context.site_key), reach=reach)


class TestLXDCloud(CloudContract):
    """What every cloud promises."""

    @pytest.fixture
    def make_cloud(self, lxd):
        own = read_section(LXDSection, NAME, section(lxd))
        return lambda site_key: LXDCloud(own, site_key)


class TestLXDProvider(MachineProviderContract):
    """What every provider of machines promises."""

    bad_sections = [
        ({"remote": "no spaces"}, "remote"),
        ({"type": "cow"}, "type"),
        ({"shapes": {"s": {"cpus": 0, "memory": "1GiB"}}}, "shapes.s.cpus"),
        ({"config": {"limits.cpu": "64"}}, "config"),
    ]

    @pytest.fixture
    def make(self, context, lxd):
        return lambda told=None: Answering(section(lxd) if told is None else told, context)

    def test_bad_sections_are_refused(self, context):
        """The real provider reads its section as it should."""
        super().test_bad_sections_are_refused(lambda told: LXDProvider(NAME, told, context))


@pytest.fixture
def context(tmp_path):
    """Return what a site gives, for machines to which nothing is done."""

    async def probe(endpoint, identity):
        raise AssertionError("nothing is probed here")

    return ProviderContext(SITE, tmp_path, LendingSettings(), probe, MakingForTests())


def new_lease():
    """Return a lease of a small machine for some minutes."""
    now = datetime.now(UTC)
    return Lease(
        id=new_id(16),
        role=LeaseRole.OWN,
        state=LeaseState.INTENT,
        provider=NAME,
        need=Need(memory_bytes=2**26),
        created_at=now,
        ends_at=now + timedelta(minutes=10),
    )


# Fast, so that many runs fit in a minute; what goes wrong is the same.
QUICK = Faults(withheld_seconds=0.3, retry_after="0", stale_seconds=0.5)
AT_ONCE = 10


def batches():
    """Return the seeds, some of which run side by side."""
    every = list(seeds())
    return [every[n : n + AT_ONCE] for n in range(0, len(every), AT_ONCE)]


@pytest.mark.parametrize("batch", batches(), ids=lambda batch: f"{batch[0]}-{batch[-1]}")
async def test_faults_leave_nothing(batch, lxd_server, context, tmp_path):
    """Errors, cuts, stale and repeated answers, and kills at any instant leave nothing at LXD."""

    async def campaign(seed):
        async with contextlib.AsyncExitStack() as stack:
            # Asked in threads: LXD takes nobody's requests while one that was let in says nothing,
            # as a proxy does whose loop waits for LXD.
            entered = lxd_server.project()
            project = await asyncio.to_thread(entered.__enter__)
            stack.push_async_callback(asyncio.to_thread, entered.__exit__, None, None, None)
            path = tmp_path / f"{seed}.sock"
            upstream = f"unix://{project.socket}"
            proxy = FaultProxy(upstream, seed=seed, listen=path, faults=QUICK)
            await stack.enter_async_context(proxy)
            told = await asyncio.to_thread(section, project, socket=str(path))
            told["calls_per_second"] = 1000

            async def left():
                return await asyncio.to_thread(project.left)

            def calm():
                proxy.faults = CALM

            def kill(provider):
                def dead():
                    raise Unavailable("This site was killed.")

                api = provider._cloud._api
                api._find, api._way = dead, None

            subject = Subject(
                make=lambda: Answering(told, context),
                new_lease=new_lease,
                left=left,
                kill=kill,
                calm=calm,
                launch_seconds=4.0,
                settles_seconds=0.5,
                leases=2,
            )
            await hurt(seed, subject)

    async with asyncio.TaskGroup() as group:
        for seed in batch:
            group.create_task(campaign(seed))


class Interrupted(Exception):
    """What ends an attempt in a test."""


async def test_an_instance_that_was_never_started_is_gone_on_with(lxd, context, monkeypatch):
    """After a death between making and starting it is found, started, and no other made."""
    lease = new_lease()
    one = cloud_of(lxd)

    async def die(name):
        raise Interrupted

    monkeypatch.setattr(one, "_start", die)
    provider = Answering(section(lxd), context)
    made = {}

    async def keep(build):
        made["build"] = build
        raise InvalidSpec("Only the build is wanted.", hint="Go on.")

    with monkeypatch.context() as patch:
        patch.setattr(provider._cloud, "create", keep)
        with pytest.raises(InvalidSpec):
            await provider.launch(lease)
    with pytest.raises(Interrupted):
        await one.create(made["build"])
    assert [told["status"] for told in lxd.instances()] == ["Stopped"]
    assert await one.server(lease.id) is None
    assert await provider.made() == [lease.id]
    await provider.launch(lease)
    assert [told["status"] for told in lxd.instances()] == ["Running"]
    await provider.terminate(lease.id)
    assert lxd.left() == []
    await provider.close()
    await one.close()


async def test_a_machine_that_powers_itself_off_is_gone(lxd, context):
    """LXD removes it: nobody has to be there."""
    provider = Answering(section(lxd), context)
    machine = await provider.launch(new_lease())
    lxd.query("PUT", f"/1.0/instances/{machine.id}/state", {"action": "stop", "timeout": 10})
    async with asyncio.timeout(30):
        while lxd.left():
            await asyncio.sleep(0.1)
    assert await provider.made() == []
    await provider.close()


async def test_a_project_that_is_full_is_no_capacity(lxd_server, context):
    """A limit of the project shows as headroom, and refuses with the limit's own words."""
    with lxd_server.project(limits_instances="1", limits_cpu="4", limits_memory="1GiB") as project:
        project.image("tiny")
        provider = Answering(section(project), context)
        headroom = (await provider.capacity()).headroom[""]
        assert (headroom.machines, headroom.cpus, headroom.memory_bytes) == (1, 4, 2**30)
        await provider.launch(new_lease())
        assert (await provider.check()).headroom[""].machines == 0
        with pytest.raises(NoCapacity, match="eached maximum number of instances") as refused:
            await provider.launch(new_lease())
        assert "limit" in refused.value.hint
        assert len(project.instances()) == 1
        await provider.close()


async def test_many_at_once_are_all_there(lxd, context):
    """Twelve launches side by side end with twelve machines, and then with none."""
    provider = Answering(section(lxd), context)
    leases = [new_lease() for _ in range(12)]
    made = await asyncio.gather(*(provider.launch(lease) for lease in leases))
    assert len({machine.id for machine in made}) == len(lxd.instances()) == len(leases)
    await asyncio.gather(*(provider.terminate(lease.id) for lease in leases))
    assert lxd.left() == []
    await provider.close()


async def test_shapes_follow_the_host_unless_told(lxd):
    """Three sizes, none above a half of the host."""
    cloud = cloud_of(lxd, shapes={})
    resources = lxd.query("GET", "/1.0/resources")
    shapes = {shape.name: shape.resources for shape in await cloud.shapes()}
    assert list(shapes) == ["small", "medium", "large"]
    assert shapes["large"].memory_bytes <= resources["memory"]["total"] / 2
    assert shapes["small"].memory_bytes < shapes["medium"].memory_bytes
    await cloud.close()


async def test_an_image_is_found_by_alias_pattern_and_fingerprint(lxd):
    """All name the same one; another name tells what there is, and where others come from."""
    lxd.image("debian")
    cloud = cloud_of(lxd)
    shape = (await cloud.shapes())[0]
    by_alias = await cloud.image("debian", shape)
    assert by_alias.user == "debian"
    assert await cloud.image("deb*", shape) == by_alias
    assert await cloud.image(by_alias.id[:12], shape) == by_alias
    with pytest.raises(NotFound) as refused:
        await cloud.image("debain", shape)
    assert "debian" in refused.value.hint
    with pytest.raises(NotFound, match="no server of images called 'nowhere'"):
        await cloud.image("nowhere:debian/12", shape)
    assert (await cloud.image("ubuntu:24.04", shape)).user == "ubuntu"
    await cloud.close()


async def test_settings_that_name_what_is_not_there_are_told(lxd, context):
    """A wrong project, network, profile or pool fails for good, and says what is missing."""
    for wrong in ({"project": "nowhere"}, {"network": "nowhere"}, {"profiles": ["nowhere"]}):
        provider = Answering(section(lxd) | wrong, context)
        with pytest.raises(NotFound) as refused:
            await provider.launch(new_lease())
        assert "LXD says" in refused.value.message
        assert refused.value.hint
        await provider.close()
    assert lxd.left() == []


async def test_an_lxd_that_is_away_is_unavailable_and_comes_back(lxd, context, tmp_path):
    """It is a problem that passes: told as such, and over when LXD answers again."""
    proxy = FaultProxy(f"unix://{lxd.socket}", listen=tmp_path / "s", faults=CALM)
    provider = Answering(section(lxd, socket=str(tmp_path / "s")), context)
    with pytest.raises(Unavailable, match="does not answer"):
        await provider.made()
    async with proxy:
        assert await provider.made() == []
    with pytest.raises(Unavailable, match="does not answer"):
        await provider.made()
    await provider.close()


async def test_what_is_no_lxd_is_told(context, tmp_path):
    """Something else that listens there is not believed."""

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        writer.close()

    path = tmp_path / "s"
    async with await asyncio.start_unix_server(serve, path):
        provider = LXDProvider(NAME, {"socket": str(path)}, context)
        capacity = await provider.check()
        assert "is no LXD" in capacity.problem
        await provider.close()


async def test_a_remote_is_reached_by_the_conventions_of_lxc(
    lxd, lxd_server, tmp_path, monkeypatch
):
    """With client certificate and pinned server, as `lxc remote add` leaves them; else refused."""
    folder = tmp_path / "lxc"
    (folder / "servercerts").mkdir(parents=True)
    with lxd_server.https(folder) as address:
        monkeypatch.setenv("LXD_CONF", str(folder))
        (folder / "config.yml").write_text(
            f"remotes:\n  far: {{addr: 'https://{address}', protocol: lxd, project: {lxd.name}}}\n"
        )
        own = read_section(LXDSection, NAME, {"remote": "far", "shapes": SHAPES})
        cloud = LXDCloud(own, SITE)
        assert (await cloud.image(lxd.image("tiny"), (await cloud.shapes())[0])).name == "tiny"
        assert await cloud.things() == []
        await cloud.close()
        (folder / "servercerts/far.crt").write_text((folder / "client.crt").read_text())
        with pytest.raises(Forbidden, match="does not prove to be the one"):
            await cloud.shapes()
        await cloud.close()
    with pytest.raises(NotFound, match="no remote 'near'"):
        await LXDCloud(read_section(LXDSection, NAME, {"remote": "near"}), SITE).shapes()
