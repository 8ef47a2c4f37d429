"""The members of this site's communities: who they are, proved; what is kept of each; who counts.

Nothing is believed because of who passed it on. A member's place is proved by its credential, its
addresses by its own signature, and of two versions the one issued later counts. So lists can be
pulled from any member, and a lying one can at worst be silent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import structlog

from gridcloud.errors import Conflict, Forbidden, GridcloudError, NotFound
from gridcloud.grid.community_store import CommunityStore
from gridcloud.grid.credentials import verify_credential
from gridcloud.grid.documents import Clock, sign, verify
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.messages import Asking, MemberRecord
from gridcloud.grid.papers import Membership, Presence, Role, split_community
from gridcloud.grid.transport import PeerAddress
from gridcloud.model.frozen import Frozen

log = structlog.get_logger()


class Member(Frozen):
    """A member, with the documents that prove what is said."""

    membership: Membership
    presence: Presence
    record: MemberRecord

    @property
    def key(self) -> str:
        """Its key."""
        return self.membership.member

    @property
    def site_name(self) -> str:
        """Its name in this community."""
        return self.membership.site_name

    @property
    def address(self) -> PeerAddress:
        """Where to reach it."""
        return PeerAddress(key=self.key, addresses=self.presence.addresses)

    def has(self, role: Role) -> bool:
        """Whether it has a role."""
        return role in self.membership.roles


class Directory:
    """All members of all communities of this site, kept in a store and, once read, in memory.

    ``where`` tells the addresses at which this site is to be reached now.
    """

    def __init__(
        self,
        identity: Identity,
        store: CommunityStore,
        clock: Clock,
        where: Callable[[], tuple[str, ...]],
    ) -> None:
        self.identity = identity
        self._store = store
        self._clock = clock
        self._where = where
        self._read: dict[str, dict[str, Member]] = {}

    async def communities(self) -> tuple[str, ...]:
        """Return the identities of the communities this site is in, sorted."""
        return tuple(sorted(await self._store.communities()))

    async def resolve(self, community: str) -> str:
        """Return the identity of the one community of that name, or of that identity.

        Raises `NotFound`, and `Conflict` if there are several of that name.
        """
        found = [
            each
            for each in await self.communities()
            if community in (each, split_community(each)[0])
        ]
        if not found:
            raise NotFound(
                f"This site is in no community {community!r}.",
                hint="See 'gridcloud community list', or join with an invitation.",
            )
        if len(found) > 1:
            raise Conflict(
                f"There are several communities called {community}: {', '.join(found)}.",
                hint="Give the one you mean in full.",
            )
        return found[0]

    async def founding(self, community: str) -> str:
        """Return the founding document of a community this site is in; raises `NotFound`."""
        documents = await self._store.communities()
        if community not in documents:
            raise NotFound(f"This site is not in {_name(community)}.")
        return documents[community]

    async def members(self, community: str) -> dict[str, Member]:
        """Return the members of a community by key, this site among them."""
        if community not in self._read:
            kept = await self._store.members(community)
            read: dict[str, Member] = {}
            for key, (credential, presence) in kept.items():
                with contextlib.suppress(GridcloudError):  # such as under a clock set back
                    record = MemberRecord(credential=credential, presence=presence)
                    read[key] = self._proved(record, community)
            if len(read) < len(kept):
                return read  # it may be better next time
            self._read.setdefault(community, read)
        return dict(self._read[community])

    async def myself(self, community: str) -> Member:
        """Return this site as a member; raises `NotFound` if it is not in that community."""
        mine = (await self.members(community)).get(self.identity.key)
        if mine is None:
            raise NotFound(
                f"This site is not in {_name(community)}.", hint="Join it with an invitation."
            )
        return mine

    async def member(self, community: str, key: str) -> Member:
        """Return one member; raises `NotFound`."""
        found = (await self.members(community)).get(key)
        if found is None:
            raise NotFound(f"No member of {_name(community)} has the key {short(key)}.")
        return found

    def presence(self) -> str:
        """Return a document that says where this site is now."""
        now = self._clock()
        paper = Presence(site=self.identity.key, addresses=self._where()[:16], issued_at=now)
        return sign(self.identity, paper)

    async def asking(self, community: str) -> Asking:
        """Return what this site says of itself in every request about a community."""
        mine = await self.myself(community)
        return Asking(
            community=community,
            credential=mine.record.credential,
            presence=self.presence(),
        )

    async def records(self, community: str) -> tuple[MemberRecord, ...]:
        """Return all that is known of the members, for a peer; this site's presence is fresh."""
        members = await self.members(community)
        fresh = self.presence()
        return tuple(
            member.record.model_copy(update={"presence": fresh})
            if key == self.identity.key
            else member.record
            for key, member in members.items()
        )

    async def admit(self, key: str, asking: Asking) -> Member:
        """Return the member that asks, where the transport has proved its ``key``.

        What it shows of itself is kept if it is newer than what was known. Raises `Forbidden` for
        a non-member, and for a community this site is not in.
        """
        community = asking.community
        if self.identity.key not in await self.members(community):
            raise Forbidden(f"This site is not in {_name(community)}.")
        record = MemberRecord(credential=asking.credential, presence=asking.presence)
        try:
            shown = self._proved(record, community)
        except GridcloudError as error:
            raise Forbidden(
                f"{short(key)} is not a member of {_name(community)}: {error.message}",
                hint="Ask for an invitation.",
            ) from error
        if shown.key != key:
            raise Forbidden(
                f"{short(key)} is not a member of {_name(community)}: it showed the credential "
                f"of {short(shown.key)}.",
                hint="Ask for an invitation.",
            )
        return await self.keep(community, shown)

    async def merge(self, community: str, records: Iterable[MemberRecord]) -> int:
        """Keep what a peer knows of members, as far as it is proved; return how much was not."""
        refused = 0
        for record in records:
            try:
                heard = self._proved(record, community)
            except GridcloudError as error:
                refused += 1
                log.warning("member record refused", community=community, cause=error.message)
                continue
            await self.keep(community, heard)
        return refused

    async def keep(self, community: str, heard: Member) -> Member:
        """Keep a proved member, the newer half of each; return what is known now."""
        known = (await self.members(community)).get(heard.key)
        if known is not None:
            newest = max(known, heard, key=lambda member: member.membership.issued_at)
            latest = max(known, heard, key=lambda member: member.presence.issued_at)
            if newest is known and latest is known:
                return known
            heard = Member(
                membership=newest.membership,
                presence=latest.presence,
                record=MemberRecord(
                    credential=newest.record.credential, presence=latest.record.presence
                ),
            )
        await self._store.save_member(
            community, heard.key, heard.record.credential, heard.record.presence
        )
        if community in self._read:
            self._read[community][heard.key] = heard
        return heard

    async def enter(self, community: str, founding: str, credential: str) -> None:
        """Make this site a member of a community, by its own credential."""
        record = MemberRecord(credential=credential, presence=self.presence())
        await self.keep(community, self._proved(record, community))
        await self._store.save_community(community, founding)

    async def remove(self, community: str, key: str) -> None:
        """Drop a member that says it leaves. Idempotent."""
        await self._store.remove_member(community, key)
        self._read.get(community, {}).pop(key, None)

    async def forget(self, community: str) -> None:
        """Drop a community and all its members. Idempotent."""
        await self._store.forget_community(community)
        self._read.pop(community, None)

    def _proved(self, record: MemberRecord, community: str) -> Member:
        now = self._clock()
        membership = verify_credential(record.credential, community, now)
        presence = verify(record.presence, Presence, membership.member, now)
        return Member(membership=membership, presence=presence, record=record)


def _name(community: str) -> str:
    return split_community(community)[0]
