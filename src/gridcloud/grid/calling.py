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

    async def ask(
        self, peer: PeerAddress, kind: Kind, body: Frozen, expected: type[Body], timeout: float
    ) -> Body:
        """Return a peer's answer; waits at most ``timeout`` seconds. Repeating it does no harm.

        Raises what the transport raises, what the peer answered, `Conflict` for clocks that
        differ and `InvalidSpec` for an answer that makes no sense.
        """
        message = encode_request(kind, body, self._clock())
        reply = await self._transport.request(peer, message, timeout)
        return decode_reply(reply, expected, self._clock())
