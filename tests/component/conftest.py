"""Sites for component tests."""

import pytest

from testbeds import lxd as lxd_testbed
from testbeds.sites import SiteProcess


@pytest.fixture
def new_site(tmp_path):
    """Return a function that makes sites; they all end with the test."""
    made = []

    def make(name="site", settings=""):
        site = SiteProcess(tmp_path / name, name, settings)
        made.append(site)
        return site

    yield make
    for site in made:
        site.close()


@pytest.fixture
def site(new_site):
    """Return a running site of two CPUs."""
    made = new_site(settings="[providers.local]\ncpus = 2\n")
    made.start()
    return made


@pytest.fixture(scope="session")
def lxd_server():
    """Keep this machine's LXD running; see `testbeds.lxd`."""
    if problem := lxd_testbed.problem():
        pytest.skip(problem)
    with lxd_testbed.running() as server:
        yield server


@pytest.fixture
def lxd(lxd_server):
    """Return a project of its own at a real LXD, emptied and removed with the test."""
    with lxd_server.project() as project:
        yield project
