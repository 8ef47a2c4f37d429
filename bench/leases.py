"""What a lease between two sites takes: ``make bench`` runs it, or by itself.

The borrower is a site in this process, the lenders are sites in theirs, on loopback, over the
overlay. One lender starts a sandbox for each lease, as sites do; the other starts none, so that
the rest is seen: checking who asks, deciding, writing down, signing, on both sides. Beside it is
a bare ping over the same transport. They take turns; the first round fills caches.
"""

from __future__ import annotations

import asyncio
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import structlog
from rounds import Table, ratio, told
from testbed import CAPACITY, LENDING, SiteProcess, wait_until

from gridcloud.client import starting
from gridcloud.grid.broker import Broker
from gridcloud.grid.messages import Kind, Nothing
from gridcloud.model.need import Need
from gridcloud.settings import SiteSettings
from gridcloud.site.site import Site

ROUNDS = 60
AIM_SECONDS = 0.010
PATIENCE = 30.0
PAUSE_SECONDS = 0.2
NEED = Need(cpus=1, memory_bytes=2**28)
_LENDER = Path(__file__).with_name("lender_site.py")


class Lender:
    """A site to borrow from, as the borrower knows it."""

    def __init__(self, broker: Broker, community: str, key: str) -> None:
        self._broker = broker
        self._community = community
        self._key = key

    async def ping(self) -> float:
        """Ask it for nothing; return how long that took."""
        began = time.perf_counter()
        member = await self._broker._directory.member(self._community, self._key)
        message = await self._broker._caller.carry(member.address, Kind.PING, Nothing(), PATIENCE)
        self._broker._caller.read(message, Nothing)
        return time.perf_counter() - began

    async def lend(self, number: int, public_key: str) -> float:
        """Borrow, and give back; return how long borrowing took."""
        request = f"bench-{number}"
        began = time.perf_counter()
        grant = await self._broker.request_lease(
            self._key,
            self._community,
            request,
            need=NEED,
            user="bench",
            ssh_public_key=public_key,
        )
        seconds = time.perf_counter() - began
        await self._broker.release_lease(self._key, self._community, grant.lease_id)
        return seconds


class WithoutSandboxes(SiteProcess):
    """A lender whose leases have nothing behind them."""

    def start(self, dying: str = "") -> None:
        """See `SiteProcess`."""
        with (self.folder / "site.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, _LENDER],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        wait_until(lambda: starting.answers(self.state))


async def measure(base: Path, table: Table) -> None:
    """Start all three, let them take turns, print."""
    (base / "state").mkdir()
    borrower = Site(SiteSettings(name="borrower"), base / "settings.toml", base / "state")
    sites = [
        SiteProcess(base / "lender", "lender", CAPACITY + LENDING),
        WithoutSandboxes(base / "bare", "bare", CAPACITY + LENDING),
    ]
    await borrower.start()
    try:
        community = (await borrower.peers.create_community("bench")).id
        for site in sites:
            await asyncio.to_thread(site.start)
            invited = await borrower.peers.invite(
                community, ("provider",), timedelta(hours=1), approve=False, uses=1
            )
            await asyncio.to_thread(_join, site, invited.code)
        broker = await borrower.peers._started()
        keys = {member.site_name: member.key for member in await broker.members(community)}
        lender, bare = (Lender(broker, community, keys[site.name]) for site in sites)
        await _compare(table, lender, bare, borrower._keyring.new_loan_key("bench"))
    finally:
        await borrower.stop()
        for site in sites:
            site.close()


async def _compare(table: Table, lender: Lender, bare: Lender, public_key: str) -> None:
    """Let them take turns, and print."""
    times: dict[str, list[float]] = {"ping": [], "lease": [], "sandboxed": []}
    for number in range(-1, ROUNDS):
        found = {
            "ping": await lender.ping(),
            "lease": await bare.lend(number, public_key),
            "sandboxed": await lender.lend(number, public_key),
        }
        for name, seconds in found.items():
            if number >= 0:
                times[name].append(seconds)
        await asyncio.sleep(PAUSE_SECONDS)  # members are answered so many leases a second
    ping, lease, sandboxed = times.values()
    table.add("ping of a peer, there and back", told(ping))
    table.add("a lease without its sandbox", told(lease), f"ping {told(ping)}", ratio(lease, ping))
    own = [each - statistics.median(ping) for each in lease]
    table.add(f"the same, less a ping (aim ≤ {AIM_SECONDS * 1e3:.0f} ms)", told(own))
    table.add("a lease with its sandbox", told(sandboxed))
    start = statistics.median(sandboxed) - statistics.median(lease)
    table.add("so the sandbox's start takes", f"{start * 1e3:.0f} ms")


def _join(site: SiteProcess, code: str) -> None:
    with site.client() as client:
        client.join_community(code)


def main() -> None:
    """Measure, print."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(Path(folder), table))
    print(f"load {os.getloadavg()[0]:.1f}; medians, and minima in brackets")


if __name__ == "__main__":
    main()
