"""How sites meet that cannot be dialled: behind NATs and firewalls, in networks of their own."""

import time

import pytest

from testbeds import nat
from testbeds.nat import Edge, internet
from testbeds.overlay_node import OverlayNode

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(not nat.available(), reason="networks of its own take root and iptables"),
]
LISTEN = "0.0.0.0:4433"
PATIENCE = 20.0


@pytest.fixture
def net():
    with internet() as made:
        yield made


@pytest.fixture
def new_node():
    """Return a function that starts a node in a host; they all end with the test."""
    made = []

    def make(host, **options):
        node = OverlayNode(host, **{"listen": LISTEN} | options)
        made.append(node)
        return node

    yield make
    for node in made:
        node.close()


def until(truth, patience=PATIENCE):
    """Wait for something that comes about by itself."""
    end = time.monotonic() + patience
    while not (found := truth()):
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.05)
    return found


def joined(helper, *nodes):
    """Have all nodes hold a link to a helper that introduces and relays."""
    helper.do("settle", [], True)
    for node in nodes:
        node.do("settle", [helper.address], False)
    for node in nodes:
        until(lambda node=node: helper.do("path", node.key))


def test_a_site_behind_nat_is_asked_over_the_link_it_made(net, new_node):
    """Whoever dialled, requests go both ways."""
    open_site = new_node(net.host())
    inside = new_node(net.network(Edge.PORT_PRESERVING).host())
    assert inside.ask(open_site) == f"hello to {inside.key[:8]}"
    unknown = inside.address | {"addresses": []}
    assert open_site.do("request", unknown, "hello", 5) == f"hello to {open_site.key[:8]}"


def test_two_sites_behind_nats_that_keep_ports_meet_straight(net, new_node):
    """They are introduced by a third, dial at the same time, and need it no more."""
    helper = new_node(net.host())
    one, other = (new_node(net.network(Edge.PORT_PRESERVING).host()) for _ in range(2))
    joined(helper, one, other)
    assert one.ask(other) == f"hello to {one.key[:8]}"
    until(lambda: one.do("path", other.key)["how"] == "direct")
    helper.close()
    assert other.ask(one) == f"hello to {other.key[:8]}"


def test_a_site_behind_nat_tells_where_it_is_seen(net, new_node):
    """It learns its outer address from those it holds links to, and says so in its own."""
    helper, network = new_node(net.host()), net.network(Edge.PORT_PRESERVING)
    inside = new_node(network.host())
    joined(helper, inside)
    until(lambda: f"{network.address}:4433" in inside.do("address")["addresses"])


def test_two_sites_behind_nats_that_change_ports_are_relayed(net, new_node):
    """Where no NAT can be opened a member that offers to carries what it cannot read."""
    helper = new_node(net.host())
    one, other = (new_node(net.network(Edge.SYMMETRIC).host()) for _ in range(2))
    joined(helper, one, other)
    assert one.ask(other) == f"hello to {one.key[:8]}"
    path = one.do("path", other.key)
    assert (path["how"], path["via"]) == ("relayed", helper.key)
    assert other.ask(one, 5) == f"hello to {other.key[:8]}"
    assert one.do("stream", other.address, 1_000_000) == 1_000_000


def test_a_site_without_udp_takes_part_over_tls(net, new_node):
    """The second carrier is chosen by itself when the first is dropped."""
    open_site = new_node(net.host(), tls_listen=LISTEN)
    inside = new_node(net.network(Edge.TCP_OUT_ONLY).host())
    assert inside.ask(open_site) == f"hello to {inside.key[:8]}"
    assert inside.do("path", open_site.key)["how"] == "tls"
    unknown = inside.address | {"addresses": []}
    assert open_site.do("request", unknown, "hello", 5) == f"hello to {open_site.key[:8]}"


def test_a_site_without_udp_and_one_behind_nat_are_relayed(net, new_node):
    """The helper joins the two carriers."""
    helper = new_node(net.host(), tls_listen=LISTEN)
    one = new_node(net.network(Edge.TCP_OUT_ONLY).host())
    other = new_node(net.network(Edge.PORT_PRESERVING).host())
    joined(helper, one, other)
    assert other.ask(one) == f"hello to {other.key[:8]}"
    assert other.do("path", one.key)["how"] == "relayed"


def test_where_nobody_relays_the_reason_is_told(net, new_node):
    """The error says what was tried, and whom it failed at."""
    helper = new_node(net.host())
    one, other = (new_node(net.network(Edge.SYMMETRIC).host()) for _ in range(2))
    joined(helper, one, other)
    helper.do("settle", [], False)
    answer = one.do("request", other.address | {"addresses": []}, "hello", 15)
    assert "does not relay" in answer["error"]


def test_a_network_cut_off_is_found_again_when_it_heals(net, new_node):
    """A silent partition is noticed, and undone by itself."""
    helper = new_node(net.host())
    networks = [net.network(Edge.PORT_PRESERVING) for _ in range(2)]
    one, other = (new_node(network.host()) for network in networks)
    joined(helper, one, other)
    assert one.ask(other) == f"hello to {one.key[:8]}"
    networks[1].cut()
    assert "error" in one.ask(other, 3)
    networks[1].heal()
    until(lambda: one.ask(other, 10) == f"hello to {one.key[:8]}", 60)
