"""What this site lends: to whom, until when; ending it."""

from __future__ import annotations

import click

from gridcloud.cli.options import as_json, print_json


@click.group(invoke_without_command=True)
@as_json
@click.pass_context
def lent(context: click.Context, *, json_: bool) -> None:
    """Show what is lent now, or end a loan."""
    if context.invoked_subcommand is None:
        _show(json_=json_)


def _show(*, json_: bool) -> None:
    from gridcloud.cli import render
    from gridcloud.client import Client
    from gridcloud.model.quantities import format_duration

    with Client() as client:
        found = client.loans()
    if json_:
        return print_json(found)
    if not found:
        return click.echo("nothing is lent")
    rows = [
        (
            loan.lease_id,
            render.plain(loan.person),
            render.plain(loan.community.partition(".")[0]),
            str(loan.need),
            render.clock(loan.since),
            render.clock(loan.ends_at) if loan.ends_at else "",
            "never" if loan.notice is None else format_duration(loan.notice),
            _recalled(render.plain(loan.recalled), told=loan.told),
        )
        for loan in found
    ]
    columns = ("lease", "to", "community", "what", "since", "ends", "notice", "recalled")
    return render.table(columns, rows)


def _recalled(reason: str, *, told: bool) -> str:
    if not reason:
        return ""
    return reason if told else f"{reason} (not told yet)"


@lent.command()
@click.argument("lease")
@click.option("--now", is_flag=True, help="At once, without the notice that was agreed.")
@as_json
def end(lease: str, *, now: bool, json_: bool) -> None:
    """End a loan, after the notice that its rule gives or at once."""
    from gridcloud.cli import render
    from gridcloud.client import Client

    with Client() as client:
        loan = client.end_loan(lease, now=now)
    if json_:
        return print_json(loan)
    assert loan.ends_at
    word = "ended" if now else "ends"
    return click.echo(
        f"{loan.lease_id}, lent to {loan.person}, {word} {render.clock(loan.ends_at)}"
    )
