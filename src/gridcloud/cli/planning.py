"""Shows what a job would cost where a machine has to be made for it, before that is done."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gridcloud.client import Client
    from gridcloud.model.job import JobSpec
    from gridcloud.model.machine import MachineOrder
    from gridcloud.model.offer import Offer, Plan

#: Of so many offers it is told why they are not the place, where one expected that they would be.
_OTHERS_TOLD = 2
#: So many verdicts are asked for; the best and a few of each cloud are among the first.
_ASKED = 60


def agreed(client: Client, spec: JobSpec, *, ask: bool) -> bool:
    """Tell on standard error which machine would be made for a job, if any, and what it costs.

    At a terminal ask whether that is right, elsewhere go on; return whether to go on. Where no
    machine has to be made nothing is told or asked.
    """
    if not any(provider.makes_machines for provider in client.providers()):
        _warn_of_what_does_not_count(spec.machine, None)
        return True
    plan = client.offers(
        spec.need,
        spec.site,
        constraints=spec.constraints,
        strategy=spec.strategy,
        most=_ASKED,
        spot=spec.machine.spot,
    ).plan
    best = plan.winners[0] if plan.winners else None
    if best is None or not best.shape:
        _warn_of_what_does_not_count(spec.machine, best)
        return True
    for line in lines(plan, spec):
        click.echo(line, err=True)
    if not ask or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    return click.confirm("Go on?", default=True, err=True)


def lines(plan: Plan, spec: JobSpec) -> list[str]:
    """Return what tells a plan whose best offer is a machine to be made: which, why, what next."""
    from gridcloud.cli import render
    from gridcloud.cli.launching import told

    best, *others = [verdict for verdict in plan.verdicts if verdict.rank]
    count = f"for each of {len(spec.tasks)} tasks " if len(spec.tasks) > 1 else ""
    found = [f"plan: {count}{told(best.offer, spec.need)}{_in_all(best.offer, spec)}"]
    there = [v for v in plan.verdicts if v.reasons and not v.offer.shape and not v.offer.peer]
    why = [f"{v.offer.place}: {'; '.join(v.reasons)}" for v in there[:_OTHERS_TOLD]]
    fit = f"the best of {plan.fit} that fit" if plan.fit > 1 else "the only one that fits"
    found.append(" why: " + "; ".join([fit, *why]))
    for second in others[:1]:
        shown = told(second.offer, spec.need) if second.offer.shape else second.offer.place
        found.append(f"next: {shown}; {second.behind}")
    return [render.safe(line) for line in found]


def _in_all(offer: Offer, spec: JobSpec) -> str:
    """Return what the job costs if it takes all of its time."""
    from gridcloud.model.quantities import format_duration

    cost = offer.hourly(spec.need.resources)
    if cost is None or spec.need.time is None:
        return ""
    amount = cost * (spec.need.time / timedelta(hours=1))
    return f", {amount:.4g} {offer.currency} for {format_duration(spec.need.time)}"


def _warn_of_what_does_not_count(order: MachineOrder, best: Offer | None) -> None:
    """Say so where what is asked of a machine has no effect, since none is made."""
    from gridcloud.cli import render

    asked = {
        "--image": order.image,
        "--user-data": order.user_data,
        "--playbook": order.playbooks,
        "--volume": order.volumes,
    }
    given = " and ".join(option for option, value in asked.items() if value)
    if not given or (best is not None and best.isolation):
        return
    where = f"{best.place} is there already" if best else "No cloud is among the providers here"
    hint = "; --kind names providers that make one" if best else ""
    word = f"gridcloud: {where}: {given} counts only where a machine is made{hint}"
    click.echo(render.safe(word), err=True)
