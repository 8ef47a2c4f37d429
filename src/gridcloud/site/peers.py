"""The site among its peers: the broker, started once there is a community, and what it borrows.

It is over 400 lines since every question about communities passes here on its way to the broker.
"""

from __future__ import annotations

import asyncio
import getpass
import re
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import structlog

from gridcloud import __version__
from gridcloud.errors import Forbidden, GridcloudError, InvalidSpec, Unavailable
from gridcloud.grid.broker import Broker
from gridcloud.grid.communities import read_code
from gridcloud.grid.documents import LEEWAY
from gridcloud.grid.identity import short
from gridcloud.grid.messages import ReceiptReply
from gridcloud.grid.offers import NOT_YET, PeerOffer, closed
from gridcloud.grid.papers import LeaseGrant, Offered
from gridcloud.grid.transport import ByteStream
from gridcloud.model.api import (
    CommunityInfo,
    GridSite,
    InvitationInfo,
    LeftInfo,
    MemberInfo,
    RequestInfo,
)
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.need import Resources
from gridcloud.model.offer import Offer
from gridcloud.site import entrance
from gridcloud.site.keyring import Keyring
from gridcloud.site.lending import Lending
from gridcloud.site.live_settings import LiveSettings
from gridcloud.site.offered import PeerOffers
from gridcloud.site.ports import Ports, parse_address
from gridcloud.site.tenancy import Tenancy
from gridcloud.store.papers import PaperStore

if TYPE_CHECKING:
    from gridcloud.grid.overlay import OverlayTransport

log = structlog.get_logger()
_REFRESH_TIMEOUT = 2.0
#: By how much a lease may end after the longest time offered.
_CLOCKS_AND_STAGING = timedelta(minutes=15)
_LONGEST_LOAN = timedelta(days=366)
_FIRST_RETRY, _LAST_RETRY = 2.0, 60.0
#: After what time a site that waits for approval first asks again.
_FIRST_ASK = 3.0
#: How long a loan that was asked for, but never answered, is given back.
_UNANSWERED_FOR = timedelta(minutes=10)
#: Peers' capacity stands under this name: what is behind it is the owner's affair.
LENT = "lent"


class Peers:
    """Borrowing from peers, and membership. Without a community nothing of it runs or listens."""

    def __init__(
        self,
        live: LiveSettings,
        keyring: Keyring,
        papers: PaperStore,
        lending: Lending,
        tenancy: Tenancy,
        ports: Ports,
    ) -> None:
        self._live = live
        self._keyring = keyring
        self._papers = papers
        self._lending = lending
        self._tenancy = tenancy
        self._ports = ports
        self._broker: Broker | None = None
        self._transport: OverlayTransport | None = None
        self._starting = asyncio.Lock()
        self._asking: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._given_back: deque[tuple[datetime, Lease]] = deque(maxlen=1000)
        self._offers = PeerOffers(self._offer)
        #: Gives the CPU-seconds borrowed of each lender lately, by its key.
        self.borrowed_lately: Callable[[], Mapping[str, float]] = dict
        #: Called when something new was learned of what peers offer.
        self.on_change: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Begin to answer peers if the site is in a community, and tell them where it is now."""
        communities = await self._papers.communities()
        if not communities and not await self._papers.read_all("waiting"):
            return
        self._keep_asking(await self._started())

    async def stop(self) -> None:
        """Stop to answer."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._broker:
            await self._broker.close()
            self._broker = None

    def addresses(self) -> tuple[str, ...]:
        """Return where peers may reach this site; empty while it is in no community."""
        return self._broker.address().addresses if self._broker else ()

    async def open_stream(self, peer: str, service: str, timeout: float) -> ByteStream:
        """Open a stream to a member; see `gridcloud.grid.transport.Streams`.

        Raises `Unavailable` as well for a peer that is no member of a community of this site.
        """
        there = self._broker.address_of(peer) if self._broker else None
        if there is None or self._transport is None:
            raise Unavailable(f"{short(peer)} is in no community with this site.")
        return await self._transport.open_stream(there, service, timeout)

    def lease_id(self, request_id: str) -> str:
        """Return the id that the lease of a request will have."""
        assert self._broker
        return self._broker.lease_id(request_id)

    async def offers(self, live: Iterable[Lease]) -> list[Offer]:
        """Return what peers offer, less what this site borrowed since they said so.

        Nobody is asked: peers tell by themselves when their offers change.
        """
        if self._broker is None:
            return []
        known = _as_members_see(await self._broker.offers(), await self._broker.communities())
        borrowed = [lease for lease in live if lease.role is LeaseRole.BORROWED]
        return self._offers.listed(known, borrowed, self._given_back)

    async def refresh(self) -> None:
        """Ask peers for their offers, now."""
        if self._broker:
            await self._broker.refresh_offers(_REFRESH_TIMEOUT, timedelta(0))

    async def borrow(self, lease: Lease, offer: Offer) -> Lease:
        """Ask the owner for the intended lease; return it active. Idempotent."""
        assert self._broker and offer.peer and offer.community and lease.job_id
        key = self._keyring.new_loan_key(lease.id)
        grant = await self._broker.request_lease(
            offer.peer,
            offer.community,
            lease.request_id,
            need=lease.need,
            user=_user(),
            ssh_public_key=key,
        )
        # Who has more rights than a plain member may get it longer and cheaper than offered to all.
        if grant.ends_at > datetime.now(UTC) + _LONGEST_LOAN:
            raise Forbidden(f"{offer.site} granted a lease that ends in more than a year.")
        if not grant.prices.at_most(offer.prices):
            raise Forbidden(
                f"{offer.site} would charge more than it offers to all.",
                hint="Choose another site, or ask its administrator.",
            )
        if lease.need.time and grant.ends_at < lease.created_at + lease.need.time - LEEWAY:
            raise Forbidden(f"{offer.site} granted a lease for less time than was asked for.")
        await self._tenancy.granted(grant)
        self._keyring.put_certificate(lease.id, grant.certificate)
        machine = Machine(
            lease_id=lease.id, provider=lease.provider, folder=grant.folder, endpoint=grant.endpoint
        )
        return lease.model_copy(
            update={"state": LeaseState.ACTIVE, "machine": machine, "ends_at": grant.ends_at}
        )

    async def renew(self, lease: Lease, until: datetime) -> Lease:
        """Ask the owner that a loan end no earlier than ``until``; return it as it is then."""
        assert self._broker and lease.peer and lease.community
        grant = await self._broker.renew_lease(lease.peer, lease.community, lease.id, until)
        if grant.ends_at > until + _CLOCKS_AND_STAGING:
            raise Forbidden("Its owner lengthened the lease by more than was asked for.")
        await self._tenancy.granted(grant)
        self._keyring.put_certificate(lease.id, grant.certificate)
        return lease.model_copy(update={"ends_at": grant.ends_at})

    async def give_back(self, lease: Lease) -> None:
        """Give a loan back; if its owner cannot be reached, try until it has ended by itself."""
        pause = _FIRST_RETRY
        while self._broker and lease.peer and lease.community:
            await self._tenancy.giving_back(lease.id)
            try:
                await self._broker.release_lease(lease.peer, lease.community, lease.id)
                self._given_back.append((datetime.now(UTC), lease))
                self.on_change()
                break
            except GridcloudError as error:
                end = lease.ends_at or lease.created_at + _UNANSWERED_FOR
                if datetime.now(UTC) >= end or not error.retryable:
                    log.info("loan not given back", lease=lease.id, cause=error.message)
                    break
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_RETRY)
        self._keyring.forget_loan(lease.id)

    def offer_changed(self) -> None:
        """Tell peers soon what this site offers by now."""
        if self._broker:
            self._broker.offer_changed()

    async def recall(self, grant: LeaseGrant, reason: str) -> None:
        """Tell a borrower that its lease ends earlier; ``grant`` is made out anew. Idempotent."""
        if self._broker is None:
            raise Unavailable("No peer can be told: this site is in no community.")
        await self._broker.recall_lease(grant, reason)

    async def show_receipt(self, borrower: str, community: str, receipt: str) -> ReceiptReply:
        """Ask the borrower of a loan that has ended to countersign its receipt. Idempotent."""
        if self._broker is None:
            raise Unavailable("No peer can be asked: this site is in no community.")
        return await self._broker.show_receipt(borrower, community, receipt)

    async def is_member(self, community: str, key: str) -> bool:
        """Return whether a site is a member of a community, as far as is known here."""
        return self._broker is not None and await self._broker.is_member(community, key)

    async def communities(self) -> list[CommunityInfo]:
        """Return the communities this site is in, or asks to be admitted to."""
        return await self._broker.communities() if self._broker else []

    async def create_community(self, name: str) -> CommunityInfo:
        """Found a community."""
        return await (await self._started()).create_community(name, self._live.current.name)

    async def invite(
        self,
        community: str,
        roles: Iterable[str],
        valid_for: timedelta,
        *,
        approve: bool,
        uses: int,
    ) -> InvitationInfo:
        """Make out a join code."""
        broker = await self._started()
        return await broker.invite(community, roles, valid_for, approve=approve, uses=uses)

    async def join(self, code: str, site_name: str | None = None) -> CommunityInfo:
        """Join by a code, under the site's own name unless another is given; or ask to, and go on
        asking until that is decided."""
        self._check_reach(code)
        broker = await self._started()
        joined = await broker.join(code, site_name or self._live.current.name)
        if joined.waiting:
            self._keep_asking(broker)
            return joined
        self._in_background(broker.refresh_offers(_REFRESH_TIMEOUT, timedelta(0)))
        return joined

    async def members(self, community: str) -> list[MemberInfo]:
        """Return the members; they are asked for what they know first."""
        broker = await self._started()
        await broker.refresh_members(community)
        return await broker.members(community)

    async def grid(self, community: str | None) -> list[GridSite]:
        """Return the sites of one community, or of all, and what they lend; nobody is asked."""
        if self._broker is None:
            return []
        offers = {
            (offer.community, offer.address.key): offer for offer in await self._broker.offers()
        }
        known = [found.id for found in await self._broker.communities() if not found.waiting]
        found = []
        for each in known if community is None else [community]:
            for member in await self._broker.members(each):
                if member.myself:
                    offered = await self._lending.digest(member.community)
                    problem = closed(offered, datetime.now(UTC)) if offered else ""
                else:
                    offer = offers.get((member.community, member.key))
                    digest = offer.digest if offer else None
                    offered = digest.offered if digest else None
                    problem = offer.problem if offer else ""
                found.append(_grid_site(member, offered, problem))
        return found

    async def leave(self, community: str) -> LeftInfo:
        """Leave a community, or ask no more to be admitted."""
        return await (await self._started()).leave(community)

    async def requests(self, community: str) -> list[RequestInfo]:
        """Return who asks this site to be admitted."""
        return await (await self._started()).requests(community)

    async def approve(self, community: str, site: str) -> MemberInfo:
        """Admit a site that asks."""
        return await (await self._started()).approve(community, site)

    async def refuse(self, community: str, site: str) -> str:
        """Refuse a site that asks; return its key."""
        return await (await self._started()).refuse(community, site)

    async def change_roles(
        self, community: str, site: str, add: Iterable[str], drop: Iterable[str]
    ) -> MemberInfo:
        """Give a member roles, or take some away."""
        return await (await self._started()).change_roles(community, site, add, drop)

    async def remove(self, community: str, site: str, reason: str) -> str:
        """Remove a member for good; return its key."""
        return await (await self._started()).remove(community, site, reason)

    def _offer(
        self,
        peer: PeerOffer,
        borrowed: Iterable[Lease],
        given_back: Iterable[tuple[datetime, Lease]],
    ) -> Offer:
        offer = _made_offer(peer, borrowed, given_back)
        used = self.borrowed_lately().get(peer.address.key, 0.0)
        return offer.model_copy(update={"share": used / (offer.capacity.cpus or 1)})

    def _check_reach(self, code: str) -> None:
        """Say at once what would otherwise be a time-out: loopback cannot reach another host."""
        _, invitation = read_code(code, datetime.now(UTC))
        host, _ = parse_address(self._live.current.grid.listen)
        there = [parse_address(address)[0] for address in invitation.addresses]
        if _is_loopback(host) and there and not any(map(_is_loopback, there)):
            raise InvalidSpec(
                f"This site listens on {host} only and so cannot reach {', '.join(there)}.",
                hint='Set listen = "0.0.0.0:0" under [grid] in the settings and start it anew.',
            )

    async def _started(self) -> Broker:
        async with self._starting:
            if self._broker is None:
                # Imported when there is somebody to talk to: it is 19 MB.
                from gridcloud.grid.overlay import OverlayTransport  # noqa: PLC0415

                grid = self._live.current.grid
                identity = self._keyring.identity
                transport = OverlayTransport(
                    identity,
                    self._listen("grid", grid.listen, socket.SOCK_DGRAM),
                    grid.advertise,
                    self._listen("grid-tls", grid.tls_listen, socket.SOCK_STREAM),
                    grid.tls_advertise,
                    grid.iroh_relays,
                )
                broker = Broker(identity, transport, self._papers, self._lending, self._tenancy)
                broker.on_change(self.on_change)
                transport.serve(entrance.SERVICE, self._lending.guests.entrance.accept)
                self._tell_what_is_relayed(transport, broker)
                await broker.start()
                self._transport, self._broker = transport, broker
                self._live.listeners.append(
                    lambda _before: self._tell_what_is_relayed(transport, broker)
                )
            return self._broker

    def _tell_what_is_relayed(self, transport: OverlayTransport, broker: Broker) -> None:
        grid = self._live.current.grid
        broker.describe(__version__, relays=grid.relay)
        transport.settle(broker.neighbourhood(grid.relay_rate))

    def _listen(self, purpose: str, address: str, kind: socket.SocketKind) -> str | None:
        """Return the address to listen on, with a port that stays; None if there is none."""
        if not address:
            return None
        host, port = parse_address(address)
        port = self._ports.choose(purpose, host, port, kind)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _keep_asking(self, broker: Broker) -> None:
        if self._asking is None or self._asking.done():
            self._asking = self._in_background(self._ask_until_admitted(broker))

    async def _ask_until_admitted(self, broker: Broker) -> None:
        pause = _FIRST_ASK
        while await broker.waits():
            await asyncio.sleep(pause)
            await broker.ask_again()
            pause = min(pause * 1.5, _LAST_RETRY)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(_noted(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


async def _noted(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except GridcloudError as error:
        log.info("peers could not be asked", cause=str(error))


def _as_members_see(
    offers: list[PeerOffer], communities: Iterable[CommunityInfo]
) -> list[PeerOffer]:
    """Return the offers; those of communities that this site was removed from are none."""
    ended = {each.id: each.problem for each in communities if each.problem and not each.waiting}
    return [
        offer.model_copy(update={"digest": None, "problem": ended[offer.community]})
        if offer.community in ended
        else offer
        for offer in offers
    ]


def _made_offer(
    peer: PeerOffer, borrowed: Iterable[Lease], given_back: Iterable[tuple[datetime, Lease]]
) -> Offer:
    """Return a peer's offer as the planner sees it: as last said, less what was borrowed and
    more what was given back since."""
    digest = peer.digest
    if digest is None:
        nothing = Resources()
        return Offer(
            site=peer.site_name,
            provider=LENT,
            peer=peer.address.key,
            community=peer.community,
            capacity=nothing,
            free=nothing,
            known=not peer.problem.startswith(("unreachable", NOT_YET)),
            problem=peer.problem,
        )
    offered, free = digest.offered, digest.offered.free
    for lease in borrowed:
        if lease.peer == digest.site and lease.created_at > digest.issued_at:
            free = free.minus(lease.need.resources)
    for at, lease in given_back:
        if lease.peer == digest.site and lease.created_at <= digest.issued_at < at:
            free = (free + lease.need.resources).within(offered.capacity)
    return Offer(
        site=peer.site_name,
        provider=LENT,
        peer=digest.site,
        community=digest.community,
        capacity=offered.capacity,
        free=free,
        max_time=timedelta(seconds=offered.max_time_seconds),
        isolation=offered.isolation,
        network=offered.network,
        problem=peer.problem,
        country=offered.country,
        kind=offered.provider,
        prices=offered.prices,
        latency_seconds=peer.latency_seconds,
        preemptible=None
        if offered.notice_seconds is None
        else timedelta(seconds=offered.notice_seconds),
    )


def _grid_site(member: MemberInfo, offered: Offered | None, problem: str) -> GridSite:
    lent: dict[str, Any] = {}
    if offered is not None:
        lent = {name: getattr(offered, name) for name in ("capacity", "free", "prices", "country")}
    said = "" if problem == member.problem else problem
    return GridSite(**member.model_dump(), **lent, offer_problem=said)


def _is_loopback(host: str) -> bool:
    return ip_address(host).is_loopback


def _user() -> str:
    """Return this site's user, for whom it vouches, in letters every peer accepts."""
    return re.sub(r"[^a-z0-9._-]+", "-", getpass.getuser().lower()).strip("-.") or "user"
