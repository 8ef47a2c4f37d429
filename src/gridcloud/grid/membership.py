"""The members of this site's communities: a roster of each, kept in the store; who may ask.

Nothing is believed because of who passed it on; see `gridcloud.grid.roster`. So what is known can
be pulled from any member, and a lying one can at worst be silent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from datetime import timedelta

import structlog

from gridcloud.errors import Conflict, Forbidden, GridcloudError, NotFound
from gridcloud.grid.community_store import CommunityStore, Shelf
from gridcloud.grid.credentials import verify_credential
from gridcloud.grid.documents import LEEWAY, Clock, claimed_signer, sign, verify
from gridcloud.grid.identity import Identity, short
from gridcloud.grid.messages import Asking, MemberRecord, NewsItem, RevocationRecord
from gridcloud.grid.papers import Presence, Revocation, Role, split_community
from gridcloud.grid.roster import ALWAYS, Member, Roster
from gridcloud.grid.transport import PeerAddress

__all__ = ["Directory", "Member"]

log = structlog.get_logger()
#: A presence is signed anew after this time, though nothing has changed.
PRESENCE_HOLDS_FOR = timedelta(hours=1)
_TICK = timedelta(microseconds=1)
_FEWEST_DIGITS = 8
#: So many items are proved before others of this process have their turn.
_AT_ONCE = 16


class Directory:
    """All members of all communities of this site, kept in a store and, once read, in memory.

    ``where`` tells where this site is to be reached now.
    """

    def __init__(
        self,
        identity: Identity,
        store: CommunityStore,
        clock: Clock,
        where: Callable[[], PeerAddress],
    ) -> None:
        self.identity = identity
        self._store = store
        self._clock = clock
        self._where = where
        self._foundings: dict[str, str] | None = None
        self._rosters: dict[str, Roster] = {}
        self._presence: tuple[Presence, str] | None = None
        self._say_anew = False
        #: What this site says of itself; see `Presence`.
        self.version, self.relays = "", False
        #: Called with each item that was new to a community's roster, this site's own too.
        self.on_news: Callable[[str, NewsItem], None] = lambda community, item: None

    async def communities(self) -> tuple[str, ...]:
        """Return the identities of the communities this site is in, sorted."""
        return tuple(sorted(await self._founded()))

    async def resolve(self, community: str) -> str:
        """Return the identity of the one community so called: NAME, NAME.KEY, or NAME and the
        first 8 digits or more of its founder's key.

        Raises `NotFound`, and `Conflict` if there are several.
        """
        return pick(community, await self.communities())

    async def founding(self, community: str) -> str:
        """Return the founding document of a community this site is in; raises `NotFound`."""
        documents = await self._founded()
        if community not in documents:
            raise NotFound(
                f"This site is not in {_name(community)}.", hint="Join it with an invitation."
            )
        return documents[community]

    async def roster(self, community: str) -> Roster:
        """Return what is known of a community this site is in; raises `NotFound`."""
        if community not in self._rosters:
            await self.founding(community)
            roster = await self._read(community)
            self._rosters.setdefault(community, roster)
        return self._rosters[community]

    async def members(self, community: str) -> dict[str, Member]:
        """Return the members of a community by key, this site among them; raises `NotFound`."""
        return dict((await self.roster(community)).members)

    async def myself(self, community: str) -> Member:
        """Return this site as a member.

        Raises `NotFound` if it is not in that community, `Forbidden` if it was removed from it.
        """
        roster = await self.roster(community)
        mine = roster.members.get(self.identity.key)
        if mine is None:
            raise roster.refusal(self.identity.key)
        return mine

    async def member(self, community: str, key: str) -> Member:
        """Return one member; raises `NotFound`."""
        found = (await self.roster(community)).members.get(key)
        if found is None:
            raise NotFound(f"No member of {_name(community)} has the key {short(key)}.")
        return found

    async def find(self, community: str, site: str) -> Member:
        """Return the member shown as ``site``, or whose key begins so (with 8 digits or more).

        Raises `NotFound`, and `Conflict` if it could be several.
        """
        roster = await self.roster(community)
        found = roster.named(site)
        if found is not None:
            return found
        keys = [key for key in roster.members if key.startswith(site)]
        if len(site) < _FEWEST_DIGITS or not keys:
            raise NotFound(
                f"There is no member {site!r} in {_name(community)}.",
                hint=f"See 'gridcloud community members {_name(community)}'.",
            )
        if len(keys) > 1:
            raise Conflict(f"Several members' keys begin with {site}.", hint="Give more of it.")
        return roster.members[keys[0]]

    def presence(self) -> str:
        """Return a document that says where this site is now; the same one while that holds.

        What it said while its clock was ahead nobody has believed: it is said anew.
        """
        there, now = self._where(), self._clock()
        saying = {
            "addresses": there.addresses,
            "tls": there.tls,
            "relay_urls": there.relay_urls,
            "relays": self.relays,
            "version": self.version,
        }
        if self._presence is not None and self._presence[0].issued_at <= now + LEEWAY:
            last, document = self._presence
            same = last.model_dump(include=set(saying)) == saying
            if same and not self._say_anew and now - last.issued_at < PRESENCE_HOLDS_FOR:
                return document
            now = max(now, last.issued_at + _TICK)
        paper = Presence(site=self.identity.key, issued_at=now, **saying)
        document = sign(self.identity, paper)
        self._presence, self._say_anew = (paper, document), False
        return document

    def renew(self) -> None:
        """Have this site's presence signed anew the next time: as its word that it is there."""
        self._say_anew = True

    async def asking(self, community: str) -> Asking:
        """Return what this site says of itself in every request about a community."""
        mine = await self.myself(community)
        record = MemberRecord(credential=mine.record.credential, presence=self.presence())
        if record != mine.record:
            # With a clock that is behind, the membership is of the future: the asked one says so.
            with contextlib.suppress(Forbidden):
                await self.add(community, record)
        return Asking(community=community, credential=record.credential, presence=record.presence)

    async def introductions(self, community: str, limit: int) -> tuple[MemberRecord, ...]:
        """Return the records of some members for a newcomer: this site, managers, then others."""
        await self.asking(community)
        me, roster = self.identity.key, await self.roster(community)
        chosen = sorted(
            roster.members.values(), key=lambda m: (m.key != me, not m.has(Role.MANAGER), m.key)
        )
        return tuple(member.record for member in chosen[:limit])

    async def admit(self, key: str, asking: Asking) -> Member:
        """Return the member that asks, where the transport has proved its ``key``.

        What it shows of itself is kept if it is newer than what was known. Raises `Forbidden` for
        a non-member, a removed member, and for a community this site is not in.
        """
        community = asking.community
        try:
            await self.myself(community)
        except GridcloudError as error:
            raise Forbidden(f"The asked site is not in {_name(community)}.") from error
        roster = await self.roster(community)
        hint = "Ask for an invitation."
        known = roster.members.get(key)
        record = MemberRecord(credential=asking.credential, presence=asking.presence)
        if known is not None and known.record == record:
            return known  # as with nearly every message: nothing to prove again
        try:
            shown = verify_credential(asking.credential, community, self._clock())
            if shown.member != key:
                raise Forbidden(f"it showed the credential of {short(shown.member)}.")
            await self.add(community, record)
        except GridcloudError as error:
            raise Forbidden(
                f"{short(key)} is not a member of {_name(community)}: {error.message}", hint=hint
            ) from error
        if key not in roster.members:
            raise roster.refusal(key)
        return roster.members[key]

    async def add(self, community: str, item: NewsItem) -> bool:
        """Take in what was heard of a community; return whether it was new. Raises as
        `Roster.add` does."""
        roster = await self.roster(community)
        if not roster.add(item):
            return False
        await self._save(roster, {roster.key_of(item)})
        self.on_news(community, item)
        return True

    async def merge(self, community: str, items: Iterable[NewsItem]) -> int:
        """Take in what a peer knows, as far as it is proved; return how much was not."""
        roster = await self.roster(community)
        refused, changed = 0, set()
        for number, item in enumerate(items, 1):
            try:
                if roster.add(item):
                    changed.add(roster.key_of(item))
                    self.on_news(community, item)
            except GridcloudError as error:
                refused += 1
                log.warning("news refused", community=community, cause=error.message)
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
        await self._save(roster, changed)
        return refused

    async def enter(self, community: str, founding: str, credential: str) -> None:
        """Make this site a member of a community, by its own credential.

        Raises `Forbidden` if that does not hold, as for one issued before this site left.
        """
        roster = await self._read(community)
        roster.add(MemberRecord(credential=credential, presence=self.presence()))
        if self.identity.key not in roster.members:
            raise roster.refusal(self.identity.key)
        self._rosters[community] = roster
        await self._save(roster, {self.identity.key})
        await self._store.save_community(community, founding)
        (await self._founded())[community] = founding

    async def farewell(self, community: str) -> RevocationRecord:
        """Return this site's own word that it leaves; nothing is changed by that."""
        roster, key = await self.roster(community), self.identity.key
        paper = Revocation(
            community=community,
            member=key,
            issuer=key,
            revoked_at=max(self._clock(), roster.latest_of(key)),
        )
        mine = roster.members.get(key)
        founded = key == roster.founder
        proof = "" if mine is None or founded else mine.record.credential
        return RevocationRecord(revocation=sign(self.identity, paper), proof=proof)

    async def left(self, community: str) -> RevocationRecord | None:
        """Return the word by which this site left a community before, if it did."""
        rows = await self._store.read(Shelf.REVOCATION, community)
        found = [
            (verify(revocation, Revocation, self.identity.key, ALWAYS), revocation, proof)
            for revocation, proof in rows.values()
            if claimed_signer(revocation) == self.identity.key
        ]
        mine = [each for each in found if each[0].member == self.identity.key]
        if not mine:
            return None
        _, revocation, proof = max(mine, key=lambda each: each[0].revoked_at)
        return RevocationRecord(revocation=revocation, proof=proof)

    async def forget(self, community: str, farewell: RevocationRecord | None = None) -> None:
        """Drop a community and all that is known of it but this site's own word that it left:
        old news can then not bring it back. Idempotent."""
        await self._store.forget_community(community)
        if farewell is not None:
            row = {self.identity.key: (farewell.revocation, farewell.proof)}
            await self._store.save(Shelf.REVOCATION, community, row)
        (await self._founded()).pop(community, None)
        self._rosters.pop(community, None)

    async def _founded(self) -> dict[str, str]:
        if self._foundings is None:
            read = await self._store.communities()
            if self._foundings is None:
                self._foundings = read
        return self._foundings

    async def _read(self, community: str) -> Roster:
        """Return the roster in the store; what is there of old or no use is put in order."""
        roster = Roster(community, self._clock)
        items: list[NewsItem] = []
        kept = {shelf: await self._store.read(shelf, community) for shelf in _SHELVES}
        for revocation, proof in kept[Shelf.REVOCATION].values():
            items.append(RevocationRecord(revocation=revocation, proof=proof))
        for credential, presence in kept[Shelf.MEMBER].values():
            items.append(MemberRecord(credential=credential, presence=presence))
        for item in items:
            try:
                roster.restore(item)
            except GridcloudError as error:
                log.warning("kept news left out", community=community, cause=error.message)
        rows = _rows(roster, roster.keys())
        for shelf in _SHELVES:
            await self._store.remove(shelf, community, kept[shelf].keys() - rows[shelf].keys())
            await self._store.save(
                shelf, community, dict(rows[shelf].items() - kept[shelf].items())
            )
        mine = roster.members.get(self.identity.key)
        if mine is not None and self._presence is None:
            self._presence = mine.presence, mine.record.presence
        return roster

    async def _save(self, roster: Roster, keys: Iterable[str]) -> None:
        for shelf, rows in _rows(roster, keys).items():
            if rows:
                await self._store.save(shelf, roster.community, rows)


def pick(community: str, among: Iterable[str]) -> str:
    """Return the one community so called; see `Directory.resolve`."""
    name, _, start = community.partition(".")
    found = [
        each
        for each in among
        if split_community(each)[0] == name
        and (not start or each == community or len(start) >= _FEWEST_DIGITS)
        and split_community(each)[1].startswith(start)
    ]
    if not found:
        raise NotFound(
            f"This site is in no community {community!r}.",
            hint="See 'gridcloud community list', or join with an invitation.",
        )
    if len(found) > 1:
        raise Conflict(
            f"There are several communities called {name}: {', '.join(found)}.",
            hint=f"Give 8 digits of the key or more, as in {found[0][: len(name) + 9]}.",
        )
    return found[0]


_SHELVES = (Shelf.REVOCATION, Shelf.MEMBER)


def _rows(roster: Roster, keys: Iterable[str]) -> dict[Shelf, dict[str, tuple[str, str]]]:
    rows: dict[Shelf, dict[str, tuple[str, str]]] = {shelf: {} for shelf in _SHELVES}
    for key in keys:
        for slot, item in roster.slots_of(key).items():
            if isinstance(item, RevocationRecord):
                rows[Shelf.REVOCATION][slot] = item.revocation, item.proof
            else:
                rows[Shelf.MEMBER][slot] = item.credential, item.presence
    return rows


def _name(community: str) -> str:
    return split_community(community)[0]
