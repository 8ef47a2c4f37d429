"""Thirty real sites as processes beside thirty peers of pyipv8: meeting, missing, healing.

Run as root: everything happens in a network namespace of its own, where a firewall rule parts and
heals. Each figure is the time until *every* site (or peer) has seen it. Both contestants are run
one after the other in the same run; neither knows of the other.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rounds import Table
from testbed import SiteProcess

COUNT = 30
APART = 9
_NET = "10.77.0.0/16"
_MAIN, _OTHER = "10.77.1", "10.77.2"
_IPV8 = Path(__file__).with_name("ipv8_peer.py")
_INSIDE = "--in-namespace"
_PATIENCE = 240.0


def main() -> None:
    """Measure both, print ours, theirs and the ratio."""
    if _INSIDE not in sys.argv:
        command = ["unshare", "--net", sys.executable, __file__, _INSIDE]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    _run("ip", "link", "set", "lo", "up")
    for host in _hosts():
        _run("ip", "address", "add", f"{host}/16", "dev", "lo")
    with tempfile.TemporaryDirectory() as folder:
        ours = _measure_sites(Path(folder))
    theirs = _measure_ipv8()
    table = Table()
    for what, seconds in ours.items():
        other = theirs.get(what)
        table.add(
            f"{COUNT} sites: {what}",
            f"{seconds:.2f} s",
            f"pyipv8 {other:.2f} s" if other else "",
            f"{seconds / other:.2f}" if other else "",
        )


def _measure_sites(base: Path) -> dict[str, float]:
    sites = [
        SiteProcess(base / f"s{number}", f"s{number}", f'[grid]\nlisten = "{host}:4433"\n')
        for number, host in enumerate(_hosts())
    ]
    found: dict[str, float] = {}
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(SiteProcess.start, sites))
        with sites[0].client() as client:
            client.create_community("mesh")
            codes = [client.invite("mesh").code for _ in sites[1:]]
        begun = time.monotonic()
        with ThreadPoolExecutor(COUNT) as pool:
            list(pool.map(_join, sites[1:], codes))
        found["all join at once"] = _until_all_see(sites, COUNT - 1, begun)
        with _dropped("-s", _NET):
            _until_all_see(sites, 0, begun)
        found["full mesh"] = _until_all_see(sites, COUNT - 1, time.monotonic())
        sites[-1].kill()
        found["one killed, seen by all"] = _until_all_see(sites[:-1], COUNT - 2, time.monotonic())
        sites[-1].start()
        _until_all_see(sites, COUNT - 1, time.monotonic())
        with _parted():
            _until_all_see(sites[: COUNT - APART], COUNT - APART - 1, time.monotonic())
            _until_all_see(sites[COUNT - APART :], APART - 1, time.monotonic())
        found["parted, then healed"] = _until_all_see(sites, COUNT - 1, time.monotonic())
        return found
    finally:
        for site in sites:
            site.close()


def _join(site: SiteProcess, code: str) -> None:
    with site.client() as client:
        client.join_community(code)


def _until_all_see(sites: list[SiteProcess], alive: int, begun: float) -> float:
    """Return how long after ``begun`` every site saw so many others alive.

    They are asked one after the other, so that asking takes little of the machine.
    """
    for site in sites:
        with site.client() as client:
            _until(
                lambda client=client: sum(s.state == "alive" for s in client.grid("mesh")) == alive
            )
    return time.monotonic() - begun


class _Peer:
    """One process of pyipv8; `seen` is what it said last."""

    def __init__(self, number: int, host: str, folder: Path) -> None:
        self._log = folder / f"{number}.log"
        first = next(iter(_hosts()))
        self.process = subprocess.Popen(
            [sys.executable, _IPV8, host, "7000", first, "7000"],
            stdin=subprocess.PIPE,
            stdout=self._log.open("wb"),
            stderr=subprocess.DEVNULL,
        )

    def go(self) -> None:
        """Let it begin."""
        assert self.process.stdin
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    @property
    def seen(self) -> int:
        """How many peers it has."""
        lines = self._log.read_text().split("\n")
        return int(lines[-2].split()[1]) if len(lines) > 1 else 0


def _measure_ipv8() -> dict[str, float]:
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        peers = [_Peer(i, host, Path(folder)) for i, host in enumerate(_hosts())]
        try:
            time.sleep(COUNT / 3)  # until all have started; they wait for the word
            begun = time.monotonic()
            for peer in peers:
                peer.go()
            found["all join at once"] = found["full mesh"] = _until_peers(peers, COUNT - 1, begun)
            with _parted():
                _until_peers(peers[: COUNT - APART], COUNT - APART - 1, time.monotonic())
                _until_peers(peers[COUNT - APART :], APART - 1, time.monotonic())
            found["parted, then healed"] = _until_peers(peers, COUNT - 1, time.monotonic())
            begun = time.monotonic()
            peers[-1].process.kill()
            found["one killed, seen by all"] = _until_peers(peers[:-1], COUNT - 2, begun)
            return found
        finally:
            for peer in peers:
                peer.process.kill()
                peer.process.communicate()


def _until_peers(peers: list[_Peer], seen: int, begun: float) -> float:
    for peer in peers:
        _until(lambda peer=peer: peer.seen == seen)
    return time.monotonic() - begun


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("not seen by all in time")
        time.sleep(0.05)


@contextlib.contextmanager
def _parted() -> Iterator[None]:
    main, other = f"{_MAIN}.0/24", f"{_OTHER}.0/24"
    with _dropped("-s", main, "-d", other), _dropped("-s", other, "-d", main):
        yield


@contextlib.contextmanager
def _dropped(*which: str) -> Iterator[None]:
    """Drop what matches, without a word to the sender."""
    _run("iptables", "-A", "INPUT", *which, "-j", "DROP")
    try:
        yield
    finally:
        _run("iptables", "-D", "INPUT", *which, "-j", "DROP")


def _hosts() -> Iterator[str]:
    for number in range(COUNT - APART):
        yield f"{_MAIN}.{number + 1}"
    for number in range(APART):
        yield f"{_OTHER}.{number + 1}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if os.geteuid():
        print("30 sites and pyipv8: left out, needs root (for a network namespace)")
    else:
        main()
