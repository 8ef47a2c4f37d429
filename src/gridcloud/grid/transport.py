"""How brokers reach one another: one message there, one message back, or a stream of bytes.

What every transport keeps:

- The key that a handler is given is proved: nobody but that key's owner can have sent the message.
  The reply likewise comes from the key that was asked, and nobody in between can read either.
- There is no order among requests, not even to one peer.
- A request may be carried out though its caller saw an error, and may be carried out twice when
  a connection broke and was made anew. **Requests must therefore be idempotent.**
- A message has at most `MAX_MESSAGE_BYTES`, both ways.

A stream is an ordered flow of bytes both ways, proved and private as messages are. Unlike them it
is never made anew by itself: when what carries it breaks, the stream is broken.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

from gridcloud.errors import InvalidSpec
from gridcloud.grid.papers import Addresses, Key, RelayUrls
from gridcloud.model.frozen import Frozen

MAX_MESSAGE_BYTES = 1024 * 1024


class PeerAddress(Frozen):
    """Whom to reach (the key) and where to try (``IP:PORT``, IPv6 in brackets; any may fail).

    ``addresses`` are UDP ports, ``tls`` are TCP ports, ``relay_urls`` are iroh relays it listens
    at. All may be empty: a peer may still be reached by a link it made, or through another.
    """

    key: Key
    addresses: Addresses = ()
    tls: Addresses = ()
    relay_urls: RelayUrls = ()


class Path(Frozen):
    """How a peer is reached now.

    ``how``: straight over UDP (``direct``) or TCP (``tls``), through another site (``relayed``;
    ``via`` is its key) or an iroh relay (``iroh-relay``). ``rtt_seconds`` is there and back.
    """

    how: Literal["direct", "tls", "relayed", "iroh-relay"]
    via: Key | None = None
    rtt_seconds: float | None = None

    def __str__(self) -> str:
        return f"relayed by {self.via[:8]}" if self.via else self.how


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


class ByteStream(Protocol):
    """One end of a stream. Its methods raise `Unavailable` once the stream is broken."""

    async def read(self, limit: int) -> bytes:
        """Return at least one and at most ``limit`` bytes, waiting for them; ``b""`` at the end."""
        ...

    async def write(self, data: bytes) -> None:
        """Send all of ``data``; waits while the other end is slow to read."""
        ...

    async def write_eof(self) -> None:
        """Say that no more will be written; reading goes on. Idempotent."""
        ...

    def close(self) -> None:
        """Let go of both directions at once, without waiting. Idempotent.

        What was written before `write_eof` still arrives; without it the other end sees a broken
        stream, so that a part is never taken for the whole.
        """
        ...


#: Takes a stream that a peer opened; given the peer's proved key. The stream is closed when it
#: returns; a fault of it costs that stream only.
Acceptor = Callable[[str, ByteStream], Awaitable[None]]


class Streams(Protocol):
    """What can carry streams between sites."""

    async def open_stream(self, peer: PeerAddress, service: str, timeout: float) -> ByteStream:
        """Open a stream to what the peer serves by this name; reached in ``timeout`` seconds.

        Raises `Unavailable` if the peer cannot be reached or serves nothing by that name,
        `InvalidSpec` for an impossible name. The caller closes it in the end.
        """
        ...

    def serve(self, service: str, acceptor: Acceptor) -> None:
        """Hand streams opened to ``service`` (1 to 15 of a-z, 0-9, ``-``) to the acceptor.

        Before or after the start. Raises `Conflict` if it is served already, `InvalidSpec`.
        """
        ...


def check_size(message: bytes) -> None:
    """Raise `InvalidSpec` if the message is larger than any transport takes."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise InvalidSpec(
            f"A message of {len(message)} bytes is larger than the {MAX_MESSAGE_BYTES} allowed."
        )
