"""The testbed's routers do what routers of their kind do, so that tests behind them mean it."""

import os
import socket
import subprocess

import pytest

from testbeds import nat
from testbeds.nat import Edge, internet

pytestmark = [
    pytest.mark.component,
    pytest.mark.skipif(not nat.available(), reason="networks of its own take root and iptables"),
]
UDP = socket.SOCK_DGRAM
PORT = 4433
NATS = [Edge.PORT_PRESERVING, Edge.SYMMETRIC, Edge.TCP_OUT_ONLY]
PATIENCE = 10.0
#: How long nothing must come. What is dropped is dropped within microseconds.
SILENCE = 0.1


@pytest.fixture
def net():
    with internet() as made:
        yield made


@pytest.fixture
def open_socket():
    """Return a function that makes bound sockets in hosts."""
    made = []

    def make(host, kind=UDP, port=PORT, timeout=PATIENCE):
        one = host.socket(kind)
        made.append(one)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host.address, port))
        one.settimeout(timeout)
        if kind is socket.SOCK_STREAM:
            one.listen()
        return one

    yield make
    for one in made:
        one.close()


def dial(host, address, timeout=PATIENCE):
    """Return a TCP connection out of a host."""
    link = host.socket()
    link.settimeout(timeout)
    try:
        link.connect(address)
    except BaseException:
        link.close()
        raise
    return link


def hears_nothing(listening):
    listening.settimeout(SILENCE)
    with pytest.raises(TimeoutError):
        listening.recvfrom(100)
    listening.settimeout(PATIENCE)


def mappings(net, inside, open_socket):
    """Return how two open hosts see the same socket of a private one, and the three sockets."""
    ours = open_socket(inside)
    theirs = [open_socket(net.host()) for _ in range(2)]
    for one in theirs:
        ours.sendto(b"out", one.getsockname())
    return [one.recvfrom(100)[1] for one in theirs], ours, theirs


def test_open_hosts_reach_each_other(net, open_socket):
    """Both ways, without anything in between."""
    one, other = open_socket(net.host()), open_socket(net.host())
    one.sendto(b"hi", other.getsockname())
    assert other.recvfrom(100) == (b"hi", one.getsockname())
    other.sendto(b"ho", one.getsockname())
    assert one.recvfrom(100) == (b"ho", other.getsockname())


def test_a_port_preserving_nat_shows_everybody_the_same(net, open_socket):
    """One address and the very port; so two behind such routers can meet by dialling at once."""
    home = net.network(Edge.PORT_PRESERVING)
    seen, ours, theirs = mappings(net, home.host(), open_socket)
    assert seen == [(home.address, PORT)] * 2
    there = net.network(Edge.PORT_PRESERVING)
    other = open_socket(there.host())
    other.sendto(b"lost", (home.address, PORT))  # the first one opens the way for the answer
    ours.sendto(b"met", (there.address, PORT))
    assert other.recvfrom(100) == (b"met", (home.address, PORT))
    theirs[0].sendto(b"answer", seen[0])
    assert ours.recvfrom(100)[0] == b"answer"


def test_a_symmetric_nat_shows_each_another_port(net, open_socket):
    """Nobody can be told where to dial: what one sees is no use to another."""
    home = net.network(Edge.SYMMETRIC)
    seen, ours, theirs = mappings(net, home.host(), open_socket)
    assert {address for address, _ in seen} == {home.address}
    assert len({PORT, *(port for _, port in seen)}) == 3
    theirs[1].sendto(b"by the other's", seen[0])
    theirs[0].sendto(b"answer", seen[0])
    assert ours.recvfrom(100)[0] == b"answer"


@pytest.mark.parametrize("edge", [Edge.PORT_PRESERVING, Edge.SYMMETRIC])
def test_only_answers_come_in(net, open_socket, edge):
    """A stranger's datagram does not pass, not even to a port in use; the answer after it does."""
    seen, ours, theirs = mappings(net, net.network(edge).host(), open_socket)
    stranger = open_socket(net.host())
    stranger.sendto(b"stranger", seen[0])
    theirs[0].sendto(b"answer", seen[0])
    assert ours.recvfrom(100)[0] == b"answer"


@pytest.mark.parametrize("edge", NATS)
def test_tcp_goes_out_and_not_in(net, open_socket, edge):
    """A server is reached from inside, and a server inside by nobody outside."""
    outside, network = net.host(), net.network(edge)
    inside = network.host()
    server = open_socket(outside, socket.SOCK_STREAM)
    with dial(inside, server.getsockname()), server.accept()[0] as accepted:
        assert accepted.getpeername()[0] == network.address
    open_socket(inside, socket.SOCK_STREAM)
    with pytest.raises(TimeoutError):
        dial(outside, (network.address, PORT), SILENCE).close()


@pytest.mark.parametrize("edge", [Edge.UDP_BLOCKED, Edge.TCP_OUT_ONLY])
def test_no_udp_passes_where_it_is_blocked(net, open_socket, edge):
    """Neither out nor in, and no answer that says so."""
    outside, inside = net.host(), net.network(edge).host()
    theirs, ours = open_socket(outside), open_socket(inside)
    ours.sendto(b"out", theirs.getsockname())
    theirs.sendto(b"in", (inside.address, PORT))
    hears_nothing(theirs)
    hears_nothing(ours)


def test_a_firewall_that_blocks_udp_lets_tcp_in(net, open_socket):
    """Its hosts have addresses of their own."""
    outside, inside = net.host(), net.network(Edge.UDP_BLOCKED).host()
    server = open_socket(inside, socket.SOCK_STREAM)
    with dial(outside, server.getsockname()), server.accept()[0] as accepted:
        assert accepted.getpeername()[0] == outside.address


def test_cut_and_healed(net, open_socket):
    """A host, or a whole network, that was cut off hears nothing, and then everything again."""
    home = net.network(Edge.PORT_PRESERVING)
    inside, outside = home.host(), net.host()
    ours, theirs = open_socket(inside), open_socket(outside)
    for one in (inside, home, outside):
        one.cut()
        one.cut()
        ours.sendto(b"lost", theirs.getsockname())
        hears_nothing(theirs)
        one.heal()
        ours.sendto(b"found", theirs.getsockname())
        assert theirs.recvfrom(100)[0] == b"found"


def test_what_passes_is_counted(net, open_socket):
    """From one address to another, each direction by itself, as the public segment sees it."""
    home, outside = net.network(Edge.PORT_PRESERVING), net.host()
    ours, theirs = open_socket(home.host()), open_socket(outside)
    net.watch(home.address, outside.address)
    net.watch(outside.address, home.address)
    for _ in range(10):
        ours.sendto(bytes(1000), theirs.getsockname())
    for _ in range(10):
        theirs.recvfrom(1000)
    assert net.passed(home.address, outside.address) == 10 * (1000 + 28)
    assert net.passed(outside.address, home.address) == 0


def test_nothing_is_left(tmp_path):
    """Processes, namespaces and cables go with the context, also when a test fails in it."""
    before = subprocess.check_output(["ip", "-br", "link"])
    with pytest.raises(ZeroDivisionError), internet() as net:
        host = net.network(Edge.SYMMETRIC).host()
        assert (
            host.run(["ip", "-br", "address", "show", "eth0"])
            .stdout.split()[2]
            .startswith(f"{host.address}/")
        )
        process = host.popen(["sh", "-c", "trap '' TERM; echo; sleep 300 & wait"], stdout=-1)
        process.stdout.readline()
        assert subprocess.check_output(["ip", "-br", "link"]) == before
        raise ZeroDivisionError
    with process:
        assert process.wait(PATIENCE) == -9
    with pytest.raises(ProcessLookupError):
        os.kill(net.pid, 0)
