"""What is lent to whom, on what terms and until when: the owner's rules, applied. Pure.

The first rule that is for the asker decides alone. Refusals say who refused, why, and what to do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from gridcloud.errors import Forbidden, InvalidSpec, NoCapacity
from gridcloud.model.lease import Lease, LoanTerms
from gridcloud.model.need import Need, Resources
from gridcloud.model.quantities import format_bytes, format_duration
from gridcloud.orchestration.consumption import cpu_seconds
from gridcloud.orchestration.lender import (
    NO_BOUND,
    NOTHING,
    PLAIN_ROLES,
    Asker,
    Lender,
    asker_of,
    covers_community,
    total,
)
from gridcloud.settings import LendingRule, Quota

#: On top of the time a job may run, for copying its files in and out.
STAGING_TIME = timedelta(minutes=10)
#: A loan that would be shorter, for want of hours or quota, is refused.
SHORTEST_LOAN = timedelta(minutes=1)
#: Combinations of loans that are looked at before the largest loans are taken instead.
_COMBINATIONS = 2000


class Full(NoCapacity):
    """What the asker's rule allows is there, but others have it now."""


@dataclass(frozen=True)
class Granted:
    """The terms on which a need is lent, and until when."""

    terms: LoanTerms
    ends_at: datetime


@dataclass(frozen=True)
class Standing:
    """What a community is offered now; see `gridcloud.grid.papers.Offered`."""

    capacity: Resources
    free: Resources
    max_time: timedelta
    terms: LoanTerms
    opens_at: datetime | None = None


def decide(lender: Lender, asker: Asker, need: Need, now: datetime) -> Granted:
    """Return on what terms a need is lent, and until when.

    Raises `Forbidden` for who gets nothing, `InvalidSpec` for a need that is never lent, `Full` if
    others have now what the asker may have, and `NoCapacity` for another passing reason.
    """
    rule = lender.rule_for(asker)
    if rule is None:
        raise Forbidden(
            f"{lender.name} lends nothing to {asker.person} in {_short(asker.community)}: "
            "no rule of its owner is for them.",
            hint="Ask its owner, or borrow elsewhere.",
        )
    who = f"{lender.name} lends {asker.person}"
    longest = lender.longest(rule)
    largest = lender.bound(rule).within(_person_bound(rule))
    if lacking := largest.lacking(need.resources):
        raise InvalidSpec(f"{lender.name} lends less: {', '.join(lacking)}.", hint="Ask for less.")
    if need.time and need.time > longest:
        raise InvalidSpec(
            f"{lender.name} lends for {format_duration(longest)} at most.", hint="Ask for less."
        )
    opening = lender.window(rule, now)
    if not opening.open:
        raise NoCapacity(
            f"{who} nothing at this hour, but {_listed(rule)}.",
            hint=f"It does again from {_clock(opening.changes_at, lender)} on.",
        )
    _check_quotas(lender, rule, asker, need)
    end, because = _end(lender, rule, asker, need, now)
    if end - now < (need.time or min(SHORTEST_LOAN, longest)):
        raise NoCapacity(
            f"{who} something until {_clock(end, lender)} only: {because}.",
            hint="Ask for less time, or later.",
        )
    for free in (lender.left(rule), lender.free):
        if lacking := free.lacking(need.resources):
            raise Full(f"{lender.name} {', '.join(lacking)} at the moment.")
    return Granted(lender.terms(rule, asker.roles), end)


def renewed_until(lender: Lender, lease: Lease, until: datetime, now: datetime) -> datetime:
    """Return the end of a live loan whose borrower wants it to last until ``until``: no earlier,
    and no earlier than it is. The longest time counts from the loan's start.

    Raises `Forbidden` or `NoCapacity` with the reason why it is not lengthened.
    """
    assert lease.ends_at
    if until <= lease.ends_at:
        return lease.ends_at
    asker = asker_of(lease)
    rule = lender.rule_for(asker)
    no_longer = f"{lender.name} does not lengthen this loan"
    if rule is None or not lender.lending.enabled:
        raise Forbidden(f"{no_longer}: it lends nothing to {asker.person} any more.")
    last = lease.created_at + lender.longest(rule)
    if until > last:
        raise Forbidden(
            f"{no_longer} beyond {_clock(last, lender)}: it lends for "
            f"{format_duration(lender.longest(rule))} at most.",
            hint="Save what you have by then, and ask for a new lease.",
        )
    opening = lender.window(rule, now)
    if not opening.open or (opening.changes_at and until > opening.changes_at):
        raise NoCapacity(f"{no_longer} so far: it lends {_listed(rule)}.")
    if lender.promised != NOTHING and lease.recallable:
        raise NoCapacity(f"{no_longer}: its own users wait for what it takes.")
    if over := [*_more("all loans", lender.lent, lender.limit), *_over(lender, rule, asker)]:
        raise NoCapacity(f"{no_longer}: {over[0]}.")
    more = cpu_seconds(lease.need, until - lease.ends_at)
    for quota, seconds, whose in _budgets(lender, rule, asker, now):
        if more > seconds:
            raise NoCapacity(f"{no_longer} so far: {_budget_spent(quota, whose)}.")
    return until


def offered(lender: Lender, community: str, now: datetime) -> Standing | None:
    """Return what the best-placed plain member of a community could get now, None for nothing.

    If only some roles or people get anything, it is what the first of them could get. Outside a
    rule's hours nothing of it is free.
    """
    plain = Asker(community, "", "", PLAIN_ROLES)
    rule = lender.rule_for(plain)
    if rule is None:
        if not lender.lends_in(community):
            return None
        rule = next((each for each in lender.rules if covers_community(each, community)), None)
    if rule is None:
        return None
    capacity = lender.bound(rule).within(_person_bound(rule))
    if not capacity.cpus or not capacity.memory_bytes:
        return None
    opening = lender.window(rule, now)
    free, longest = capacity.within(lender.free).within(lender.left(rule)), lender.longest(rule)
    if not opening.open:
        free = NOTHING
    elif opening.changes_at:
        longest = max(min(longest, opening.changes_at - now), timedelta(seconds=1))
    opens_at = None if opening.open else opening.changes_at
    return Standing(capacity, free, longest, lender.terms(rule, PLAIN_ROLES), opens_at)


def over_quota(lender: Lender) -> tuple[str, ...]:
    """Return, in words, what is lent beyond what the rules allow now. It runs to its end."""
    found = _more("all loans", lender.lent, lender.limit)
    people = {asker_of(lease): (rule, lease) for rule, lease in lender.loans}
    for asker, (rule, lease) in people.items():
        if rule is None:
            found.append(f"{lease.person}: no rule is for them any more, and {lease.need} are lent")
        else:
            found += _over(lender, rule, asker)
    return tuple(dict.fromkeys(found))


def whom_to_recall(
    need: Resources, free: Resources, loans: Iterable[Lease], now: datetime
) -> tuple[Lease, ...]:
    """Return the fewest loans to recall so that ``need`` fits, of several choices the youngest.

    What is recalled already will be free, so it is counted as if it were. Nothing is returned if
    that suffices, or if recalling all that may be recalled would not.
    """
    live = [lease for lease in loans if lease.live and not lease.expired(now)]
    coming = total(lease for lease in live if lease.recall is not None)
    short = need.minus(free + coming)
    if short == NOTHING:
        return ()
    candidates = sorted(
        (lease for lease in live if lease.recallable), key=lambda each: (each.created_at, each.id)
    )[::-1]
    if short.minus(total(candidates)) != NOTHING:
        return ()
    return _fewest(short, candidates)


def _fewest(short: Resources, candidates: Sequence[Lease]) -> tuple[Lease, ...]:
    """Return the fewest of these, youngest first, that together give what is short."""
    # In plain numbers, since a site does nothing else meanwhile.
    sizes = [_amounts(lease.need.resources) for lease in candidates]
    wanted, looked_at = _amounts(short), 0
    for count in range(1, len(candidates) + 1):
        largest = [sum(sorted(amounts)[-count:]) for amounts in zip(*sizes, strict=True)]
        if any(most < want for most, want in zip(largest, wanted, strict=True)):
            continue  # not even the largest of each kind suffice
        for chosen in itertools.combinations(range(len(candidates)), count):
            given = map(sum, zip(*(sizes[at] for at in chosen), strict=True))
            if all(have >= want for have, want in zip(given, wanted, strict=True)):
                return tuple(candidates[at] for at in chosen)
            looked_at += 1
            if looked_at > _COMBINATIONS:
                return _largest(short, candidates)
    raise AssertionError("all of them together are enough")


def _amounts(resources: Resources) -> tuple[int, ...]:
    return resources.cpus, resources.memory_bytes, resources.gpus


def _largest(short: Resources, candidates: Sequence[Lease]) -> tuple[Lease, ...]:
    """Return enough of these: again and again the one that leaves least short."""
    left = {at: _amounts(lease.need.resources) for at, lease in enumerate(candidates)}
    wanted, chosen = _amounts(short), []
    while any(wanted):
        best = min(left, key=lambda at: _part_left(wanted, left[at]))
        given = left.pop(best)
        chosen.append(candidates[best])
        wanted = tuple(max(0, want - have) for want, have in zip(wanted, given, strict=True))
    return tuple(chosen)


def _part_left(wanted: tuple[int, ...], given: tuple[int, ...]) -> float:
    """Return what part is left of what is wanted, by the kind of resource of which it is most."""
    pairs = zip(wanted, given, strict=True)
    return max(max(0, want - have) / max(1, want) for want, have in pairs)


def _person_bound(rule: LendingRule) -> Resources:
    """Return what one person may have at a time, by the quotas."""
    quotas = (quota.cpus for quota in (rule.per_person, rule.per_site) if quota and quota.cpus)
    return Resources(
        cpus=min(quotas, default=NO_BOUND.cpus),
        memory_bytes=NO_BOUND.memory_bytes,
        gpus=NO_BOUND.gpus,
    )


def _scopes(
    lender: Lender, rule: LendingRule, asker: Asker
) -> list[tuple[Quota, list[Lease], str | None, str]]:
    """Return the quotas an asker is under: live loans, whose use counts, and whose in words."""
    site = [lease for lease in lender.under(rule) if lease.peer == asker.borrower]
    person = [lease for lease in site if lease.person == asker.person]
    found: list[tuple[Quota, list[Lease], str | None, str]] = []
    if rule.per_person:
        found.append((rule.per_person, person, asker.person, asker.person))
    if rule.per_site:
        name = asker.person.rpartition("@")[2]
        found.append((rule.per_site, site, None, f"the site {name}"))
    return found


def _check_quotas(lender: Lender, rule: LendingRule, asker: Asker, need: Need) -> None:
    for quota, loans, _, whose in _scopes(lender, rule, asker):
        used = total(loans).cpus
        if quota.cpus is not None and used + need.cpus > quota.cpus:
            raise NoCapacity(
                f"{lender.name} lends {whose} {quota.cpus} CPUs at a time, and {used} are lent.",
                hint="Wait until some of it is given back.",
            )


def _budgets(
    lender: Lender, rule: LendingRule, asker: Asker, now: datetime
) -> list[tuple[Quota, float, str]]:
    """Return the CPU-seconds left of each quota of hours; live loans count to their ends."""
    found = []
    for quota, loans, person, whose in _scopes(lender, rule, asker):
        if quota.cpu_hours is None:
            continue
        since = now - quota.period
        community = asker.community if rule.community else None
        used = lender.ledger.used(asker.borrower, since, community=community, person=person)
        for lease in loans:
            assert lease.ends_at
            used += cpu_seconds(lease.need, lease.ends_at - max(lease.created_at, since))
        found.append((quota, quota.cpu_hours * 3600 - used, whose))
    return found


def _end(
    lender: Lender, rule: LendingRule, asker: Asker, need: Need, now: datetime
) -> tuple[datetime, str]:
    """Return when a loan granted now would end, and what bounds it."""
    longest = lender.longest(rule)
    wanted = min(need.time + STAGING_TIME, longest) if need.time else longest
    ends = [(now + wanted, f"it lends for {format_duration(longest)} at most")]
    if changes_at := lender.window(rule, now).changes_at:
        ends.append((changes_at, f"it lends {_listed(rule)}"))
    for quota, seconds, whose in _budgets(lender, rule, asker, now):
        # The largest quota is more than a year, which is more than a time can be added to.
        left = timedelta(seconds=min(max(0.0, seconds) / need.cpus, 4e8))
        ends.append((now + left, _budget_spent(quota, whose)))
    return min(ends)


def _budget_spent(quota: Quota, whose: str) -> str:
    period = format_duration(quota.period)
    return f"{whose} may have {quota.cpu_hours:g} CPU-hours in {period}, and most of it is used"


def _over(lender: Lender, rule: LendingRule, asker: Asker) -> list[str]:
    """Return in words where a rule, or one of its quotas for an asker, is exceeded."""
    number = next(at for at, each in enumerate(lender.rules, start=1) if each is rule)
    found = _more(f"rule {number}", total(lender.under(rule)), lender.bound(rule))
    for quota, loans, _, whose in _scopes(lender, rule, asker):
        if quota.cpus is not None:
            used = Resources(cpus=total(loans).cpus)
            found += _more(whose, used, Resources(cpus=quota.cpus))
    return found


def _more(what: str, used: Resources, limit: Resources) -> list[str]:
    """Return a line for what is lent beyond a limit."""
    pairs = [
        (f"{used.cpus} of {limit.cpus} CPUs", used.cpus > limit.cpus),
        (
            f"{format_bytes(used.memory_bytes)} of {format_bytes(limit.memory_bytes)}",
            used.memory_bytes > limit.memory_bytes,
        ),
        (f"{used.gpus} of {limit.gpus} GPUs", used.gpus > limit.gpus),
    ]
    over = [text for text, exceeded in pairs if exceeded]
    return [f"{what}: {', '.join(over)} are lent"] if over else []


def _listed(rule: LendingRule) -> str:
    return "at " + " and ".join(str(hours) for hours in rule.hours)


def _short(community: str) -> str:
    return community.partition(".")[0]


def _clock(moment: datetime | None, lender: Lender) -> str:
    assert moment
    return f"{moment.astimezone(lender.zone):%a %H:%M %Z}"
