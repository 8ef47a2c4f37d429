"""The gateway's second entrance: SSH inside a stream of the overlay, for who cannot dial its port.

On the wire (service `SERVICE`): the lender says one byte. After `WELCOME` both sides speak SSH as
on the gateway's port, with the same host key and certificates; after any other the stream ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Collection

from gridcloud.errors import GridcloudError
from gridcloud.grid.transport import ByteStream
from gridcloud.site.gateway import CONNECTIONS_PER_LEASE_LIMIT, Gateway
from gridcloud.site.streaming import splice

SERVICE = "gateway"
WELCOME = b"+"
#: The asker has no live lease here.
NO_LEASE = b"-"
#: It has as many streams as its leases are good for.
FULL = b"~"
#: However many leases a peer has.
STREAMS_PER_PEER_LIMIT = 128


class Entrance:
    """Lets borrowers in by streams: each to its own leases, and only while it has any.

    ``gateway`` gives the running one, or None; ``lent_to`` the ids of the live leases of a peer,
    by its key.
    """

    def __init__(
        self, gateway: Callable[[], Gateway | None], lent_to: Callable[[str], Collection[str]]
    ) -> None:
        self._gateway = gateway
        self._lent_to = lent_to
        self._streams: Counter[str] = Counter()

    async def accept(self, key: str, stream: ByteStream) -> None:
        """Serve a stream that the owner of ``key`` opened, until it ends; see `Acceptor`."""
        with contextlib.closing(stream):
            gateway, leases = self._gateway(), len(self._lent_to(key))
            limit = min(leases * CONNECTIONS_PER_LEASE_LIMIT, STREAMS_PER_PEER_LIMIT)
            if gateway is None or not leases:
                await _say(stream, NO_LEASE)
            elif self._streams[key] >= limit:
                await _say(stream, FULL)
            else:
                self._streams[key] += 1
                try:
                    await self._serve(gateway, key, stream)
                finally:
                    self._streams[key] -= 1
                    if not self._streams[key]:
                        del self._streams[key]

    async def _serve(self, gateway: Gateway, key: str, stream: ByteStream) -> None:
        try:
            await stream.write(WELCOME)
        except GridcloudError:
            return
        ours, theirs = socket.socketpair()
        async with asyncio.TaskGroup() as group:
            group.create_task(splice(stream, ours))
            group.create_task(
                gateway.serve(theirs, lambda lease_id: lease_id in self._lent_to(key))
            )


async def _say(stream: ByteStream, answer: bytes) -> None:
    with contextlib.suppress(GridcloudError):
        await stream.write(answer)
        await stream.write_eof()
