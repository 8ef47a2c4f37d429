"""Thirty real sites as processes beside thirty peers of pyipv8: meeting, missing, healing.

Run as root: everything happens in a network namespace of its own, where a firewall rule parts and
heals. Each figure is the time until *every* process has seen it, by what each tells itself: it
looks twenty times a second. Both contestants go through the same steps, one after the other, and
all processes have started before the first is told to begin.

The sites are those of `mesh_site`, members of one community before they begin. What pyipv8 does
is `ipv8_peer`'s.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from typing import Protocol

import psutil
from rounds import Table
from testbed import SiteProcess

from gridcloud.client import starting

COUNT = 30
APART = 9
_MAIN, _OTHER = "10.77.1", "10.77.2"
_SITE, _IPV8 = (Path(__file__).with_name(name) for name in ("mesh_site.py", "ipv8_peer.py"))
_INSIDE = "--in-namespace"
_PATIENCE = 120.0
_PEACE_SECONDS = 20.0
MESH, KILLED, HEALED = "all see all", "one killed, seen by all", "30 % parted, then healed"
AIMS = {MESH: 2.0, KILLED: 6.0, HEALED: 3.0}
JOINING = "all join at once, by codes"


class Peer(Protocol):
    """One process of a contestant, which tells what it sees."""

    process: subprocess.Popen[bytes] | None

    def told(self) -> list[tuple[float, int, int]]:
        """Return when it saw how many others, and how many of them gone."""
        ...


class Site(SiteProcess):
    """A site that tells how many others it sees."""

    def begin(self) -> None:
        """Start it; it waits for the word."""
        self._said = self.folder / f"seen-{time.monotonic()}"
        with (self.folder / "site.log").open("ab") as log, self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, _SITE],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def told(self) -> list[tuple[float, int, int]]:
        """See `Peer`."""
        return _lines(self._said)


class Ipv8:
    """A process of pyipv8."""

    def __init__(self, host: str, said: Path) -> None:
        self._said = said
        with said.open("wb") as file:
            self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, _IPV8, host, "7000", next(_hosts()), "7000"],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.DEVNULL,
            )

    def told(self) -> list[tuple[float, int, int]]:
        """See `Peer`."""
        return _lines(self._said)


def _lines(said: Path) -> list[tuple[float, int, int]]:
    whole = said.read_text().rpartition("\n")[0]
    found = [line.split() for line in whole.splitlines()]
    return [(float(at), int(alive), int(gone)) for at, alive, gone in found]


def main() -> None:
    """Measure both, print ours, theirs and the ratio."""
    if _INSIDE not in sys.argv:
        command = ["unshare", "--net", sys.executable, __file__, _INSIDE]
        raise SystemExit(subprocess.run(command, check=False).returncode)
    # Sites of one host would else find one another's loopback, where no rule parts them.
    for each in ("all", "default"):
        Path(f"/proc/sys/net/ipv6/conf/{each}/disable_ipv6").write_text("1")
    _run("ip", "link", "set", "lo", "up")
    for host in _hosts():
        _run("ip", "address", "add", f"{host}/16", "dev", "lo")
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        ours = _measure_sites(Path(folder), table)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _measure_ipv8(Path(folder))
    for what, aim in AIMS.items():
        mine, other = ours[what], theirs[what]
        table.add(
            f"{COUNT} sites: {what} (aim ≤ {aim:g} s)",
            _told(mine),
            f"pyipv8 {_told(other)}",
            "" if inf in (mine, other) else f"{mine / other:.3f}",
        )
    print(f"load {os.getloadavg()[0]:.1f}")


def _measure_sites(base: Path, table: Table) -> dict[str, float]:
    sites = [
        Site(base / f"s{number}", f"s{number}", f'[grid]\nlisten = "{host}:4433"\n')
        for number, host in enumerate(_hosts())
    ]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(SiteProcess.start, sites))
        _join_all(sites, table)
        with ThreadPoolExecutor(COUNT) as pool:
            list(pool.map(SiteProcess.stop, sites))
        for site in sites:
            site.begin()
        for site in sites:
            _until(lambda site=site: starting.answers(site.state))
        return _measure(sites)
    finally:
        for site in sites:
            site.close()


def _join_all(sites: Sequence[SiteProcess], table: Table) -> None:
    with sites[0].client() as client:
        client.create_community("mesh")
        codes = [client.invite("mesh").code for _ in sites[1:]]
    began = time.monotonic()
    with ThreadPoolExecutor(COUNT) as pool:
        list(pool.map(_join, sites[1:], codes))
    for site in sites:
        with site.client() as client:
            _until(lambda client=client: len(client.grid("mesh")) == COUNT)
    table.add(f"{COUNT} sites: {JOINING}", f"{time.monotonic() - began:.1f} s until all know all")


def _join(site: SiteProcess, code: str) -> None:
    with site.client() as client:
        client.join_community(code)


def _measure_ipv8(folder: Path) -> dict[str, float]:
    peers = [Ipv8(host, folder / f"{number}") for number, host in enumerate(_hosts())]
    try:
        return _measure(peers)
    finally:
        for peer in peers:
            assert peer.process
            peer.process.kill()
            peer.process.communicate()


def _measure(peers: Sequence[Peer]) -> dict[str, float]:
    """Take one contestant through all steps; return how long each took, in seconds."""
    found = {}
    _until(lambda: all(peer.told() for peer in peers))
    began = time.monotonic()
    for peer in peers:
        assert peer.process and peer.process.stdin
        peer.process.stdin.write(b"go\n")
        peer.process.stdin.flush()
    found[MESH] = _until_all(peers, began, alive=COUNT - 1)
    main, other = peers[: COUNT - APART], peers[COUNT - APART :]
    with _parted():
        began = time.monotonic()
        _until_all(main, began, gone=APART)
        _until_all(other, began, gone=COUNT - APART)
    found[HEALED] = _until_all(peers, time.monotonic(), alive=COUNT - 1)
    _peace(peers)
    began = time.monotonic()
    assert peers[-1].process
    peers[-1].process.kill()
    found[KILLED] = _until_all(peers[:-1], began, gone=1)
    return found


def _until_all(
    peers: Sequence[Peer], began: float, *, alive: int | None = None, gone: int | None = None
) -> float:
    """Wait until all saw so many; return how long after ``began`` the last of them did.

    Infinite if they do not within `_PATIENCE`.
    """

    def seen() -> list[float]:
        return [_first(peer.told(), began, alive=alive, gone=gone) for peer in peers]

    if not _until(lambda: inf not in seen()):
        return inf
    return max(seen()) - began


def _first(
    told: Sequence[tuple[float, int, int]], began: float, *, alive: int | None, gone: int | None
) -> float:
    """Return when a peer first saw so many, not before ``began``; infinite if it did not."""
    earlier = sum(line[0] < began for line in told)
    for at, living, lost in told[max(0, earlier - 1) :]:  # what it saw already counts
        if living == alive or lost == gone:
            return max(at, began)
    return inf


def _peace(peers: Sequence[Peer]) -> None:
    """Let a while pass, and tell what that costs each."""
    processes = [psutil.Process(peer.process.pid) for peer in peers if peer.process]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(_PEACE_SECONDS)
    spent = [sum(process.cpu_times()[:2]) for process in processes]
    shares = sorted((b - a) / _PEACE_SECONDS for a, b in zip(before, spent, strict=True))
    sizes = sorted(process.memory_info().rss / 1e6 for process in processes)
    middle = len(processes) // 2
    print(f"in peace: {shares[middle]:.2%} of a core, {sizes[middle]:.0f} MB (medians of all)")


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return true


def _told(seconds: float) -> str:
    return f"not within {_PATIENCE:.0f} s" if seconds == inf else f"{seconds:.2f} s"


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
