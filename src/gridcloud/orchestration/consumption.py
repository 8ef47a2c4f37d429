"""What each person of each site used of this site's capacity, for quotas.

Figures are of what was leased, in CPU-seconds, and count when a loan ends. They are kept by the
hour, so that a loan may count up to an hour too long; that keeps a look-up cheap however many
loans there were.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from gridcloud.model.lease import Lease
from gridcloud.model.need import Need

_HOUR = 3600.0
#: After this long nothing is asked about any more: the longest period of a quota.
_FORGOTTEN_AFTER = timedelta(days=366)
#: People a site may have entries of; it vouches for names as it likes, so further ones share one.
_PEOPLE_OF_A_SITE = 4096


def cpu_seconds(need: Need, time: timedelta) -> float:
    """Return the CPU-seconds that a need takes up in some time."""
    return need.cpus * time.total_seconds()


class Ledger:
    """What ended loans used, by site and person. In memory; read anew from the store at a start."""

    def __init__(self, ended: Iterable[Lease] = ()) -> None:
        self._hours: dict[str, dict[tuple[str, str], dict[int, float]]] = {}
        for lease in ended:
            self.add(lease)

    def add(self, lease: Lease) -> None:
        """Count a loan that has ended; others and unfinished ones are passed over."""
        if lease.ended_at is None or lease.peer is None:
            return
        used = cpu_seconds(lease.need, lease.ended_at - lease.created_at)
        people = self._hours.setdefault(lease.peer, {})
        who = (lease.community or "", lease.person or "")
        if who not in people and len(people) >= _PEOPLE_OF_A_SITE:
            who = (lease.community or "", "")
        hours = people.setdefault(who, defaultdict(float))
        hour = _hour(lease.ended_at)
        if hour not in hours and hours:
            oldest = hour - _FORGOTTEN_AFTER / timedelta(hours=1)
            for old in [each for each in hours if each < oldest]:
                del hours[old]
        hours[hour] += used

    def used(
        self, site: str, since: datetime, *, community: str | None = None, person: str | None = None
    ) -> float:
        """Return the CPU-seconds a site used since then; of one community, of one person."""
        first = _hour(since)
        return sum(
            amount
            for (where, who), hours in self._hours.get(site, {}).items()
            if community in (None, where) and person in (None, who)
            for hour, amount in hours.items()
            if hour >= first
        )


def _hour(moment: datetime) -> int:
    return int(moment.astimezone(UTC).timestamp() // _HOUR)
