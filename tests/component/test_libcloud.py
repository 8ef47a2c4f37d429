"""Libcloud's drivers by settings: DigitalOcean's, against a server of its call shapes."""

import asyncio
import inspect

import pytest
from libcloud.compute.drivers.digitalocean import DigitalOcean_v2_NodeDriver
from libcloud.compute.drivers.vultr import VultrNodeDriverV2
from libcloud.compute.providers import get_driver

from gridcloud.errors import Forbidden, InvalidSpec, NoCapacity, NotFound
from gridcloud.model.machine import MachineOrder
from gridcloud.providers.base import ProviderContext, read_section
from gridcloud.providers.cloud.contract import (
    SITE,
    CloudContract,
    MachineProviderContract,
    MakingForTests,
)
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.contract import NAME, assert_telling
from gridcloud.providers.libcloud import LibcloudProvider
from gridcloud.providers.libcloud.any_cloud import LibcloudCloud
from gridcloud.providers.libcloud.dialects import DIALECTS
from gridcloud.providers.libcloud.section import LibcloudSection
from gridcloud.settings import LendingSettings
from testbeds import droplets
from testbeds.fault_proxy import FaultProxy, Faults
from testbeds.faults import Subject, hurt, seeds
from testbeds.leases import lease

_AT_ONCE = 25
BATCHES = [tuple(seeds()[n : n + _AT_ONCE]) for n in range(0, len(seeds()), _AT_ONCE)]


class QuickCloud(LibcloudCloud):
    """One that is believed soon; ``kill`` ends it as ``kill -9`` does."""

    shows_late_seconds = 0.8

    def kill(self):
        async def never(doing, work):
            await asyncio.get_running_loop().create_future()

        self._ask = never


class Provider(CloudProvider):
    """A provider whose machines are taken to answer."""

    kind = "libcloud"


async def answers(host, port):
    """Be an SSH server that answers at once."""


@pytest.fixture
async def account(monkeypatch):
    """Give an empty account, with its token in the environment."""
    monkeypatch.setenv("DO_TOKEN", droplets.TOKEN)
    async with droplets.running() as one:
        yield one


def section(account, **more):
    """Return settings for it."""
    told = {
        "driver": "digitalocean",
        "secrets": {"key": "env:DO_TOKEN"},
        "endpoint": account.url,
        "image": "debian-12-x64",
        "calls_per_second": 1000.0,
        **more,
    }
    return read_section(LibcloudSection, NAME, told)


def provider(own, folder, site=SITE):
    """Return a provider that remembers nothing."""

    async def probe(endpoint, identity):
        raise AssertionError

    context = ProviderContext(site, folder, LendingSettings(), probe, MakingForTests())
    return Provider(NAME, own, context, QuickCloud(own, site), reach=answers)


class TestLibcloudCloud(CloudContract):
    """What every cloud promises."""

    has_volumes = False
    keeps_ends = False

    @pytest.fixture
    def make_cloud(self, account):
        own = section(account)
        return lambda site_key: QuickCloud(own, site_key)


class TestLibcloudProvider(MachineProviderContract):
    """What every provider of machines promises."""

    bad_sections = [
        ({}, "driver"),
        ({"driver": "digitalocean", "secrets": {"key": "dop_v1_in-the-file"}}, "secrets.key"),
        ({"driver": "digitalocean", "sizes": []}, "sizes"),
    ]

    @pytest.fixture
    def make(self, context, account):
        def make(told=None):
            if told is not None:
                return LibcloudProvider(NAME, told, context)
            own = section(account)
            return Provider(NAME, own, context, QuickCloud(own, SITE), reach=answers)

        return make


async def test_a_machine_is_made_as_asked(account, tmp_path):
    """Its name holds site and lease, its user-data is the order's, and its location the lease's."""
    own = provider(section(account, ssh_key="512190"), tmp_path)
    asked = lease(order=MachineOrder(user_data="#!/bin/sh\n"), shape="s-4vcpu-8gb", region="fra1")
    made = await own.launch(asked)
    [body] = account.asked
    assert body == {
        "name": f"gridcloud-{SITE[:32]}-{asked.id}",
        "size": "s-4vcpu-8gb",
        "image": "101",
        "region": "fra1",
        "user_data": "#!/bin/sh\n",
        "tags": ["gridcloud"],
        "ssh_keys": ["512190"],
    }
    assert (made.region, made.endpoint.user) == ("fra1", "root")
    await own.terminate(asked.id)
    assert account.machines == {}
    await own.close()


async def test_a_quota_is_told_and_leaves_nothing(account, tmp_path):
    """The cloud's words are in the error."""
    account.limit = 0
    own = provider(section(account), tmp_path)
    with pytest.raises(NoCapacity) as refused:
        await own.launch(lease())
    assert "will exceed your limit" in str(refused.value)
    assert_telling(refused.value)
    await own.close()


async def test_a_wrong_secret_is_told_and_not_shown(account, monkeypatch):
    """Login that is refused is told as such; so is a secret that is not there."""
    monkeypatch.setenv("DO_TOKEN", "dop_v1_wrong")
    cloud = QuickCloud(section(account), SITE)
    with pytest.raises(Forbidden) as refused:
        await cloud.things()
    assert "wrong" not in str(refused.value)
    monkeypatch.delenv("DO_TOKEN")
    with pytest.raises(Forbidden, match="env:DO_TOKEN"):
        await cloud.things()
    await cloud.close()


async def test_an_image_is_found_by_slug_pattern_and_unknown_ones_name_near_ones(account):
    """The newest of several counts."""
    cloud = QuickCloud(section(account), SITE)
    shape = (await cloud.shapes())[0]
    assert (await cloud.image("debian-*", shape)).id == "102"
    with pytest.raises(NotFound, match="debian-12-x64"):
        await cloud.image("debian-11-x64", shape)
    await cloud.close()


@pytest.mark.parametrize("driver", ["upcloud", "no-such-driver", "ec2"])
def test_drivers_that_cannot_prepare_a_machine_are_refused(driver):
    """Without user-data a machine would never end; the error says which drivers there are."""
    with pytest.raises(InvalidSpec) as refused:
        LibcloudCloud(LibcloudSection(driver=driver), SITE)
    assert_telling(refused.value)


@pytest.mark.parametrize("one", DIALECTS.values(), ids=DIALECTS)
def test_dialects_name_arguments_that_the_drivers_have(one):
    """Libcloud's own signatures bear out the table."""
    newest = {"vultr": VultrNodeDriverV2, "digitalocean": DigitalOcean_v2_NodeDriver}
    made = newest.get(one.provider) or get_driver(one.provider)
    known = inspect.signature(made.create_node).parameters
    paths = [one.user_data, *(path for path, _ in one.more)]
    paths += [one.ssh_keys] if one.ssh_keys else []
    paths += ["location"] if one.zoned else []
    assert {path.partition(".")[0] for path in paths} <= set(known)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("few", BATCHES, ids=lambda few: f"{few[0]}-{few[-1]}")
async def test_faults_leave_nothing(few, account, tmp_path):
    """Errors, cuts, throttling, duplicates and stale lists, and kills at random instants."""
    await asyncio.gather(*(campaign(seed, account, tmp_path) for seed in few))


async def campaign(seed, account, folder):
    """Hurt one site of its own."""
    site = f"{seed:08x}" * 8
    faults = Faults(withheld_seconds=0.5, stale_seconds=0.3, retry_after="0")

    async def left():
        names = [one["name"] for one in account.machines.values()]
        return [name for name in names if site[:32] in name]

    async with FaultProxy(account.url, seed, faults) as proxy:
        # Links lead to the proxy, as the API's own do to the API.
        proxy.rewrite = lambda body: body.replace(account.url.encode(), proxy.url.encode())
        own = section(account, endpoint=proxy.url, patience={"removal": "120s"})
        await hurt(
            seed,
            Subject(
                make=lambda: provider(own, folder, site),
                new_lease=lease,
                left=left,
                kill=lambda one: one._cloud.kill(),
                calm=proxy.calm,
                launch_seconds=4.0,
                settles_seconds=0.5,
                leases=2,
            ),
        )
