"""What was lent and borrowed."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import as_json, print_json

if TYPE_CHECKING:
    from gridcloud.model.usage import Figures, UsageReport


class _Since(click.ParamType[datetime]):
    """A time ago, as ``7d``, or a date or time (UTC unless it says otherwise)."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        from gridcloud.errors import InvalidSpec
        from gridcloud.model.quantities import parse_duration

        if isinstance(value, datetime):
            return value
        text = str(value)
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            try:
                return datetime.now(UTC) - parse_duration(text)
            except (InvalidSpec, OverflowError):
                self.fail(f"{text!r} is no time: write 7d, 12h or 2026-05-01.", param, ctx)
        return at if at.tzinfo else at.replace(tzinfo=UTC)


SINCE = _Since()


class _Person(click.ParamType[str]):
    """A user and the site that vouches for them."""

    name = "person"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value)
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}@[a-z0-9][a-z0-9-]{0,62}", text):
            self.fail(f"{text!r} is no person: write user@site, as alice@university.", param, ctx)
        return text


PERSON = _Person()


@click.command()
@click.option("--community", metavar="NAME", help="Only in this community.")
@click.option("--person", type=PERSON, metavar="USER@SITE", help="Only for this person.")
@click.option("--since", type=SINCE, help="Only loans that ended since: 7d, or 2026-05-01 (UTC).")
@click.option(
    "--by",
    type=click.Choice(["community", "person", "site", "month"]),
    default="community",
    show_default=True,
    help="What a row stands for.",
)
@click.option("--csv", "csv_", is_flag=True, help="Print CSV (RFC 4180).")
@as_json
def usage(
    community: str | None,
    person: str | None,
    since: datetime | None,
    by: str,
    *,
    csv_: bool,
    json_: bool,
) -> None:
    """Show what was lent and borrowed: CPU-hours, GB-hours, GPU-hours and credits.

    The figures are of what was leased, used or not, and come from the receipts of ended loans
    that both sides signed. What ran on this site's own machines is not in them.
    """
    from gridcloud.client import Client
    from gridcloud.model.usage import Grouping, ReceiptFilter

    chosen = ReceiptFilter(community=community, person=person, since=since)
    with Client() as client:
        report = client.usage(Grouping(by), chosen)
    if json_:
        return print_json(report)
    if csv_:
        return click.echo(_csv(report), nl=False)
    if report.rows:
        _table(report)
    else:
        click.echo("no loan has ended with a receipt that both sides signed")
    left_out = [
        f"{number} {what}"
        for number, what in (
            (report.disputed, "disputed"),
            (report.open, "not countersigned yet"),
            (report.missing, "missing"),
        )
        if number
    ]
    if left_out:
        click.echo(f"not counted: {', '.join(left_out)}: gridcloud receipts list --disputed")
    return None


def _table(report: UsageReport) -> None:
    from gridcloud.cli import render
    from gridcloud.model.usage import Side

    rows = []
    for side in Side:
        mine = [row for row in report.rows if row.side is side]
        for row in mine:
            name = row.community.partition(".")[0]
            if report.by != "community":
                name = f"{row.group} ({name})" if name else row.group
            rows.append((side.value, render.plain(name), *_cells(row.figures)))
        if mine:
            total = (f"[bold]{cell}[/]" for cell in _cells(report.total(side)))
            rows.append((side.value, "[bold]sum[/]", *total))
    figures = ("receipts", "CPU-hours", "GB-hours", "GPU-hours", "credits")
    render.table(("", report.by.value, *figures), rows, right=figures)


def _cells(figures: Figures) -> tuple[str, ...]:
    amounts = (figures.cpu_hours, figures.gb_hours, figures.gpu_hours, figures.credits)
    return (str(figures.receipts), *(f"{amount:,.3f}" for amount in amounts))


def _csv(report: UsageReport) -> str:
    """Return the rows, sorted and rounded, so that the same books always make the same text."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text)
    group = [] if report.by == "community" else [report.by.value]
    columns = ["receipts", "cpu_hours", "gb_hours", "gpu_hours", "credits", "begun_at", "ended_at"]
    writer.writerow(["side", "community", *group, *columns])
    for row in report.rows:
        figures = row.figures
        amounts = (figures.cpu_hours, figures.gb_hours, figures.gpu_hours, figures.credits)
        times = (
            at.isoformat(timespec="seconds") for at in (figures.begun_at, figures.ended_at) if at
        )
        writer.writerow(
            [
                row.side.value,
                row.community,
                *([row.group] if group else []),
                figures.receipts,
                *(f"{amount:.6f}" for amount in amounts),
                *times,
            ]
        )
    return text.getvalue()
