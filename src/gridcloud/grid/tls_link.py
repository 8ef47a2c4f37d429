"""Links over TLS on one TCP port: for where UDP does not pass. Same identities, same messages."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence

import structlog

from gridcloud.errors import Unavailable
from gridcloud.grid.addresses import own_hosts, parse_listen, show
from gridcloud.grid.links import LinkDown, unreachable
from gridcloud.grid.mux_link import MuxLink
from gridcloud.grid.rates import Door
from gridcloud.grid.tls_channel import TlsIdentity, answer_over, dial_over
from gridcloud.grid.transport import PeerAddress

log = structlog.get_logger()

_HANDSHAKE_TIMEOUT = 10.0
#: Of several addresses the next is tried when one has not answered for so long.
_NEXT_ADDRESS_SECONDS = 0.5
_MOST_ADDRESSES = 8


class TcpStream:
    """A TCP connection as a `gridcloud.grid.transport.ByteStream`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, limit: int) -> bytes:
        """See `ByteStream`."""
        try:
            return await self._reader.read(limit)
        except OSError as error:
            raise Unavailable(f"The connection broke: {error}.") from error

    async def write(self, data: bytes) -> None:
        """See `ByteStream`."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise Unavailable(f"The connection broke: {error}.") from error

    async def write_eof(self) -> None:
        """See `ByteStream`."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    def close(self) -> None:
        """See `ByteStream`."""
        self._writer.transport.abort()


class TlsCarrier:
    """This site's TCP port, if it has one, and its way to those of others.

    ``listen`` is ``IP:PORT`` or None; ``advertise`` replaces the addresses found by itself.
    ``on_link`` takes a link that came in, and closes it when done with it.
    """

    def __init__(
        self,
        mine: TlsIdentity,
        listen: str | None,
        advertise: Sequence[str],
        door: Door,
        on_link: Callable[[MuxLink], object],
    ) -> None:
        self._mine = mine
        self._listen = parse_listen(listen) if listen else None
        self._advertise = tuple(advertise)
        for address in advertise:
            parse_listen(address)
        self._door = door
        self._on_link = on_link
        self._server: asyncio.Server | None = None
        self._greeting: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to listen, if told to; raises `Unavailable` if the port cannot be had."""
        if self._listen is None:
            return
        host, port = self._listen
        try:
            self._server = await asyncio.start_server(self._greet, str(host), port)
        except OSError as error:
            raise Unavailable(
                f"The grid cannot listen on TCP {show(host, port)}: {_said(error)}.",
                hint="Free that port, or set another in [grid] tls_listen.",
            ) from error

    def addresses(self, known: Sequence[str] = ()) -> tuple[str, ...]:
        """Return where the port is found; ``known`` are this host's other addresses."""
        if self._server is None:
            return ()
        if self._advertise or self._listen is None:
            return self._advertise
        port = self._server.sockets[0].getsockname()[1]
        return tuple(show(host, port) for host in own_hosts(self._listen[0], known))[:16]

    async def dial(self, peer: PeerAddress) -> MuxLink:
        """Return a new link to the peer, by its first address that answers with its key.

        Raises `Unavailable`.
        """
        where = ", ".join(peer.tls)
        if not peer.tls:
            raise unreachable(peer.key, where, "no TLS address of it is known")
        problems: list[str] = []
        pending: set[asyncio.Task[MuxLink]] = set()
        left = list(peer.tls[:_MOST_ADDRESSES])
        try:
            while left or pending:
                if left:
                    pending.add(asyncio.create_task(self._dial(peer.key, left.pop(0))))
                done, pending = await asyncio.wait(
                    pending,
                    timeout=_NEXT_ADDRESS_SECONDS if left else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                links = [task.result() for task in done if task.exception() is None]
                for extra in links[1:]:
                    extra.close()
                if links:
                    return links[0]
                problems += [str(task.exception()) for task in done]
        finally:
            for task in pending:
                task.add_done_callback(_close_late)
                task.cancel()
        raise unreachable(peer.key, where, "; ".join(dict.fromkeys(problems)))

    async def close(self) -> None:
        """Stop to listen. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for task in list(self._greeting):
            task.cancel()
        await asyncio.gather(*self._greeting, return_exceptions=True)

    async def _dial(self, key: str, address: str) -> MuxLink:
        host, port = parse_listen(address)
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
                raw = TcpStream(*await asyncio.open_connection(str(host), port))
                try:
                    channel = await dial_over(raw, self._mine, key)
                except BaseException:
                    raw.close()
                    raise
        except (OSError, TimeoutError) as error:
            raise LinkDown(_said(error)) from error
        return MuxLink(channel, key, dialled=True, how="tls")

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take one connection in; whatever is wrong with it stays in here."""
        task = asyncio.current_task()
        assert task is not None
        self._greeting.add(task)
        raw = TcpStream(reader, writer)
        taken = False
        try:
            host = str((writer.get_extra_info("peername") or ("",))[0])
            with self._door.enter(host) as admitted:
                if not admitted:
                    return
                async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
                    channel, key = await answer_over(raw, self._mine)
            taken = True
            self._on_link(MuxLink(channel, key, dialled=False, how="tls"))
        except (LinkDown, TimeoutError) as error:
            log.debug("incoming connection failed", error=str(error))
        except Exception:  # a fault of ours costs one connection, not the accepting of others
            log.exception("incoming connection failed")
        finally:
            self._greeting.discard(task)
            if not taken:
                raw.close()


def _close_late(task: asyncio.Task[MuxLink]) -> None:
    """Close a link that was made just when nobody wanted it any more."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _said(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "nobody answered in time"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error)
