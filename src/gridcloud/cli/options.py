"""Options and output that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gridcloud.errors import InvalidSpec

if TYPE_CHECKING:
    from gridcloud.model.choice import Constraints
    from gridcloud.model.need import Need

#: As `gridcloud.model.choice.Strategy`, which is not imported for ``--help``; a test compares.
STRATEGIES = ("first-fit", "best-fit", "fair-fit", "cheapest", "nearest-data")
_CONSTRAINTS = {
    "countries": ("country", "The code is that of ISO 3166, as in DK, DE, SE."),
    "kinds": ("kind", "See 'gridcloud offers' for the kinds there are."),
    "within": ("within", "Name a community as 'gridcloud community list' does, or 'own'."),
    "max_price": ("max-price", "It is an amount of credits for the whole job."),
}

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


def choice_options(command: F) -> F:
    """Add the options that say where work may run, and which place is best."""
    for option in (
        click.option(
            "--strategy",
            type=click.Choice(STRATEGIES),
            help="Which place is best.  [default: as the site's settings have it]",
        ),
        click.option(
            "--max-price",
            type=click.FloatRange(min=0),
            metavar="CREDITS",
            help="Only where all of it costs no more; needs --time.",
        ),
        click.option(
            "--within",
            multiple=True,
            metavar="NAME",
            help="Never outside this community; 'own' is your own machines alone. Repeatable.",
        ),
        click.option(
            "--kind",
            "kinds",
            multiple=True,
            metavar="KIND",
            help="Only on capacity of this kind of provider, as ssh. Repeatable.",
        ),
        click.option(
            "--country",
            "countries",
            multiple=True,
            metavar="CODE",
            help="Only in this country, as DK. Repeatable.",
        ),
    ):
        command = option(command)
    return command


def make_constraints(
    countries: tuple[str, ...],
    kinds: tuple[str, ...],
    within: tuple[str, ...],
    max_price: float | None,
) -> Constraints:
    """Return the constraints the options say, or end with a usage error that names the culprit."""
    from pydantic import ValidationError

    from gridcloud.model.choice import Constraints

    try:
        return Constraints(countries=countries, kinds=kinds, within=within, max_price=max_price)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option, hint = _CONSTRAINTS[str(first["loc"][0])]
        message = str(first["msg"]).removeprefix("Value error, ")
        raise InvalidSpec(f"--{option} {first['input']}: {message}.", hint=hint) from error


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
