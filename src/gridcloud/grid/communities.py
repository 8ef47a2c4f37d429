"""Founding, inviting, joining and leaving communities: the rules, with no network in them.

A community is its founder's key and a name. An invitation is a secret text that admits one site,
once, until it expires (or several, if each is approved); it is redeemed at the site that made it
out. That site is the founder's or a manager's, and signs the new membership.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta

from pydantic import ValidationError

from gridcloud.errors import Conflict, Forbidden, InvalidSpec
from gridcloud.grid.community_store import CommunityStore
from gridcloud.grid.credentials import verify_credential
from gridcloud.grid.documents import Clock, claimed_signer, first_problem, sign, verify
from gridcloud.grid.governing import Governing, check_name, read_roles
from gridcloud.grid.identity import short
from gridcloud.grid.membership import Directory, Member
from gridcloud.grid.messages import JoinBody, JoinedBody, LeaveBody, RevocationRecord
from gridcloud.grid.papers import (
    MOST_USES,
    CommunityPaper,
    Invitation,
    Membership,
    Presence,
    Revocation,
    Role,
    Via,
    community_id,
    split_community,
)
from gridcloud.grid.requests import Request, Requests
from gridcloud.grid.transport import PeerAddress

CODE_PREFIX = "gridcloud-invite:"
LONGEST_INVITATION = timedelta(days=90)
#: How many members a newcomer is told of at once; it hears of the rest from them.
INTRODUCED = 32
_TICK = timedelta(microseconds=1)


class Communities:
    """This site's part in the founding, growing and shrinking of communities."""

    def __init__(self, directory: Directory, store: CommunityStore, clock: Clock) -> None:
        self._directory = directory
        self._identity = directory.identity
        self._store = store
        self._clock = clock
        self._admitting = asyncio.Lock()
        self.governing = Governing(directory, clock)
        self.requests = Requests(directory.identity.key, store, clock)

    async def create(self, name: str, site_name: str) -> str:
        """Found a community with this site as its first member; return its identity.

        Raises `InvalidSpec` for a bad name and `Conflict` if this site founded it before. One it
        founded and left is founded again: it is the same, and who is in it still is.
        """
        key, now = self._identity.key, self._clock()
        community = community_id(name, key)
        if community in await self._directory.communities():
            raise Conflict(f"This site founded {name} already.", hint="Choose another name.")
        try:
            paper = CommunityPaper(name=name, founder=key, created_at=now)
            credential = await self._as_founder(community, site_name)
        except ValidationError as error:
            raise InvalidSpec(
                f"A community cannot be founded so: {first_problem(error)}.",
                hint="Names have 1 to 63 of a-z, 0-9 and '-', and begin with none of the last.",
            ) from error
        founding = sign(self._identity, paper)
        await self._directory.enter(community, founding, credential)
        return community

    async def invite(
        self,
        community: str,
        roles: Iterable[str],
        valid_for: timedelta,
        there: PeerAddress,
        *,
        via: tuple[Via, ...] = (),
        approve: bool = False,
        uses: int = 1,
    ) -> tuple[str, Invitation]:
        """Return a join code, and what it says. The code is a secret.

        ``there`` is where this site is reached, ``via`` are members through which it is. Raises
        `Forbidden` if this site may not invite, or not with these roles, and `InvalidSpec` for
        roles, times or uses that make no sense.
        """
        mine = await self.governing.manager(community)
        name, founder = split_community(community)
        wanted = read_roles(roles)
        if not wanted:
            raise InvalidSpec("A member has at least one role.", hint=f"Of {', '.join(Role)}.")
        if Role.MANAGER in wanted and founder != self._identity.key:
            raise Forbidden(f"Only the founder of {name} makes managers.")
        if not timedelta(0) < valid_for <= LONGEST_INVITATION:
            raise InvalidSpec(
                f"An invitation holds for up to {LONGEST_INVITATION.days} days.",
                hint="Ask for a time between, such as 1d.",
            )
        if not 1 <= uses <= MOST_USES or (uses > 1 and not approve):
            raise InvalidSpec(
                f"One code admits 1 site, or up to {MOST_USES} if you approve of each.",
                hint="Use --approve with --uses.",
            )
        now = self._clock()
        invitation = Invitation(
            community=community,
            inviter=self._identity.key,
            inviter_name=mine.site_name,
            addresses=there.addresses,
            tls=there.tls,
            relay_urls=there.relay_urls,
            via=via,
            secret=secrets.token_hex(16),
            roles=wanted,
            approve=approve,
            uses=uses,
            issued_at=now,
            expires_at=now + valid_for,
        )
        return CODE_PREFIX + sign(self._identity, invitation), invitation

    async def accept_join(self, key: str, body: JoinBody) -> JoinedBody:
        """Admit the site whose ``key`` the transport proved, if its invitation is good; or note
        that it asks, if the invitation wants approval.

        Idempotent for the same key. Raises `Forbidden` for an invitation that is forged, expired,
        not made out here, to a community that this site does not manage, older than the asker's
        removal, or refused; and `Conflict` if it was used up or the name is taken; a name taken
        does not use it up.
        """
        invitation = await self._invitation(body.invitation)
        community = invitation.community
        verify(body.presence, Presence, key, self._clock())
        if body.left is not None:
            await self._hear_of_leaving(community, key, body.left)
        async with self._admitting:
            roster = await self._directory.roster(community)
            revocation = roster.revoked(key)
            if revocation is not None and invitation.issued_at <= revocation.revoked_at:
                raise roster.refusal(key)
            check_name(roster.members.values(), body.site_name, key)
            await self._use(invitation, key)
            known = roster.members.get(key)
            if known is not None and known.membership.issued_at >= invitation.issued_at:
                roles = known.membership.roles  # an old invitation brings no old roles back
            elif invitation.approve:
                return await self._note(key, body, invitation)
            else:
                roles = invitation.roles
            if known is None or (known.site_name, known.membership.roles) != (
                body.site_name,
                roles,
            ):
                since = (
                    known.membership.admitted_at
                    if known and known.site_name == body.site_name
                    else None
                )
                known = await self.governing.admit(
                    community, key, body.site_name, roles, body.presence, since
                )
        return JoinedBody(
            community=await self._directory.founding(community),
            credential=known.record.credential,
            members=await self._directory.introductions(community, INTRODUCED),
        )

    async def approve(self, community: str, site: str) -> Member:
        """Admit a site that asks; it learns so when it asks again.

        Raises `NotFound` if none does by that name, `Conflict` if its name was taken meanwhile.
        """
        async with self._admitting:
            request = await self.requests.find(community, site)
            members = await self._directory.members(community)
            check_name(members.values(), request.site_name, request.key)
            known = members.get(request.key)
            member = await self.governing.admit(
                community,
                request.key,
                request.site_name,
                request.invitation.roles,
                known.record.presence if known is not None else request.presence,
            )
            await self.requests.drop(request)
            return member

    async def refuse(self, community: str, site: str) -> Request:
        """Refuse a site that asks; raises `NotFound` if none does by that name."""
        async with self._admitting:
            request = await self.requests.find(community, site)
            await self.requests.refuse(request)
            return request

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
        credential = reply.credential
        if founder == self._identity.key:  # coming back to what it founded and left
            credential = await self._as_founder(community, site_name)
        await self._directory.enter(community, reply.community, credential)
        await self._directory.merge(community, reply.members)
        return community

    async def hear(self, body: LeaveBody) -> None:
        """Take note of a removal, by whomever it is told. Raises as `Directory.add` does."""
        community = body.community
        roster = await self._directory.roster(community)
        record = RevocationRecord(revocation=body.revocation, proof=body.proof)
        key = roster.key_of(record)
        known = roster.members.get(key)
        if not await self._directory.add(community, record):
            return
        leaves = claimed_signer(body.revocation) == key
        if leaves and known is not None and known.has(Role.MANAGER):
            await self.governing.dismiss_who_left(community, key)

    async def _as_founder(self, community: str, site_name: str) -> str:
        left, now = await self._directory.left(community), self._clock()
        if left is not None:
            key = self._identity.key
            last = verify(left.revocation, Revocation, key, now).revoked_at
            now = max(now, last + _TICK)
        membership = Membership(
            community=community,
            member=self._identity.key,
            site_name=site_name,
            roles=tuple(Role),
            issued_at=now,
            issuer=self._identity.key,
        )
        return sign(self._identity, membership)

    async def _invitation(self, document: str) -> Invitation:
        invitation = verify(document, Invitation, self._identity.key, self._clock())
        community = invitation.community
        if community not in await self._directory.communities():
            raise Forbidden("That invitation is to a community this site has left.")
        mine = await self._directory.myself(community)
        if not mine.has(Role.MANAGER):
            raise Forbidden(f"This site may not admit members to {split_community(community)[0]}.")
        if Role.MANAGER in invitation.roles and split_community(community)[1] != mine.key:
            raise Forbidden("Only the founder makes managers.")
        return invitation

    async def _use(self, invitation: Invitation, key: str) -> None:
        """Take one of an invitation's uses, unless ``key`` has one."""
        for number in range(invitation.uses):
            use = invitation.secret if number == 0 else f"{invitation.secret}/{number}"
            if await self._store.use_invitation(invitation.community, use, key) == key:
                return
        others = "another site" if invitation.uses == 1 else f"{invitation.uses} other sites"
        raise Conflict(f"That invitation was already used by {others}.", hint="Ask for a new one.")

    async def _note(self, key: str, body: JoinBody, invitation: Invitation) -> JoinedBody:
        request = await self.requests.ask(key, body, invitation)
        if request.refused:
            name = split_community(invitation.community)[0]
            raise Forbidden(
                f"A manager of {name} refused to admit {body.site_name}.",
                hint="Ask who invited you why; another try needs a new invitation.",
            )
        return JoinedBody(
            community=await self._directory.founding(invitation.community), waits=True
        )

    async def _hear_of_leaving(self, community: str, key: str, left: RevocationRecord) -> None:
        if verify(left.revocation, Revocation, key, self._clock()).member != key:
            raise Forbidden("Who joins may tell of its own leaving only.")
        await self.hear(LeaveBody(community=community, **left.model_dump()))


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
