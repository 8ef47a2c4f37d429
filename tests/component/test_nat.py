"""Sites that nobody can dial lend and borrow: real sites, behind routers of every kind.

One open member is all they have in common. Which way the bytes really went is counted by the
network in between, not told by the sites.
"""

import contextlib

import pytest

from testbeds import nat
from testbeds.nat import Edge, internet
from testbeds.sites import SiteProcess, wait_until

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(not nat.available(), reason="networks of its own take root and iptables"),
]
PORT = 4433
LENDING = '[lending]\nenabled = true\nmax_time = "1h"\ndisk = "1G"\n'
SIZE = 3 * 2**20
#: Prints SIZE bytes, enough to tell what carried them from what only looked for a way.
MAKE = ("python3", "-c", f"import os; os.write(1, bytes({SIZE}))")


class Scene:
    """A small internet with an open founder, and sites added to its community."""

    def __init__(self, folder, stack):
        self.net = stack.enter_context(internet())
        self._folder = folder
        self._stack = stack
        self.public = {}
        host = self.net.host()
        here = f"{host.address}:{PORT}"
        self.founder = self.site(
            "founder", host, f'listen = "{here}"\ntls_listen = "{here}"\nrelay = true\n'
        )
        with self.founder.client() as client:
            client.create_community("physics")

    def site(self, name, host, grid='listen = "0.0.0.0:0"\n', *, cpus=1, more=""):
        """Start a site in a host."""
        settings = f'[grid]\n{grid}[providers.local]\ncpus = {cpus}\nmemory = "4G"\n{more}'
        site = SiteProcess(self._folder / name, name, settings, enter=host.enter)
        self._stack.callback(site.close)
        site.start()
        return site

    def member(self, name, edge, *, lends=False):
        """Start a site behind a router of some kind (None: none) and let it join."""
        segment = self.net if edge is None else self.net.network(edge)
        host = segment.host()
        grid = 'listen = "0.0.0.0:0"\n'
        lending = LENDING
        if edge is None:
            grid += f'tls_listen = "{host.address}:{PORT}"\n'
            # On every address, and none is told: who borrows has none to dial.
            lending += '[gateway]\nlisten = "0.0.0.0:0"\n'
        options = {"cpus": 2, "more": lending} if lends else {}
        site = self.site(name, host, grid, **options)
        routed = edge in (None, Edge.UDP_BLOCKED)
        self.public[name] = host.address if routed else segment.address
        with self.founder.client() as inviter:
            code = inviter.invite("physics").code
        joined = site.cli("community", "join", code)
        assert joined.returncode == 0, joined.stderr
        return site

    def borrow(self, lender, borrower):
        """Run a job that only the lender has room for, and see that all of it comes through.

        Return how it came: "straight" from the lender's router, or "relayed" by the founder.
        """
        here = self.public["borrower"]
        sources = {"straight": self.public["lender"], "relayed": self.founder_address}
        for source in sources.values():
            self.net.watch(source, here)
        # They can be introduced once both know of one another.
        wait_until(lambda: "borrower" in lender.cli("community", "members").stdout)
        wait_until(lambda: "lender" in borrower.cli("offers", "--cpus", "2").stdout)
        done = borrower.cli("run", "--cpus", "2", "--", *MAKE)
        assert (done.returncode, len(done.stdout)) == (0, SIZE), done.stderr
        passed = {name: self.net.passed(source, here) for name, source in sources.items()}
        way = max(passed, key=passed.get)
        assert passed.pop(way) > SIZE
        assert max(passed.values()) < SIZE / 2, "it came both ways"
        return way

    @property
    def founder_address(self):
        """Where the founder is."""
        return f"{nat.PUBLIC}.0.2"


def path(site, name):
    """Return how a site reaches another now; empty if it does not."""
    with site.client() as client:
        return next((one.path for one in client.grid("physics") if one.site_name == name), "")


@pytest.fixture
def scene(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Scene(tmp_path, stack)


def test_two_sites_behind_port_preserving_routers_meet(scene):
    """The founder introduces them, and then has no part in what they send each other."""
    lender = scene.member("lender", Edge.PORT_PRESERVING, lends=True)
    borrower = scene.member("borrower", Edge.PORT_PRESERVING)
    # On a busy host the founder may have to relay the first words.
    wait_until(lambda: path(borrower, "lender") == "direct")
    assert scene.borrow(lender, borrower) == "straight"


def test_two_sites_behind_symmetric_routers_are_relayed(scene):
    """Nothing opens these, so a member that offers to passes on what they say."""
    lender = scene.member("lender", Edge.SYMMETRIC, lends=True)
    borrower = scene.member("borrower", Edge.SYMMETRIC)
    assert scene.borrow(lender, borrower) == "relayed"


def test_a_site_without_udp_borrows_over_tls(scene):
    """By itself, without a word in its settings; straight where the lender has an open TCP port."""
    lender = scene.member("lender", None, lends=True)
    borrower = scene.member("borrower", Edge.TCP_OUT_ONLY)
    assert scene.borrow(lender, borrower) == "straight"


def test_a_site_without_udp_and_without_a_port_lends(scene):
    """Its own TLS connection to an open member is the way in."""
    lender = scene.member("lender", Edge.TCP_OUT_ONLY, lends=True)
    borrower = scene.member("borrower", Edge.PORT_PRESERVING)
    assert scene.borrow(lender, borrower) == "relayed"
