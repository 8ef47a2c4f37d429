"""What peers offer, as they last said: a cache filled by asking, looked up without.

Offers are soft state: good for choosing whom to ask. Only the owner's grant counts.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from gridcloud.errors import Forbidden, GridcloudError, TimedOut, Unavailable
from gridcloud.grid.calling import Caller
from gridcloud.grid.documents import Clock, verify
from gridcloud.grid.membership import Directory, Member
from gridcloud.grid.messages import Asking, DigestBody, Kind
from gridcloud.grid.papers import OfferDigest, Role
from gridcloud.grid.transport import PeerAddress
from gridcloud.model.frozen import Frozen

#: How many peers are asked at once.
FAN_OUT = 16


class PeerOffer(Frozen):
    """A peer's offer to one community, or why there is none.

    ``digest`` is what it last said that has not expired. ``problem`` is why it could not be had
    at the last try (``unreachable: …`` for a peer that does not answer), empty if it could.
    ``seen_at`` is when it was last asked.
    """

    community: str
    site_name: str
    address: PeerAddress
    digest: OfferDigest | None
    problem: str
    seen_at: datetime


class OfferCache:
    """The digests of all peers of all communities."""

    def __init__(self, directory: Directory, caller: Caller, clock: Clock) -> None:
        self._directory = directory
        self._caller = caller
        self._clock = clock
        self._offers: dict[tuple[str, str], PeerOffer] = {}
        self._refreshing: dict[str, asyncio.Lock] = {}

    async def refresh(self, community: str, timeout: float, max_age: timedelta) -> None:
        """Ask every lending member that was not asked within ``max_age`` for its digest.

        Waits at most about ``timeout`` seconds for each `FAN_OUT` members. A member that fails is
        noted with its reason and raises nothing. Raises `NotFound` for a foreign community.
        """
        # A second caller waits, and then finds what the first one learned.
        async with self._refreshing.setdefault(community, asyncio.Lock()):
            asking = await self._directory.asking(community)
            members = await self._directory.members(community)
            me = self._directory.identity.key
            lenders = {k: m for k, m in members.items() if k != me and m.has(Role.PROVIDER)}
            for known, key in list(self._offers):
                if known == community and key not in lenders:
                    del self._offers[known, key]
            now = self._clock()
            due = [
                member
                for key, member in lenders.items()
                if (last := self._offers.get((community, key))) is None
                or now - last.seen_at >= max_age
            ]
            slots = asyncio.Semaphore(FAN_OUT)
            async with asyncio.TaskGroup() as group:
                for member in due:
                    group.create_task(self._ask(member, asking, timeout, slots))

    def listed(self, community: str) -> tuple[PeerOffer, ...]:
        """Return what is known now of each lending member; nobody is asked."""
        now = self._clock()
        found = []
        for (known, _), offer in sorted(self._offers.items()):
            if known != community:
                continue
            if offer.digest is not None and offer.digest.expires_at <= now:
                problem = offer.problem or "its offer expired"
                found.append(offer.model_copy(update={"digest": None, "problem": problem}))
            else:
                found.append(offer)
        return tuple(found)

    async def _ask(
        self, member: Member, asking: Asking, timeout: float, slots: asyncio.Semaphore
    ) -> None:
        community = asking.community
        last = self._offers.get((community, member.key))
        digest = last.digest if last is not None else None
        problem = ""
        try:
            async with slots:
                reply = await self._caller.ask(
                    member.address, Kind.OFFERS, asking, DigestBody, timeout
                )
            heard = read_digest(reply.digest, member, community, self._clock())
            if digest is None or heard.version >= digest.version:
                digest = heard
        except (Unavailable, TimedOut) as error:
            problem = f"unreachable: {error.message}"
        except GridcloudError as error:
            digest, problem = None, error.message
        self._offers[community, member.key] = PeerOffer(
            community=community,
            site_name=member.site_name,
            address=member.address,
            digest=digest,
            problem=problem,
            seen_at=self._clock(),
        )


def read_digest(document: str, member: Member, community: str, now: datetime) -> OfferDigest:
    """Return a member's digest, proved to be its own, for this community, and fresh."""
    digest = verify(document, OfferDigest, member.key, now)
    if (digest.community, digest.site_name) != (community, member.site_name):
        raise Forbidden(f"{member.site_name} answered with an offer for something else.")
    return digest
