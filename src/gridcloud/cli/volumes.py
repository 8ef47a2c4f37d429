"""Disks that outlive machines."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import MEMORY, as_json, print_json
from gridcloud.errors import InvalidSpec

if TYPE_CHECKING:
    from gridcloud.model.accounts import VolumeInfo

#: One that was at no machine for so long may have been forgotten.
_FORGOTTEN_AFTER = timedelta(days=7)


@click.group()
def volume() -> None:
    """Disks at your clouds that outlive machines: mount them by --volume of run and machine."""


@volume.command("list")
@as_json
def list_(*, json_: bool) -> int:
    """List the volumes there are; those that are at no machine cost all the same."""
    from gridcloud.cli import render
    from gridcloud.client import Client
    from gridcloud.model.quantities import format_bytes

    with Client() as client:
        report = client.volumes()
    if json_:
        print_json(report)
        return 69 if report.problems else 0
    rows = [
        (
            info.name,
            format_bytes(info.size_bytes),
            render.plain(info.provider),
            render.plain(info.place),
            "in use" if info.attached_to else "free",
            render.clock(info.created_at) if info.created_at else "",
        )
        for info in report.volumes
    ]
    if rows:
        columns = ("name", "size", "provider", "place", "state", "since")
        render.table(*render.without({"place": "", "since": ""}, columns, rows), right=("size",))
    elif not report.problems:
        click.echo("no volumes; 'gridcloud volume create' makes one")
    for info in report.volumes:
        if days := _forgotten(info):
            click.echo(
                f"gridcloud: {info.name} is {days} days old and at no machine; 'gridcloud volume "
                f"remove {info.name}' deletes it and what is on it",
                err=True,
            )
    for problem in report.problems:
        click.echo(f"gridcloud: {render.safe(problem)}", err=True)
    return 69 if report.problems else 0


@volume.command()
@click.option("--provider", default="", metavar="NAME", help="Where.  [default: the only one]")
@as_json
@click.argument("name")
@click.argument("size", type=MEMORY)
def create(name: str, size: int, provider: str, *, json_: bool) -> None:
    """Make the volume NAME of SIZE, as 20G; --volume of a machine makes one as well."""
    from gridcloud.client import Client

    with Client() as client:
        info = client.make_volume(name, size, provider)
    print_json(info) if json_ else click.echo(f"made {info.name} at {info.provider}")


@volume.command()
@click.option("--provider", default="", metavar="NAME", help="Where, if it is at several.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
@click.argument("name")
def remove(name: str, provider: str, *, yes: bool, json_: bool) -> int:
    """Delete the volume NAME and what is on it, for good."""
    from gridcloud.client import Client

    if not yes:
        if json_ or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise InvalidSpec(
                f"{name} would be deleted with all that is on it, and nobody is here to be asked.",
                hint="Say --yes.",
            )
        if not click.confirm(f"Delete {name} and all that is on it?", err=True):
            return 1
    with Client() as client:
        info = client.remove_volume(name, provider)
    print_json({"removed": info}) if json_ else click.echo(f"removed {info.name}")
    return 0


def _forgotten(info: VolumeInfo) -> int:
    """Return how many days old a volume is that may have been forgotten; else 0."""
    from datetime import UTC, datetime

    if info.unused_since is None:
        return 0
    age = datetime.now(UTC) - info.unused_since
    return age.days if age >= _FORGOTTEN_AFTER else 0
