"""One peer of pyipv8, which the mesh is measured against.

Called with ``HOST PORT FIRST_HOST FIRST_PORT``. It waits for a line on its standard input, then
joins by the first peer, and prints a line ``SECONDS PEERS GONE`` (of the machine's monotonic clock)
whenever the number of its peers, or of those it has lost, changes.

pyipv8 is LGPL-3. It runs in processes of its own, only here, and nothing of gridcloud imports it.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from ipv8.community import CommunitySettings
from ipv8.configuration import (
    Bootstrapper,
    BootstrapperDefinition,
    ConfigBuilder,
    Strategy,
    WalkerDefinition,
)
from ipv8.peerdiscovery.community import DiscoveryCommunity
from ipv8.util import run_forever
from ipv8_service import IPv8


class Mesh(DiscoveryCommunity):
    """A community in which everyone seeks everyone, and pings who is silent."""

    community_id = b"gridcloud-bench-mesh"

    def __init__(self, settings: CommunitySettings) -> None:
        super().__init__(settings)
        self.max_peers = -1

    def started(self) -> None:
        """Tell how many peers there are, as they come and go."""
        last, most = -1, 0

        async def tell() -> None:
            nonlocal last, most
            if (count := len(self.get_peers())) != last:
                last, most = count, max(most, count)
                print(time.monotonic(), count, most - count, flush=True)

        self.register_task("tell", tell, interval=0.05)


async def main(host: str, port: int, first: tuple[str, int]) -> None:
    """Run one peer until its process is ended."""
    print(time.monotonic(), 0, 0, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    settings = ConfigBuilder().clear_keys().clear_overlays()
    settings.set_address(host).set_port(port)
    with tempfile.TemporaryDirectory() as folder:
        settings.add_key("mine", "curve25519", str(Path(folder) / "key"))
        settings.add_overlay(
            "Mesh",
            "mine",
            [
                WalkerDefinition(Strategy.RandomWalk, -1, {"timeout": 3.0}),
                WalkerDefinition(Strategy.RandomChurn, -1, {}),
                WalkerDefinition(Strategy.PeriodicSimilarity, -1, {}),
            ],
            [
                BootstrapperDefinition(
                    Bootstrapper.DispersyBootstrapper,
                    {"ip_addresses": [first], "dns_addresses": []},
                )
            ],
            {},
            [("started",)],
        )
        await IPv8(settings.finalize(), extra_communities={"Mesh": Mesh}).start()
        await run_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), (sys.argv[3], int(sys.argv[4]))))
