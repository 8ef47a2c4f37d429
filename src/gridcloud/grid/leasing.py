"""Leases between sites: asked for by one message, granted by the owner alone, signed, verified."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from datetime import datetime
from typing import Protocol
from weakref import WeakValueDictionary

from pydantic import ValidationError

from gridcloud.errors import Conflict, Forbidden, InvalidSpec, NoCapacity
from gridcloud.grid.calling import Caller
from gridcloud.grid.documents import Clock, first_problem, sign, verify
from gridcloud.grid.identity import short
from gridcloud.grid.membership import Directory, Member
from gridcloud.grid.messages import (
    GrantBody,
    Kind,
    LeaseBody,
    Nothing,
    RecallBody,
    ReceiptBody,
    ReceiptReply,
    ReleaseBody,
    RenewBody,
    printable,
)
from gridcloud.grid.papers import LeaseGrant, Offered, Role, split_community
from gridcloud.grid.transport import PeerAddress
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Need


class LeaseRequest(Frozen):
    """What an owner is asked for. Everything but the need and the SSH key is proved.

    ``person`` is ``user@site``: the borrowing site, under its name in the community, vouches for
    the user. ``roles`` are the borrowing site's in the community.
    """

    lease_id: str
    community: str
    lender: str
    borrower: str
    person: str
    roles: tuple[Role, ...] = ()
    need: Need
    ssh_public_key: str


class Tenant(Protocol):
    """What this site is told about what it borrowed; the site hands it in. All is idempotent."""

    async def recalled(self, grant: LeaseGrant, reason: str) -> None:
        """Take note that a lender ends a lease earlier; ``grant`` is its word on it, proved.

        Raises `NotFound` if nothing is borrowed under that lease, `Forbidden` if that is another
        lender's. Less notice than agreed is remarked upon, no more: the owner ends it anyway.
        """
        ...

    async def countersign(self, lender: str, document: str) -> tuple[str, str]:
        """Return this site's countersignature under a receipt, or "" and why it does not agree.

        ``lender`` is the proved key of who shows it. Raises `Forbidden` for a receipt that is
        not that lender's, or of a lease this site never had.
        """
        ...


class Owner(Protocol):
    """Decides over this site's own resources; the site hands it in.

    All methods are idempotent. What they raise of `gridcloud.errors` is told to the peer.
    """

    async def digest(self, community: str) -> Offered | None:
        """Return what is offered to a community now; None if nothing ever is."""
        ...

    async def grant(self, request: LeaseRequest) -> LeaseGrant:
        """Lend, or raise why not (`NoCapacity`, `Forbidden`).

        A ``lease_id`` granted before gets the same grant; one that was released is refused with
        `Conflict`, since a late copy of a request must not bring a lease back to life. For one
        lease, calls of `grant`, `renew` and `release` never overlap.
        """
        ...

    async def renew(self, lease_id: str, borrower: str, until: datetime) -> LeaseGrant:
        """Let a lease end no earlier than ``until``, or raise why not.

        Raises `NotFound` if the borrower has no such lease.
        """
        ...

    async def release(self, lease_id: str, borrower: str) -> None:
        """End a lease. One that is unknown or ended is no error; another's is `Forbidden`."""
        ...


def lease_id(borrower: str, request_id: str) -> str:
    """Return the id of the lease that a borrower's request stands for, the same each time.

    80 bits of SHA-256, in lowercase base32.
    """
    digest = hashlib.sha256(f"{borrower}/{request_id}".encode()).digest()
    return base64.b32encode(digest[:10]).decode().lower()


class Lender:
    """Answers what peers ask of this site's capacity."""

    def __init__(self, directory: Directory, owner: Owner) -> None:
        self._directory = directory
        self._identity = directory.identity
        self._owner = owner
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def grant(self, key: str, body: LeaseBody) -> GrantBody:
        """Check that the asker is a member who may borrow, and have the owner decide."""
        member = await self._borrower(key, body)
        request = LeaseRequest(
            lease_id=lease_id(key, body.request_id),
            community=body.community,
            lender=self._identity.key,
            borrower=key,
            person=f"{body.user}@{member.site_name}",
            roles=member.membership.roles,
            need=body.need,
            ssh_public_key=body.ssh_public_key,
        )
        async with self._lock(request.lease_id):
            grant = await self._owner.grant(request)
        if grant.person != request.person or grant.need != request.need:
            raise Conflict(
                f"This site granted another lease than {request.lease_id}.",
                hint="A request means one lease; ask for another by a new one.",
            )
        return self._signed(grant, request.lease_id, key, body.community)

    async def renew(self, key: str, body: RenewBody) -> GrantBody:
        """Have the owner lengthen a member's own lease."""
        await self._borrower(key, body)
        async with self._lock(body.lease_id):
            grant = await self._owner.renew(body.lease_id, key, body.until)
        return self._signed(grant, body.lease_id, key, body.community)

    async def release(self, key: str, body: ReleaseBody) -> Nothing:
        """End a lease for who has it."""
        async with self._lock(body.lease_id):
            await self._owner.release(body.lease_id, key)
        return Nothing()

    async def recall(
        self, caller: Caller, address: PeerAddress, grant: LeaseGrant, reason: str, timeout: float
    ) -> None:
        """Tell a borrower that its lease ends earlier: ``grant`` is made out anew."""
        asking = await self._directory.asking(grant.community)
        body = RecallBody(
            community=grant.community,
            credential=asking.credential,
            presence=asking.presence,
            grant=sign(self._identity, grant),
            reason=reason,
        )
        await caller.ask(address, Kind.RECALL, body, Nothing, timeout)

    async def _borrower(self, key: str, body: LeaseBody | RenewBody) -> Member:
        member = await self._directory.admit(key, body)
        name = split_community(body.community)[0]
        roster = await self._directory.roster(body.community)
        if roster.shown(key) != member.site_name:  # or it would borrow as the other's people
            raise Forbidden(
                f"Another member was called {member.site_name} before this one.",
                hint="Join again under another name: --as NAME.",
            )
        if not member.has(Role.CONSUMER):
            raise Forbidden(
                f"{member.site_name} may not borrow in {name}: it is no consumer there.",
                hint="Ask for an invitation with that role.",
            )
        if not (await self._directory.myself(body.community)).has(Role.PROVIDER):
            raise NoCapacity(f"This site lends nothing in {name}.")
        return member

    def _signed(self, grant: LeaseGrant, lease: str, borrower: str, community: str) -> GrantBody:
        if (grant.lease_id, grant.borrower, grant.community) != (lease, borrower, community):
            raise Forbidden(f"The lease {lease} is not this borrower's in this community.")
        return GrantBody(grant=sign(self._identity, grant))

    def _lock(self, lease: str) -> asyncio.Lock:
        lock = self._locks.get(lease)
        if lock is None:
            lock = self._locks[lease] = asyncio.Lock()
        return lock


class Borrower:
    """Asks peers for leases, and believes only what is signed, for this site, and asked for."""

    def __init__(self, directory: Directory, caller: Caller, tenant: Tenant, clock: Clock) -> None:
        self._directory = directory
        self._caller = caller
        self._tenant = tenant
        self._clock = clock

    async def request(
        self,
        address: PeerAddress,
        community: str,
        request_id: str,
        *,
        need: Need,
        user: str,
        ssh_public_key: str,
        timeout: float,
    ) -> LeaseGrant:
        """Ask a peer for a lease; repeated with the same ``request_id`` it is the same lease.

        Raises `InvalidSpec` for a user or key that cannot be sent, what the owner answered,
        `Unavailable` or `TimedOut` if it did not (ask again, or release the lease), and
        `Forbidden` if its grant is not for what was asked.
        """
        asking = await self._directory.asking(community)
        mine = await self._directory.myself(community)
        try:
            body = LeaseBody(
                community=community,
                credential=asking.credential,
                presence=asking.presence,
                request_id=request_id,
                need=need,
                user=user,
                ssh_public_key=ssh_public_key,
            )
        except ValidationError as error:
            raise InvalidSpec(f"That lease cannot be asked for: {first_problem(error)}.") from error
        reply = await self._caller.ask(address, Kind.LEASE, body, GrantBody, timeout)
        expected = lease_id(self._directory.identity.key, request_id)
        grant = self._read(reply, address.key, community, expected)
        if (grant.person, grant.need) != (f"{user}@{mine.site_name}", need):
            raise _liar(address.key)
        return grant

    async def renew(
        self, address: PeerAddress, community: str, lease: str, until: datetime, timeout: float
    ) -> LeaseGrant:
        """Ask that a lease end no earlier than ``until``; raises as `request` does."""
        asking = await self._directory.asking(community)
        body = RenewBody(
            community=community,
            credential=asking.credential,
            presence=asking.presence,
            lease_id=lease,
            until=until,
        )
        reply = await self._caller.ask(address, Kind.RENEW, body, GrantBody, timeout)
        grant = self._read(reply, address.key, community, lease)
        if grant.ends_at < until:
            raise _liar(address.key)
        return grant

    async def release(self, address: PeerAddress, lease: str, timeout: float) -> None:
        """Give a lease back. A peer that cannot be told ends it at its end by itself."""
        body = ReleaseBody(lease_id=lease)
        await self._caller.ask(address, Kind.RELEASE, body, Nothing, timeout)

    async def recalled(self, key: str, body: RecallBody) -> Nothing:
        """Hear from a lender that a lease ends earlier."""
        await self._directory.admit(key, body)
        grant = verify(body.grant, LeaseGrant, key, self._clock())
        if (grant.borrower, grant.community) != (self._directory.identity.key, body.community):
            raise _liar(key)
        await self._tenant.recalled(grant, printable(body.reason))
        return Nothing()

    async def countersign(self, key: str, body: ReceiptBody) -> ReceiptReply:
        """Judge the receipt of a loan that has ended."""
        await self._directory.admit(key, body)
        countersignature, dispute = await self._tenant.countersign(key, body.receipt)
        return ReceiptReply(countersignature=countersignature, dispute=dispute)

    def _read(self, reply: GrantBody, lender: str, community: str, lease: str) -> LeaseGrant:
        now = self._clock()
        grant = verify(reply.grant, LeaseGrant, lender, now)
        mine = self._directory.identity.key
        if (grant.borrower, grant.community, grant.lease_id) != (mine, community, lease):
            raise _liar(lender)
        if grant.ends_at <= now:
            raise Forbidden(f"{short(lender)} granted a lease that has ended already.")
        return grant


def _liar(lender: str) -> Forbidden:
    return Forbidden(
        f"{short(lender)} answered with a lease for something else than was asked.",
        hint="Use another site, and tell that one.",
    )
