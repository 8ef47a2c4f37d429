"""What this site says that it offers: asked of its owner, signed anew when it changed."""

from __future__ import annotations

from datetime import datetime, timedelta

from gridcloud.grid.documents import Clock, sign
from gridcloud.grid.leasing import Owner
from gridcloud.grid.membership import Directory
from gridcloud.grid.offers import LONGEST_OFFER
from gridcloud.grid.papers import OfferDigest, Offered, Role
from gridcloud.model.need import Resources

#: How long an offer may be believed, at least; longer in large communities.
OFFER_HOLDS_FOR = timedelta(minutes=5)
_LONGEST = LONGEST_OFFER / 2
#: Said by who lends nothing, so that nothing said before is believed any more.
_NOTHING = Offered(capacity=Resources(), free=Resources(), max_time_seconds=1, network=False)


class Announcer:
    """The digests of this site, one for each community where it may lend."""

    def __init__(self, directory: Directory, owner: Owner, clock: Clock) -> None:
        self._directory = directory
        self._owner = owner
        self._clock = clock
        self._last: dict[str, tuple[OfferDigest, str]] = {}
        self._version = 0

    async def current(self, community: str) -> str | None:
        """Return the document of what is offered now; None for a site that may not lend there.

        It is signed anew if the offer changed or half its life is over; its version then grows.
        """
        mine = await self._directory.myself(community)
        if not mine.has(Role.PROVIDER):
            return None
        offered = await self._owner.digest(community) or _NOTHING
        last, now = self._last.get(community), self._clock()
        if last is not None and last[0].site_name == mine.site_name and last[0].offered == offered:
            half = (last[0].expires_at - last[0].issued_at) / 2
            if last[0].issued_at <= now < last[0].issued_at + half:
                return last[1]
        digest = OfferDigest(
            site=mine.key,
            site_name=mine.site_name,
            community=community,
            version=self._next_version(now),
            offered=offered,
            issued_at=now,
            expires_at=now + await self._life(community),
        )
        document = sign(self._directory.identity, digest)
        self._last[community] = digest, document
        return document

    async def _life(self, community: str) -> timedelta:
        """Return how long a digest holds: the more members, the longer, to bound the traffic."""
        members = len(await self._directory.members(community))
        return min(_LONGEST, max(OFFER_HOLDS_FOR, timedelta(seconds=members)))

    def _next_version(self, now: datetime) -> int:
        # Milliseconds keep growing over restarts, which a bare counter would not.
        self._version = max(self._version + 1, int(now.timestamp() * 1000))
        return self._version
