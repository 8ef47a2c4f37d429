"""How brokers reach one another: one message there, one message back, both ends proved.

What every transport keeps:

- The key that a handler is given is proved: nobody but that key's owner can have sent the message.
  The reply likewise comes from the key that was asked, and nobody in between can read either.
- There is no order among requests, not even to one peer.
- A request may be carried out though its caller saw an error, and may be carried out twice when
  a connection broke and was made anew. **Requests must therefore be idempotent.**
- A message has at most `MAX_MESSAGE_BYTES`, both ways.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from gridcloud.errors import InvalidSpec
from gridcloud.grid.papers import Addresses, Key
from gridcloud.model.frozen import Frozen

MAX_MESSAGE_BYTES = 1024 * 1024


class PeerAddress(Frozen):
    """Whom to reach (the key) and where to try (``IP:PORT``, IPv6 in brackets; any may fail)."""

    key: Key
    addresses: Addresses = ()


#: Answers a message; given the proved key of who asks. It must not raise: a fault of the handler
#: drops the one request.
Handler = Callable[[str, bytes], Awaitable[bytes]]


class Transport(Protocol):
    """One site's end of the overlay."""

    async def start(self, handler: Handler) -> None:
        """Begin to listen, and answer requests by ``handler``, many at a time.

        Raises `Unavailable` if the address to listen on cannot be had.
        """
        ...

    async def request(self, peer: PeerAddress, message: bytes, timeout: float) -> bytes:
        """Send one message and return its reply; waits at most ``timeout`` seconds.

        Raises `Unavailable` if the peer could not be reached or dropped the request, `TimedOut`
        if it was reached and did not answer in time, `InvalidSpec` for a message too large.
        """
        ...

    def address(self) -> PeerAddress:
        """Return where peers may reach this end; known once started."""
        ...

    async def close(self) -> None:
        """Stop to listen, drop what is under way and let go of everything. Idempotent."""
        ...


def check_size(message: bytes) -> None:
    """Raise `InvalidSpec` if the message is larger than any transport takes."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise InvalidSpec(
            f"A message of {len(message)} bytes is larger than the {MAX_MESSAGE_BYTES} allowed."
        )
