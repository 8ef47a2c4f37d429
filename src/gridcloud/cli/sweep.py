"""Finding and removing what is left over at providers."""

from __future__ import annotations

import click

from gridcloud.cli.options import as_json, print_json
from gridcloud.errors import InvalidSpec


@click.command()
@click.option("--dry-run", is_flag=True, help="Only show what there is.")
@click.option(
    "--all-sites",
    is_flag=True,
    help="Show, too, what other sites have at the same accounts.",
)
@click.option(
    "--yes", is_flag=True, help="With --all-sites: remove that, also what those sites use."
)
@as_json
def sweep(*, dry_run: bool, all_sites: bool, yes: bool, json_: bool) -> int:
    """Ask every provider for what carries this site's tag, and remove what no lease knows.

    It works with an empty store: all that counts is the site's key and its settings. Volumes are
    kept. The exit status is 75 if something could not be asked or removed.

    What other sites have there is theirs: no site can tell what another still needs. It is removed
    only with --all-sites --yes, say for a site whose key is lost.
    """
    from gridcloud.cli import render
    from gridcloud.client import Client
    from gridcloud.model.accounts import Fate

    if yes and not all_sites:
        raise InvalidSpec(
            "--yes is for what other sites have; own strays are removed without being asked.",
            hint="Say --all-sites, too, or leave --yes out.",
        )
    with Client() as client:
        found = client.sweep(dry_run=dry_run, all_sites=all_sites, remove_others=yes)
    failed = found.problems or any(thing.fate is Fate.NOT_REMOVED for thing in found.things)
    if json_:
        print_json(found)
        return 75 if failed else 0
    colours = {
        Fate.STRAY: "yellow",
        Fate.REMOVED: "green",
        Fate.NOT_REMOVED: "red",
        Fate.ANOTHERS: "cyan",
    }
    rows = [
        (
            f"[{colours[thing.fate]}]{thing.fate}[/]" if thing.fate in colours else str(thing.fate),
            render.plain(thing.provider),
            render.plain(thing.kind),
            render.plain(thing.id),
            render.plain(thing.lease_id),
            render.plain(thing.site[:12]),
            render.clock(thing.ends_at) if thing.ends_at else "",
            render.plain(thing.note),
        )
        for thing in found.things
    ]
    if rows:
        columns = ("what", "provider", "kind", "id", "lease", "other site", "until", "note")
        empty = {"other site": "", "until": "", "note": ""}
        render.table(*render.without(empty, columns, rows))
    else:
        whose = "any site's tag" if all_sites else "this site's tag"
        click.echo(f"nothing at any provider carries {whose}")
    for problem in found.problems:
        click.echo(f"gridcloud: could not be asked: {render.safe_lines(problem)}", err=True)
    if dry_run and any(thing.fate is Fate.STRAY for thing in found.things):
        click.echo("gridcloud: nothing was removed; without --dry-run strays are", err=True)
    if not yes and any(thing.fate is Fate.ANOTHERS for thing in found.things):
        word = "what other sites have was left alone; --yes removes it, in use or not"
        click.echo(f"gridcloud: {word}", err=True)
    return 75 if failed else 0
