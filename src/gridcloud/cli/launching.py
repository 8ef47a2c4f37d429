"""Shows where machines would be made, and follows them while they are."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import print_json

if TYPE_CHECKING:
    from datetime import datetime

    from gridcloud.client import Client
    from gridcloud.model.fleet import LaunchNews, MachineInfo, MachinePlan
    from gridcloud.model.need import Need
    from gridcloud.model.offer import Offer

#: How long the site may let us wait for news of one machine, and of each of several.
_ONE, _EACH = timedelta(seconds=20), timedelta(seconds=0.3)


def agreed(found: MachinePlan, *, ask: bool, quiet: bool) -> bool:
    """Tell a plan on standard error; at a terminal ask whether it is right, elsewhere go on."""
    from gridcloud.cli import render
    from gridcloud.errors import NoCapacity

    plan = found.plan
    if not plan.winners:
        raise NoCapacity(
            f"No machine can be had now: {plan.explain()}.",
            hint="Try again later, or ask for less.",
        )
    best, *others = [verdict for verdict in plan.verdicts if verdict.rank]
    if quiet:
        return True
    count = f"{found.request.count} × " if found.request.count > 1 else ""
    need = found.request.need
    click.echo(
        f"plan: {count}{told(best.offer, need)}, until {render.clock(found.ends_at)}", err=True
    )
    if found.total is not None:
        click.echo(
            f"      {_money(found.total, found.currency)} in all, if it is kept so long", err=True
        )
    for second in others[:1]:
        why = f"; {render.safe(second.behind)}" if second.behind else ""
        click.echo(f"next: {told(second.offer, need)}{why}", err=True)
    if not ask or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    return click.confirm("Make it?" if not count else "Make them?", default=True, err=True)


def follow(client: Client, names: list[str], *, json_: bool, quiet: bool = False) -> int:
    """Show what happens until all machines are ready or over; return the exit status.

    Ctrl-C leaves them to the site, and says how to go on.
    """
    from gridcloud.model.fleet import MachineState

    try:
        found = _watched(client, names, quiet=json_ or quiet)
    except KeyboardInterrupt:
        all_ = " ".join(names)
        click.echo(
            f"\nthe site goes on making {all_}; look with 'gridcloud machine show {names[0]}', "
            f"end it with 'gridcloud machine stop {all_}'",
            err=True,
        )
        return 130
    if json_:
        print_json(found)
    failed = [info for info in found if info.state is not MachineState.READY]
    for info in () if json_ or quiet else found:
        _say(info, failed=info in failed)
    return 69 if failed else 0


def checked(client: Client, name: str) -> MachineInfo:
    """Show what happens to a machine that is made for a check, until it is gone again."""
    from gridcloud.model.fleet import MachineState

    (found,) = _watched(client, [name], quiet=False)
    while found.state is MachineState.READY:  # it is given back in a moment
        found = client.wait_machine(name, timedelta(seconds=1))
    (found,) = _watched(client, [name], quiet=True)
    return found


def line(event: LaunchNews, name: str = "") -> str:
    """Return an event as it is shown."""
    return step_line(event.at, event.step.value, event.message, name)


def step_line(at: datetime, step: str, message: str, name: str = "") -> str:
    """Return something that happened in a step of a launch as it is shown, further lines below."""
    from gridcloud.cli import render

    before = f"{render.clock(at)} {name + ' ' if name else ''}{step}: "
    first, *more = render.safe_lines(message).splitlines() or [""]
    return "\n".join([before + first, *(f"    {text}" for text in more)])


def _watched(client: Client, names: list[str], *, quiet: bool) -> list[MachineInfo]:
    heard = dict.fromkeys(names, 0)
    over: dict[str, MachineInfo] = {}
    while len(over) < len(names):
        left = [name for name in names if name not in over]
        for name in left:
            news = client.machine_events(name, heard[name], wait=_ONE if len(left) == 1 else _EACH)
            for event in news:
                heard[name] = event.number
                if not quiet:
                    click.echo(line(event, name if len(names) > 1 else ""), err=True)
            if not news and (info := client.machine(name)).state.settled:
                over[name] = info
    return [over[name] for name in names]


def _say(info: MachineInfo, *, failed: bool) -> None:
    from gridcloud.cli import render

    if failed:
        why = render.safe_lines(info.reason)
        return click.echo(f"gridcloud: {info.name} {info.state}: {why}", err=True)
    return click.echo(f"{info.name} is ready; 'gridcloud machine ssh {info.name}' logs in")


def told(offer: Offer, need: Need) -> str:
    """Return which machine an offer is of, and at what price."""
    from gridcloud.cli import render
    from gridcloud.model.quantities import format_bytes

    has = need.resources if offer.flexible else offer.capacity
    plural = "s"[: has.cpus != 1]
    gpus = f", {has.gpus} GPU{'s'[: has.gpus != 1]}" if has.gpus else ""
    size = f"{has.cpus} CPU{plural}, {format_bytes(has.memory_bytes)}{gpus}"
    hourly = offer.hourly(need.resources)
    price = "at an unknown price"
    if hourly is not None:
        price = f"{_money(hourly, offer.currency)} an hour"
    return render.safe(f"{offer.label} ({size}): {price}")


def _money(amount: float, currency: str) -> str:
    return f"{amount:.4g} {currency}".rstrip()
