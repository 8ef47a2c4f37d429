"""What people are shown of a peer's being there."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol, runtime_checkable

from gridcloud.grid.roster import Member
from gridcloud.grid.swim import PeerState, Seen
from gridcloud.grid.transport import Path, Transport
from gridcloud.model.frozen import Frozen


class PeerSeen(Frozen):
    """What this site knows of a peer's being there.

    ``latency_seconds`` is a moving average of what a probe takes, ``problem`` why the last try
    failed, ``through_others`` whether it is heard of only by its word that others brought,
    ``path`` how it is reached if the transport tells, ``version`` which gridcloud it says it runs.
    """

    state: PeerState
    latency_seconds: float | None
    heard_at: datetime | None
    problem: str
    through_others: bool
    path: Path | None = None
    version: str = ""


@runtime_checkable
class Paths(Protocol):
    """What a transport may tell besides."""

    def path(self, key: str) -> Path | None:
        """Return how a peer is reached now; None if it is not."""
        ...


def told(
    key: str,
    seen: Seen,
    records: Sequence[Member],
    heard_at: datetime | None,
    problem: str,
    transport: Transport,
) -> PeerSeen:
    """Return what is known of a peer, of which there are records in some communities."""
    latest = max(records, key=lambda each: each.presence.issued_at, default=None)
    return PeerSeen(
        state=seen.state,
        latency_seconds=seen.latency,
        heard_at=heard_at,
        problem=problem,
        through_others=not seen.direct,
        path=transport.path(key) if isinstance(transport, Paths) else None,
        version=latest.presence.version if latest else "",
    )
