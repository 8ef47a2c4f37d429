"""The roster of one community: who is a member, by what is proved, whatever order it came in.

A roster holds what was heard: memberships, presences and revocations, each proving itself. It is
a state that only grows (a CRDT): of each kind the newest of every signer counts, and so two sites
that heard the same hold the same, and have the same `digest`. Who *is* a member follows from that
state alone:

- A revocation voids every membership of its member issued up to then; one by a manager voids none
  that makes a manager. A membership issued later admits anew.
- Whom the founder removes, or makes a plain member, loses what it signed as a manager too, however
  it is dated; so whoever removes a manager first signs anew what shall stay. What a manager signed
  before it left by itself stays.
- What the founder signed last replaces what it signed before, and what is issued last counts; but
  a manager may change a plain member's roles only, not a manager's.
- Of several members of one name the one admitted first has it; see `shown`.

The rules lean on one another, and so stand in one module.

It is over 400 lines, since what counts as membership is to be read in one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from gridcloud.errors import Conflict, Forbidden
from gridcloud.grid.credentials import Admission, Removal, read_credential, read_revocation
from gridcloud.grid.documents import LEEWAY, Clock, verify
from gridcloud.grid.identity import short
from gridcloud.grid.messages import MemberRecord, NewsItem, RevocationRecord
from gridcloud.grid.papers import Membership, Presence, Revocation, Role, split_community
from gridcloud.grid.transport import PeerAddress
from gridcloud.model.frozen import Frozen

BUCKETS = 64
#: How many keys one roster knows at most, removed members included.
MAX_SEATS = 16_384
#: At this time everything has begun.
ALWAYS = datetime.max.replace(tzinfo=UTC)
_NEVER = datetime.min.replace(tzinfo=UTC)


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
        """The name it was admitted by; `Roster.shown` tells it from others of that name."""
        return self.membership.site_name

    @property
    def address(self) -> PeerAddress:
        """Where to reach it."""
        there = self.presence
        return PeerAddress(
            key=self.key,
            addresses=there.addresses,
            tls=there.tls,
            relay_urls=there.relay_urls,
        )

    def has(self, role: Role) -> bool:
        """Whether it has a role."""
        return role in self.membership.roles


@dataclass(slots=True)
class _Seat:
    """What was heard of one key: the newest of each signer."""

    admissions: dict[tuple[str, bool], Admission] = field(default_factory=dict)
    removals: dict[tuple[str, str], Removal] = field(default_factory=dict)
    presence: tuple[datetime, str, Presence] | None = None
    hash: int = 0
    #: All that can be told of it, kept since peers that compare ask for many at a time.
    items: tuple[NewsItem, ...] = ()


def voids(revocation: Revocation, membership: Membership) -> bool:
    """Whether a revocation, itself in force, ends a membership of the same community."""
    if revocation.member != membership.member or membership.issued_at > revocation.revoked_at:
        return False
    founder = split_community(revocation.community)[1]
    strong = revocation.issuer in (founder, revocation.member)
    return strong or Role.MANAGER not in membership.roles


class Roster:
    """What is known of one community. Nothing waits, and nothing is asked of anyone."""

    def __init__(self, community: str, clock: Clock) -> None:
        self.community = community
        self.founder = split_community(community)[1]
        self._clock = clock
        self._seats: dict[str, _Seat] = {}
        self._members: dict[str, Member] = {}
        self._names: dict[str, set[str]] = {}
        self._signed_by: dict[str, set[str]] = {}
        self._buckets: list[set[str]] = [set() for _ in range(BUCKETS)]
        self._hashes = [0] * BUCKETS
        self._digest = ""

    @property
    def members(self) -> Mapping[str, Member]:
        """The members, by key; a view that changes with the roster."""
        return MappingProxyType(self._members)

    def add(self, item: NewsItem) -> bool:
        """Take in what was heard; return whether that was new. Idempotent.

        Raises `InvalidSpec` or `Forbidden` for what does not prove itself, and `Conflict` if there
        are `MAX_SEATS` already.
        """
        return self._take(item, self._clock())

    def restore(self, item: NewsItem) -> bool:
        """Take in what was kept, and so proved before: it is not refused for a clock set back."""
        return self._take(item, ALWAYS)

    def keys(self) -> tuple[str, ...]:
        """Return all keys that something is known of."""
        return tuple(self._seats)

    def key_of(self, item: NewsItem) -> str:
        """Return the key that an item is about; raises as `add` does."""
        if isinstance(item, RevocationRecord):
            return read_revocation(item, self.community, ALWAYS).revocation.member
        return read_credential(item.credential, self.community, ALWAYS).membership.member

    def revoked(self, key: str) -> Revocation | None:
        """Return the latest revocation of a key that is no member; None if it is, or was not."""
        if key in self._members or key not in self._seats:
            return None
        found = [each.revocation for each in self._in_force(self._seats[key])]
        return max(found, key=lambda each: each.revoked_at, default=None)

    def refusal(self, key: str) -> Forbidden:
        """Return why a key that shows a credential is no member."""
        name = split_community(self.community)[0]
        revocation = self.revoked(key)
        hint = f"Ask a manager of {name} for a new invitation."
        if revocation is None:
            return Forbidden(
                f"The membership of {short(key)} in {name} no longer holds: "
                "who signed it was removed, or it was replaced.",
                hint=hint,
            )
        if revocation.issuer == key:
            return Forbidden(f"{self.known_as(key)} left {name}{_on(revocation)}.", hint=hint)
        reason = f": {revocation.reason}" if revocation.reason else ""
        return Forbidden(
            f"{self.known_as(key)} was removed from {name}{_on(revocation)} "
            f"by {self.known_as(revocation.issuer)}{reason}.",
            hint=hint,
        )

    def shown(self, key: str) -> str:
        """Return the name to show a member by, unique here: the one it was admitted by, or, if an
        earlier member has that, with ``~`` and the beginning of its key. Raises `KeyError`."""
        name = self._members[key].site_name
        first, *others = self._claimants(name)
        if key == first:
            return name
        length = 4
        while sum(each.startswith(key[:length]) for each in others) > 1:
            length += 1
        return f"{name}~{key[:length]}"

    def named(self, name: str) -> Member | None:
        """Return the member shown by a name, or None; more of its key after ``~`` is no harm."""
        plain, mark, start = name.partition("~")
        claimants = self._claimants(plain)
        if not mark:
            return self._members[claimants[0]] if claimants else None
        found = [key for key in claimants if start and key.startswith(start)]
        return self._members[found[0]] if len(found) == 1 else None

    def known_as(self, key: str) -> str:
        """Return how to speak of a key, member or not: its name there, or how its key begins."""
        if key in self._members:
            return self.shown(key)
        seat = self._seats.get(key)
        if seat is not None and seat.admissions:
            newest = max(seat.admissions.values(), key=lambda each: each.membership.issued_at)
            return f"{newest.membership.site_name} ({short(key)})"
        return short(key)

    def summary(self) -> dict[int, int]:
        """Return a 64-bit hash of each of the `BUCKETS`; equal hashes hold equal items."""
        return dict(enumerate(self._hashes))

    def digest(self) -> str:
        """Return one hash of everything: equal digests are equal rosters."""
        if not self._digest:
            whole = b"".join(each.to_bytes(8) for each in self._hashes)
            self._digest = hashlib.sha256(whole).hexdigest()
        return self._digest

    def items_in(self, buckets: Iterable[int]) -> list[NewsItem]:
        """Return all that is known of the keys in some buckets, removals first."""
        keys = [key for bucket in sorted(set(buckets)) for key in sorted(self._buckets[bucket])]
        items = [item for key in keys for item in self._seats[key].items]
        return sorted(items, key=lambda item: isinstance(item, MemberRecord))

    def items_of(self, key: str) -> list[NewsItem]:
        """Return all that is known of one key."""
        return list(self.slots_of(key).values())

    def slots_of(self, key: str) -> dict[str, NewsItem]:
        """Return all that is known of one key, each under a name that its successor has too."""
        seat = self._seats.get(key, _Seat())
        slots: dict[str, NewsItem] = {
            "/".join((key, *by)): seat.removals[by].record for by in sorted(seat.removals)
        }
        if seat.presence is not None:
            for (issuer, manages), admission in sorted(seat.admissions.items()):
                record = MemberRecord(credential=admission.text, presence=seat.presence[1])
                slots[f"{key}/{issuer}/{'manager' if manages else 'plain'}"] = record
        return slots

    def signed_by(self, manager: str) -> tuple[list[Member], list[Revocation]]:
        """Return the members and the removals that hold by the word of one manager."""
        members, removals = [], []
        for key in sorted(self._signed_by.get(manager, set()) & self._seats.keys()):
            member = self._members.get(key)
            if member is not None and member.membership.issuer == manager:
                members.append(member)
            removals += [
                removal.revocation
                for removal in self._in_force(self._seats[key])
                if removal.chain is not None and removal.chain.member == manager
            ]
        return members, removals

    def latest_of(self, key: str) -> datetime:
        """Return when the newest membership or revocation of a key was issued: a later one wins."""
        seat = self._seats.get(key, _Seat())
        issued = [each.membership.issued_at for each in seat.admissions.values()]
        return max(
            [*issued, *(r.revocation.revoked_at for r in seat.removals.values())], default=_NEVER
        )

    def _take(self, item: NewsItem, now: datetime) -> bool:
        if isinstance(item, RevocationRecord):
            removal = read_revocation(item, self.community, now)
            key = removal.revocation.member
            seat, endings = self._seat(key), self._endings(key)
            chain = removal.chain
            by = (removal.revocation.issuer, chain.member if chain is not None else "")
            known = seat.removals.get(by)
            if known is None or _removal_rank(removal) > _removal_rank(known):
                seat.removals[by] = removal
        else:
            admission = read_credential(item.credential, self.community, now)
            key = admission.membership.member
            presence = verify(item.presence, Presence, key, now)
            seat, endings = self._seat(key), self._endings(key)
            slot = (admission.membership.issuer, Role.MANAGER in admission.membership.roles)
            held = seat.admissions.get(slot)
            if held is None or _admission_rank(admission) > _admission_rank(held):
                seat.admissions[slot] = admission
            chain = admission.chain
            heard = (presence.issued_at, item.presence, presence)
            said = seat.presence
            # One of the future is this site's own, from when its clock was ahead.
            if said is None or heard[:2] > said[:2] or said[0] - LEEWAY > now:
                seat.presence = heard
        if chain is not None:
            self._signed_by.setdefault(chain.member, set()).add(key)
        changed = self._settle(key)
        if changed and self._endings(key) != endings:
            for other in self._signed_by.get(key, ()):
                if other in self._seats:
                    self._settle(other)
        return changed

    def _seat(self, key: str) -> _Seat:
        seat = self._seats.get(key)
        if seat is None:
            if len(self._seats) >= MAX_SEATS:
                for bare in [k for k, s in self._seats.items() if not s.admissions | s.removals]:
                    self._drop(bare)
            if len(self._seats) >= MAX_SEATS:
                name = split_community(self.community)[0]
                raise Conflict(f"{name} has {MAX_SEATS} members, past ones included: it is full.")
            seat = self._seats[key] = _Seat()
            self._buckets[_bucket(key)].add(key)
        return seat

    def _settle(self, key: str) -> bool:
        """Bring what follows from a seat into agreement with it; return whether it differs."""
        seat = self._seats[key]
        for slot in [slot for slot, each in seat.admissions.items() if self._dead(each.chain)]:
            del seat.admissions[slot]
        for by in [by for by, each in seat.removals.items() if self._dead(each.chain)]:
            del seat.removals[by]
        seat.items = tuple(self.items_of(key))
        before, seat.hash = seat.hash, _hash(seat.items)
        bucket = _bucket(key)
        self._hashes[bucket] = (self._hashes[bucket] + seat.hash - before) % 2**64
        self._digest = ""
        self._rename(key, self._judged(seat))
        if seat.presence is None and not seat.admissions and not seat.removals:
            self._drop(key)
        return seat.hash != before

    def _judged(self, seat: _Seat) -> Member | None:
        """Return the member that a seat's documents make, if they do."""
        removals = list(self._in_force(seat))
        by_founder = [each for each in seat.admissions.values() if each.chain is None]
        floor = max(by_founder, key=_admission_rank, default=None)
        holding = [
            each
            for each in seat.admissions.values()
            if (each is floor or each.chain is not None)
            and self._counts(each.membership.issued_at, each.chain)
            and not any(voids(removal.revocation, each.membership) for removal in removals)
        ]
        if not holding or seat.presence is None:
            return None
        best = max(holding, key=lambda each: (each.membership.issued_at, each.text))
        if floor in holding and floor is not None and Role.MANAGER in floor.membership.roles:
            best = floor
        _, document, presence = seat.presence
        record = MemberRecord(credential=best.text, presence=document)
        return Member(membership=best.membership, presence=presence, record=record)

    def _rename(self, key: str, member: Member | None) -> None:
        known = self._members.pop(key, None)
        if known is not None:
            self._names[known.site_name].discard(key)
            if not self._names[known.site_name]:
                del self._names[known.site_name]
        if member is not None:
            self._members[key] = member
            self._names.setdefault(member.site_name, set()).add(key)

    def _claimants(self, name: str) -> list[str]:
        members = (self._members[key] for key in self._names.get(name, ()))
        return [m.key for m in sorted(members, key=lambda m: (m.membership.admitted_at, m.key))]

    def _in_force(self, seat: _Seat) -> Iterator[Removal]:
        for removal in seat.removals.values():
            leaves = removal.revocation.issuer == removal.revocation.member
            if leaves or self._counts(removal.revocation.revoked_at, removal.chain):
                yield removal

    def _dead(self, chain: Membership | None) -> bool:
        """Whether the founder has ended, for good, what a manager signed by this membership."""
        return chain is not None and chain.issued_at <= self._endings(chain.member)[0]

    def _counts(self, issued_at: datetime, chain: Membership | None) -> bool:
        """Whether what a manager says it issued then was issued before it left, if it did."""
        if chain is None:
            return True
        return not chain.issued_at <= self._endings(chain.member)[1] < issued_at

    def _endings(self, key: str) -> tuple[datetime, datetime]:
        """Return when the founder last ended a key's being a manager, and when it left itself."""
        seat = self._seats.get(key)
        if seat is None:
            return _NEVER, _NEVER
        made_plain = seat.admissions.get((self.founder, False))
        removed = seat.removals.get((self.founder, ""))
        left = [each.revocation for (by, _), each in seat.removals.items() if by == key]
        return (
            max(
                removed.revocation.revoked_at if removed else _NEVER,
                made_plain.membership.issued_at if made_plain else _NEVER,
            ),
            max((each.revoked_at for each in left), default=_NEVER),
        )

    def _drop(self, key: str) -> None:
        del self._seats[key]
        self._buckets[_bucket(key)].discard(key)


def _admission_rank(each: Admission) -> tuple[datetime, datetime, str]:
    # By the signer's own membership first: what is dead then never hides what is not.
    chain = each.chain.issued_at if each.chain is not None else _NEVER
    return chain, each.membership.issued_at, each.text


def _removal_rank(each: Removal) -> tuple[datetime, datetime, str]:
    chain = each.chain.issued_at if each.chain is not None else _NEVER
    return chain, each.revocation.revoked_at, each.record.revocation + each.record.proof


def _bucket(key: str) -> int:
    return hashlib.sha256(bytes.fromhex(key)).digest()[0] * BUCKETS // 256


def _hash(items: Iterable[NewsItem]) -> int:
    """Return 64 bits of the hash of what can be told; 0 for nothing."""
    texts = "\n".join(item.model_dump_json() for item in items)
    return int.from_bytes(hashlib.blake2b(texts.encode(), digest_size=8).digest()) if texts else 0


def _on(revocation: Revocation) -> str:
    return f" on {revocation.revoked_at:%Y-%m-%d}"
