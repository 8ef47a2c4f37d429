"""Adds a provider of any kind: asks what has to be known, tries it, and keeps it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from gridcloud.cli.options import as_json
from gridcloud.errors import InvalidSpec, Unavailable

if TYPE_CHECKING:
    from gridcloud.model.asking import Question

_GROUP = "gridcloud.providers"


class AnyKind(click.Group):
    """A group with a command for each kind of provider that is installed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return those with a command of their own, and all other kinds."""
        from importlib.metadata import entry_points

        kinds = {entry.name for entry in entry_points(group=_GROUP)} - {"local"}
        return sorted(kinds | set(super().list_commands(ctx)))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a kind."""
        if own := super().get_command(ctx, cmd_name):
            return own
        return _command(cmd_name) if cmd_name in self.list_commands(ctx) else None


def _command(kind: str) -> click.Command:
    @click.command(kind, help=f"Add a provider of kind {kind}: you are asked what it needs.")
    @click.option(
        "--set",
        "given",
        multiple=True,
        metavar="SETTING=VALUE",
        help="A setting, instead of being asked; values as in TOML, or plain text. Repeatable.",
    )
    @click.option("--name", default=kind, show_default=True, help="What to call it.")
    @as_json
    def add(given: tuple[str, ...], name: str, *, json_: bool) -> None:
        from gridcloud.cli.providers import show_providers
        from gridcloud.client import Client

        settings = dict(map(_setting, given))
        with Client() as client:
            about = client.provider_kind(kind)
            if about.problem:
                raise Unavailable(f"Nothing of kind {kind} can be added: {about.problem}")
            settings |= _asked(about.questions, settings)
            info = client.add_provider(name, {"kind": kind} | settings)
        show_providers([info], json_=json_)
        if info.makes_machines and not json_:
            click.echo(f"'gridcloud provider check {name}' proves it with a real machine", err=True)

    return add


def _asked(questions: tuple[Question, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Return the answers; nobody is asked where nobody is."""
    open_ = [each for each in questions if each.setting not in given]
    lacking = [each.setting for each in open_ if each.needed and not each.default]
    present = sys.stdin.isatty() and sys.stderr.isatty()
    if not present:
        if lacking:
            raise InvalidSpec(
                f"{', '.join(lacking)}: must be said, and nobody is here to be asked.",
                hint=f"Add --set {lacking[0]}=VALUE.",
            )
        return {each.setting: _value(each.default) for each in open_ if each.default}
    answers = {}
    for question in open_:
        if answer := _answer(question):
            answers[question.setting] = _value(answer)
    return answers


def _answer(question: Question) -> str:
    from gridcloud.cli import render

    for number, choice in enumerate(question.choices, 1):
        click.echo(f"  {number}) {render.safe(choice)}", err=True)
    text = question.text + (" (a number, or another)" if question.choices else "")
    default = question.default or ("1" if question.needed and question.choices else "")
    while True:
        said = click.prompt(text, default=default, err=True, show_default=bool(default)).strip()
        if said.isdigit() and 1 <= int(said) <= len(question.choices):
            return question.choices[int(said) - 1]
        if said or not question.needed:
            return str(said)
        click.echo("This one is needed.", err=True)


def _setting(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given or not name:
        raise InvalidSpec(f"--set {text}: write SETTING=VALUE.")
    return name, _value(value)


def _value(text: str) -> Any:
    """Return a value as TOML reads it; what is none there is plain text."""
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
