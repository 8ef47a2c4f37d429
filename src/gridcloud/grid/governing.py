"""What managers sign: admissions, other roles, removals. The rules, with no network in them.

Each is added to this site's own roster, from where it spreads. Whoever ends a manager's being one
first signs anew what that manager had signed and shall stay: its word ends with it, however dated.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from pydantic import ValidationError

from gridcloud.errors import Conflict, Forbidden, InvalidSpec, NotFound
from gridcloud.grid.credentials import make_credential
from gridcloud.grid.documents import Clock, first_problem, sign
from gridcloud.grid.identity import short
from gridcloud.grid.membership import Directory, Member
from gridcloud.grid.messages import MemberRecord, RevocationRecord
from gridcloud.grid.papers import Membership, Revocation, Role, split_community
from gridcloud.grid.roster import Roster

_TICK = timedelta(microseconds=1)
_KEY_DIGITS = 64


class Governing:
    """This site's part in deciding who is a member, and as what."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._identity = directory.identity
        self._clock = clock

    async def manager(self, community: str) -> Member:
        """Return this site as a manager; raises `Forbidden` if it is none."""
        mine = await self._directory.myself(community)
        if not mine.has(Role.MANAGER):
            raise Forbidden(
                f"This site may not do that in {_name(community)}: it is no manager.",
                hint="Ask the founder or a manager.",
            )
        return mine

    async def admit(
        self,
        community: str,
        key: str,
        site_name: str,
        roles: tuple[Role, ...],
        presence: str,
        since: datetime | None = None,
    ) -> Member:
        """Sign a membership and return who is a member by it. It is newer than all before it."""
        mine = await self.manager(community)
        roster = await self._directory.roster(community)
        if Role.MANAGER in roles and not self._founded(community):
            raise Forbidden(f"Only the founder of {_name(community)} makes managers.")
        membership = Membership(
            community=community,
            member=key,
            site_name=site_name,
            roles=roles,
            issued_at=self._later_than(roster, key, mine),
            issuer=self._identity.key,
            since=since,
        )
        credential = make_credential(
            sign(self._identity, membership),
            mine.record.credential,
            by_founder=self._founded(community),
        )
        await self._directory.add(community, MemberRecord(credential=credential, presence=presence))
        return await self._directory.member(community, key)

    async def change_roles(
        self, community: str, site: str, add: Iterable[str], drop: Iterable[str]
    ) -> Member:
        """Give a member roles and take others away; return it as it is then.

        Raises `NotFound`, `Forbidden` if this site may not, and `InvalidSpec` for roles that make
        no sense.
        """
        await self.manager(community)
        member = await self._directory.find(community, site)
        more, less = set(read_roles(add)), set(read_roles(drop))
        if more & less:
            raise InvalidSpec(f"A role cannot be both given and taken: {', '.join(more & less)}.")
        roles = tuple(role for role in Role if role in (set(member.membership.roles) | more) - less)
        if not roles:
            raise InvalidSpec(
                "A member has at least one role.", hint="Remove it: gridcloud community remove"
            )
        self._check_rank(community, member, Role.MANAGER in more)
        if member.key == split_community(community)[1] and Role.MANAGER in less:
            raise InvalidSpec("A founder manages its community for as long as it is in it.")
        if roles == member.membership.roles:
            return member
        if member.has(Role.MANAGER) and Role.MANAGER in less:
            await self._sign_anew_what_was_signed_by(community, member.key)
        return await self.admit(
            community,
            member.key,
            member.site_name,
            roles,
            member.record.presence,
            member.membership.admitted_at,
        )

    async def remove(self, community: str, site: str, reason: str) -> str:
        """Remove a member for good; return its key. A whole key may also be of a past member.

        Raises `NotFound`, `Forbidden` if this site may not, and `InvalidSpec` for a reason that
        cannot be written or for this site itself.
        """
        mine = await self.manager(community)
        try:
            member = await self._directory.find(community, site)
        except NotFound:
            if len(site) != _KEY_DIGITS or set(site) - set("0123456789abcdef"):
                raise
            key = site
        else:
            key = member.key
            if key != self._identity.key:
                self._check_rank(community, member, making=False)
        if key == self._identity.key:
            raise InvalidSpec(
                "A site does not remove itself.",
                hint=f"It leaves: gridcloud community leave {_name(community)}",
            )
        if key == split_community(community)[1]:
            raise Forbidden(f"Nobody removes the founder of {_name(community)}.")
        await self._revoke(community, key, reason, mine)
        return key

    async def dismiss_who_left(self, community: str, key: str) -> None:
        """Have the founder end the word of a manager that left by itself."""
        if self._founded(community):
            await self._revoke(community, key, "left", await self.manager(community))

    async def _revoke(self, community: str, key: str, reason: str, mine: Member) -> None:
        roster = await self._directory.roster(community)
        try:
            paper = Revocation(
                community=community,
                member=key,
                issuer=self._identity.key,
                revoked_at=self._later_than(roster, key, mine),
                reason=reason,
            )
        except ValidationError as error:
            raise InvalidSpec(
                f"The reason cannot be told: {first_problem(error)}.",
                hint="It has up to 256 plain letters, digits and signs (ASCII).",
            ) from error
        if self._founded(community):
            await self._sign_anew_what_was_signed_by(community, key)
        proof = "" if self._founded(community) else mine.record.credential
        record = RevocationRecord(revocation=sign(self._identity, paper), proof=proof)
        await self._directory.add(community, record)

    async def _sign_anew_what_was_signed_by(self, community: str, manager: str) -> None:
        roster = await self._directory.roster(community)
        members, revocations = roster.signed_by(manager)
        for member in members:
            await self.admit(
                community,
                member.key,
                member.site_name,
                member.membership.roles,
                member.record.presence,
                member.membership.admitted_at,
            )
        for old in revocations:
            if roster.revoked(old.member) is not None:
                paper = old.model_copy(update={"issuer": self._identity.key})
                record = RevocationRecord(revocation=sign(self._identity, paper))
                await self._directory.add(community, record)

    def _check_rank(self, community: str, member: Member, making: bool) -> None:
        """Raise `Forbidden` for what only the founder may do."""
        if self._founded(community):
            return
        name = _name(community)
        if member.key == split_community(community)[1]:
            raise Forbidden(f"Nobody but the founder of {name} decides on its membership.")
        if making:
            raise Forbidden(f"Only the founder of {name} makes managers.")
        if member.has(Role.MANAGER):
            raise Forbidden(
                f"{member.site_name} is a manager; only the founder of {name} decides on those.",
                hint="Ask the founder.",
            )

    def _later_than(self, roster: Roster, key: str, mine: Member) -> datetime:
        """Return now, or a moment after all that is known of ``key`` if a clock was ahead."""
        return max(self._clock(), roster.latest_of(key) + _TICK, mine.membership.issued_at)

    def _founded(self, community: str) -> bool:
        return split_community(community)[1] == self._identity.key


def read_roles(roles: Iterable[str]) -> tuple[Role, ...]:
    """Return roles in their order, each once; raises `InvalidSpec` for a word that is none."""
    try:
        chosen = {Role(role) for role in roles}
    except ValueError as error:
        raise InvalidSpec(f"{error.args[0]}.", hint=f"Roles are {', '.join(Role)}.") from error
    return tuple(role for role in Role if role in chosen)


def check_name(members: Iterable[Member], site_name: str, key: str) -> None:
    """Raise `Conflict` if another member has that name."""
    for member in members:
        if member.site_name == site_name and member.key != key:
            raise Conflict(
                f"There is a member called {site_name!r} already ({short(member.key)}).",
                hint="Join under another name: --as NAME.",
            )


def _name(community: str) -> str:
    return split_community(community)[0]
