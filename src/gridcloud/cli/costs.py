"""What own machines at clouds cost."""

from __future__ import annotations

import csv
import sys
from datetime import datetime
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import as_json, print_json

if TYPE_CHECKING:
    from gridcloud.model.accounts import CostReport


@click.command()
@click.option(
    "--since",
    type=click.DateTime(formats=["%Y-%m-%d", "%Y-%m"]),
    help="Count from this day on, as 2026-05-01.  [default: from the beginning]",
)
@click.option("--csv", "csv_", is_flag=True, help="Print CSV for a spreadsheet.")
@as_json
def costs(since: datetime | None, *, csv_: bool, json_: bool) -> None:
    """Show what your machines at clouds cost, by month, provider and shape.

    Hours times the price that the provider told when each machine was asked for; those that run
    are counted until now. It is no bill: traffic, volumes and discounts are not in it.
    """
    from gridcloud.client import Client

    with Client() as client:
        found = client.costs(since.astimezone() if since else None)
    if json_:
        return print_json(found)
    return _csv(found) if csv_ else _show(found)


def _show(found: CostReport) -> None:
    from gridcloud.cli import render

    if not found.rows:
        return click.echo("no machine was made at a cloud")
    rows = [
        (
            row.month,
            render.plain(row.provider),
            render.plain(row.shape),
            str(row.machines),
            str(row.running) if row.running else "",
            f"{row.hours:.1f}",
            f"{row.cost:.2f} {render.plain(row.currency)}".rstrip()
            if row.unpriced_hours < row.hours
            else "no price known",
        )
        for row in found.rows
    ]
    columns = ("month", "provider", "shape", "machines", "running", "hours", "cost")
    render.table(columns, rows, right=columns[3:])
    totals: dict[str, float] = {}
    for row in found.rows:
        if row.unpriced_hours < row.hours:
            totals[row.currency] = totals.get(row.currency, 0.0) + row.cost
    told = ", ".join(f"{amount:.2f} {name}".rstrip() for name, amount in sorted(totals.items()))
    click.echo(f"in all: {told or 'nothing that has a price'}")
    if unpriced := sum(row.unpriced_hours for row in found.rows):
        click.echo(f"{unpriced:.1f} hours have no price: their provider does not tell any")
    return None


def _csv(found: CostReport) -> None:
    from gridcloud.model.accounts import CostRow

    writer = csv.writer(sys.stdout)
    writer.writerow(CostRow.model_fields)
    for row in found.rows:
        writer.writerow(row.model_dump().values())
