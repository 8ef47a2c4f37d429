"""The shipped contracts of clouds and their providers, over the cloud in memory."""

import pytest

from gridcloud.providers.base import read_section
from gridcloud.providers.cloud.contract import CloudContract, MachineProviderContract
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.cloud.section import CloudSection
from gridcloud.providers.contract import NAME
from testbeds.memory_cloud import Badness, MemoryCloud, World


class MemoryCloudProvider(CloudProvider):
    """The provider over a world in memory, whose machines answer at once."""

    kind = "memory-cloud"

    def __init__(self, name, section, context, world):
        async def reach(host, port):
            pass

        own = read_section(CloudSection, name, section)
        cloud = MemoryCloud(world, context.site_key)
        super().__init__(name, own, context, cloud, reach=reach)


class TestMemoryCloud(CloudContract):
    """The in-memory twin, with tokens and a network for each machine."""

    world_options = {}

    @pytest.fixture
    def make_cloud(self):
        world = World(**self.world_options)
        return lambda site_key: MemoryCloud(world, site_key)


class TestMemoryCloudWithoutTokens(TestMemoryCloud):
    """One like OpenStack: no tokens, one network for all."""

    world_options = {"knows_tokens": False, "shares_networks": True}


class TestSlowMemoryCloud(TestMemoryCloud):
    """One where requests take a while, so that overlapping ones overlap."""

    world_options = {
        "knows_tokens": False,
        "badness": Badness(latency_seconds=(0.001, 0.01), removal_seconds=(0.0, 0.05)),
    }


class TestMemoryCloudProvider(MachineProviderContract):
    """What every provider promises holds for one over a cloud."""

    bad_sections = [
        ({"calls_per_second": 0}, "calls_per_second"),
        ({"at_once": 0}, "at_once"),
        ({"user": "Not A User"}, "user"),
        ({"patience": {"create": "soon"}}, "patience.create"),
    ]

    @pytest.fixture
    def make(self, context):
        world = World()
        return lambda section=None: MemoryCloudProvider(NAME, section or {}, context, world)
