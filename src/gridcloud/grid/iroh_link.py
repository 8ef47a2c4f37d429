"""Links over iroh: QUIC whose TLS key is the site's own, so that its key is its address.

There is no look-up service, and no relay but those this site is told to use: peers are dialled at
the addresses they were last known at. iroh takes no idle timeout and gives up dialling only after
30 s, so every wait needs an end from outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable, Sequence

import structlog
from iroh import iroh_ffi as iroh
from pydantic import TypeAdapter, ValidationError

from gridcloud.errors import InvalidSpec, Unavailable
from gridcloud.grid.addresses import parse_listen, show, shown_by
from gridcloud.grid.identity import Identity
from gridcloud.grid.iroh_binding import lighten
from gridcloud.grid.links import LinkDown, broken, unreachable
from gridcloud.grid.papers import RelayUrls
from gridcloud.grid.rates import Door
from gridcloud.grid.transport import Path, PeerAddress

log = structlog.get_logger()

_ALPN = b"gridcloud/3"
_HANDSHAKE_TIMEOUT = 10.0
_CLOSE_TIMEOUT = 5.0
_MAX_STREAMS = 96
#: How much one connection may hold here unread.
_RECEIVE_WINDOW = 2 * 1024 * 1024
_MOST_OBSERVED = 3
_RELAY_URLS: TypeAdapter[tuple[str, ...]] = TypeAdapter(RelayUrls)


class IrohStream:
    """See `gridcloud.grid.transport.ByteStream`."""

    def __init__(self, key: str, stream: iroh.BiStream, endings: set[asyncio.Task[None]]) -> None:
        self._key = key
        self._send = stream.send()
        self._receive = stream.recv()
        self._endings = endings
        self._ended = False
        self._closed = False
        self._read_all = False

    async def read(self, limit: int) -> bytes:
        """See `ByteStream`."""
        self._check()
        if self._read_all:
            return b""
        try:
            data = await self._receive.read(limit)
        except iroh.IrohError as error:
            raise broken(self._key, cause(error)) from error
        self._read_all = not data
        return data

    async def write(self, data: bytes) -> None:
        """See `ByteStream`."""
        self._check()
        try:
            await self._send.write_all(data)
        except iroh.IrohError as error:
            raise broken(self._key, cause(error)) from error

    async def write_eof(self) -> None:
        """See `ByteStream`."""
        self._check()
        if self._ended:
            return
        self._ended = True
        try:
            await self._send.finish()
        except iroh.IrohError as error:
            raise broken(self._key, cause(error)) from error

    def close(self) -> None:
        """See `ByteStream`."""
        if self._closed:
            return
        self._closed = True
        if self._ended and self._read_all:
            return
        # Left to itself a stream would look finished to the other end, not broken.
        ending = asyncio.ensure_future(self._let_go())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    def _check(self) -> None:
        if self._closed:
            raise broken(self._key, "the stream was closed here")

    async def _let_go(self) -> None:
        if not self._ended:
            with contextlib.suppress(iroh.IrohError):
                await self._send.reset(1)
        if not self._read_all:
            with contextlib.suppress(iroh.IrohError):
                await self._receive.stop(1)


class IrohLink:
    """See `gridcloud.grid.links.Link`."""

    def __init__(self, connection: iroh.Connection, *, dialled: bool, observed: str = "") -> None:
        self._connection = connection
        self.key = connection.remote_id().to_bytes().hex()
        self.dialled = dialled
        self._observed = observed
        self._endings: set[asyncio.Task[None]] = set()
        connection.set_max_concurrent_bi_streams(_MAX_STREAMS)
        connection.set_max_concurrent_uni_streams(0)
        connection.set_receive_window(_RECEIVE_WINDOW)

    async def open(self) -> IrohStream:
        """See `Link`."""
        try:
            return IrohStream(self.key, await self._connection.open_bi(), self._endings)
        except iroh.IrohError as error:
            raise LinkDown(cause(error)) from error

    async def accept(self) -> IrohStream:
        """See `Link`."""
        try:
            return IrohStream(self.key, await self._connection.accept_bi(), self._endings)
        except iroh.IrohError as error:
            raise LinkDown(cause(error)) from error

    @property
    def alive(self) -> bool:
        """See `Link`."""
        return self._connection.close_reason() is None

    def received(self) -> int:
        """See `Link`. QUIC acknowledges all that comes."""
        return self._connection.stats().udp_rx_datagrams

    def nudge(self) -> None:
        """See `Link`; QUIC needs none."""

    def meter(self, toll: Callable[[int], float]) -> None:
        """See `Link`; QUIC's frames are counted by iroh."""

    def path(self) -> Path:
        """See `Link`."""
        used = [path for path in self._connection.paths() if path.is_selected]
        rtt = self._connection.rtt()
        return Path(
            how="iroh-relay" if used and used[0].is_relay else "direct",
            rtt_seconds=None if rtt is None else rtt / 1000,
        )

    def observed(self) -> str:
        """See `Link`."""
        used = [path for path in self._connection.paths() if path.is_selected and path.is_ip]
        return used[0].remote_addr if used else self._observed

    def close(self) -> None:
        """See `Link`."""
        if self.alive:
            self._connection.close(0, b"")


class IrohCarrier:
    """This site's UDP port. All of one process must share one event loop.

    ``listen`` is ``IP:PORT``, port 0 for any; a specific address is the only one listened on (the
    other IP family keeps to loopback). ``advertise`` replaces the addresses found by itself.
    ``on_link`` takes a link that came in, and closes it when done with it.
    """

    def __init__(
        self,
        identity: Identity,
        listen: str,
        advertise: Sequence[str],
        relays: Sequence[str],
        door: Door,
        on_link: Callable[[IrohLink], object],
    ) -> None:
        self._identity = identity
        self._host, self._port = parse_listen(listen)
        self._advertise = tuple(advertise)
        for address in advertise:
            parse_listen(address)
        self._relays = tuple(relays)
        self._relay_mode = _relay_mode(relays)
        self._door = door
        self._on_link = on_link
        self._endpoint: iroh.Endpoint | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._observed: dict[str, None] = {}

    async def start(self) -> None:
        """Begin to listen; raises `Unavailable` if the port cannot be had."""
        lighten()
        iroh.uniffi_set_event_loop(asyncio.get_running_loop())  # type: ignore[arg-type]
        self._endpoint = await self._bound()
        self._accepting = asyncio.create_task(self._accept(self._endpoint), name="accept-udp")

    def addresses(self) -> tuple[str, ...]:
        """Return where this port is found."""
        if self._advertise or self._endpoint is None:
            return self._advertise
        # What others said they see comes last: it is a guess.
        return (*self.own_addresses()[:12], *self._observed)

    def own_addresses(self) -> tuple[str, ...]:
        """Return where this port is found without what others see or the user says."""
        if self._endpoint is None:
            return ()
        known = self._endpoint.addr().direct_addresses()
        return tuple(
            each for each in known if each not in self._observed and shown_by(self._host, each)
        )

    @property
    def relay_urls(self) -> tuple[str, ...]:
        """The iroh relays this site can be reached by."""
        return self._relays

    async def learn(self, address: str) -> None:
        """Note where a trusted peer sees this port; the latest few are kept."""
        if self._advertise or self._endpoint is None or self._host.is_loopback:
            return
        if address in self.addresses() and address not in self._observed:
            return
        self._observed.pop(address, None)
        self._observed[address] = None
        with contextlib.suppress(iroh.IrohError):
            await self._endpoint.add_external_addr(address)
            while len(self._observed) > _MOST_OBSERVED:
                oldest = next(iter(self._observed))
                del self._observed[oldest]
                await self._endpoint.remove_external_addr(oldest)

    async def dial(self, peer: PeerAddress) -> IrohLink:
        """Return a new link to the peer; tries for 30 s at most. Raises `Unavailable`."""
        # Others' relays are not asked: their URLs could name anything.
        relay = next((url for url in peer.relay_urls if url in self._relays), None)
        where = ", ".join([*peer.addresses, *([relay] if relay else [])])
        if self._endpoint is None:
            raise Unavailable("This site's grid transport is closed.")
        if not where:
            raise unreachable(peer.key, where, "no address of it is known")
        try:
            target = iroh.EndpointAddr(
                iroh.EndpointId.from_bytes(bytes.fromhex(peer.key)), relay, list(peer.addresses)
            )
            connection = await self._endpoint.connect(target, _ALPN)
        except iroh.IrohError as error:
            raise unreachable(peer.key, where, cause(error)) from error
        return IrohLink(connection, dialled=True)

    async def close(self) -> None:
        """Stop to listen. Idempotent."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is None:
            return
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        with contextlib.suppress(iroh.IrohError, TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await endpoint.close()

    async def _bound(self) -> iroh.Endpoint:
        binds = [show(self._host, self._port)]
        if not self._host.is_unspecified:
            # Left to itself iroh would listen on every address of the other IP family.
            # On the same port, so that it too stays over restarts: iroh goes on dialling the path
            # that answered last, and a peer on this host may have found this one.
            other = "::1" if self._host.version == 4 else "127.0.0.1"
            # Tried before: after a failure iroh keeps the port that it did get for a moment.
            if _can_be_had(other, self._port):
                binds.append(show(other, self._port))
        try:
            return await self._bind(binds)
        except iroh.IrohError as error:
            raise Unavailable(
                f"The grid cannot listen on {binds[0]}: {cause(error)}.",
                hint="Free that port, or set another in [grid] listen.",
            ) from error

    async def _bind(self, binds: Sequence[str]) -> iroh.Endpoint:
        builder = iroh.EndpointBuilder()  # type: ignore[no-untyped-call]
        builder.apply_minimal()
        builder.secret_key(self._identity.secret_bytes)
        builder.alpns([_ALPN])
        builder.relay_mode(self._relay_mode)
        for bind in binds:
            builder.bind_addr(bind)
        return await builder.bind()

    async def _accept(self, endpoint: iroh.Endpoint) -> None:
        async with asyncio.TaskGroup() as greeting:
            while (incoming := await endpoint.accept_next()) is not None:
                greeting.create_task(self._greet(incoming))

    async def _greet(self, incoming: iroh.Incoming) -> None:
        """Take one connection in; whatever is wrong with it stays in here."""
        try:
            source = await incoming.remote_addr()
            observed = source.addr if isinstance(source, iroh.IncomingAddr.IP) else ""
            with self._door.enter(observed.rpartition(":")[0]) as admitted:
                if not admitted:
                    await incoming.refuse()
                    return
                if self._door.crowded and not await incoming.remote_addr_validated():
                    await incoming.retry()  # it comes again once it proved its address
                    return
                async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
                    connection = await (await incoming.accept()).connect()
                link = IrohLink(connection, dialled=False, observed=observed)
            self._on_link(link)
        except (iroh.IrohError, TimeoutError) as error:
            log.debug("incoming connection failed", error=str(error))
        except Exception:  # a fault of ours costs one connection, not the accepting of others
            log.exception("incoming connection failed")


def has_udp() -> bool:
    """Say whether a plain UDP socket can be made on this host at all."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True


def _can_be_had(host: str, port: int) -> bool:
    """Say whether a UDP port is free; false on a host without that IP family."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind((host, port))
    except OSError:
        return False
    return True


def _relay_mode(relays: Sequence[str]) -> iroh.RelayMode:
    if not relays:
        return iroh.RelayMode.disabled()
    try:
        return iroh.RelayMode.custom_from_urls(list(_RELAY_URLS.validate_python(tuple(relays))))
    except (ValidationError, iroh.IrohError) as error:
        raise InvalidSpec(
            f"{', '.join(relays)} does not name at most four iroh relays.",
            hint="Write their URLs, such as https://relay.example.org.",
        ) from error


def cause(error: iroh.IrohError) -> str:
    """Return the innermost cause of an error, without the places in iroh's source."""
    lines = [line.strip() for line in error.message().splitlines() if line.strip()]
    text = re.sub(r"\s*\((/|[A-Za-z]:)[^)]*\)", "", lines[-1]) if lines else ""
    return text.rstrip(".") or error.kind().name.lower()
