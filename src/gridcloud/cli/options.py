"""Options and output that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gridcloud.errors import InvalidSpec

if TYPE_CHECKING:
    from gridcloud.model.need import Need

F = TypeVar("F", bound=Callable[..., Any])


class _Quantity(click.ParamType[object]):
    """An option whose text a parser of `gridcloud.model.quantities` reads."""

    def __init__(self, name: str, parser: str) -> None:
        self.name = name
        self._parser = parser

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        if not isinstance(value, str):
            return value
        from gridcloud.model import quantities

        try:
            return getattr(quantities, self._parser)(value)
        except InvalidSpec as error:
            self.fail(str(error), param, ctx)


MEMORY = _Quantity("size", "parse_bytes")
DURATION = _Quantity("duration", "parse_duration")
TASKS = _Quantity("range", "parse_tasks")


def as_json(command: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "json_", is_flag=True, help="Print JSON for programs.")(command)


def need_options(command: F) -> F:
    """Add the options that say what work needs."""
    for option in (
        click.option(
            "--site", metavar="NAME", help="Only at the site of this name, never elsewhere."
        ),
        click.option("--time", "time_", type=DURATION, help="Run for this long at most, as 2h."),
        click.option("--gpus", default=0, show_default=True, help="GPUs it needs."),
        click.option("--memory", type=MEMORY, help="Memory it needs, as 4G.  [default: 1G]"),
        click.option("--cpus", default=1, show_default=True, help="CPUs it needs."),
    ):
        command = option(command)
    return command


def make_need(cpus: int, memory: int | None, gpus: int, time: timedelta | None) -> Need:
    """Return the need the options say, or end with a usage error that names the culprit."""
    from pydantic import ValidationError

    from gridcloud.model.need import Need

    values: dict[str, Any] = {"cpus": cpus, "gpus": gpus, "time": time}
    if memory is not None:
        values["memory_bytes"] = memory
    try:
        return Need(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0]).removesuffix("_bytes")
        raise InvalidSpec(
            f"--{option}: {first['msg']}.",
            hint="Needs are positive: at least 1 CPU, 1M of memory, and a time above zero.",
        ) from error


def print_json(value: Any) -> None:
    """Print a value, or a list of values, as JSON."""
    from pydantic import TypeAdapter

    click.echo(TypeAdapter(Any).dump_json(value, indent=2).decode())
