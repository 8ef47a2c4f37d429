"""One site of the mesh: the real thing, which also tells how many others it sees.

It waits for a line on its standard input before it looks for its peers, and prints a line
``SECONDS ALIVE GONE`` (of the machine's monotonic clock) whenever one of these numbers changes.
All else is as with ``python -m gridcloud.site``.
"""

from __future__ import annotations

import asyncio
import sys
import time

import gridcloud.grid.overlay  # noqa: F401  # else imported at first use, after the word
from gridcloud.grid.gossip import Gossip
from gridcloud.grid.swim import PeerState
from gridcloud.site.__main__ import main
from gridcloud.site.peers import Peers

_begin, _meet = Peers.start, Gossip.start
_telling: set[asyncio.Task[None]] = set()


async def start_all_else(peers: Peers) -> None:
    """Go on with what a site starts besides."""
    _telling.add(asyncio.create_task(wait_for_the_word(peers)))


async def wait_for_the_word(peers: Peers) -> None:
    """Begin when told to."""
    print(time.monotonic(), 0, 0, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await _begin(peers)


async def meet_and_tell(gossip: Gossip) -> None:
    """Look for peers, and tell of it."""
    await _meet(gossip)
    _telling.add(asyncio.create_task(tell(gossip)))


async def tell(gossip: Gossip) -> None:
    """Tell how many peers are there and how many are not, as they come and go."""
    last = (0, 0)
    while True:
        swim = gossip.swim
        members = {
            key for circle in gossip.exchanges.circles.values() for key in circle.roster.members
        }
        gone = sum(swim.seen(key).state is PeerState.DEAD for key in members)
        if (seen := (len(swim.alive()), gone)) != last:
            last = seen
            print(time.monotonic(), *seen, flush=True)
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    Peers.start = start_all_else  # type: ignore[method-assign]
    Gossip.start = meet_and_tell  # type: ignore[method-assign]
    main()
