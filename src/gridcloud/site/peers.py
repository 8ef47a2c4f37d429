"""The site among its peers: the broker, started once there is a community, and what it borrows."""

from __future__ import annotations

import asyncio
import getpass
import re
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import structlog

from gridcloud.errors import Forbidden, GridcloudError, InvalidSpec
from gridcloud.grid.broker import Broker
from gridcloud.grid.communities import read_code
from gridcloud.grid.offers import PeerOffer
from gridcloud.model.api import CommunityInfo, InvitationInfo, MemberInfo
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.need import Resources
from gridcloud.model.offer import Offer
from gridcloud.settings import SiteSettings
from gridcloud.site.keyring import Keyring
from gridcloud.site.lending import Lending
from gridcloud.site.ports import Ports, parse_address
from gridcloud.store.papers import PaperStore

log = structlog.get_logger()
_REFRESH_TIMEOUT = 2.0
#: By how much a lease may end after the longest time offered.
_CLOCKS_AND_STAGING = timedelta(minutes=15)
_FIRST_RETRY, _LAST_RETRY = 2.0, 60.0
#: How long a loan that was asked for, but never answered, is given back.
_UNANSWERED_FOR = timedelta(minutes=10)
#: Peers' capacity stands under this name: what is behind it is the owner's affair.
LENT = "lent"


class Peers:
    """Borrowing from peers, and membership. Without a community nothing of it runs or listens."""

    def __init__(
        self,
        settings: SiteSettings,
        keyring: Keyring,
        papers: PaperStore,
        lending: Lending,
        ports: Ports,
    ) -> None:
        self._settings = settings
        self._keyring = keyring
        self._papers = papers
        self._lending = lending
        self._ports = ports
        self._broker: Broker | None = None
        self._starting = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._given_back: deque[tuple[datetime, Lease]] = deque(maxlen=1000)
        #: Called when something new was learned of what peers offer.
        self.on_change: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Begin to answer peers if the site is in a community, and tell them where it is now."""
        communities = await self._papers.communities()
        if not communities:
            return
        broker = await self._started()
        for community in communities:
            self._in_background(broker.refresh_members(community))

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

    def lease_id(self, request_id: str) -> str:
        """Return the id that the lease of a request will have."""
        assert self._broker
        return self._broker.lease_id(request_id)

    async def offers(self, live: Iterable[Lease], *, max_age: timedelta) -> list[Offer]:
        """Return what peers offer, less what this site borrowed since they said so.

        Looks into the cache; peers are asked anew beside that when it is older than ``max_age``,
        and waited for only when nothing is known yet.
        """
        if self._broker is None:
            return []
        known = await self._broker.offers()
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = self._in_background(self._refresh(self._broker, max_age))
        if not known:
            await asyncio.wait({self._refreshing}, timeout=_REFRESH_TIMEOUT * 1.5)
            known = await self._broker.offers()
        borrowed = [lease for lease in live if lease.role is LeaseRole.BORROWED]
        return [_offer(peer, borrowed, self._given_back) for peer in known]

    async def refresh(self) -> None:
        """Ask peers for their offers, now."""
        if self._broker:
            await self._refresh(self._broker, timedelta(0))

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
        longest = (offer.max_time or timedelta(0)) + _CLOCKS_AND_STAGING
        if grant.ends_at > datetime.now(UTC) + longest:
            raise Forbidden(f"{offer.site} granted a lease for longer than it offered.")
        self._keyring.put_certificate(lease.id, grant.certificate)
        machine = Machine(
            lease_id=lease.id, provider=lease.provider, folder=grant.folder, endpoint=grant.endpoint
        )
        return lease.model_copy(
            update={"state": LeaseState.ACTIVE, "machine": machine, "ends_at": grant.ends_at}
        )

    async def give_back(self, lease: Lease) -> None:
        """Give a loan back; if its owner cannot be reached, try until it has ended by itself."""
        pause = _FIRST_RETRY
        while self._broker and lease.peer and lease.community:
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

    async def communities(self) -> list[CommunityInfo]:
        """Return the communities this site is in."""
        return await self._broker.communities() if self._broker else []

    async def create_community(self, name: str) -> CommunityInfo:
        """Found a community."""
        return await (await self._started()).create_community(name, self._settings.name)

    async def invite(
        self, community: str, roles: Iterable[str], valid_for: timedelta
    ) -> InvitationInfo:
        """Make out a join code."""
        return await (await self._started()).invite(community, roles, valid_for)

    async def join(self, code: str, site_name: str) -> CommunityInfo:
        """Join by a code."""
        self._check_reach(code)
        broker = await self._started()
        joined = await broker.join(code, site_name)
        self._in_background(broker.refresh_offers(_REFRESH_TIMEOUT, timedelta(0)))
        return joined

    async def members(self, community: str) -> list[MemberInfo]:
        """Return the members; they are asked for what they know first."""
        broker = await self._started()
        await broker.refresh_members(community)
        return await broker.members(community)

    async def leave(self, community: str) -> None:
        """Leave a community."""
        await (await self._started()).leave(community)

    def _check_reach(self, code: str) -> None:
        """Say at once what would otherwise be a time-out: loopback cannot reach another host."""
        _, invitation = read_code(code, datetime.now(UTC))
        host, _ = parse_address(self._settings.grid.listen)
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
                from gridcloud.grid.iroh_transport import IrohTransport  # noqa: PLC0415

                grid = self._settings.grid
                host, port = parse_address(grid.listen)
                port = self._ports.choose("grid", host, port, socket.SOCK_DGRAM)
                shown = f"[{host}]" if ":" in host else host
                identity = self._keyring.identity
                transport = IrohTransport(identity, f"{shown}:{port}", grid.advertise)
                broker = Broker(identity, transport, self._papers, self._lending)
                await broker.start()
                self._broker = broker
            return self._broker

    async def _refresh(self, broker: Broker, max_age: timedelta) -> None:
        before = await broker.offers()
        await broker.refresh_offers(_REFRESH_TIMEOUT, max_age)
        if await broker.offers() != before:
            self.on_change()

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


def _offer(
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
            known=not peer.problem.startswith("unreachable"),
            problem=peer.problem or "has said nothing yet",
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
    )


def _is_loopback(host: str) -> bool:
    return ip_address(host).is_loopback


def _user() -> str:
    """Return this site's user, for whom it vouches, in letters every peer accepts."""
    return re.sub(r"[^a-z0-9._-]+", "-", getpass.getuser().lower()).strip("-.") or "user"
