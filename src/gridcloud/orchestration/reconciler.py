"""What should not be: compares leases with jobs, clocks and what providers list. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from gridcloud.model.lease import Lease, LeaseRole, LeaseState

#: What is younger may be in the middle of being made: the parts are not looked at in one instant.
_SETTLED_AFTER = timedelta(minutes=1)
#: A cloud may leave out for a moment what it has: only what is absent for so long is gone.
_GONE_AFTER = timedelta(seconds=45)
#: A job on a machine of its own is given so long after its end to be heard of.
_LATE = timedelta(minutes=2)
THE_END = "its end has come"
GONE = "gone: deleted by somebody else"
LOST = "somebody else deleted its machine"


@dataclass
class Mending:
    """What to do: leases to give up, each with the reason, places of jobs that are lost, and strays
    to remove at providers."""

    release: list[tuple[Lease, str]] = field(default_factory=list)
    lost: list[tuple[Lease, str]] = field(default_factory=list)
    terminate: list[tuple[str, str]] = field(default_factory=list)


def reconcile(
    leases: Iterable[Lease],
    jobs: Mapping[str, str | None],
    made: Mapping[str, Iterable[str]],
    now: datetime,
    *,
    starting: bool,
    absent: Mapping[str, datetime] | None = None,
) -> Mending:
    """Return what must be mended.

    ``leases`` are the live ones; ``jobs`` maps each job that has not ended to the lease it counts
    on (None while it waits in line), ``made`` each provider's name to the lease ids of what it has
    there: a provider that could not be asked is left out, and nothing is concluded from that.
    ``starting`` says that no request is under way, so an intent without a result was cut off by a
    crash; but the making of a machine without a job is gone on with. ``absent`` is what `absences`
    returned.
    """
    mending = Mending()
    held = {provider: set(tags) for provider, tags in made.items()}
    keep: set[str] = set()
    for lease in leases:
        gone = _gone(lease, held, absent or {}, now)
        if lease.for_a_machine:
            reason = _why_end(lease, now) or (GONE if gone else "")
        else:
            reason = _why_release(lease, jobs, held, now, starting=starting)
        if reason:
            mending.release.append((lease, reason))
        elif gone:
            mending.lost.append((lease, LOST))
        keep.add(lease.id)
    for provider, tags in held.items():
        mending.terminate += [(provider, tag) for tag in sorted(tags - keep)]
    return mending


def absences(
    before: Mapping[str, datetime],
    leases: Iterable[Lease],
    made: Mapping[str, Iterable[str]],
    now: datetime,
) -> dict[str, datetime]:
    """Return since when each live lease's machine is not listed by its provider, as far as known.

    ``before`` is what this returned at the last look. A provider that could not be asked changes
    nothing for its leases.
    """
    held = {provider: set(tags) for provider, tags in made.items()}
    found = {}
    for lease in leases:
        if not _makes_one(lease) or lease.state is not LeaseState.ACTIVE:
            continue
        if lease.provider not in held:
            if lease.id in before:
                found[lease.id] = before[lease.id]
        elif lease.id not in held[lease.provider]:
            found[lease.id] = before.get(lease.id, now)
    return found


def _makes_one(lease: Lease) -> bool:
    """Whether its place is made for the lease alone, and listed as long as it is there."""
    machine = lease.machine if lease.role is LeaseRole.OWN else None
    return machine is not None and (machine.certified or machine.sandbox)


def _gone(
    lease: Lease, held: Mapping[str, set[str]], absent: Mapping[str, datetime], now: datetime
) -> bool:
    known = lease.provider in held and lease.id not in held[lease.provider]
    return known and lease.id in absent and now - absent[lease.id] >= _GONE_AFTER


def _why_end(lease: Lease, now: datetime) -> str:
    """Return why a machine without a job is to end; a reason it has is not forgotten."""
    return lease.reason or (THE_END if lease.expired(now) else "")


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
            return THE_END
        maker = lease.machine.provider if lease.machine else lease.provider
        there = maker not in held or lease.id in held[maker]
        settled = starting or now - lease.created_at > _SETTLED_AFTER
        gone = lease.state is LeaseState.ACTIVE and not there and settled
        return "what it gave is gone" if gone else ""
    if _makes_one(lease) and lease.expired(now - _LATE):
        return THE_END
    if lease.job_id is None:
        return ""
    if lease.job_id not in jobs:
        return "its job has ended"
    settled = starting or now - lease.created_at > _SETTLED_AFTER
    return "its job has another" if settled and jobs[lease.job_id] != lease.id else ""
