"""Founding, inviting, joining and leaving communities: the rules, with no network in them.

A community is its founder's key and a name. An invitation is a secret text that admits one site,
once, until it expires; it is redeemed at the site that made it out. That site is the founder's or
a manager's, and signs the new membership.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta

from pydantic import ValidationError

from gridcloud.errors import Conflict, Forbidden, InvalidSpec
from gridcloud.grid.community_store import CommunityStore
from gridcloud.grid.credentials import make_credential, verify_credential
from gridcloud.grid.documents import Clock, claimed_signer, first_problem, sign, verify
from gridcloud.grid.identity import short
from gridcloud.grid.membership import Directory, Member
from gridcloud.grid.messages import JoinBody, JoinedBody, MemberRecord
from gridcloud.grid.papers import (
    CommunityPaper,
    Invitation,
    Membership,
    Presence,
    Role,
    community_id,
    split_community,
)

CODE_PREFIX = "gridcloud-invite:"
LONGEST_INVITATION = timedelta(days=90)


class Communities:
    """This site's part in the founding, growing and shrinking of communities."""

    def __init__(self, directory: Directory, store: CommunityStore, clock: Clock) -> None:
        self._directory = directory
        self._identity = directory.identity
        self._store = store
        self._clock = clock
        self._admitting = asyncio.Lock()

    async def create(self, name: str, site_name: str) -> str:
        """Found a community with this site as its first member; return its identity.

        Raises `InvalidSpec` for a bad name and `Conflict` if this site founded it before.
        """
        key, now = self._identity.key, self._clock()
        community = community_id(name, key)
        if community in await self._directory.communities():
            raise Conflict(f"This site founded {name} already.", hint="Choose another name.")
        try:
            paper = CommunityPaper(name=name, founder=key, created_at=now)
            membership = Membership(
                community=community,
                member=key,
                site_name=site_name,
                roles=tuple(Role),
                issued_at=now,
                issuer=key,
            )
        except ValidationError as error:
            raise InvalidSpec(
                f"A community cannot be founded so: {first_problem(error)}.",
                hint="Names have 1 to 63 of a-z, 0-9 and '-', and begin with none of the last.",
            ) from error
        founding = sign(self._identity, paper)
        await self._directory.enter(community, founding, sign(self._identity, membership))
        return community

    async def invite(
        self,
        community: str,
        roles: Iterable[str],
        valid_for: timedelta,
        addresses: tuple[str, ...],
    ) -> tuple[str, Invitation]:
        """Return a join code for one site, and what it says. The code is a secret.

        Raises `Forbidden` if this site may not invite, or not with these roles, and `InvalidSpec`
        for roles or times that make no sense.
        """
        mine = await self._directory.myself(community)
        name, founder = split_community(community)
        if not mine.has(Role.MANAGER):
            raise Forbidden(
                f"This site may not invite to {name}: it is no manager.",
                hint="Ask the founder or a manager.",
            )
        wanted = _roles(roles)
        if Role.MANAGER in wanted and founder != self._identity.key:
            raise Forbidden(f"Only the founder of {name} makes managers.")
        if not timedelta(0) < valid_for <= LONGEST_INVITATION:
            raise InvalidSpec(
                f"An invitation holds for up to {LONGEST_INVITATION.days} days.",
                hint="Ask for a time between, such as 1d.",
            )
        now = self._clock()
        invitation = Invitation(
            community=community,
            inviter=self._identity.key,
            addresses=addresses,
            secret=secrets.token_hex(16),
            roles=wanted,
            issued_at=now,
            expires_at=now + valid_for,
        )
        return CODE_PREFIX + sign(self._identity, invitation), invitation

    async def accept_join(self, key: str, body: JoinBody) -> JoinedBody:
        """Admit the site whose ``key`` the transport proved, if its invitation is good.

        Idempotent for the same key. Raises `Forbidden` for an invitation that is forged, expired,
        not made out here or to a community that this site does not manage, and `Conflict` if it
        was used by another site or the name is taken; a name taken does not use it up.
        """
        invitation = await self._invitation(body.invitation)
        community = invitation.community
        presence = verify(body.presence, Presence, key, self._clock())
        async with self._admitting:
            members = await self._directory.members(community)
            _check_name(members.values(), body.site_name, key)
            first = await self._store.use_invitation(community, invitation.secret, key)
            if first != key:
                raise Conflict(
                    "That invitation was already used by another site.", hint="Ask for a new one."
                )
            known = members.get(key)
            roles = invitation.roles
            if known is not None and known.membership.issued_at >= invitation.issued_at:
                roles = known.membership.roles  # an old invitation brings no old roles back
            if known is None or (known.site_name, known.membership.roles) != (
                body.site_name,
                roles,
            ):
                known = await self._admit(key, body, invitation.community, roles, presence)
        return JoinedBody(
            community=await self._directory.founding(community),
            credential=known.record.credential,
            members=await self._directory.records(community),
        )

    async def enter(self, invitation: Invitation, site_name: str, reply: JoinedBody) -> str:
        """Become a member by the inviter's reply, once proved; return the community's identity.

        Raises `Forbidden` or `InvalidSpec` if the reply does not make this site the member that
        the invitation promised.
        """
        community, now = invitation.community, self._clock()
        founder = split_community(community)[1]
        paper = verify(reply.community, CommunityPaper, founder, now)
        if community_id(paper.name, founder) != community:
            raise Forbidden(f"{short(invitation.inviter)} answered for another community.")
        membership = verify_credential(reply.credential, community, now)
        if (membership.member, membership.site_name) != (self._identity.key, site_name):
            raise Forbidden(f"{short(invitation.inviter)} answered with another's membership.")
        await self._directory.enter(community, reply.community, reply.credential)
        await self._directory.merge(community, reply.members)
        return community

    async def _invitation(self, document: str) -> Invitation:
        invitation = verify(document, Invitation, self._identity.key, self._clock())
        community = invitation.community
        if community not in await self._directory.communities():
            raise Forbidden("That invitation is to a community this site has left.")
        mine = await self._directory.myself(community)
        if not mine.has(Role.MANAGER):
            raise Forbidden(f"This site may not admit members to {split_community(community)[0]}.")
        return invitation

    async def _admit(
        self,
        key: str,
        body: JoinBody,
        community: str,
        roles: tuple[Role, ...],
        presence: Presence,
    ) -> Member:
        membership = Membership(
            community=community,
            member=key,
            site_name=body.site_name,
            roles=roles,
            issued_at=self._clock(),
            issuer=self._identity.key,
        )
        mine = await self._directory.myself(community)
        credential = make_credential(
            sign(self._identity, membership),
            mine.record.credential,
            by_founder=split_community(community)[1] == self._identity.key,
        )
        record = MemberRecord(credential=credential, presence=body.presence)
        member = Member(membership=membership, presence=presence, record=record)
        return await self._directory.keep(community, member)


def read_code(code: str, now: datetime) -> tuple[str, Invitation]:
    """Return the invitation's document in a join code, and what it says, verified.

    Nothing is asked of anyone. Raises `InvalidSpec` if the text is no join code and `Forbidden`
    if it is forged or expired.
    """
    text = "".join(code.split())  # a code may have been wrapped on its way
    if not text.startswith(CODE_PREFIX):
        raise InvalidSpec(
            "That is not a join code.", hint=f"It begins with {CODE_PREFIX!r}; copy all of it."
        )
    document = text.removeprefix(CODE_PREFIX)
    return document, verify(document, Invitation, claimed_signer(document), now)


def _roles(roles: Iterable[str]) -> tuple[Role, ...]:
    try:
        chosen = {Role(role) for role in roles}
    except ValueError as error:
        raise InvalidSpec(f"{error.args[0]}.", hint=f"Roles are {', '.join(Role)}.") from error
    if not chosen:
        raise InvalidSpec("A member has at least one role.", hint=f"Choose of {', '.join(Role)}.")
    return tuple(role for role in Role if role in chosen)


def _check_name(members: Iterable[Member], site_name: str, key: str) -> None:
    for member in members:
        if member.site_name == site_name and member.key != key:
            raise Conflict(
                f"There is a member called {site_name!r} already.",
                hint="Join under another name: --as NAME.",
            )
