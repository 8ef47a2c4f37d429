"""The transport over iroh: QUIC whose TLS key is the site's own, so that its key is its address.

One connection is kept per peer and one bidirectional stream is used per request. There is no relay
and no look-up service: peers are dialled at the addresses they were last known at. iroh takes no
idle timeout, so liveness is ours: every wait here has an end, and a kept connection on which
nothing at all arrives for a while after a request (the peer acknowledges even what it is slow to
answer) is given up and dialled anew, with the request sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import structlog
from iroh import iroh_ffi as iroh

from gridcloud.errors import Conflict, InvalidSpec, TimedOut, Unavailable
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.transport import MAX_MESSAGE_BYTES, Handler, PeerAddress, check_size

log = structlog.get_logger()
_T = TypeVar("_T")

_ALPN = b"gridcloud/1"
#: A kept connection is dead when nothing arrives on it within this time after a request.
_SILENCE = 2.0
_HANDSHAKE_TIMEOUT = 10.0
_TRANSFER_TIMEOUT = 30.0
_CLOSE_TIMEOUT = 5.0
_MAX_CONNECTIONS = 256
_MAX_CONNECTIONS_PER_PEER = 8
_MAX_STREAMS_PER_CONNECTION = 16
#: A connection on which nothing was asked for so long is closed; its owner makes a new one.
_IDLE_TIMEOUT = 600.0
_MAX_HANDLERS = 128


class IrohTransport:
    """See `gridcloud.grid.transport.Transport`. All of one process must share one event loop.

    ``listen`` is ``IP:PORT``, port 0 for any; a specific address is the only one listened on (the
    other IP family keeps to loopback). ``advertise`` replaces the addresses found by itself.
    """

    def __init__(
        self, identity: Identity, listen: str = "127.0.0.1:0", advertise: Sequence[str] = ()
    ) -> None:
        self._identity = identity
        self._host, self._port = _parse_listen(listen)
        self._advertise = tuple(advertise)
        for address in advertise:
            _parse_listen(address)
        self._endpoint: iroh.Endpoint | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._connections: dict[str, iroh.Connection] = {}
        self._dialling: dict[str, asyncio.Lock] = {}
        self._handlers = asyncio.Semaphore(_MAX_HANDLERS)
        self._served = 0
        self._served_to: Counter[str] = Counter()

    async def start(self, handler: Handler) -> None:
        """See `Transport`."""
        if self._endpoint is not None:
            raise Conflict("The transport is started already.")
        iroh.uniffi_set_event_loop(asyncio.get_running_loop())  # type: ignore[arg-type]
        self._endpoint = await self._bind()
        self._accepting = asyncio.create_task(self._accept(self._endpoint, handler), name="accept")

    def address(self) -> PeerAddress:
        """See `Transport`."""
        if self._advertise or self._endpoint is None:
            found: Sequence[str] = self._advertise
        else:
            known = self._endpoint.addr().direct_addresses()
            found = [address for address in known if self._shows(address)]
        return PeerAddress(key=self._identity.key, addresses=tuple(found[:16]))

    async def request(self, peer: PeerAddress, message: bytes, timeout: float) -> bytes:
        """See `Transport`."""
        check_size(message)
        silence = min(_SILENCE, timeout / 2)
        reached = False
        try:
            async with asyncio.timeout(timeout):
                if (kept := self._kept(peer.key)) is not None:
                    reached = True
                    with contextlib.suppress(_Dead):
                        return await self._exchange(kept, peer.key, message, silence)
                    reached = False
                connection = await self._dial(peer)
                reached = True
                return await self._exchange(connection, peer.key, message)
        except _Dead as error:
            raise _dropped(peer.key, str(error)) from error
        except TimeoutError as error:
            if reached:
                raise TimedOut(
                    f"{short(peer.key)} did not answer within {timeout:g} s.", hint="Try again."
                ) from error
            raise _unreachable(peer, f"nobody with that key answered within {timeout:g} s") from (
                error
            )

    async def close(self) -> None:
        """See `Transport`."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is None:
            return
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None
        for key in list(self._connections):
            self._forget(key)
        with contextlib.suppress(iroh.IrohError, TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await endpoint.close()

    async def _bind(self) -> iroh.Endpoint:
        listen = f"[{self._host}]" if self._host.version == 6 else str(self._host)
        binds = [f"{listen}:{self._port}"]
        if not self._host.is_unspecified:
            # Left to itself iroh would listen on every address of the other IP family.
            # On the same port, so that it too stays over restarts: iroh goes on dialling the path
            # that answered last, and a peer on this host may have found this one.
            other = "[::1]" if self._host.version == 4 else "127.0.0.1"
            binds.append(f"{other}:{self._port}")
        try:
            try:
                return await _bind(self._identity, binds)
            except iroh.IrohError:
                if len(binds) == 1:
                    raise
                return await _bind(self._identity, binds[:1])  # a host without the other family
        except iroh.IrohError as error:
            raise Unavailable(
                f"The grid cannot listen on {binds[0]}: {_cause(error)}.",
                hint="Free that port, or set another in [grid] listen.",
            ) from error

    def _shows(self, address: str) -> bool:
        host = _parse_listen(address)[0]
        if host.is_link_local:
            return False  # means nothing without the interface, which differs from host to host
        return self._host.is_unspecified or host.version == self._host.version

    def _kept(self, key: str) -> iroh.Connection | None:
        connection = self._connections.get(key)
        if connection is not None and connection.close_reason() is not None:
            self._forget(key)
            return None
        return connection

    def _forget_this(self, key: str, connection: iroh.Connection) -> None:
        if self._connections.get(key) is connection:
            self._forget(key)

    def _forget(self, key: str) -> None:
        if (connection := self._connections.pop(key, None)) is not None:
            connection.close(0, b"")

    async def _dial(self, peer: PeerAddress) -> iroh.Connection:
        async with self._dialling.setdefault(peer.key, asyncio.Lock()):
            if (kept := self._kept(peer.key)) is not None:
                return kept
            if self._endpoint is None:
                raise Unavailable("This site's grid transport is closed.")
            if not peer.addresses:
                raise _unreachable(peer, "no address of it is known")
            try:
                target = iroh.EndpointAddr(
                    iroh.EndpointId.from_bytes(bytes.fromhex(peer.key)), None, list(peer.addresses)
                )
                connection = await self._endpoint.connect(target, _ALPN)
            except iroh.IrohError as error:
                raise _unreachable(peer, _cause(error)) from error
            self._connections[peer.key] = connection
            return connection

    async def _exchange(
        self,
        connection: iroh.Connection,
        key: str,
        message: bytes,
        silence: float | None = None,
    ) -> bytes:
        """Send and receive on a stream of its own; raises `_Dead` if the connection is no good.

        With ``silence``, that many seconds in which nothing arrives from the start show that.
        """
        talking = asyncio.create_task(_converse(connection, message))
        try:
            if silence is not None:
                before = connection.stats().udp_rx_datagrams
                await asyncio.wait([talking], timeout=silence)
                if not talking.done() and connection.stats().udp_rx_datagrams == before:
                    raise _Dead("it fell silent")
            return await talking
        except iroh.IrohError as error:
            if connection.close_reason() is None:  # this stream only: others may be in use
                raise _dropped(key, _cause(error)) from error
            self._forget_this(key, connection)
            raise _Dead(_cause(error)) from error
        except _Dead:
            self._forget_this(key, connection)
            raise
        finally:
            talking.cancel()
            await asyncio.gather(talking, return_exceptions=True)

    async def _accept(self, endpoint: iroh.Endpoint, handler: Handler) -> None:
        async with asyncio.TaskGroup() as serving:
            while (incoming := await endpoint.accept_next()) is not None:
                if self._served >= _MAX_CONNECTIONS:
                    with contextlib.suppress(iroh.IrohError):
                        await incoming.refuse()
                    continue
                serving.create_task(self._serve_connection(incoming, handler))

    async def _serve_connection(self, incoming: iroh.Incoming, handler: Handler) -> None:
        """Answer all requests of one connection; whatever is wrong with it stays in here."""
        self._served += 1
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
                connection = await (await incoming.accept()).connect()
            connection.set_max_concurrent_bi_streams(_MAX_STREAMS_PER_CONNECTION)
            key = connection.remote_id().to_bytes().hex()
            self._served_to[key] += 1
            try:
                if self._served_to[key] > _MAX_CONNECTIONS_PER_PEER:
                    return
                async with asyncio.TaskGroup() as answering:
                    with contextlib.suppress(iroh.IrohError, TimeoutError):
                        while True:
                            async with asyncio.timeout(_IDLE_TIMEOUT):
                                stream = await connection.accept_bi()
                            answering.create_task(self._answer(stream, key, handler))
            finally:
                self._served_to[key] -= 1
                self._served_to += Counter()  # drops those at nought
                connection.close(0, b"")
        except (iroh.IrohError, TimeoutError) as error:
            log.debug("incoming connection failed", error=str(error))
        except Exception:  # a fault of ours costs one connection, not the accepting of others
            log.exception("incoming connection failed")
        finally:
            self._served -= 1

    async def _answer(self, stream: iroh.BiStream, key: str, handler: Handler) -> None:
        """Answer one request, or reset its stream."""
        send = stream.send()
        try:
            # Read outside of it: a peer that sends slowly holds up nobody's place.
            message = await _in_time(stream.recv().read_to_end(MAX_MESSAGE_BYTES))
            async with self._handlers:
                reply = await handler(key, message)
                check_size(reply)
                await _in_time(send.write_all(reply))
                await _in_time(send.finish())
        except (iroh.IrohError, TimeoutError) as error:
            log.debug("request dropped", peer=short(key), error=repr(error))
            await _reset(send)
        except Exception:  # the handler's fault; it costs one request, not the connection
            log.exception("request failed", peer=short(key))
            await _reset(send)


class _Dead(Exception):
    """The connection is no good; the request may have arrived or not."""


async def _bind(identity: Identity, binds: Sequence[str]) -> iroh.Endpoint:
    builder = iroh.EndpointBuilder()  # type: ignore[no-untyped-call]
    builder.apply_minimal()
    builder.secret_key(identity.secret_bytes)
    builder.alpns([_ALPN])
    builder.relay_mode(iroh.RelayMode.disabled())
    for bind in binds:
        builder.bind_addr(bind)
    return await builder.bind()


async def _converse(connection: iroh.Connection, message: bytes) -> bytes:
    stream = await connection.open_bi()
    send = stream.send()
    await send.write_all(message)
    await send.finish()
    return await stream.recv().read_to_end(MAX_MESSAGE_BYTES)


async def _in_time(work: Awaitable[_T]) -> _T:
    async with asyncio.timeout(_TRANSFER_TIMEOUT):
        return await work


async def _reset(send: iroh.SendStream) -> None:
    with contextlib.suppress(iroh.IrohError):
        await send.reset(1)


def _parse_listen(listen: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    host, _, port = listen.rpartition(":")
    try:
        number = int(port)
        if not 0 <= number < 65536:
            raise ValueError("no such port")
        return ipaddress.ip_address(host.strip("[]")), number
    except ValueError as error:
        raise InvalidSpec(
            f"{listen!r} is not the address of a port.",
            hint="Write IP:PORT, such as 0.0.0.0:4433 or [::]:4433.",
        ) from error


def _unreachable(peer: PeerAddress, cause: str) -> Unavailable:
    where = ", ".join(peer.addresses) or "nowhere"
    return Unavailable(
        f"{short(peer.key)} cannot be reached at {where}: {cause}.",
        hint="Is that site up, and its port open to this one?",
    )


def _dropped(key: str, cause: str) -> Unavailable:
    return Unavailable(f"{short(key)} dropped the request: {cause}.", hint="Try again.")


def _cause(error: iroh.IrohError) -> str:
    """Return the innermost cause of an error, without the places in iroh's source."""
    lines = [line.strip() for line in error.message().splitlines() if line.strip()]
    text = re.sub(r"\s*\((/|[A-Za-z]:)[^)]*\)", "", lines[-1]) if lines else ""
    return text.rstrip(".") or error.kind().name.lower()
