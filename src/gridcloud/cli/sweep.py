"""Finding and removing what is left over at providers."""

from __future__ import annotations

import click

from gridcloud.cli.options import as_json, print_json


@click.command()
@click.option("--dry-run", is_flag=True, help="Only show what there is.")
@as_json
def sweep(*, dry_run: bool, json_: bool) -> int:
    """Ask every provider for what carries this site's tag, and remove what no lease knows.

    It works with an empty store: all that counts is the site's key and its settings. Volumes are
    kept. The exit status is 75 if something could not be asked or removed.
    """
    from gridcloud.cli import render
    from gridcloud.client import Client
    from gridcloud.model.accounts import Fate

    with Client() as client:
        found = client.sweep(dry_run=dry_run)
    failed = found.problems or any(thing.fate is Fate.NOT_REMOVED for thing in found.things)
    if json_:
        print_json(found)
        return 75 if failed else 0
    colours = {Fate.STRAY: "yellow", Fate.REMOVED: "green", Fate.NOT_REMOVED: "red"}
    rows = [
        (
            f"[{colours[thing.fate]}]{thing.fate}[/]" if thing.fate in colours else str(thing.fate),
            render.plain(thing.provider),
            render.plain(thing.kind),
            render.plain(thing.id),
            render.plain(thing.lease_id),
            render.clock(thing.ends_at) if thing.ends_at else "",
            render.plain(thing.note),
        )
        for thing in found.things
    ]
    if rows:
        columns = ("what", "provider", "kind", "id", "lease", "until", "note")
        render.table(*render.without({"until": "", "note": ""}, columns, rows))
    else:
        click.echo("nothing at any provider carries this site's tag")
    for problem in found.problems:
        click.echo(f"gridcloud: could not be asked: {render.safe_lines(problem)}", err=True)
    if dry_run and any(thing.fate is Fate.STRAY for thing in found.things):
        click.echo("gridcloud: nothing was removed; without --dry-run strays are", err=True)
    return 75 if failed else 0
