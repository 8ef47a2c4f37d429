"""This site among the members of its communities: what is asked of them, told them, shown of them.

What is decided stands in `communities` and `governing`; here it is carried over the network.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, Sequence
from datetime import timedelta

import structlog
from pydantic import ValidationError

from gridcloud.errors import Conflict, GridcloudError, InvalidSpec, NotFound
from gridcloud.grid.calling import Caller
from gridcloud.grid.communities import Communities, read_code
from gridcloud.grid.community_store import CommunityStore
from gridcloud.grid.documents import Clock, claimed_signer, first_problem
from gridcloud.grid.identity import short
from gridcloud.grid.membership import Directory, Member, pick
from gridcloud.grid.messages import JoinBody, JoinedBody, Kind, LeaveBody, Nothing, RevocationRecord
from gridcloud.grid.papers import Invitation, Role, Via, split_community
from gridcloud.grid.requests import Wait, Waiting, invitation_id
from gridcloud.grid.transport import PeerAddress, Transport
from gridcloud.model.api import (
    CommunityInfo,
    InvitationInfo,
    LeftInfo,
    MemberInfo,
    RequestInfo,
)

log = structlog.get_logger()
#: How many members are told of one's leaving, how many at once; they tell the others.
_TOLD, _TOLD_AT_ONCE = 32, 16
#: How many members an invitation names through which the inviter is reached.
_VIA = 4


class Belonging:
    """Founding, inviting, joining, leaving, and deciding on members, with the network in it.

    Where a community is named, see `Directory.resolve`; where a member is, `Directory.find`.
    """

    def __init__(
        self,
        directory: Directory,
        transport: Transport,
        caller: Caller,
        store: CommunityStore,
        clock: Clock,
    ) -> None:
        self._directory = directory
        self._transport = transport
        self._caller = caller
        self._clock = clock
        self._waiting = Waiting(store)
        self._helpers: dict[str, tuple[PeerAddress, ...]] = {}
        self.communities = Communities(directory, store, clock)

    async def create(self, name: str, site_name: str) -> CommunityInfo:
        """Found a community; see `Communities.create`."""
        return await self._info(await self.communities.create(name, site_name))

    async def invite(
        self,
        community: str,
        roles: Iterable[str],
        valid_for: timedelta,
        *,
        approve: bool = False,
        uses: int = 1,
    ) -> InvitationInfo:
        """Return a join code; see `Communities.invite`. Raises `NotFound` besides."""
        found = await self._directory.resolve(community)
        there = self._transport.address()
        code, invitation = await self.communities.invite(
            found, roles, valid_for, there, via=await self._via(found), approve=approve, uses=uses
        )
        return InvitationInfo(
            code=code,
            id=invitation_id(invitation),
            community=found,
            expires_at=invitation.expires_at,
            addresses=invitation.addresses,
            approve=approve,
            uses=uses,
            warning=_address_warning(there),
        )

    async def join(self, code: str, site_name: str, timeout: float) -> CommunityInfo:
        """Join the community a code admits to, under a name; or ask to, if it wants approval.

        The code is checked before anyone is asked. Raises `InvalidSpec` or `Forbidden` for a code
        that is malformed, forged, expired or refused, `Conflict` if it was used, the name is taken
        or this site is a member already, and what the way to the inviter raises. May be repeated.
        """
        document, invitation = read_code(code, self._clock())
        community = invitation.community
        if community in await self._directory.communities():
            roster = await self._directory.roster(community)
            if self._directory.identity.key in roster.members:
                raise Conflict(f"This site is in {_name(community)} already.")
        try:
            body = JoinBody(
                invitation=document,
                site_name=site_name,
                presence=self._directory.presence(),
                left=await self._directory.left(community),
            )
        except ValidationError as error:
            raise InvalidSpec(
                f"{site_name!r} is no name for a site: {first_problem(error)}.",
                hint="Names have 1 to 63 of a-z, 0-9 and '-', and begin with none of the last.",
            ) from error
        reply = await self._ask_inviter(invitation, body, timeout)
        if not reply.waits:
            await self.communities.enter(invitation, site_name, reply)
            await self._waiting.drop(community)
            return await self._info(community)
        known = {each.community: each for each in await self._waiting.all()}.get(community)
        wait = Wait(
            community=community,
            code=code,
            site_name=site_name,
            inviter=invitation.inviter,
            inviter_name=invitation.inviter_name,
            since=known.since if known and known.code == code else self._clock(),
        )
        await self._waiting.keep(wait)
        return _waiting_info(wait)

    async def ask_again(self, timeout: float) -> list[str]:
        """Ask once more wherever this site waits; return the communities that it is now in.

        Raises nothing: what an inviter says is kept, and shown by `listed`. A refusal, or the
        invitation's expiry, ends the asking.
        """
        entered = []
        for wait in await self._waiting.all():
            if wait.over:
                continue
            try:
                info = await self.join(wait.code, wait.site_name, timeout)
            except GridcloudError as error:
                if wait.community in await self._directory.communities():
                    await self._waiting.drop(wait.community)  # it came in by another code
                    continue
                update = {"problem": str(error), "over": not error.retryable}
                await self._waiting.keep(wait.model_copy(update=update))
                continue
            if not info.waiting:
                entered.append(wait.community)
        return entered

    async def waits(self) -> bool:
        """Whether there is a community that this site asks to be admitted to, still."""
        return any(not wait.over for wait in await self._waiting.all())

    async def leave(self, community: str, timeout: float) -> LeftInfo:
        """Leave a community for good, or ask no more to be admitted to it.

        Up to `_TOLD` members are told, who tell the others; if none can be, the warning says so.
        Raises `NotFound`.
        """
        waiting = [wait.community for wait in await self._waiting.all()]
        try:
            found = await self._directory.resolve(community)
        except NotFound:
            found = pick(community, waiting)
            await self._waiting.drop(found)
            return LeftInfo(community=found, told=0)
        roster = await self._directory.roster(found)
        me = self._directory.identity.key
        if me not in roster.members:  # removed already: there is nobody to tell
            await self._directory.forget(found, await self._directory.left(found))
            return LeftInfo(community=found, told=0)
        farewell = await self._directory.farewell(found)
        others = [member for key, member in roster.members.items() if key != me]
        told = await self._tell(found, farewell, others, timeout)
        await self._directory.forget(found, farewell)
        warning = ""
        if others and not told:
            warning = (
                "Nobody could be told: the others go on listing this site. "
                "Ask one of them to remove it."
            )
        return LeftInfo(community=found, told=told, warning=warning)

    async def listed(self) -> list[CommunityInfo]:
        """Return the communities this site is in, and those it asks to be admitted to."""
        entered = await self._directory.communities()
        waiting = [w for w in await self._waiting.all() if w.community not in entered]
        return [await self._info(each) for each in entered] + [_waiting_info(w) for w in waiting]

    async def members(self, community: str) -> list[MemberInfo]:
        """Return the members known here, by name; nobody is asked. Raises `NotFound`, and
        `Forbidden` if this site was removed."""
        found = await self._directory.resolve(community)
        await self._directory.myself(found)
        roster = await self._directory.roster(found)
        me, here = self._directory.identity.key, self._transport.address()
        infos = [
            MemberInfo(
                community=found,
                site_name=roster.shown(key),
                key=key,
                roles=tuple(member.membership.roles),
                addresses=(here if key == me else member.address).addresses,
                myself=key == me,
                version=member.presence.version,
                relays=member.presence.relays,
                since=member.membership.admitted_at,
                by=roster.known_as(member.membership.issuer),
            )
            for key, member in roster.members.items()
        ]
        return sorted(infos, key=lambda info: (info.site_name, info.key))

    async def is_member(self, community: str, key: str) -> bool:
        """Whether a key is a member's; of a community this site is not in, none is."""
        if community not in await self._directory.communities():
            return False
        return key in (await self._directory.roster(community)).members

    async def requests(self, community: str) -> list[RequestInfo]:
        """Return who asks this site to be admitted, by how long they wait."""
        found = await self._directory.resolve(community)
        await self.communities.governing.manager(found)
        asking = (await self.communities.requests.all(found)).values()
        return [
            RequestInfo(
                community=found,
                site_name=each.site_name,
                key=each.key,
                since=each.since,
                roles=tuple(each.invitation.roles),
                invitation=invitation_id(each.invitation),
                expires_at=each.invitation.expires_at,
            )
            for each in sorted(asking, key=lambda each: (each.since, each.key))
            if not each.refused
        ]

    async def approve(self, community: str, site: str) -> MemberInfo:
        """Admit a site that asks; see `Communities.approve`."""
        found = await self._directory.resolve(community)
        return await self._member_info(found, (await self.communities.approve(found, site)).key)

    async def refuse(self, community: str, site: str) -> str:
        """Refuse a site that asks, and return its key; see `Communities.refuse`."""
        found = await self._directory.resolve(community)
        await self.communities.governing.manager(found)
        return (await self.communities.refuse(found, site)).key

    async def change_roles(
        self, community: str, site: str, add: Iterable[str], drop: Iterable[str]
    ) -> MemberInfo:
        """Change a member's roles; see `Governing.change_roles`."""
        found = await self._directory.resolve(community)
        member = await self.communities.governing.change_roles(found, site, add, drop)
        return await self._member_info(found, member.key)

    async def remove(self, community: str, site: str, reason: str, timeout: float) -> str:
        """Remove a member, tell it so if it can be reached, and return its key; see
        `Governing.remove`."""
        found = await self._directory.resolve(community)
        roster = await self._directory.roster(found)
        before = dict(roster.members)
        key = await self.communities.governing.remove(found, site, reason)
        if key in before:
            mine = (
                item
                for item in roster.items_of(key)
                if isinstance(item, RevocationRecord)
                and claimed_signer(item.revocation) == self._directory.identity.key
            )
            await self._tell(found, next(mine), [before[key]], timeout)
        return key

    def helpers_of(self, key: str) -> Sequence[PeerAddress]:
        """Return through whom an invitation says that its inviter can be reached, while asked."""
        return self._helpers.get(key, ())

    async def _ask_inviter(
        self, invitation: Invitation, body: JoinBody, timeout: float
    ) -> JoinedBody:
        inviter = PeerAddress(
            key=invitation.inviter,
            addresses=invitation.addresses,
            tls=invitation.tls,
            relay_urls=invitation.relay_urls,
        )
        self._helpers[inviter.key] = tuple(
            PeerAddress(key=via.key, addresses=via.addresses, tls=via.tls) for via in invitation.via
        )
        try:
            return await self._caller.ask(inviter, Kind.JOIN, body, JoinedBody, timeout)
        finally:
            self._helpers.pop(inviter.key, None)

    async def _tell(
        self, community: str, record: RevocationRecord, members: list[Member], timeout: float
    ) -> int:
        """Tell members of a removal, the founder and managers first; return how many heard."""
        founder = split_community(community)[1]
        first = sorted(members, key=lambda m: (m.key != founder, not m.has(Role.MANAGER), m.key))
        body = LeaveBody(community=community, **record.model_dump())
        slots = asyncio.Semaphore(_TOLD_AT_ONCE)

        async def one(member: Member) -> bool:
            try:
                async with slots:
                    await self._caller.ask(member.address, Kind.LEAVE, body, Nothing, timeout)
            except GridcloudError as error:
                log.info("removal not told", peer=short(member.key), cause=error.message)
                return False
            return True

        return sum(await asyncio.gather(*(one(member) for member in first[:_TOLD])))

    async def _via(self, community: str) -> tuple[Via, ...]:
        members = await self._directory.members(community)
        me = self._directory.identity.key
        relays = [m.address for key, m in sorted(members.items()) if m.presence.relays if key != me]
        there = [address for address in relays if address.addresses or address.tls]
        return tuple(Via(key=a.key, addresses=a.addresses, tls=a.tls) for a in there[:_VIA])

    async def _member_info(self, community: str, key: str) -> MemberInfo:
        return next(info for info in await self.members(community) if info.key == key)

    async def _info(self, community: str) -> CommunityInfo:
        name, founder = split_community(community)
        roster = await self._directory.roster(community)
        key = self._directory.identity.key
        mine = roster.members.get(key)
        if mine is None:
            problem = str(roster.refusal(key))
            return CommunityInfo(id=community, name=name, founder=founder, problem=problem)
        roles = tuple(mine.membership.roles)
        return CommunityInfo(id=community, name=name, founder=founder, roles=roles)


def _waiting_info(wait: Wait) -> CommunityInfo:
    name, founder = split_community(wait.community)
    inviter = short(wait.inviter)
    if wait.inviter_name:
        inviter = f"{wait.inviter_name} ({inviter})"
    waiting = "" if wait.over else f"waits for approval by {inviter}"
    return CommunityInfo(
        id=wait.community, name=name, founder=founder, waiting=waiting, problem=wait.problem
    )


def _address_warning(there: PeerAddress) -> str:
    if there.relay_urls:
        return ""
    addresses = (*there.addresses, *there.tls)
    if not addresses:
        return "No address of this site is known, so nobody can use the code."
    hosts = [address.rpartition(":")[0].strip("[]") for address in addresses]
    if all(ipaddress.ip_address(host).is_loopback for host in hosts):
        return "This site listens on loopback only, so the code works on this machine alone."
    return ""


def _name(community: str) -> str:
    return split_community(community)[0]
