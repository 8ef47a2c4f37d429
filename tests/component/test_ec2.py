"""The EC2 provider against moto, which keeps EC2's call shapes and starts no machines."""

import pytest

from gridcloud.providers.base import read_section
from gridcloud.providers.cloud.contract import CloudContract
from gridcloud.providers.contract import NAME
from gridcloud.providers.libcloud.ec2 import EC2Cloud
from gridcloud.providers.libcloud.section import EC2Section
from testbeds import moto_server

pytestmark = pytest.mark.xdist_group("moto")


@pytest.fixture(scope="session")
def server():
    """Keep a moto running."""
    if problem := moto_server.problem():
        pytest.skip(problem)
    with moto_server.running() as one:
        yield one


@pytest.fixture
def ec2(server, monkeypatch):
    """Give an empty EC2, with credentials in the environment."""
    server.reset()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def section(ec2, **more):
    """Return settings for it."""
    types = ["t3.micro", "t3.small", "m7g.medium", "g4dn.xlarge"]
    told = {"endpoint": ec2.url, "types": types, "calls_per_second": 1000.0, **more}
    return read_section(EC2Section, NAME, told)


class TestEC2Cloud(CloudContract):
    """What every cloud promises."""

    @pytest.fixture
    def make_cloud(self, ec2):
        own = section(ec2)
        return lambda site_key: EC2Cloud(own, site_key)
