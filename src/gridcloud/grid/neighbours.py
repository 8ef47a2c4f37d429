"""What this site tells its transport of the members: who is known, who helps, who may be helped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gridcloud.grid.gossip import Gossip
from gridcloud.grid.membership import Directory, Member
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.swim import PeerState
from gridcloud.grid.transport import PeerAddress

#: So many members are named as helpers, and as anchors.
_HELPERS, _ANCHORS = 8, 4


class Neighbours:
    """Answers a transport's questions by what gossip knows now.

    ``helpers_of`` tells of a site that is no member yet through whom it is to be reached.
    """

    def __init__(
        self,
        gossip: Gossip,
        directory: Directory,
        helpers_of: Callable[[str], Sequence[PeerAddress]],
    ) -> None:
        self._gossip = gossip
        self._directory = directory
        self._helpers_of = helpers_of

    def told(self, relay_bytes_per_second: int) -> Neighbourhood:
        """Return what the transport is to be told."""
        return Neighbourhood(
            knows=self._gossip.knows,
            relays_for=self.helpers,
            may_introduce=self.may_introduce,
            may_relay=self.may_relay,
            anchors=self.anchors,
            slowness=lambda: self._gossip.swim.slowness,
            relay_bytes_per_second=relay_bytes_per_second,
        )

    def helpers(self, target: str) -> Sequence[PeerAddress]:
        """Return through whom a peer may be reached: those who relay first, then any who live."""
        named = tuple(self._helpers_of(target))
        shared = self._gossip.exchanges.shared(target)
        return (*named, *self._best([c.roster.members for c in shared], _HELPERS, target))

    def anchors(self) -> Sequence[PeerAddress]:
        """Return the members to hold a link to, so that this site is found through them."""
        circles = self._gossip.exchanges.circles.values()
        return self._best([c.roster.members for c in circles], _ANCHORS, "")

    def may_introduce(self, source: str, target: str) -> bool:
        """Whether two peers share a community with each other and this site."""
        return any(
            target in circle.roster.members for circle in self._gossip.exchanges.shared(source)
        )

    def may_relay(self, source: str, target: str) -> bool:
        """Whether this site passes on what two such peers cannot send one another."""
        return self._directory.relays and self.may_introduce(source, target)

    def _best(
        self, rosters: Sequence[Mapping[str, Member]], most: int, besides: str
    ) -> list[PeerAddress]:
        found = {key: member for members in rosters for key, member in members.items()}
        for key in (besides, self._directory.identity.key):
            found.pop(key, None)
        ranked = sorted(found, key=lambda key: (self._rank(key, found[key]), key))
        return [found[key].address for key in ranked[:most]]

    def _rank(self, key: str, member: Member) -> tuple[bool, bool]:
        seen = self._gossip.swim.seen(key)
        there = seen.state is PeerState.ALIVE and seen.direct
        return not (there and member.presence.relays), not there
