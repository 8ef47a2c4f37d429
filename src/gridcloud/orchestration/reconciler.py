"""What should not be: compares leases with jobs, clocks and what providers list. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from gridcloud.model.lease import Lease, LeaseRole, LeaseState

#: What is younger may be in the middle of being made: the parts are not looked at in one instant.
_SETTLED_AFTER = timedelta(minutes=1)


@dataclass
class Mending:
    """What to do: leases to give up, each with the reason, and strays to remove at providers."""

    release: list[tuple[Lease, str]] = field(default_factory=list)
    terminate: list[tuple[str, str]] = field(default_factory=list)


def reconcile(
    leases: Iterable[Lease],
    jobs: Mapping[str, str | None],
    made: Mapping[str, Iterable[str]],
    now: datetime,
    *,
    starting: bool,
) -> Mending:
    """Return what must be mended.

    ``leases`` are the live ones; ``jobs`` maps each job that has not ended to the lease it counts
    on (None while it waits in line), ``made`` each provider's name to the lease ids of what it has
    there. ``starting`` says that no request is under way, so an intent without a result was cut off
    by a crash.
    """
    mending = Mending()
    held = {provider: set(tags) for provider, tags in made.items()}
    keep: set[str] = set()
    for lease in leases:
        if reason := _why_release(lease, jobs, held, now, starting=starting):
            mending.release.append((lease, reason))
        keep.add(lease.id)
    for provider, tags in held.items():
        mending.terminate += [(provider, tag) for tag in sorted(tags - keep)]
    return mending


def _why_release(
    lease: Lease,
    jobs: Mapping[str, str | None],
    held: Mapping[str, set[str]],
    now: datetime,
    *,
    starting: bool,
) -> str:
    if lease.state is LeaseState.INTENT and starting:
        return "the site stopped before it was granted"
    if lease.role is LeaseRole.LENT:
        if lease.expired(now):
            return "its end has come"
        there = lease.id in held.get(lease.provider, set())
        settled = starting or now - lease.created_at > _SETTLED_AFTER
        gone = lease.state is LeaseState.ACTIVE and not there and settled
        return "what it gave is gone" if gone else ""
    if lease.job_id is None:
        return ""
    if lease.job_id not in jobs:
        return "its job has ended"
    settled = starting or now - lease.created_at > _SETTLED_AFTER
    return "its job has another" if settled and jobs[lease.job_id] != lease.id else ""
