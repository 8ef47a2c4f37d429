"""Which offer serves a need best, and why each other one lost. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gridcloud.model.job import Job
from gridcloud.model.need import Need
from gridcloud.model.offer import Offer, Plan, Verdict
from gridcloud.model.quantities import format_duration


def plan(need: Need, offers: Iterable[Offer], site: str | None = None) -> Plan:
    """Rank ``offers`` for ``need``.

    First-fit over an order that keeps work at home: the site's own offers before those of peers,
    among equals the one with most CPUs free, then by name so that the answer is stable. ``site``
    admits only the offers of the site so named.
    """
    verdicts = [_judge(need, offer, site) for offer in offers]
    able = sorted((v for v in verdicts if not v.reasons), key=lambda v: _preference(v.offer))
    unable = sorted((v for v in verdicts if v.reasons), key=lambda v: (not v.later, v.offer.place))
    ranked = [v.model_copy(update={"rank": i}) for i, v in enumerate(able, start=1)]
    return Plan(verdicts=(*ranked, *unable))


def _preference(offer: Offer) -> tuple[bool, int, str]:
    return (offer.peer is not None, -offer.free.cpus, offer.place)


def _judge(need: Need, offer: Offer, site: str | None) -> Verdict:
    never = []
    if site is not None and offer.site != site:
        never.append(f"the job is pinned to {site}")
    if offer.known and (lacking := offer.capacity.lacking(need.resources)):
        never += [offer.problem] if offer.problem else lacking
    if need.time and offer.max_time and need.time > offer.max_time:
        longest, wanted = format_duration(offer.max_time), format_duration(need.time)
        never.append(f"lends for {longest} at most, {wanted} are needed")
    if never:
        return Verdict(offer=offer, reasons=tuple(never))
    now = [offer.problem] if offer.problem else []
    if offer.known:
        lacking = offer.free.lacking(need.resources)
        now += [reason.replace("has", "has free now", 1) for reason in lacking]
    return Verdict(offer=offer, reasons=tuple(now), later=bool(now))


def place(
    queued: Sequence[Job], offers: Sequence[Offer]
) -> tuple[list[tuple[Job, Offer]], list[tuple[Job, Plan]]]:
    """Match waiting jobs, oldest first, with offers; return the matches and who has to wait.

    A job that has to wait lays claim to every offer that could serve it later: no younger job is
    placed there before it, so large jobs are not starved by a stream of small ones. Within one
    array the tasks are alike, so that a waiting task blocks nothing that its elders would not.
    """
    remaining = {_key(offer): offer for offer in offers}
    claimed: set[tuple[str | None, str]] = set()
    placed: list[tuple[Job, Offer]] = []
    waiting: list[tuple[Job, Plan]] = []
    for job in queued:
        judged = plan(job.spec.need, remaining.values(), job.spec.site)
        choice = next((o for o in judged.winners if _key(o) not in claimed), None)
        if choice is None:
            waiting.append((job, judged))
            claimed |= {_key(v.offer) for v in judged.verdicts if v.later or v.rank}
            continue
        free = choice.free.minus(job.spec.need.resources)
        remaining[_key(choice)] = choice.model_copy(update={"free": free})
        placed.append((job, choice))
        if not any(o.free.cpus for o in remaining.values()):
            waiting += [
                (rest, plan(rest.spec.need, remaining.values(), rest.spec.site))
                for rest in queued[len(placed) + len(waiting) :]
            ]
            break
    return placed, waiting


def _key(offer: Offer) -> tuple[str | None, str]:
    return (offer.peer, offer.provider)
