"""Receipts: the signed books of what was lent and borrowed."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gridcloud.cli.options import as_json, print_json
from gridcloud.cli.usage import PERSON, SINCE

if TYPE_CHECKING:
    from gridcloud.model.usage import Audit, KeptReceipt

_COLOURS = {"agreed": "green", "disputed": "red", "missing": "red", "open": "yellow"}


@click.group()
def receipts() -> None:
    """Receipts of what was lent and borrowed: see, export, verify."""


@receipts.command("list")
@click.option("--community", metavar="NAME", help="Only in this community.")
@click.option("--person", type=PERSON, metavar="USER@SITE", help="Only for this person.")
@click.option("--since", type=SINCE, help="Only loans that ended since: 7d, or 2026-05-01 (UTC).")
@click.option("--lent", "side", flag_value="lent", help="Only what was lent.")
@click.option("--borrowed", "side", flag_value="borrowed", help="Only what was borrowed.")
@click.option("--disputed", is_flag=True, help="Only those that both sides have not signed.")
@click.option("--latest", default=50, show_default=True, help="At most so many.")
@as_json
def list_(
    community: str | None,
    person: str | None,
    since: datetime | None,
    side: str | None,
    latest: int,
    *,
    disputed: bool,
    json_: bool,
) -> None:
    """List receipts, the newest last, and loans for which none came."""
    from gridcloud.cli import render
    from gridcloud.client import Client
    from gridcloud.model.usage import ReceiptFilter, ReceiptState, Side

    states = tuple(state for state in ReceiptState if state is not ReceiptState.AGREED)
    chosen = ReceiptFilter(
        community=community,
        person=person,
        side=Side(side) if side else None,
        states=states if disputed else (),
        since=since,
    )
    with Client() as client:
        found = client.receipts(chosen, latest=latest)
    if json_:
        return print_json(found)
    if not found:
        return click.echo("no receipts")
    rows = [
        (
            each.id[:12] or each.lease_id,
            f"{'to' if each.side is Side.LENT else 'from'} {render.plain(each.site)}",
            render.plain(each.community.partition(".")[0]),
            render.plain(each.person),
            render.clock(each.ended_at),
            f"{each.figures.cpu_hours:,.3f}",
            f"{each.credits:,.3f}",
            f"[{_COLOURS[each.state]}]{each.state}[/]",
        )
        for each in found
    ]
    columns = ("receipt", "loan", "community", "person", "ended", "CPU-hours", "credits", "state")
    render.table(columns, rows, right=("CPU-hours", "credits"))
    for each in found:
        if each.remark:
            click.echo(f"{each.id[:12] or each.lease_id}: {render.safe(each.remark)}")
    return None


@receipts.command()
@as_json
@click.argument("name", metavar="RECEIPT")
def show(name: str, *, json_: bool) -> None:
    """Show one receipt: RECEIPT is the beginning of its id, or its lease."""
    from gridcloud.client import Client

    with Client() as client:
        found = client.receipt(name)
    print_json(found) if json_ else _show(found)


@receipts.command()
@click.option("--community", metavar="NAME", help="Only of this community.")
@as_json
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
def export(file: Path, community: str | None, *, json_: bool) -> None:
    """Write all receipts to FILE (- is standard output), with all that proves them.

    'gridcloud receipts verify' checks such a file anywhere.
    """
    from gridcloud.client import Client
    from gridcloud.errors import InvalidSpec

    with Client() as client:
        if str(file) == "-":
            for data in client.books(community):
                sys.stdout.buffer.write(data)
            return None
        draft = file.with_name(f".{file.name}.part")
        try:
            with draft.open("wb") as out:
                for data in client.books(community):
                    out.write(data)
            draft.replace(file)
        except OSError as error:
            raise InvalidSpec(f"{file} cannot be written: {error.strerror}.") from error
        finally:
            draft.unlink(missing_ok=True)
    return print_json({"file": str(file)}) if json_ else click.echo(f"wrote {file}")


@receipts.command()
@click.option(
    "--community",
    "communities",
    metavar="NAME.KEY",
    multiple=True,
    help="Only receipts of this community count; else of any that is named. Repeatable.",
)
@as_json
@click.argument(
    "files",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
def verify(files: tuple[Path, ...], communities: tuple[str, ...], *, json_: bool) -> int:
    """Check exported receipts; needs no network, no site and nothing but FILES.

    Every signature, the chain of each lender, the arithmetic, and the names of both sides. The
    exit status is 0 if nothing is wrong. Give the community's identity ('gridcloud community
    list' prints it), since anyone can found one of the same name. What several sites exported
    may be checked together.
    """
    import subprocess

    from gridcloud.model.usage import Audit

    # A process of its own: what understands signed documents is no part of the command line.
    command = [sys.executable, "-m", "gridcloud.grid.books"]
    for community in communities:
        command += ["--community", community]
    done = subprocess.run([*command, "--", *map(str, files)], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        return done.returncode
    audit = Audit.model_validate_json(done.stdout)
    print_json(audit) if json_ else _report(audit)
    return 1 if audit.flaws else 0


def _show(found: KeptReceipt) -> None:
    from gridcloud.cli import render
    from gridcloud.model.quantities import format_bytes

    resources, figures = found.resources, found.figures
    lines = (
        ("receipt", found.id),
        ("number", f"{found.number} of {found.lender[:16]} in {found.community}"),
        ("state", f"{found.state}" + (f": {found.remark}" if found.remark else "")),
        (found.side.value, f"{'to' if found.side == 'lent' else 'from'} {found.site}"),
        ("person", found.person),
        ("lease", found.lease_id),
        (
            "leased",
            f"{resources.cpus} CPUs, {format_bytes(resources.memory_bytes)}, {resources.gpus} GPUs",
        ),
        ("begun", found.begun_at.isoformat(timespec="seconds")),
        ("ended", found.ended_at.isoformat(timespec="seconds")),
        (
            "figures",
            f"{figures.cpu_hours:.6f} CPU-hours, {figures.gb_hours:.6f} GB-hours, "
            f"{figures.gpu_hours:.6f} GPU-hours, {figures.credits:.6f} credits",
        ),
        ("signed by lender", found.document),
        ("signed by borrower", found.countersignature or "not yet"),
    )
    render.table(("", ""), [(name, render.plain(text)) for name, text in lines])


def _report(audit: Audit) -> None:
    from gridcloud.cli import render

    for flaw in audit.flaws:
        what = f"receipt {flaw.receipt[:16]}" if flaw.receipt else "not readable"
        click.echo(f"{flaw.file}, line {flaw.line}: {what}: {_clean(flaw.problem)}")
    for note in audit.notes:
        click.echo(f"note: {_clean(note)}")
    if audit.agreed:
        rows = [
            (
                each.community.partition(".")[0],
                render.plain(each.lender_name),
                render.plain(each.borrower_name),
                str(each.figures.receipts),
                f"{each.figures.cpu_hours:,.3f}",
                f"{each.figures.gb_hours:,.3f}",
                f"{each.figures.gpu_hours:,.3f}",
                f"{each.figures.credits:,.3f}",
            )
            for each in audit.agreed
        ]
        figures = ("receipts", "CPU-hours", "GB-hours", "GPU-hours", "credits")
        render.table(("community", "lent by", "to", *figures), rows, right=figures)
        for community in sorted({each.community for each in audit.agreed}):
            click.echo(f"community {community}")
    wrong = len({(flaw.file, flaw.line) for flaw in audit.flaws})
    click.echo(
        f"{audit.receipts} receipt{'s' * (audit.receipts != 1)}, {audit.open} not countersigned, "
        + (f"{wrong} line{'s' * (wrong > 1)} wrong" if wrong else "nothing wrong")
    )


def _clean(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
