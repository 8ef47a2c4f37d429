"""Communities: found, invite, join, leave, see who is there."""

from __future__ import annotations

import sys
from datetime import timedelta

import click

from gridcloud.cli.options import DURATION, as_json, print_json


@click.group()
def community() -> None:
    """Found, join and leave communities."""


@community.command()
@as_json
@click.argument("name")
def create(name: str, *, json_: bool) -> None:
    """Found the community NAME; its identity is this site's key and the name."""
    from gridcloud.client import Client

    with Client() as client:
        made = client.create_community(name)
    if json_:
        return print_json(made)
    return click.echo(f"founded {made.id}\ninvite others: gridcloud community invite {made.name}")


@community.command()
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice(["provider", "consumer", "manager"]),
    help="What the new member may be. Repeatable.  [default: provider and consumer]",
)
@click.option("--valid-for", type=DURATION, default="1d", show_default=True, help="Until when.")
@as_json
@click.argument("name")
def invite(name: str, roles: tuple[str, ...], valid_for: timedelta, *, json_: bool) -> None:
    """Print a join code that admits one site to the community NAME. It is a secret."""
    from gridcloud.client import Client

    with Client() as client:
        made = client.invite(name, roles=roles or ("provider", "consumer"), valid_for=valid_for)
    if json_:
        return print_json(made)
    if made.warning:
        click.echo(f"warning: {made.warning}", err=True)
    return click.echo(made.code)


@community.command()
@click.option("--as", "site_name", metavar="NAME", help="The name to be known by.")
@as_json
@click.argument("code", required=False)
def join(code: str | None, site_name: str | None, *, json_: bool) -> None:
    """Join the community that a join code admits to.

    Without CODE it is asked for, or read from standard input, and so stays out of the shell's
    history and the list of processes.
    """
    from gridcloud.client import Client

    if code is None and sys.stdin.isatty():
        code = str(click.prompt("join code", hide_input=True))
    elif code is None:
        code = sys.stdin.read()
    code = code.strip()
    with Client() as client:
        joined = client.join_community(code, site_name)
    print_json(joined) if json_ else click.echo(f"joined {joined.id}")


@community.command()
@as_json
@click.argument("name")
def leave(name: str, *, json_: bool) -> None:
    """Leave the community NAME."""
    from gridcloud.client import Client

    with Client() as client:
        client.leave_community(name)
    print_json({"left": name}) if json_ else click.echo(f"left {name}")


@community.command()
@as_json
@click.argument("name", required=False)
def members(name: str | None, *, json_: bool) -> None:
    """List the members of the community NAME, or of all this site is in."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        names = [name] if name else [found.id for found in client.communities()]
        found = [member for each in names for member in client.members(each)]
    if json_:
        return print_json(found)
    rows = [
        (
            member.community.split(".")[0],
            render.plain(member.site_name) + (" (this site)" if member.myself else ""),
            member.key[:16],
            ", ".join(member.roles),
            f"[red]{render.plain(member.problem)}[/]" if member.problem else "",
        )
        for member in found
    ]
    return render.table(("community", "site", "key", "roles", ""), rows)


@community.command("list")
@as_json
def list_(*, json_: bool) -> None:
    """List the communities this site is in."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        found = client.communities()
    if json_:
        return print_json(found)
    rows = [(each.name, each.id, ", ".join(each.roles)) for each in found]
    return render.table(("name", "identity", "roles"), rows)
