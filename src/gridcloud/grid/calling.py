"""Asking a peer: one request encoded, carried and its reply decoded."""

from __future__ import annotations

from gridcloud.grid.documents import Clock
from gridcloud.grid.messages import Body, Kind, decode_reply, encode_request
from gridcloud.grid.transport import PeerAddress, Transport
from gridcloud.model.frozen import Frozen


class Caller:
    """Carries requests over a transport, by a clock."""

    def __init__(self, transport: Transport, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock
        self._asked = 0

    async def ask(
        self, peer: PeerAddress, kind: Kind, body: Frozen, expected: type[Body], timeout: float
    ) -> Body:
        """Return a peer's answer; waits at most ``timeout`` seconds. Repeating it does no harm.

        Raises what `carry` and `read` do.
        """
        return self.read(await self.carry(peer, kind, body, timeout), expected)

    async def carry(self, peer: PeerAddress, kind: Kind, body: Frozen, timeout: float) -> bytes:
        """Return a peer's answer unread: that there is one proves that the peer is there.

        Raises what the transport raises.
        """
        self._asked += 1
        message = encode_request(kind, body, self._clock(), self._asked)
        return await self._transport.request(peer, message, timeout)

    def read(self, reply: bytes, expected: type[Body]) -> Body:
        """Return what an answer says.

        Raises what the peer answered, `Conflict` for clocks that differ and `InvalidSpec` for an
        answer that makes no sense.
        """
        return decode_reply(reply, expected, self._clock())
