"""What peers offer, as they last said: signed digests, kept by version, looked up without asking.

Offers are soft state: good for choosing whom to ask. Only the owner's grant counts. A site can
lie about its own offers only: nobody else's signature makes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import NamedTuple

from gridcloud.errors import Forbidden, GridcloudError
from gridcloud.grid.documents import LEEWAY, Clock, claimed_signer, verify
from gridcloud.grid.news import BUCKETS
from gridcloud.grid.papers import OfferDigest, Offered, Role, split_community
from gridcloud.grid.roster import Member, Roster
from gridcloud.grid.swim import PeerState, Seen
from gridcloud.grid.transport import PeerAddress
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Resources

#: An offer that says it holds for longer is refused.
LONGEST_OFFER = timedelta(hours=2)
#: The problem of a member of which nothing was heard yet.
NOT_YET = "has offered nothing yet"


class PeerOffer(Frozen):
    """A peer's offer to one community, or why there is none.

    ``digest`` is what it last said that has not expired. ``problem`` is why it cannot be counted
    on (`NOT_YET`; ``unreachable…`` for a peer that does not answer), empty where it can.
    ``seen_at`` is when it was last heard, None if never. ``latency_seconds`` is a round trip.
    """

    community: str
    site_name: str
    address: PeerAddress
    digest: OfferDigest | None
    problem: str
    seen_at: datetime | None
    latency_seconds: float | None = None


class Held(NamedTuple):
    """An offer in the book."""

    document: str
    digest: OfferDigest
    heard_at: datetime
    hash: int


class OfferBook:
    """The newest digest of each member of one community, this site's own among them.

    Pure but for its clock; equal books have equal `digest`.
    """

    def __init__(self, roster: Roster, clock: Clock) -> None:
        self._roster = roster
        self._clock = clock
        self._held: dict[str, Held] = {}
        self._hashes = [0] * BUCKETS
        self._digest = ""
        self._problems: dict[str, str] = {}
        self._silent: dict[str, str] = {}
        #: Grows with every change of what `listed` would say.
        self.changes = 0

    def add(self, document: str, signer: str | None = None) -> str | None:
        """Keep a digest if it is newer than what is held; return whose it is if so.

        ``signer`` is whose it must be, where that is known. Raises `InvalidSpec` or `Forbidden`
        for one that does not prove itself, or is not by a lending member.
        """
        key = signer or claimed_signer(document)
        held = self._held.get(key)
        if held is not None and held.document == document:
            self._held[key] = held._replace(heard_at=self._clock())
            return None
        member = self._roster.members.get(key)
        if member is None:
            return None  # its record is still on its way, or it was removed
        now = self._clock()
        digest = read_digest(document, member, self._roster.community, now)
        self._problems.pop(key, None)
        if held is not None and held.digest.version >= digest.version:
            return None
        seal = hashlib.sha256(f"{key}/{digest.version}".encode()).digest()
        fresh = Held(document, digest, now, int.from_bytes(seal[:8]))
        self._hashes[_bucket(key)] ^= fresh.hash ^ (held.hash if held else 0)
        self._digest = ""
        self._held[key] = fresh
        self.changes += 1
        return key

    def blame(self, key: str, problem: str) -> None:
        """Show a member's problem until it says something better; its offer no longer counts."""
        if self._problems.get(key) != problem:
            self._problems[key] = problem
            self.changes += 1

    def silent(self, key: str, problem: str) -> None:
        """Show that a member could not be asked, until `confirm`."""
        self._silent[key] = problem
        self.changes += 1

    def confirm(self, key: str) -> None:
        """Take note that a member is there."""
        if self._silent.pop(key, None) is not None:
            self.changes += 1

    def prune(self) -> None:
        """Drop what has expired, and what non-members offered."""
        now = self._clock()
        members = self._roster.members
        for key, held in list(self._held.items()):
            if held.digest.expires_at + LEEWAY <= now or key not in members:
                self._hashes[_bucket(key)] ^= held.hash
                self._digest = ""
                del self._held[key]
                self.changes += 1
        for noted in (self._problems, self._silent):
            for key in [key for key in noted if key not in members]:
                del noted[key]

    def version(self, key: str) -> int:
        """Return the version held of a member's digest; -1 if there is none."""
        held = self._held.get(key)
        return held.digest.version if held else -1

    def heard_at(self, key: str) -> datetime | None:
        """Return when a member's digest was last heard."""
        held = self._held.get(key)
        return held.heard_at if held else None

    def next_expiry(self) -> datetime:
        """Return when the next of the digests held expires, or its hours begin."""
        now = self._clock()
        digests = [held.digest for held in self._held.values()]
        times = [digest.expires_at for digest in digests]
        times += [each.offered.opens_at for each in digests if each.offered.opens_at]
        return min((time for time in times if time > now), default=now + LONGEST_OFFER)

    def summary(self) -> tuple[int, ...]:
        """Return a 64-bit hash of each part; equal hashes hold equal digests."""
        return tuple(self._hashes)

    def digest(self) -> str:
        """Return one hash of everything."""
        if not self._digest:
            whole = b"".join(each.to_bytes(8) for each in self._hashes)
            self._digest = hashlib.sha256(whole).hexdigest()[:16]
        return self._digest

    def documents_in(self, buckets: Iterable[int]) -> list[str]:
        """Return the digests in some parts, in an order that is the same each time."""
        wanted = set(buckets)
        return [held.document for key, held in sorted(self._held.items()) if _bucket(key) in wanted]

    def listed(self, me: str, seen: Callable[[str], Seen]) -> list[PeerOffer]:
        """Return what is known now of each other lending member; nobody is asked.

        ``seen`` tells of a key what is thought of that peer.
        """
        now = self._clock()
        found = []
        for key, member in self._roster.members.items():
            if key != me and member.has(Role.PROVIDER):
                found.append(self._listed(member, seen(key), now))
        return sorted(found, key=lambda offer: (offer.site_name, offer.address.key))

    def _listed(self, member: Member, seen: Seen, now: datetime) -> PeerOffer:
        key, community = member.key, self._roster.community
        name = self._roster.shown(key)
        held = self._held.get(key)
        digest = held.digest if held else None
        problem = self._problems.get(key, "")
        if problem:
            digest = None
        elif digest is None:
            problem = NOT_YET
        elif digest.expires_at <= now:
            digest, problem = None, "its offer expired"
        elif digest.offered.capacity == Resources():
            digest = None
            problem = f"{name} lends nothing in {split_community(community)[0]}."
        else:
            problem = closed(digest.offered, now)
        if key in self._silent:
            problem = f"unreachable: {self._silent[key]}"
        elif seen.state is PeerState.DEAD:
            problem = f"unreachable: {name} does not answer."
        elif not seen.direct:
            problem = f"unreachable from this site, though others hear {name}."
        return PeerOffer.model_construct(
            community=community,
            site_name=name,
            address=member.address,
            digest=digest,
            problem=problem,
            seen_at=held.heard_at if held else None,
            latency_seconds=seen.latency,
        )


def read_digest(document: str, member: Member, community: str, now: datetime) -> OfferDigest:
    """Return a member's digest, proved to be its own, for this community, and fresh.

    Raises `InvalidSpec` and `Forbidden`, for a member who may not lend too.
    """
    digest = verify(document, OfferDigest, member.key, now)
    if (digest.community, digest.site_name) != (community, member.site_name):
        raise Forbidden(f"{member.site_name} answered with an offer for something else.")
    if not member.has(Role.PROVIDER):
        raise Forbidden(f"{member.site_name} may not lend in {split_community(community)[0]}.")
    if digest.expires_at - digest.issued_at > LONGEST_OFFER:
        raise Forbidden(f"The offer of {member.site_name} claims to hold for too long.")
    return digest


def closed(offered: Offered, now: datetime) -> str:
    """Return until when the owner's hours keep all from being lent, by the clock of this host;
    empty while nothing is kept back."""
    if offered.opens_at is None or offered.opens_at <= now:
        return ""
    return f"closed until {offered.opens_at.astimezone():%a %H:%M %Z}"


def unreadable(error: GridcloudError) -> str:
    """Return how to tell people that a member's offer cannot be used."""
    return f"its offer cannot be used: {error.message}"


def _bucket(key: str) -> int:
    return hashlib.sha256(key.encode()).digest()[0] >> 2
