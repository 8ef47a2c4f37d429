"""How values look in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from gridcloud.model.job import Job, JobState
from gridcloud.model.quantities import format_bytes, format_duration

_COLOURS = {
    JobState.COMPLETED: "green",
    JobState.FAILED: "red",
    JobState.CANCELED: "yellow",
    JobState.ACTIVE: "cyan",
}


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    """Print a table; cells are rich markup, so `plain` what comes from outside. Without a
    terminal nothing is cut or wrapped, so that other programs can read it. Columns named in
    ``right`` hold numbers: they stand to the right, and are never broken."""
    console = Console()
    titled = any(columns)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=titled)
    for name in columns:
        number = name in right
        justify: JustifyMethod = "right" if number else "left"
        drawn.add_column(name, justify=justify, overflow="fold", no_wrap=number)
    for row in rows:
        drawn.add_row(*row)
    if not console.is_terminal:
        wide = Console(width=10_000)
        console = Console(width=max(40, wide.measure(drawn).maximum))
    console.print(drawn)


def without(
    empty: Mapping[str, str], columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a table without those columns of ``empty`` whose every cell is as named there, since
    they tell nothing: ``{"GPUs": "0/0"}``."""
    kept = [
        index
        for index, name in enumerate(columns)
        if name not in empty or any(row[index] != empty[name] for row in rows)
    ]
    return (
        tuple(columns[index] for index in kept),
        [tuple(row[index] for index in kept) for row in rows],
    )


def part(free_bytes: int, whole_bytes: int) -> str:
    """Return how much memory of how much is free, as ``12/23.5 GiB``."""
    free, _, free_unit = format_bytes(free_bytes).partition(" ")
    whole, _, unit = format_bytes(whole_bytes).partition(" ")
    same = free_unit == unit or not free_bytes
    return f"{free}/{whole} {unit}" if same else f"{free} {free_unit}/{whole} {unit}"


def plain(text: object) -> str:
    """Return text safe to stand in a cell: no markup, no control characters."""
    return escape(safe(text))


def safe(text: object) -> str:
    """Return text without control characters, which could steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def safe_lines(text: str) -> str:
    """Return text of several lines without other control characters."""
    return "\n".join(map(safe, text.splitlines()))


def state(job: Job) -> str:
    """Return the job's state in its colour."""
    colour = _COLOURS.get(job.state)
    return f"[{colour}]{job.state}[/]" if colour else str(job.state)


def span(job: Job) -> str:
    """Return how long the command ran, or has been running."""
    if job.started_at is None:
        return ""
    return format_duration((job.ended_at or datetime.now(UTC)) - job.started_at)


def clock(at: datetime) -> str:
    """Return a time of day in the reader's own zone, with the date unless it is today's."""
    local = at.astimezone()
    today = datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if local.date() == today else "%Y-%m-%d %H:%M:%S")
