"""Communities: found, invite, join, leave, see who is there, decide who is."""

from __future__ import annotations

import sys
from datetime import timedelta

import click

from gridcloud.cli.options import DURATION, as_json, print_json

_ROLE = click.Choice(["provider", "consumer", "manager"])
_NONE = (
    "This site is in no community. Found one with 'gridcloud community create NAME', or join one "
    "with 'gridcloud community join CODE'."
)


@click.group()
def community() -> None:
    """Found, join and leave communities, and decide who is in them."""


@community.command()
@as_json
@click.argument("name")
def create(name: str, *, json_: bool) -> None:
    """Found the community NAME.

    Its identity is this site's key and the name, so others may have a community of that name too.
    """
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
    type=_ROLE,
    help="What the new member may be. Repeatable.  [default: provider and consumer]",
)
@click.option("--valid-for", type=DURATION, default="1d", show_default=True, help="Until when.")
@click.option("--approve", is_flag=True, help="Who uses the code only asks; you decide on each.")
@click.option(
    "--uses",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="How many sites may use the code. More than one wants --approve.",
)
@as_json
@click.argument("name")
def invite(
    name: str,
    roles: tuple[str, ...],
    valid_for: timedelta,
    *,
    approve: bool,
    uses: int,
    json_: bool,
) -> None:
    """Print a join code for the community NAME.

    It admits one site, unless you say --uses, and is a secret: whoever has it can use it.
    """
    from gridcloud.client import Client

    with Client() as client:
        made = client.invite(
            name,
            roles=roles or ("provider", "consumer"),
            valid_for=valid_for,
            approve=approve,
            uses=uses,
        )
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
    """Join a community by a join code, or ask to.

    If a manager has to approve it, the site goes on asking by itself; see 'gridcloud community
    list'. Without CODE it is asked for, or read from standard input (as with "-"), and so stays out
    of the shell's history and the list of processes.
    """
    from gridcloud.client import Client

    if code is None and sys.stdin.isatty():
        code = str(click.prompt("join code", hide_input=True))
    elif code is None or code == "-":
        code = sys.stdin.read()
    code = code.strip()
    with Client() as client:
        joined = client.join_community(code, site_name)
    if json_:
        return print_json(joined)
    if joined.waiting:
        return click.echo(
            f"asked to join {joined.id}: {joined.waiting}\n"
            "The site goes on asking; 'gridcloud community list' shows how it stands. Tell them "
            "your key\nto compare: 'gridcloud site show' prints it."
        )
    return click.echo(f"joined {joined.id}")


@community.command()
@as_json
@click.argument("name")
def leave(name: str, *, json_: bool) -> None:
    """Leave the community NAME for good; its members are told. What you lend there ends.

    While you wait for approval, it withdraws what you asked.
    """
    from gridcloud.client import Client

    with Client() as client:
        left = client.leave_community(name)
    if json_:
        return print_json(left)
    if left.warning:
        click.echo(f"warning: {left.warning}", err=True)
    return click.echo(f"left {left.community}")


@community.command()
@as_json
@click.argument("name")
def requests(name: str, *, json_: bool) -> None:
    """List the sites that ask to join the community NAME.

    Requests stand at the site that made out the code: look there.
    """
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        found = client.requests(name)
    if json_:
        return print_json(found)
    if not found:
        return click.echo("nobody asks here: a request stands at the site that made out its code")
    rows = [
        (
            render.plain(each.site_name),
            each.key[:16],
            render.clock(each.since),
            ", ".join(each.roles),
            each.invitation,
        )
        for each in found
    ]
    return render.table(("site", "key", "since", "roles", "invitation"), rows)


@community.command()
@as_json
@click.argument("name")
@click.argument("site")
def approve(name: str, site: str, *, json_: bool) -> None:
    """Admit SITE, which asks to join the community NAME.

    SITE is a name that 'community requests' shows, or a key. Compare the key with what that site's
    people tell you: 'gridcloud site show' prints it.
    """
    from gridcloud.client import Client

    with Client() as client:
        found = client.approve(name, site)
    print_json(found) if json_ else click.echo(f"admitted {found.site_name} ({found.key[:16]})")


@community.command()
@as_json
@click.argument("name")
@click.argument("site")
def refuse(name: str, site: str, *, json_: bool) -> None:
    """Refuse SITE, which asks to join the community NAME."""
    from gridcloud.client import Client

    with Client() as client:
        client.refuse(name, site)
    print_json({"refused": site}) if json_ else click.echo(f"refused {site}")


@community.command()
@click.option("--role", "add", multiple=True, type=_ROLE, help="A role to give. Repeatable.")
@click.option("--drop", multiple=True, type=_ROLE, help="A role to take away. Repeatable.")
@as_json
@click.argument("name")
@click.argument("site")
def promote(
    name: str, site: str, add: tuple[str, ...], drop: tuple[str, ...], *, json_: bool
) -> None:
    """Change the roles of SITE in the community NAME. Only its founder makes managers."""
    from gridcloud.client import Client

    if not add and not drop:
        raise click.UsageError("Say which roles to give (--role) or to take away (--drop).")
    with Client() as client:
        found = client.change_roles(name, site, add=add, drop=drop)
    if json_:
        return print_json(found)
    return click.echo(f"{found.site_name} is now {', '.join(found.roles)}")


@community.command()
@click.option("--reason", default="", help="What the site and the members are told.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
@click.argument("name")
@click.argument("site")
def remove(name: str, site: str, *, reason: str, yes: bool, json_: bool) -> None:
    """Remove SITE from the community NAME, for good.

    The removal spreads to all members and cannot be undone; a new invitation admits the site anew.
    """
    from gridcloud.client import Client

    if not yes:
        click.confirm(f"Remove {site} from {name}, for good?", abort=True, err=True)
    with Client() as client:
        client.remove_member(name, site, reason)
    print_json({"removed": site}) if json_ else click.echo(f"removed {site}")


@community.command()
@as_json
@click.argument("name", required=False)
def members(name: str | None, *, json_: bool) -> None:
    """List the members of a community, or of all communities."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        names = [name] if name else [found.id for found in client.communities() if found.roles]
        found = [member for each in names for member in client.members(each)]
    if json_:
        return print_json(found)
    if not found:
        return click.echo(_NONE)
    rows = [
        (
            member.community.split(".")[0],
            render.plain(member.site_name) + (" (this site)" if member.myself else ""),
            member.key[:16],
            ", ".join(member.roles),
            f"{member.since:%Y-%m-%d}" if member.since else "",
            render.plain(member.by),
        )
        for member in found
    ]
    render.table(("community", "site", "key", "roles", "since", "by"), rows)
    for member in found:
        if member.problem:
            click.echo(f"{render.safe(member.site_name)}: {render.safe(member.problem)}")
    return None


@community.command("list")
@as_json
def list_(*, json_: bool) -> None:
    """List this site's communities, and those it asks to join."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        found = client.communities()
    if json_:
        return print_json(found)
    if not found:
        return click.echo(_NONE)
    rows = [
        (
            each.name,
            each.id,
            ", ".join(each.roles) or each.waiting,
        )
        for each in found
    ]
    render.table(("name", "identity", "roles"), rows)
    for each in found:
        if each.problem:
            click.echo(f"{each.name}: {render.safe(each.problem)}")
    return None
