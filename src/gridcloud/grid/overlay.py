"""The transport of a real site: links over UDP, over TLS, met or relayed through other sites.

A peer is asked over a link there is, whoever made it. Without one it is dialled: over UDP; a
moment later over TLS too; then through members that help, who introduce (both dial at once, which
opens most NATs) or else relay. What came first is used, what worked is remembered, and while it
is not the best the better ways are tried again from time to time.

On a kept link nothing at all arriving for a while after a request (the peer acknowledges even what
it is slow to answer) means that it is dead: it is given up, and the request sent again on another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog

from gridcloud.errors import Conflict, TimedOut, Unavailable
from gridcloud.grid.dialling import Attempt, Memory, Reviews, Way, first_of
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.iroh_link import IrohCarrier, has_udp
from gridcloud.grid.links import Link, LinkDown, LinkTable, broken, unreachable
from gridcloud.grid.messaging import SERVICE, Answering, Channels
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.punching import INTRODUCE, MEET, OBSERVE, Punching
from gridcloud.grid.rates import Door
from gridcloud.grid.relaying import RELAY, RELAYED, Relaying
from gridcloud.grid.streams import HeldStream, Services, header, open_on
from gridcloud.grid.tls_channel import TlsIdentity
from gridcloud.grid.tls_link import TlsCarrier
from gridcloud.grid.transport import (
    Acceptor,
    ByteStream,
    Handler,
    Path,
    PeerAddress,
    check_size,
)

log = structlog.get_logger()

#: A kept link is dead when nothing arrives on it within this time after a request.
_SILENCE = 2.0
#: A dial goes on for so long, even when who asked for it has given up: the next finds its link.
_DIAL_TIMEOUT = 20.0
#: A straight dial that nobody answers for so long is given up: the next one sends anew at once,
#: where iroh by itself would send ever more seldom.
_STRAIGHT_TIMEOUT = 6.0
_RELAY_HEAD_START = 2.0
_HELPERS = 3
_HOLD_EVERY = 30.0
#: By then there are links to some members, which serve as well as new ones.
_HOLD_AFTER = 2.0
_ANCHORS = 4
#: How long found addresses are taken for true: every message says them, and finding takes a while.
_ADDRESS_HOLDS = 5.0


class OverlayTransport:
    """See `gridcloud.grid.transport.Transport` and `Streams`.

    ``listen`` is the UDP ``IP:PORT`` (port 0 for any), or None for no UDP at all; ``tls_listen``
    the TCP one, or None. ``advertise`` and ``tls_advertise`` replace the addresses found by itself.
    ``relays`` are URLs of iroh relays that this community hosts. All transports of one process must
    share one event loop. Raises `InvalidSpec` for malformed addresses.
    """

    def __init__(
        self,
        identity: Identity,
        listen: str | None = "127.0.0.1:0",
        advertise: Sequence[str] = (),
        tls_listen: str | None = None,
        tls_advertise: Sequence[str] = (),
        relays: Sequence[str] = (),
    ) -> None:
        self._identity = identity
        self._neighbourhood = Neighbourhood()
        self._links = LinkTable(self._knows)
        self._services = Services(self._links, self._knows)
        self._channels = Channels()
        self._memory = Memory()
        self._dialling: dict[PeerAddress, asyncio.Task[Link]] = {}
        self._reviews = Reviews()
        self._background: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()
        self._address: tuple[float, PeerAddress] | None = None
        self._started = False
        self._closed = False
        mine, door = TlsIdentity(identity), Door()
        attach = self._services.attach
        self._udp: IrohCarrier | None = None
        if listen is not None:
            self._udp = IrohCarrier(identity, listen, advertise, relays, door, attach)
        self._tls = TlsCarrier(mine, tls_listen, tls_advertise, door, attach)
        self._punching = Punching(
            self._links, lambda: self._neighbourhood, lambda: self.address().addresses, self._by_udp
        )
        self._relaying = Relaying(mine, self._links, lambda: self._neighbourhood, door, attach)
        self.serve(OBSERVE, self._punching.accept_observe)
        self.serve(INTRODUCE, self._punching.accept_introduce)
        self.serve(MEET, self._punching.accept_meet)
        self.serve(RELAY, self._relaying.accept_relay)
        self.serve(RELAYED, self._relaying.accept_relayed)

    async def start(self, handler: Handler) -> None:
        """See `Transport`."""
        if self._started:
            raise Conflict("The transport is started already.")
        self._started = True
        answering = Answering(handler, self._knows, self._links, self._services.pause)
        self._services.serve_lasting(SERVICE, answering.accept)
        await self._tls.start()
        try:
            if self._udp is not None:
                await self._udp.start()
        except Unavailable as error:
            if has_udp():
                await self._tls.close()
                raise
            log.warning("no UDP on this host: the grid is reached over TLS", cause=error.message)
            self._udp = None
        self._address = None
        self._in_background(self._keep_house())

    def settle(self, neighbourhood: Neighbourhood) -> None:
        """Tell whom to trust with what; may be told anew at any time."""
        self._neighbourhood = neighbourhood
        self._settled.set()

    def serve(self, service: str, acceptor: Acceptor) -> None:
        """See `Streams`."""
        self._services.serve(service, acceptor)

    def address(self) -> PeerAddress:
        """See `Transport`."""
        now = time.monotonic()
        if self._address is None or now - self._address[0] >= _ADDRESS_HOLDS:
            udp = self._udp
            found = PeerAddress(
                key=self._identity.key,
                addresses=udp.addresses() if udp else (),
                tls=self._tls.addresses(udp.own_addresses() if udp else ()),
                relay_urls=udp.relay_urls if udp else (),
            )
            self._address = now, found
        return self._address[1]

    def path(self, key: str) -> Path | None:
        """Say how a peer is reached now; None if there is no link to it."""
        link = self._links.best(key)
        return link.path() if link is not None else None

    async def request(self, peer: PeerAddress, message: bytes, timeout: float) -> bytes:
        """See `Transport`."""
        check_size(message)
        silence = min(_SILENCE, timeout / 2)
        reached = False
        try:
            async with asyncio.timeout(timeout):
                while (kept := self._links.best(peer.key)) is not None:
                    reached = True
                    self._improve(peer, kept)
                    with contextlib.suppress(LinkDown):
                        return await self._exchange(kept, message, silence)
                    reached = False
                link = await self._dial(peer)
                reached = True
                return await self._exchange(link, message)
        except LinkDown as error:
            raise broken(peer.key, str(error)) from error
        except TimeoutError as error:
            if reached:
                raise TimedOut(
                    f"{short(peer.key)} did not answer within {timeout:g} s.", hint="Try again."
                ) from error
            raise self._silent(peer, timeout) from error

    async def open_stream(self, peer: PeerAddress, service: str, timeout: float) -> ByteStream:
        """See `Streams`."""
        header(service)
        silence = min(_SILENCE, timeout / 2)
        try:
            async with asyncio.timeout(timeout):
                while (kept := self._links.best(peer.key)) is not None:
                    self._improve(peer, kept)
                    with contextlib.suppress(LinkDown, TimeoutError):
                        async with asyncio.timeout(silence):
                            return await self._open(kept, service)
                    self._links.drop(kept)
                return await self._open(await self._dial(peer), service)
        except LinkDown as error:
            raise broken(peer.key, str(error)) from error
        except TimeoutError as error:
            raise self._silent(peer, timeout) from error

    async def close(self) -> None:
        """See `Transport`."""
        if self._closed:
            return
        self._closed = True
        tasks: list[asyncio.Task[Link] | asyncio.Task[None]] = [
            *self._dialling.values(),
            *self._background,
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._punching.close()
        self._channels.close()
        self._links.close()
        await self._services.close()
        await self._relaying.close()
        await self._tls.close()
        if self._udp is not None:
            await self._udp.close()

    def _knows(self, key: str) -> bool:
        return self._neighbourhood.knows(key)

    async def _exchange(self, link: Link, message: bytes, silence: float | None = None) -> bytes:
        with self._links.using(link):
            try:
                return await self._channels.exchange(link, message, silence)
            except LinkDown:
                self._links.drop(link)
                raise

    async def _open(self, link: Link, service: str) -> ByteStream:
        try:
            with self._links.using(link):
                return HeldStream(await open_on(link, service, asks=True), self._links, link)
        except LinkDown:
            self._links.drop(link)
            raise

    async def _dial(self, peer: PeerAddress) -> Link:
        """Return a link to the peer, new or made by it meanwhile; who else wants one shares it."""
        if not self._started or self._closed:
            raise Unavailable("This site's grid transport is closed.")
        dialling = self._dialling.get(peer)
        if dialling is None:
            dialling = asyncio.create_task(self._try_all(peer), name="dial")
            self._dialling[peer] = dialling
            dialling.add_done_callback(partial(self._dialled, peer))
        return await asyncio.shield(dialling)

    def _dialled(self, peer: PeerAddress, dialling: asyncio.Task[Link]) -> None:
        del self._dialling[peer]
        if not dialling.cancelled():
            dialling.exception()  # told to those who still wait; nobody may

    async def _try_all(self, peer: PeerAddress) -> Link:
        ways: dict[Way, Callable[[], Awaitable[Link]]] = {}
        if self._udp is not None and (peer.addresses or peer.relay_urls):
            ways[Way.UDP] = lambda: self._by_udp(peer)
        if peer.tls:
            ways[Way.TLS] = lambda: self._by_tls(peer)
        if helpers := self._helpers(peer):
            ways[Way.HELPED] = lambda: self._by_help(peer, helpers)
        if not ways:
            raise unreachable(peer.key, "", "no address of it is known")
        attempts = [(pause, ways[way]) for pause, way in self._memory.plan(peer.key, list(ways))]
        # It may dial this site at the same time, and get through where this site does not.
        return await self._in_time(peer, attempts, self._links.arrival(peer.key))

    def _helpers(self, peer: PeerAddress) -> list[PeerAddress]:
        found = self._neighbourhood.relays_for(peer.key)
        return [one for one in found if one.key not in (peer.key, self._identity.key)][:_HELPERS]

    async def _in_time(
        self,
        peer: PeerAddress,
        attempts: Sequence[Attempt],
        arrival: Awaitable[Link] | None = None,
    ) -> Link:
        try:
            slowness = self._neighbourhood.slowness()
            async with asyncio.timeout(_DIAL_TIMEOUT):
                return await first_of(
                    [(pause * slowness, attempt) for pause, attempt in attempts], arrival
                )
        except TimeoutError as error:
            raise self._silent(peer, _DIAL_TIMEOUT) from error

    async def _by_udp(self, peer: PeerAddress) -> Link:
        if self._udp is None:
            raise unreachable(peer.key, ", ".join(peer.addresses), "this host has no UDP")
        try:
            async with asyncio.timeout(_STRAIGHT_TIMEOUT * self._neighbourhood.slowness()):
                link = await self._udp.dial(peer)
        except TimeoutError as error:
            raise self._silent(peer, _STRAIGHT_TIMEOUT) from error
        return self._attached(link, Way.UDP)

    async def _by_tls(self, peer: PeerAddress) -> Link:
        return self._attached(await self._tls.dial(peer), Way.TLS)

    async def _by_help(self, peer: PeerAddress, helpers: Sequence[PeerAddress]) -> Link:
        return await first_of(
            [(number * 1.0, partial(self._through, peer, h)) for number, h in enumerate(helpers)]
        )

    async def _through(self, peer: PeerAddress, helper: PeerAddress) -> Link:
        link = self._links.best(helper.key) or await self._straight(helper)
        attempts: list[Attempt] = []
        if self._udp is not None:
            attempts.append((0.0, lambda: self._punching.punch(peer.key, link)))
        attempts.append((_RELAY_HEAD_START * len(attempts), lambda: self._by_relay(peer, link)))
        with self._links.using(link):
            found = await first_of(attempts)
        if found.path().how == "relayed":
            self._memory.note(peer.key, Way.HELPED)
        return found

    async def _by_relay(self, peer: PeerAddress, helper: Link) -> Link:
        return self._attached(await self._relaying.relay(peer.key, helper), Way.HELPED)

    async def _straight(self, peer: PeerAddress) -> Link:
        """Dial a peer without anyone's help."""
        attempts: list[Attempt] = []
        if self._udp is not None and peer.addresses:
            attempts.append((0.0, lambda: self._by_udp(peer)))
        if peer.tls:
            attempts.append((1.0 * len(attempts), lambda: self._by_tls(peer)))
        if not attempts:
            raise unreachable(peer.key, "", "no address of it is known")
        return await self._in_time(peer, attempts)

    def _attached(self, link: Link, way: Way) -> Link:
        if not self._services.attach(link):
            raise unreachable(link.key, "", "this site has too many links in use")
        self._memory.note(link.key, way)
        return link

    def _improve(self, peer: PeerAddress, kept: Link) -> None:
        """Now and then try better ways than the one there is, beside what goes on."""
        if not self._reviews.due(peer.key):
            return
        how = kept.path().how
        self._reviews.done(peer.key, straight=how == "direct")
        if how != "direct":
            self._in_background(self._better(peer, how))

    async def _better(self, peer: PeerAddress, how: str) -> None:
        attempts: list[Attempt] = []
        if self._udp is not None and peer.addresses:
            attempts.append((0.0, lambda: self._by_udp(peer)))
        if how != "tls" and peer.tls:
            attempts.append((1.0, lambda: self._by_tls(peer)))
        helpers = [self._links.best(helper.key) for helper in self._helpers(peer)]
        attempts += [
            (2.0, partial(self._punching.punch, peer.key, helper))
            for helper in helpers
            if helper is not None and self._udp is not None
        ]
        if not attempts:
            return
        with contextlib.suppress(Unavailable):
            await self._in_time(peer, attempts)

    async def _keep_house(self) -> None:
        """Close what is idle; hold the links to those through whom this site is found."""
        await asyncio.sleep(_HOLD_AFTER)
        while True:
            self._links.close_idle()
            async with asyncio.TaskGroup() as holding:
                for anchor in list(self._neighbourhood.anchors())[:_ANCHORS]:
                    holding.create_task(self._hold(anchor))
            self._settled.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HOLD_EVERY):
                    await self._settled.wait()

    async def _hold(self, anchor: PeerAddress) -> None:
        try:
            link = self._links.best(anchor.key) or await self._straight(anchor)
        except Unavailable as error:
            log.debug("no link to an anchor", peer=short(anchor.key), cause=error.message)
            return
        with self._links.using(link):
            seen = await self._punching.observe(link)
        if seen and self._udp is not None and self._knows(anchor.key):
            await self._udp.learn(seen)
            self._address = None

    def _silent(self, peer: PeerAddress, timeout: float) -> Unavailable:
        where = ", ".join([*peer.addresses, *(f"{each} (TLS)" for each in peer.tls)])
        return unreachable(peer.key, where, f"nobody with that key answered within {timeout:.2g} s")

    def _in_background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
