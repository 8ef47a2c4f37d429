"""What to remove of the things of leases that live: second machines, and what outlasted its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from gridcloud.model.things import KEPT, MACHINE, NETWORK, SHARED, Thing

#: A machine that a list lacks may only be shown late.
_GONE_AFTER_SECONDS = 60.0


class Tidying:
    """Compares what a cloud lists, time after time. Pure; instants are seconds of one clock."""

    def __init__(self) -> None:
        self._without_machine: dict[str, float] = {}

    def judge(
        self, things: Iterable[Thing], launching: Collection[str], now: float
    ) -> tuple[list[str], list[str]]:
        """Return the leases that have more than one machine, and those whose machine is gone (as
        when somebody deleted it by hand) though they have other things. What is just being
        launched is left alone."""
        all_of = Counter(thing.tags.lease for thing in things)
        machines = Counter(thing.tags.lease for thing in things if thing.kind == MACHINE)
        settled = set(all_of) - {KEPT, SHARED, NETWORK} - set(launching)
        self._without_machine = {
            lease: self._without_machine.get(lease, now)
            for lease in sorted(settled)
            if not machines[lease]
        }
        doubled = sorted(lease for lease in settled if machines[lease] > 1)
        since = self._without_machine.items()
        return doubled, [lease for lease, at in since if now - at >= _GONE_AFTER_SECONDS]
