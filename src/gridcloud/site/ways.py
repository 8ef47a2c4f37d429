"""The way to a lender's gateway: straight to its port, or inside a stream of the overlay.

The straight way is faster and so has a head start; when it leads nowhere, or to another server,
the stream is tried as well. What worked first is tried first for a while.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Protocol

import asyncssh

from gridcloud.access.connect import Carrier, Credentials, UnexpectedHost, connect
from gridcloud.errors import Forbidden, GridcloudError, TimedOut, Unavailable
from gridcloud.grid.identity import short
from gridcloud.grid.transport import ByteStream
from gridcloud.model.lease import Endpoint
from gridcloud.site import entrance
from gridcloud.site.streaming import splice

#: How long a way may go without a result before the next is tried beside it.
HEAD_START_SECONDS = 1.0
STREAM_TIMEOUT_SECONDS = 15.0
SSH_TIMEOUT_SECONDS = 20.0
REMEMBERED_SECONDS = 600.0
_REMEMBERED_LIMIT = 1000
_STRAIGHT, _STREAMED = "straight", "streamed"
_Dial = Callable[[], Coroutine[None, None, asyncssh.SSHClientConnection]]
_Place = tuple[str, str, int]


class Overlay(Protocol):
    """Streams to peers by their keys."""

    async def open_stream(self, peer: str, service: str, timeout: float) -> ByteStream:
        """Open a stream to what the peer serves by this name; see `Streams`."""
        ...


class Ways:
    """Connects to the gateways of lenders, and remembers by which way that went."""

    def __init__(self, overlay: Overlay, now: Callable[[], float] = time.monotonic) -> None:
        self._overlay = overlay
        self._now = now
        self._worked: dict[_Place, tuple[str, float]] = {}
        self._carrying: set[asyncio.Task[None]] = set()

    async def connect(
        self, lender: str, endpoint: Endpoint, credentials: Credentials
    ) -> asyncssh.SSHClientConnection:
        """Return a connection to an endpoint that the owner of the key ``lender`` granted.

        Host keys and credentials are as for `gridcloud.access.connect.connect`, by whichever way.
        Raises its errors, and `Forbidden` when the lender knows no live lease of this site.
        """

        async def straight() -> asyncssh.SSHClientConnection:
            return await connect(endpoint, credentials, timeout=SSH_TIMEOUT_SECONDS)

        async def streamed() -> asyncssh.SSHClientConnection:
            link = await self._open(lender)
            return await connect(
                endpoint,
                credentials,
                over=Carrier(link, f"grid:{short(lender)}"),
                timeout=SSH_TIMEOUT_SECONDS,
            )

        first_hop = endpoint.gateway or endpoint
        if not first_hop.host:
            return await streamed()
        place = (lender, first_hop.host, first_hop.port)
        ways: dict[str, _Dial] = {_STRAIGHT: straight, _STREAMED: streamed}
        if self._remembered(place) == _STREAMED:
            ways = dict(reversed(ways.items()))
        way, connection = await _first(ways)
        self._remember(place, way)
        return connection

    async def close(self) -> None:
        """Break the streams that still carry something. Idempotent."""
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def _open(self, lender: str) -> socket.socket:
        """Return a socket that leads to the lender's gateway."""
        try:
            async with asyncio.timeout(STREAM_TIMEOUT_SECONDS):
                stream = await self._overlay.open_stream(
                    lender, entrance.SERVICE, STREAM_TIMEOUT_SECONDS
                )
                try:
                    _check(await stream.read(1), lender)
                except BaseException:
                    stream.close()
                    raise
        except TimeoutError as error:
            raise TimedOut(
                f"The lending site {short(lender)} did not answer within "
                f"{STREAM_TIMEOUT_SECONDS:g} s.",
                hint="Check that the lending site is up; 'gridcloud grid show' tells.",
            ) from error
        ours, theirs = socket.socketpair()
        task = asyncio.create_task(splice(stream, ours))
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)
        return theirs

    def _remembered(self, place: _Place) -> str:
        way, until = self._worked.get(place, ("", 0.0))
        return way if self._now() < until else ""

    def _remember(self, place: _Place, way: str) -> None:
        # The first that worked stays: a gateway that was away for an instant, and was then found
        # over the grid first, is not left for the slower way for long.
        if not self._remembered(place):
            self._worked.pop(place, None)
            self._worked[place] = (way, self._now() + REMEMBERED_SECONDS)
            if len(self._worked) > _REMEMBERED_LIMIT:
                del self._worked[next(iter(self._worked))]


def _check(answer: bytes, lender: str) -> None:
    """Raise what the lender's first byte means, unless it lets us in."""
    if answer == entrance.NO_LEASE:
        raise Forbidden(
            f"The lending site {short(lender)} knows no live lease of this site.",
            hint="The lease has ended there; ask for another.",
        )
    if answer == entrance.FULL:
        raise Unavailable(
            f"The lending site {short(lender)} takes no more connections from this one now.",
            hint="It does again when others have ended.",
        )
    if answer != entrance.WELCOME:
        raise Unavailable(
            f"The lending site {short(lender)} broke off before it let this one in.",
            hint="Check that it is up, and lends.",
        )


async def _first(ways: Mapping[str, _Dial]) -> tuple[str, asyncssh.SSHClientConnection]:
    """Return the connection that is there first, and by which way; the others are given up.

    Each way has a head start over the next. A server that was proved and refuses is the end:
    another way to it would change nothing.
    """
    waiting = list(ways)
    dialling: dict[asyncio.Task[asyncssh.SSHClientConnection], str] = {}
    failed: dict[str, GridcloudError] = {}
    try:
        while waiting or dialling:
            if waiting:
                way = waiting.pop(0)
                dialling[asyncio.ensure_future(ways[way]())] = way
            done, _ = await asyncio.wait(
                dialling,
                timeout=HEAD_START_SECONDS if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in done:
                try:
                    connection = task.result()
                except GridcloudError as error:
                    if isinstance(error, Forbidden) and not isinstance(error, UnexpectedHost):
                        raise
                    failed[dialling.pop(task)] = error
                else:
                    return dialling.pop(task), connection
    finally:
        for task in dialling:
            task.cancel()
        for result in await asyncio.gather(*dialling, return_exceptions=True):
            if isinstance(result, asyncssh.SSHClientConnection):
                result.abort()
    # At the lender's address there may be anybody, as behind a router with the same private
    # addresses as here; but over the grid only the lender answers.
    if isinstance(failed[_STREAMED], UnexpectedHost):
        raise failed[_STREAMED]
    causes = " ".join(error.message for error in failed.values())
    raise Unavailable(
        f"The lender's gateway can be reached neither straight nor over the grid. {causes}",
        hint="Check that the lending site is up.",
    )
