"""Write docs/reference/command-line.md from the commands themselves: ``make_reference.py [FILE]``.

A test of the documentation fails when the page is not what this program would write.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from gridcloud.cli.main import cli
from gridcloud.errors import ERRORS, STATUSES

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "command-line.md"
_INTRODUCTION = """\
# Command line

<!-- Written by tools/make_reference.py; change the commands, then run it again. -->

Every command speaks to your own site, and starts it in the background when it does not run
(`gridcloud site stop` and `gridcloud serve` do not). Which site that is, two variables say:
`GRIDCLOUD_STATE` (its state folder) and `GRIDCLOUD_SETTINGS` (its settings file); see
[settings](settings.md). With `--json` a command prints JSON for programs.

Quantities: memory is written `512M`, `4G`, `1.5G` (powers of 1024), time `90s`, `15m`, `2h`,
`1d`, `1h30m` or `1:30:00`; a bare number is not a time. Tasks are `1-20`, `1,3,5-9` or `0-100:10`.
"""


def reference() -> str:
    """Return the page."""
    return "\n".join([_INTRODUCTION, *_commands(cli, ("gridcloud",)), *_statuses()])


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[str]:
    context = click.Context(group, info_name=path[-1])
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            if command.invoke_without_command:  # a command by itself, beside those below it
                yield from _command(command, (*path, name))
            yield from _commands(command, (*path, name))
        else:
            yield from _command(command, (*path, name))


def _command(command: click.Command, path: tuple[str, ...]) -> Iterator[str]:
    context = click.Context(command, info_name=" ".join(path))
    usage = " ".join([*path, *command.collect_usage_pieces(context)])
    yield f"## {' '.join(path)}\n"
    yield f"```text\n{usage}\n```\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    yield "| option | meaning |\n|---|---|"
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and isinstance(parameter, click.Option):
            names, meaning = (text.replace("|", r"\|") for text in record)
            yield f"| `{names}` | {' '.join(meaning.split())} |"
    yield ""


def _statuses() -> Iterator[str]:
    yield "## Exit statuses\n"
    yield (
        "`gridcloud run` ends with the status of the command it ran: 128 + N after signal N, 124\n"
        "at its time limit or its lease's end, 127 for a missing command. Otherwise 0 means done,\n"
        "1 that a job failed for another reason, 2 that the command line was wrong, 130 that it\n"
        "was interrupted, and:\n"
    )
    yield "| status | code in the API | HTTP | meaning |\n|---|---|---|---|"
    for code, (http, status) in STATUSES.items():
        meaning = inspect.cleandoc(ERRORS[code].__doc__ or "").splitlines()[0]
        if code == "internal":
            meaning = "A fault, in gridcloud or in a site that was asked."
        yield f"| {status} | `{code}` | {http} | {meaning} |"
    yield ""


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(reference(), encoding="utf-8")
    print(f"wrote {target}")
