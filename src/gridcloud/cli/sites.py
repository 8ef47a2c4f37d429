"""The site: what it is, how it fares, what it could do."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import (
    as_json,
    choice_options,
    make_constraints,
    make_need,
    need_options,
    print_json,
)

if TYPE_CHECKING:
    from gridcloud.model.api import OffersReply
    from gridcloud.model.need import Need
    from gridcloud.model.offer import Verdict


@click.command()
@need_options
@choice_options
@click.option("--spot", is_flag=True, help="Machines of capacity that the cloud may take back.")
@click.option("--most", default=200, show_default=True, help="Show so many, the best first.")
@click.option(
    "--shapes", default=5, show_default=True, help="Show so many sizes of machine of each cloud."
)
@as_json
def offers(
    cpus: int,
    memory: int | None,
    gpus: int,
    time_: timedelta | None,
    site: str | None,
    countries: tuple[str, ...],
    kinds: tuple[str, ...],
    within: tuple[str, ...],
    max_price: float | None,
    strategy: str | None,
    most: int,
    shapes: int,
    *,
    spot: bool,
    json_: bool,
) -> int:
    """Show which sites could serve a need, the best first, and why the others cannot.

    Nothing is leased or changed. The exit status is 0 if any site could serve it now.
    """
    from gridcloud.client import Client
    from gridcloud.model.choice import Strategy

    need = make_need(cpus, memory, gpus, time_)
    constraints = make_constraints(countries, kinds, within, max_price)
    chosen = Strategy(strategy) if strategy else None
    with Client() as client:
        reply = client.offers(
            need, site, constraints=constraints, strategy=chosen, most=most, spot=spot
        )
    if json_:
        print_json(reply)
    else:
        _tell_offers(reply, shapes)
    return 0 if reply.plan.winners else 75


def _tell_offers(reply: OffersReply, most_shapes: int) -> None:
    """Print a plan: of each cloud the first few shapes that can serve, and of those that cannot."""
    from gridcloud.cli import render

    plan, need = reply.plan, reply.need
    shown, untold = [], Counter(plan.shapes_left_out)
    seen: Counter[tuple[str, bool]] = Counter()
    for verdict in plan.verdicts:
        place = verdict.offer.place
        if verdict.offer.shape:
            seen[place, verdict.rank is None] += 1
            if seen[place, verdict.rank is None] > most_shapes:
                untold[place] += 1
                continue
        shown.append(verdict)
    click.echo(f"need: {need}; CPUs, memory and GPUs are what is free, of all there is")
    numbers = ("CPUs", "memory", "GPUs", "longest", "an hour")
    columns = ("rank", "offer", "shape", "region", "from", *numbers[:4], "where", "an hour")
    empty = {"shape": "", "region": "", "GPUs": "", "longest": "", "where": "", "an hour": "0"}
    rows = [_row(verdict, need) for verdict in shown]
    render.table(*render.without(empty, columns, rows), right=numbers)
    for verdict in shown:
        if verdict.reasons:
            click.echo(render.safe(f"{verdict.offer.label}: {'; '.join(verdict.reasons)}"))
    for place, count in sorted((+untold).items()):
        click.echo(f"{place}: and {count} more shape{'s'[: count != 1]}; --shapes shows more")
    if left := plan.left_out - sum(plan.shapes_left_out.values()):
        click.echo(f"and {left} more; --most shows more of them")


def _row(verdict: Verdict, need: Need) -> tuple[str, ...]:
    """Return the cells that tell an offer; of a machine to be made, what that would have."""
    from gridcloud.cli import render
    from gridcloud.model.quantities import format_bytes, format_duration

    offer = verdict.offer
    free, whole = offer.free, offer.capacity
    if verdict.rank:
        word = f"[green]{verdict.rank}[/]"
    else:
        word = "later" if verdict.later else "[red]no[/]"
    if offer.shape:
        amounts = (
            str(whole.cpus),
            format_bytes(whole.memory_bytes),
            str(whole.gpus) if whole.gpus else "",
        )
        cost = offer.hourly(need.resources)
        price = "not known" if cost is None else f"{cost:.4g} {offer.currency}".rstrip()
    else:
        amounts = (
            f"{free.cpus}/{whole.cpus}" if whole.cpus else "",
            render.part(free.memory_bytes, whole.memory_bytes) if whole.memory_bytes else "",
            f"{free.gpus}/{whole.gpus}" if whole.gpus else "",
        )
        price = f"{offer.prices.cost(need.resources, timedelta(hours=1)):g}"
    return (
        word,
        offer.place,
        render.plain(f"{offer.shape}, spot" if offer.spot else offer.shape),
        render.plain(offer.region),
        offer.community.split(".")[0] if offer.community else "own",
        *amounts,
        format_duration(offer.max_time) if offer.max_time else "",
        " ".join(filter(None, (offer.country, offer.kind))),
        render.plain(price),
    )


@click.command()
@as_json
def status(*, json_: bool) -> None:
    """Show how the site fares: jobs, leases, capacity, problems."""
    from gridcloud.cli import render
    from gridcloud.client import Client
    from gridcloud.model.quantities import format_bytes

    with Client() as client:
        found = client.status()
    if json_:
        return print_json(found)
    free, capacity = found.free, found.capacity
    jobs = ", ".join(f"{count} {state}" for state, count in sorted(found.jobs.items()))
    memory = f"{format_bytes(free.memory_bytes)} of {format_bytes(capacity.memory_bytes)}"
    rows = [
        ("site", f"{found.name} (gridcloud {found.version}, process {found.pid})"),
        ("up since", render.clock(found.started_at)),
        ("jobs", jobs or "none yet"),
        (
            "leases",
            f"{found.leases_own} own, {found.leases_lent} lent, {found.leases_borrowed} borrowed",
        ),
        ("free", f"{free.cpus} of {capacity.cpus} CPUs, {memory}, {free.gpus} GPUs"),
        *(("[yellow]problem[/]", render.plain(problem)) for problem in found.problems),
    ]
    return render.table(("", ""), rows)


@click.group()
def site() -> None:
    """The site itself: its identity, and stopping it."""


@site.command()
@as_json
def show(*, json_: bool) -> None:
    """Print the site's identity and where it can be reached."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        found = client.site()
    if json_:
        return print_json(found)
    rows = [
        ("name", found.name),
        ("key", found.key),
        ("version", found.version),
        ("state", render.plain(found.state_folder)),
        ("settings", render.plain(found.settings_file)),
        ("grid", ", ".join(found.grid_addresses) or "not in any community"),
        ("gateway", found.gateway_address or "no address: what is lent is reached over the grid"),
        ("lending", render.plain(found.lending)),
        ("communities", ", ".join(found.communities) or "none"),
        ("user CA", found.user_ca),
    ]
    return render.table(("", ""), rows)


@site.command()
@as_json
def stop(*, json_: bool) -> None:
    """Stop the site's daemon. Jobs go on and are found again at its next start."""
    import time

    from gridcloud.client import Client
    from gridcloud.errors import Unavailable

    try:
        client = Client(start=False)
    except Unavailable:
        return print_json({"stopped": None}) if json_ else click.echo("no site runs")
    with client:
        pid = client.status().pid
        client.stop()
    deadline = time.monotonic() + 30
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return print_json({"stopped": pid}) if json_ else click.echo(f"stopped (process {pid})")


def _alive(pid: int) -> bool:
    from pathlib import Path

    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
