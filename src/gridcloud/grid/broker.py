"""The broker: one site's part among peers, all of it behind one object and one message handler.

It keeps only its own site's state, commits only its own site's resources (by the `Owner` handed
in), and asks peers for the rest. Of what one peer asks only so much is handled; see `limits`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

import structlog

from gridcloud.errors import GridcloudError
from gridcloud.grid.announcing import Announcer
from gridcloud.grid.belonging import Belonging
from gridcloud.grid.calling import Caller
from gridcloud.grid.community_store import CommunityStore
from gridcloud.grid.documents import Clock
from gridcloud.grid.gossip import Gossip
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.leasing import Borrower, Lender, Owner, Tenant, lease_id
from gridcloud.grid.limits import Limits
from gridcloud.grid.membership import Directory
from gridcloud.grid.messages import (
    Asking,
    DigestBody,
    JoinBody,
    Kind,
    LeaseBody,
    LeaveBody,
    Nothing,
    RecallBody,
    ReceiptBody,
    ReceiptReply,
    ReleaseBody,
    RenewBody,
    Request,
    decode_body,
    decode_request,
    encode_refusal,
    encode_reply,
    reading_cost,
)
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.neighbours import Neighbours
from gridcloud.grid.offers import PeerOffer
from gridcloud.grid.papers import LeaseGrant
from gridcloud.grid.seeing import PeerSeen
from gridcloud.grid.transport import PeerAddress, Transport, check_size
from gridcloud.model.api import (
    CommunityInfo,
    InvitationInfo,
    LeftInfo,
    MemberInfo,
    RequestInfo,
)
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Need

log = structlog.get_logger()

_JOIN_TIMEOUT = 20.0
_LEASE_TIMEOUT = 60.0
_SHORT_TIMEOUT = 5.0


class Broker:
    """A site among its peers. `start` it, and `close` it in the end.

    Where a community is named, its name does if it is unambiguous here, else its identity.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        store: CommunityStore,
        owner: Owner,
        tenant: Tenant,
        clock: Clock = lambda: datetime.now(UTC),
        chance: random.Random | None = None,
    ) -> None:
        self._identity = identity
        self._transport = transport
        self._owner = owner
        self._clock = clock
        self._caller = Caller(transport, clock)
        self._directory = Directory(identity, store, clock, transport.address)
        self._belonging = Belonging(self._directory, transport, self._caller, store, clock)
        announcer = Announcer(self._directory, owner, clock)
        # Nonces come from it, too: it must not be guessed where it matters.
        chance = chance or random.SystemRandom()
        self._gossip = Gossip(self._directory, self._caller, announcer, clock, chance)
        self._neighbours = Neighbours(self._gossip, self._directory, self._belonging.helpers_of)
        self._limits = Limits()
        self._lender = Lender(self._directory, owner)
        self._borrower = Borrower(self._directory, self._caller, tenant, clock)

    async def start(self) -> None:
        """Begin to answer peers, and to look for them.

        Raises `Unavailable` if the address to listen on is taken.
        """
        await self._transport.start(self.handle)
        await self._gossip.start()

    async def close(self) -> None:
        """Stop to answer. Idempotent."""
        await self._gossip.close()
        await self._transport.close()

    def describe(self, version: str, *, relays: bool) -> None:
        """Say from now on which gridcloud this is, and whether it relays for other members."""
        self._directory.version, self._directory.relays = version, relays

    def neighbourhood(self, relay_bytes_per_second: int) -> Neighbourhood:
        """Return what a transport needs to know of the members: whom to trust with what."""
        return self._neighbours.told(relay_bytes_per_second)

    def address_of(self, peer: str) -> PeerAddress | None:
        """Return where a member of a community of this site is to be reached; None: it is none."""
        shared = self._gossip.exchanges.shared(peer)
        return next((circle.roster.members[peer].address for circle in shared), None)

    def address(self) -> PeerAddress:
        """Return where peers may reach this site; known once started."""
        return self._transport.address()

    async def create_community(self, name: str, site_name: str) -> CommunityInfo:
        """Found a community with this site, called ``site_name`` there, as its first member.

        Raises `InvalidSpec` for a bad name and `Conflict` if this site founded it before.
        """
        return await self._belonging.create(name, site_name)

    async def invite(
        self,
        community: str,
        roles: Iterable[str],
        valid_for: timedelta,
        *,
        approve: bool = False,
        uses: int = 1,
    ) -> InvitationInfo:
        """Return a join code, a secret that admits until it expires; see `Belonging.invite`."""
        return await self._belonging.invite(community, roles, valid_for, approve=approve, uses=uses)

    async def join(
        self, code: str, site_name: str, timeout: float = _JOIN_TIMEOUT
    ) -> CommunityInfo:
        """Join the community a code admits to, or ask to; see `Belonging.join`."""
        joined = await self._belonging.join(code, site_name, timeout)
        if not joined.waiting:
            await self.refresh_members(joined.id)
        return joined

    async def ask_again(self, timeout: float = _JOIN_TIMEOUT) -> list[str]:
        """Ask again to be admitted wherever this site waits; return where it now is a member."""
        entered = await self._belonging.ask_again(timeout)
        for community in entered:
            await self.refresh_members(community)
        return entered

    async def leave(self, community: str, timeout: float = _SHORT_TIMEOUT) -> LeftInfo:
        """Leave a community for good, and have its members told; see `Belonging.leave`."""
        return await self._belonging.leave(community, timeout)

    async def communities(self) -> list[CommunityInfo]:
        """Return the communities this site is in, and those it asks to be admitted to."""
        return await self._belonging.listed()

    async def members(self, community: str) -> list[MemberInfo]:
        """Return the members known here, by name; nobody is asked. See `refresh_members`."""
        seen = self.peers_seen()
        return [
            _seen(info, seen.get(info.key)) for info in await self._belonging.members(community)
        ]

    async def is_member(self, community: str, key: str) -> bool:
        """Whether a site is a member of a community of this site, as far as is known here."""
        return await self._belonging.is_member(community, key)

    async def waits(self) -> bool:
        """Whether this site asks to be admitted somewhere, and is still waiting."""
        return await self._belonging.waits()

    async def requests(self, community: str) -> list[RequestInfo]:
        """Return who asks this site to be admitted; see `Belonging.requests`."""
        return await self._belonging.requests(community)

    async def approve(self, community: str, site: str) -> MemberInfo:
        """Admit a site that asks; see `Belonging.approve`."""
        return await self._belonging.approve(community, site)

    async def refuse(self, community: str, site: str) -> str:
        """Refuse a site that asks; return its key. See `Belonging.refuse`."""
        return await self._belonging.refuse(community, site)

    async def change_roles(
        self, community: str, site: str, add: Iterable[str] = (), drop: Iterable[str] = ()
    ) -> MemberInfo:
        """Give a member roles, or take some away; see `Belonging.change_roles`."""
        return await self._belonging.change_roles(community, site, add, drop)

    async def remove(
        self, community: str, site: str, reason: str = "", timeout: float = _SHORT_TIMEOUT
    ) -> str:
        """Remove a member for good; return its key. See `Belonging.remove`."""
        return await self._belonging.remove(community, site, reason, timeout)

    async def refresh_members(self, community: str, timeout: float = _SHORT_TIMEOUT) -> None:
        """Exchange news with the members now; this tells them where this site is, too.

        Of a large community some are asked, and the rest follows by gossip. Who cannot be reached
        is noted in `members` and raises nothing.
        """
        await self._gossip.meet(await self._directory.resolve(community), timeout)

    async def refresh_offers(self, timeout: float, max_age: timedelta) -> None:
        """Ask peers of all communities for offers not heard within ``max_age``, some of many.

        Offers come by themselves; this is for a person who wants to see what is true now.
        """
        async with asyncio.TaskGroup() as group:
            for community in await self._directory.communities():
                group.create_task(self._gossip.refresh_offers(community, timeout, max_age))

    async def offers(self) -> list[PeerOffer]:
        """Return what peers of all communities offered when last heard; nobody is asked."""
        return [
            offer
            for community in await self._directory.communities()
            for offer in await self._gossip.offers(community)
        ]

    def offer_changed(self) -> None:
        """Have what this site offers announced anew, soon; may be called as often as one likes."""
        self._gossip.offer_changed()

    def on_change(self, call: Callable[[], None]) -> None:
        """Have ``call`` called when peers' offers, or who is there, changed."""
        self._gossip.on_change = call

    def peers_seen(self) -> dict[str, PeerSeen]:
        """Return what is known of each peer's being there, by key; nobody is asked."""
        return self._gossip.peers_seen(self._transport)

    def lease_id(self, request_id: str) -> str:
        """Return the id that a lease of this site's request has, known before it is asked for."""
        return lease_id(self._identity.key, request_id)

    async def request_lease(
        self,
        peer: str,
        community: str,
        request_id: str,
        *,
        need: Need,
        user: str,
        ssh_public_key: str,
        timeout: float = _LEASE_TIMEOUT,
    ) -> LeaseGrant:
        """Ask the member with key ``peer`` for a lease; see `Borrower.request`."""
        member = await self._directory.member(community, peer)
        return await self._borrower.request(
            member.address,
            community,
            request_id,
            need=need,
            user=user,
            ssh_public_key=ssh_public_key,
            timeout=timeout,
        )

    async def renew_lease(
        self,
        peer: str,
        community: str,
        lease: str,
        until: datetime,
        timeout: float = _LEASE_TIMEOUT,
    ) -> LeaseGrant:
        """Ask that a lease end no earlier than ``until``; see `Borrower.renew`."""
        member = await self._directory.member(community, peer)
        return await self._borrower.renew(member.address, community, lease, until, timeout)

    async def release_lease(
        self, peer: str, community: str, lease: str, timeout: float = _SHORT_TIMEOUT
    ) -> None:
        """Give a lease back. Idempotent; see `Borrower.release`."""
        member = await self._directory.member(community, peer)
        await self._borrower.release(member.address, lease, timeout)

    async def recall_lease(self, grant: LeaseGrant, reason: str) -> None:
        """Tell the borrower of ``grant``, made out anew, that its lease ends earlier."""
        member = await self._directory.member(grant.community, grant.borrower)
        await self._lender.recall(self._caller, member.address, grant, reason, _SHORT_TIMEOUT)

    async def show_receipt(self, borrower: str, community: str, receipt: str) -> ReceiptReply:
        """Ask the borrower of a loan that has ended to countersign its receipt."""
        member = await self._directory.member(community, borrower)
        asking = await self._directory.asking(community)
        body = ReceiptBody(**asking.model_dump(), receipt=receipt)
        return await self._caller.ask(
            member.address, Kind.RECEIPT, body, ReceiptReply, _SHORT_TIMEOUT
        )

    async def handle(self, key: str, message: bytes) -> bytes:
        """Answer one message of the peer whose ``key`` the transport proved. Never raises."""
        now = asyncio.get_running_loop().time()
        try:
            member = self._gossip.knows(key)
            self._limits.enter(key, now, member=member, cost=reading_cost(message))
            request = decode_request(message, self._clock())
            self._limits.allow(key, request.kind, now)
            self._gossip.heard(key)
            reply = encode_reply(await self._dispatch(key, request), self._clock())
            check_size(reply)
        except GridcloudError as error:
            log.info("request refused", peer=short(key), cause=error.message)
            return encode_refusal(error, self._clock())
        except Exception:  # a fault of ours: the peer learns that much, our log the rest
            log.exception("request failed", peer=short(key))
            failure = GridcloudError(
                "The asked site failed to answer.", hint="Its log says why; ask its administrator."
            )
            return encode_refusal(failure, self._clock())
        return reply

    async def _dispatch(self, key: str, request: Request) -> Frozen:
        body = request.body
        match request.kind:
            case Kind.PING:
                return decode_body(body, Nothing)
            case Kind.JOIN:
                communities = self._belonging.communities
                return await communities.accept_join(key, decode_body(body, JoinBody))
            case Kind.LEAVE:
                await self._belonging.communities.hear(decode_body(body, LeaveBody))
                return Nothing()
            case Kind.PROBE | Kind.PROBE_FOR | Kind.VOUCH | Kind.SYNC:
                return await self._gossip.exchanges.answer(key, request.kind, body)
            case Kind.OFFERS:
                asking = decode_body(body, Asking)
                await self._directory.admit(key, asking)
                return DigestBody(digest=await self._gossip.announce(asking.community))
            case Kind.LEASE:
                return await self._lender.grant(key, decode_body(body, LeaseBody))
            case Kind.RENEW:
                return await self._lender.renew(key, decode_body(body, RenewBody))
            case Kind.RELEASE:
                return await self._lender.release(key, decode_body(body, ReleaseBody))
            case Kind.RECALL:
                return await self._borrower.recalled(key, decode_body(body, RecallBody))
            case Kind.RECEIPT:
                return await self._borrower.countersign(key, decode_body(body, ReceiptBody))


def _seen(info: MemberInfo, seen: PeerSeen | None) -> MemberInfo:
    """Return what is known of a member, with what is known of its being there."""
    if seen is None:
        return info.model_copy(update={"state": "alive" if info.myself else "unknown"})
    return info.model_copy(
        update={
            "state": str(seen.state),
            "last_seen_at": seen.heard_at,
            "latency_seconds": seen.latency_seconds,
            "path": str(seen.path or ""),
            "problem": seen.problem,
        }
    )
