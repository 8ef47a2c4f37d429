"""How much is handled for one peer, so that a flood costs who makes it and nobody else."""

from __future__ import annotations

from gridcloud.errors import Unavailable
from gridcloud.grid.messages import Kind
from gridcloud.grid.rates import Buckets, TokenBucket

#: Requests a second, and at once, of one member.
MEMBER_RATE, MEMBER_BURST = 50.0, 200.0
#: Of all strangers together, and of one of them.
STRANGERS_RATE, STRANGERS_BURST = 20.0, 60.0
STRANGER_RATE, STRANGER_BURST = 2.0, 20.0
#: What reading it all may cost a second, and at once: of a member, a stranger, all strangers.
MEMBER_BYTES = (256 * 1024.0, 4096 * 1024.0)
STRANGER_BYTES = (64 * 1024.0, 512 * 1024.0)
STRANGERS_BYTES = (256 * 1024.0, 2048 * 1024.0)
#: Of one member, for the kinds that cost most.
COSTLY = {
    Kind.LEASE: (10.0, 100.0),
    Kind.SYNC: (10.0, 100.0),
    Kind.JOIN: (1.0, 20.0),
    Kind.PROBE_FOR: (5.0, 50.0),
    Kind.VOUCH: (10.0, 50.0),
    Kind.RECEIPT: (5.0, 100.0),
}


class Limits:
    """Counts what peers ask, by the clock that the caller brings (seconds that only grow)."""

    def __init__(self) -> None:
        self._members = Buckets(MEMBER_RATE, MEMBER_BURST)
        self._strangers = Buckets(STRANGER_RATE, STRANGER_BURST)
        self._all_strangers = TokenBucket(STRANGERS_RATE, STRANGERS_BURST, 0.0)
        self._member_bytes = Buckets(*MEMBER_BYTES)
        self._stranger_bytes = Buckets(*STRANGER_BYTES)
        self._all_strangers_bytes = TokenBucket(*STRANGERS_BYTES, 0.0)
        self._costly = {kind: Buckets(*limit) for kind, limit in COSTLY.items()}

    def enter(self, key: str, now: float, *, member: bool, cost: float = 0.0) -> None:
        """Count a request that is not read yet, and its `reading_cost` in bytes.

        Raises `Unavailable` if it is one too many.
        """
        if member:
            allowed = self._members.of(key, now).try_take(1, now)
            allowed = allowed and self._member_bytes.of(key, now).try_take(cost, now)
        else:
            # Its own bounds first: one loud stranger does not use up what is for all of them.
            allowed = self._strangers.of(key, now).try_take(1, now)
            allowed = allowed and self._stranger_bytes.of(key, now).try_take(cost, now)
            allowed = allowed and self._all_strangers.try_take(1, now)
            allowed = allowed and self._all_strangers_bytes.try_take(cost, now)
        if not allowed:
            raise _too_often()

    def allow(self, key: str, kind: Kind, now: float) -> None:
        """Count a request by its kind; raises `Unavailable` if it is one too many."""
        buckets = self._costly.get(kind)
        if buckets is not None and not buckets.of(key, now).try_take(1, now):
            raise _too_often()


def _too_often() -> Unavailable:
    return Unavailable("This site asks the other too often.", hint="Try again in a few seconds.")
