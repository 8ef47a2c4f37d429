"""The broker: one site's part among peers, all of it behind one object and one message handler.

It keeps only its own site's state, commits only its own site's resources (by the `Owner` handed
in), and asks peers for the rest. How often one peer may ask is not limited yet; the transport
bounds only how much is handled at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta

import structlog
from pydantic import ValidationError

from gridcloud.errors import (
    Conflict,
    GridcloudError,
    InvalidSpec,
    NoCapacity,
    TimedOut,
    Unavailable,
)
from gridcloud.grid.calling import Caller
from gridcloud.grid.communities import Communities, read_code
from gridcloud.grid.community_store import CommunityStore
from gridcloud.grid.documents import Clock, first_problem, sign
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.leasing import Borrower, Lender, Owner, lease_id
from gridcloud.grid.membership import Directory, Member
from gridcloud.grid.messages import (
    Asking,
    DigestBody,
    JoinBody,
    JoinedBody,
    Kind,
    LeaseBody,
    LeaveBody,
    MembersBody,
    Nothing,
    ReleaseBody,
    RenewBody,
    Request,
    decode_body,
    decode_request,
    encode_refusal,
    encode_reply,
)
from gridcloud.grid.offers import FAN_OUT, OfferCache, PeerOffer
from gridcloud.grid.papers import LeaseGrant, OfferDigest, Role, split_community
from gridcloud.grid.transport import PeerAddress, Transport, check_size
from gridcloud.model.api import CommunityInfo, InvitationInfo, MemberInfo
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Need

log = structlog.get_logger()

#: How long an offer may be believed.
OFFER_HOLDS_FOR = timedelta(minutes=5)
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
        clock: Clock = lambda: datetime.now(UTC),
    ) -> None:
        self._identity = identity
        self._transport = transport
        self._owner = owner
        self._clock = clock
        self._caller = Caller(transport, clock)
        self._directory = Directory(identity, store, clock, lambda: transport.address().addresses)
        self._communities = Communities(self._directory, store, clock)
        self._offers = OfferCache(self._directory, self._caller, clock)
        self._lender = Lender(self._directory, owner)
        self._borrower = Borrower(self._directory, self._caller, clock)
        self._problems: dict[tuple[str, str], str] = {}
        self._digest_version = 0

    async def start(self) -> None:
        """Begin to answer peers; raises `Unavailable` if the address to listen on is taken."""
        await self._transport.start(self.handle)

    async def close(self) -> None:
        """Stop to answer. Idempotent."""
        await self._transport.close()

    def address(self) -> PeerAddress:
        """Return where peers may reach this site; known once started."""
        return self._transport.address()

    async def create_community(self, name: str, site_name: str) -> CommunityInfo:
        """Found a community with this site, called ``site_name`` there, as its first member.

        Raises `InvalidSpec` for a bad name and `Conflict` if this site founded it before.
        """
        return await self._info(await self._communities.create(name, site_name))

    async def invite(
        self, community: str, roles: Iterable[str], valid_for: timedelta
    ) -> InvitationInfo:
        """Return a join code, a secret that admits one site until it expires.

        Raises `NotFound`, `Forbidden` if this site may not invite so, and `InvalidSpec`.
        """
        found = await self._directory.resolve(community)
        code, invitation = await self._communities.invite(
            found, roles, valid_for, self.address().addresses
        )
        return InvitationInfo(
            code=code,
            community=found,
            expires_at=invitation.expires_at,
            addresses=invitation.addresses,
            warning=_address_warning(invitation.addresses),
        )

    async def join(
        self, code: str, site_name: str, timeout: float = _JOIN_TIMEOUT
    ) -> CommunityInfo:
        """Join the community a code admits to, under a name; tell its members of this site.

        The code is checked before anyone is asked. Raises `InvalidSpec` or `Forbidden` for a code
        that is malformed, forged or expired, `Conflict` if it was used, the name is taken or this
        site is a member already, and what the way to the inviter raises. May be repeated.
        """
        document, invitation = read_code(code, self._clock())
        name = split_community(invitation.community)[0]
        if invitation.community in await self._directory.communities():
            raise Conflict(f"This site is in {name} already.")
        try:
            body = JoinBody(
                invitation=document, site_name=site_name, presence=self._directory.presence()
            )
        except ValidationError as error:
            raise InvalidSpec(
                f"{site_name!r} is no name for a site: {first_problem(error)}.",
                hint="Names have 1 to 63 of a-z, 0-9 and '-', and begin with none of the last.",
            ) from error
        inviter = PeerAddress(key=invitation.inviter, addresses=invitation.addresses)
        reply = await self._caller.ask(inviter, Kind.JOIN, body, JoinedBody, timeout)
        community = await self._communities.enter(invitation, site_name, reply)
        await self.refresh_members(community)
        return await self._info(community)

    async def leave(self, community: str, timeout: float = _SHORT_TIMEOUT) -> None:
        """Leave a community and forget it; members that can be reached are told."""
        found = await self._directory.resolve(community)

        async def tell(member: Member) -> None:
            body = LeaveBody(community=found)
            await self._caller.ask(member.address, Kind.LEAVE, body, Nothing, timeout)

        await self._each_other_member(found, tell)
        await self._directory.forget(found)

    async def communities(self) -> list[CommunityInfo]:
        """Return the communities this site is in."""
        return [await self._info(community) for community in await self._directory.communities()]

    async def members(self, community: str) -> list[MemberInfo]:
        """Return the members known here, by name; nobody is asked. See `refresh_members`."""
        found = await self._directory.resolve(community)
        members = await self._directory.members(found)
        infos = [
            MemberInfo(
                community=found,
                site_name=member.site_name,
                key=member.key,
                roles=tuple(member.membership.roles),
                addresses=self.address().addresses
                if member.key == self._identity.key
                else member.presence.addresses,
                problem=self._problems.get((found, member.key), ""),
                myself=member.key == self._identity.key,
            )
            for member in members.values()
        ]
        return sorted(infos, key=lambda info: (info.site_name, info.key))

    async def refresh_members(self, community: str, timeout: float = _SHORT_TIMEOUT) -> None:
        """Pull the member list of every member; this tells them where this site is, too.

        Who cannot be reached is noted in `members` and raises nothing.
        """
        found = await self._directory.resolve(community)
        asking = await self._directory.asking(found)

        async def pull(member: Member) -> None:
            reply = await self._caller.ask(
                member.address, Kind.MEMBERS, asking, MembersBody, timeout
            )
            await self._directory.merge(found, reply.members)

        await self._each_other_member(found, pull)

    async def refresh_offers(self, timeout: float, max_age: timedelta) -> None:
        """Ask peers of all communities for their offers; see `OfferCache.refresh`."""
        async with asyncio.TaskGroup() as group:
            for community in await self._directory.communities():
                group.create_task(self._offers.refresh(community, timeout, max_age))

    async def offers(self) -> list[PeerOffer]:
        """Return what peers of all communities offered when last asked; nobody is asked."""
        return [
            offer
            for community in await self._directory.communities()
            for offer in self._offers.listed(community)
        ]

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

    async def handle(self, key: str, message: bytes) -> bytes:
        """Answer one message of the peer whose ``key`` the transport proved. Never raises."""
        try:
            request = decode_request(message, self._clock())
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
                return await self._communities.accept_join(key, decode_body(body, JoinBody))
            case Kind.LEAVE:
                await self._directory.remove(decode_body(body, LeaveBody).community, key)
                return Nothing()
            case Kind.MEMBERS:
                asking = decode_body(body, Asking)
                await self._directory.admit(key, asking)
                return MembersBody(members=await self._directory.records(asking.community))
            case Kind.OFFERS:
                return await self._offer(key, decode_body(body, Asking))
            case Kind.LEASE:
                return await self._lender.grant(key, decode_body(body, LeaseBody))
            case Kind.RENEW:
                return await self._lender.renew(key, decode_body(body, RenewBody))
            case Kind.RELEASE:
                return await self._lender.release(key, decode_body(body, ReleaseBody))

    async def _offer(self, key: str, asking: Asking) -> DigestBody:
        community = asking.community
        await self._directory.admit(key, asking)
        mine = await self._directory.myself(community)
        offered = await self._owner.digest(community) if mine.has(Role.PROVIDER) else None
        if offered is None:
            raise NoCapacity(f"{mine.site_name} lends nothing in {split_community(community)[0]}.")
        now = self._clock()
        # Milliseconds keep growing over restarts, which a bare counter would not.
        self._digest_version = max(self._digest_version + 1, int(now.timestamp() * 1000))
        digest = OfferDigest(
            site=self._identity.key,
            site_name=mine.site_name,
            community=community,
            version=self._digest_version,
            offered=offered,
            issued_at=now,
            expires_at=now + OFFER_HOLDS_FOR,
        )
        return DigestBody(digest=sign(self._identity, digest))

    async def _each_other_member(
        self, community: str, act: Callable[[Member], Awaitable[None]]
    ) -> None:
        """Act on all other members at once, within bounds; note who failed and why."""
        slots = asyncio.Semaphore(FAN_OUT)

        async def one(member: Member) -> None:
            problem = ""
            try:
                async with slots:
                    await act(member)
            except (Unavailable, TimedOut) as error:
                problem = f"unreachable: {error.message}"
            except GridcloudError as error:
                problem = error.message
            self._problems[community, member.key] = problem

        async with asyncio.TaskGroup() as group:
            for key, member in (await self._directory.members(community)).items():
                if key != self._identity.key:
                    group.create_task(one(member))

    async def _info(self, community: str) -> CommunityInfo:
        name, founder = split_community(community)
        mine = await self._directory.myself(community)
        roles = tuple(mine.membership.roles)
        return CommunityInfo(id=community, name=name, founder=founder, roles=roles)


def _address_warning(addresses: tuple[str, ...]) -> str:
    if not addresses:
        return "No address of this site is known, so nobody can use the code."
    hosts = [address.rpartition(":")[0].strip("[]") for address in addresses]
    if all(ipaddress.ip_address(host).is_loopback for host in hosts):
        return "This site listens on loopback only, so the code works on this machine alone."
    return ""
