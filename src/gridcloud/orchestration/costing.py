"""What own cloud machines cost: hours times the price known when each was asked for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gridcloud.model.accounts import CostReport, CostRow
from gridcloud.model.fleet import times_paid
from gridcloud.model.lease import Lease

_HOUR = timedelta(hours=1)


@dataclass
class _Sum:
    machines: int = 0
    running: int = 0
    hours: float = 0.0
    unpriced_hours: float = 0.0
    cost: float = 0.0


def costs(leases: Iterable[Lease], now: datetime, since: datetime | None = None) -> CostReport:
    """Return what machines made at clouds cost until ``now``, by month, provider and shape.

    Only what they cost after ``since`` is counted. Those that still run are counted as far as they
    got. Money of different currencies is never added up.
    """
    sums: dict[tuple[str, str, str, str], _Sum] = {}
    for lease in leases:
        begun, ended = times_paid(lease, now)
        for month, first, last in _months(max(begun, since) if since else begun, ended):
            key = month, lease.provider, lease.shape, lease.currency
            total = sums.setdefault(key, _Sum())
            hours = (last - first) / _HOUR
            total.machines += 1
            total.running += lease.live and last == now
            total.hours += hours
            if lease.cost is None:
                total.unpriced_hours += hours
            else:
                total.cost += hours * lease.cost
    rows = [
        CostRow(
            month=month,
            provider=provider,
            shape=shape,
            currency=currency,
            machines=total.machines,
            running=total.running,
            hours=total.hours,
            unpriced_hours=total.unpriced_hours,
            cost=total.cost,
        )
        for (month, provider, shape, currency), total in sorted(sums.items())
    ]
    return CostReport(rows=tuple(rows), since=since)


def _months(first: datetime, last: datetime) -> Iterator[tuple[str, datetime, datetime]]:
    """Yield the part of a time that is in each month of UTC; nothing of an empty time."""
    at, end = first.astimezone(UTC), last.astimezone(UTC)
    while at < end:
        following = datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC)
        yield f"{at:%Y-%m}", at, min(following, end)
        at = following
