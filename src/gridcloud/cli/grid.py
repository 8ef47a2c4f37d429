"""The grid as this site sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import as_json, print_json

if TYPE_CHECKING:
    from gridcloud.model.api import GridSite

_COLOURS = {"alive": "green", "suspect": "yellow", "dead": "red"}


@click.group()
def grid() -> None:
    """Look at the sites of all communities."""


@grid.command()
@click.option("--community", metavar="NAME", help="Show this community only.")
@as_json
def show(community: str | None, *, json_: bool) -> None:
    """List the sites: whether and how they are reached, and what they lend.

    CPUs, memory and GPUs are what is free, of all that is lent. Nobody is asked: this is what
    the site knows by itself, seconds old at most.
    """
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        sites = client.grid(community)
    if json_:
        return print_json(sites)
    if not sites:
        return click.echo("This site is in no community: see 'gridcloud community --help'.")
    columns = ("community", "site", "reached", "latency", "CPUs", "memory", "GPUs", "version")
    numbers = ("latency", "CPUs", "memory", "GPUs")
    rows = [_row(site) for site in sites]
    render.table(*render.without({"GPUs": ""}, columns, rows), right=numbers)
    for site in sites:
        if problem := site.problem or site.offer_problem:
            name = render.safe(site.site_name)
            click.echo(f"{name}: {render.safe(problem).removeprefix(name).lstrip()}")
    return None


def _row(site: GridSite) -> tuple[str, ...]:
    from gridcloud.cli import render

    colour = _COLOURS.get(site.state)
    reached = f"[{colour}]{site.state}[/]" if colour else site.state
    if site.myself:
        reached = "this site"
    elif site.path and site.state == "alive":
        reached += f", {render.plain(site.path)}"
    latency = None if site.state == "dead" else site.latency_seconds
    lent = site.capacity, site.free
    if lent[0] is None or lent[1] is None or site.state == "dead":
        cpus = memory = gpus = ""
    else:
        free, whole = lent[1], lent[0]
        cpus = f"{free.cpus}/{whole.cpus}"
        memory = render.part(free.memory_bytes, whole.memory_bytes)
        gpus = f"{free.gpus}/{whole.gpus}" if whole.gpus else ""
    return (
        render.plain(site.community.split(".")[0]),
        render.plain(site.site_name),
        reached,
        "" if latency is None else f"{latency * 1000:.0f} ms",
        cpus,
        memory,
        gpus,
        render.plain(site.version),
    )
