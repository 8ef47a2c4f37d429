"""A small internet in network namespaces: open hosts, and private networks behind routers.

``with internet() as net`` gives one whose wires are all its own: nothing of it is seen in the
network of the tests, so any number of them stand side by side, each with the same addresses. A
namespace lives as long as one small process that reads from us: all of it goes when the context is
left, and also when the tests are killed. Needs root, iproute2, iptables and util-linux.

Every cable is a link of its own and every packet between two hosts passes a router, so that `cut`
drops packets without a word, as a partition does: nobody is told of a link that went down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

PROGRAMS = ("ip", "iptables", "nsenter", "unshare")
#: A public range that nobody is met in: https://www.ampr.org reserves it for testing.
PUBLIC = "44.128"
#: What every private network uses, as homes do: the same addresses in each of them.
_PRIVATE = "192.168.1"
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Edge(StrEnum):
    """What stands between a private network and the public one."""

    #: NAT: every flow keeps its port. Only answers come in.
    PORT_PRESERVING = "port-preserving"
    #: NAT: every flow to another destination gets another, random port. Only answers come in.
    SYMMETRIC = "symmetric"
    #: A firewall before public addresses: no UDP at all; TCP passes both ways.
    UDP_BLOCKED = "udp-blocked"
    #: NAT without UDP: nothing but TCP that goes out, and its answers.
    TCP_OUT_ONLY = "tcp-out-only"


def available() -> bool:
    """Whether there is all that it takes."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return os.geteuid() == 0 and all(shutil.which(program, path=path) for program in PROGRAMS)


@contextlib.contextmanager
def internet() -> Iterator[Internet]:
    """Make a public segment, and remove it with all that was joined to it and runs in it."""
    with contextlib.ExitStack() as stack:
        yield Internet(stack)


class Namespace:
    """A network of its own; `enter` is what a command begins with to run in it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat >&2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        stack.callback(self._close)
        assert self._holder.stdout and self._holder.stdout.readline(), "no network of its own"
        self.pid = self._holder.pid
        self.enter = ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")
        self.configure("link set lo up")

    def run(self, argv: Sequence[str | Path], **more) -> subprocess.CompletedProcess[str]:
        """Run a command here to its end; its output is text. It may fail."""
        options = {"capture_output": True, "text": True, "timeout": 60, "check": False} | more
        return subprocess.run([*self.enter, *argv], **options)

    def popen(
        self, argv: Sequence[str | Path], env: Mapping[str, str] | None = None, **more
    ) -> subprocess.Popen[bytes]:
        """Start a command here; it is killed with the namespace at the latest."""
        return subprocess.Popen([*self.enter, *argv], env=env, start_new_session=True, **more)

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """Return an IPv4 socket whose network is this one, for use by the test itself."""
        made: list[socket.socket] = []

        def make() -> None:
            # A thread may enter another network alone; it ends, and the socket stays there.
            with Path(f"/proc/{self.pid}/ns/net").open("rb") as network:
                if _libc.setns(network.fileno(), _CLONE_NEWNET) == 0:
                    made.append(socket.socket(socket.AF_INET, kind))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        return made[0]

    def configure(self, *lines: str) -> None:
        """Run lines of iproute2."""
        self._do("ip", "-batch", "-", lines=lines)

    def filter(self, *rules: str) -> None:
        """Run iptables once for each line of arguments."""
        for rule in rules:
            self._do("iptables", "--wait", *rule.split())

    def forward(self) -> None:
        """Pass on packets: become a router."""
        self._do("tee", "/proc/sys/net/ipv4/ip_forward", lines=["1"])

    def _do(self, *argv: str, lines: Sequence[str] = ()) -> None:
        done = self.run(argv, input="".join(f"{line}\n" for line in lines))
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}: {' | '.join(lines)}")

    def _close(self) -> None:
        inside = Path(f"/proc/{self._holder.pid}/ns/net")
        with contextlib.suppress(OSError):
            ours, network = Path("/proc/self/ns/net").readlink(), inside.readlink()
            for entry in Path("/proc").iterdir() if network != ours else ():
                if entry.name.isdigit():
                    with contextlib.suppress(OSError):
                        if (entry / "ns/net").readlink() == network:
                            os.kill(int(entry.name), signal.SIGKILL)
        self._holder.kill()
        self._holder.communicate()


class _Router(Namespace):
    """A namespace that passes packets between those joined to it."""

    def __init__(self, stack: contextlib.ExitStack, prefix: str) -> None:
        super().__init__(stack)
        self._stack = stack
        self._prefix = prefix
        self._joined = 0
        self.forward()

    def join(self, other: Namespace, device: str) -> str:
        """Lay a cable to another namespace; return the address that it has there."""
        self._joined += 1
        gateway, address = f"{self._prefix}.1", f"{self._prefix}.{self._joined + 1}"
        ours = f"port{self._joined}"
        self.configure(
            f"link add {ours} type veth peer name {device} netns {other.pid}",
            f"address add {gateway}/32 dev {ours}",
            f"link set {ours} up",
            f"route add {address}/32 dev {ours}",
        )
        other.configure(
            f"address add {address}/32 dev {device}",
            f"link set {device} up",
            f"route add {gateway}/32 dev {device}",
            f"route add default via {gateway} src {address}",
        )
        return address

    def host(self) -> Host:
        """Add a host."""
        return Host(self._stack, self)


class Internet(_Router):
    """The public segment. Hosts in it are reached by everybody."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__(stack, f"{PUBLIC}.0")
        self._networks = 0

    def network(self, edge: Edge) -> Network:
        """Add a private network behind a router."""
        self._networks += 1
        routed = edge is Edge.UDP_BLOCKED
        prefix = f"{PUBLIC}.{self._networks}" if routed else _PRIVATE
        network = Network(self._stack, prefix, self, edge)
        if routed:
            self.configure(f"route add {prefix}.0/24 via {network.address}")
        return network

    def watch(self, source: str, destination: str) -> None:
        """Count from now on what passes from one public address to another."""
        # A rule without a target does nothing but count.
        self.filter(f"-A FORWARD -s {source} -d {destination}")

    def passed(self, source: str, destination: str) -> int:
        """Return how many bytes have passed since `watch`: what really went this way."""
        listed = self.run(["iptables", "--wait", "-nvxL", "FORWARD"]).stdout.splitlines()
        (line,) = (line for line in listed if line.split()[-2:] == [source, destination])
        return int(line.split()[1])


class Network(_Router):
    """A private network; `address` is its router's, by which it is seen from outside."""

    def __init__(
        self, stack: contextlib.ExitStack, prefix: str, outside: Internet, edge: Edge
    ) -> None:
        super().__init__(stack, prefix)
        self._outside = outside
        self.edge = edge
        self.address = outside.join(self, "wan")
        # Dropped, not refused, and so never known to the NAT: as a home's router does. A packet
        # it had let in to itself would take the port that a flow from inside wants to keep.
        self.filter(
            "-P INPUT DROP",
            "-P FORWARD DROP",
            "-A INPUT -i lo -j ACCEPT",
        )
        if edge in (Edge.UDP_BLOCKED, Edge.TCP_OUT_ONLY):
            self.filter("-A FORWARD -p udp -j DROP")
        if edge is Edge.UDP_BLOCKED:
            self.filter("-A FORWARD -j ACCEPT")
            return
        self.filter(
            "-A FORWARD ! -i wan -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            "-t nat -A POSTROUTING -o wan -j MASQUERADE"
            + (" --random-fully" if edge is Edge.SYMMETRIC else ""),
        )

    def cut(self) -> None:
        """Part the whole network from the outside: packets are dropped, silently. Idempotent."""
        self.heal()
        self._outside.filter(*_parting("-I", self.address))

    def heal(self) -> None:
        """Join it to the outside again. Idempotent."""
        _remove(self._outside, self.address)


class Host(Namespace):
    """One computer; `address` is the one it has itself."""

    def __init__(self, stack: contextlib.ExitStack, segment: _Router) -> None:
        super().__init__(stack)
        self._segment = segment
        self.address = segment.join(self, "eth0")

    def cut(self) -> None:
        """Part it from everybody: packets are dropped, silently. Idempotent."""
        self.heal()
        self._segment.filter(*_parting("-I", self.address))

    def heal(self) -> None:
        """Join it to the others again. Idempotent."""
        _remove(self._segment, self.address)


def _parting(action: str, address: str) -> list[str]:
    return [f"{action} FORWARD -{side} {address} -j DROP" for side in ("s", "d")]


def _remove(router: Namespace, address: str) -> None:
    """Remove what parts an address, if anything does."""
    for rule in _parting("-D", address):
        while router.run(["iptables", "--wait", *rule.split()]).returncode == 0:
            continue
