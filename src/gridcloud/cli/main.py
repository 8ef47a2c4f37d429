"""The entrance of the command line. Commands are loaded when they are called, so that
``gridcloud --help`` answers at once."""

from __future__ import annotations

import importlib
import signal
import sys

import click

from gridcloud import __version__

#: Command → (module, what help says of it); the modules hold a click command of that name.
_COMMANDS = {
    "run": ("jobs_run", "Run a command, here or wherever it fits."),
    "jobs": ("jobs_show", "List jobs."),
    "logs": ("jobs_show", "Show what a job printed."),
    "events": ("jobs_show", "Show what happened to a job."),
    "cancel": ("jobs_show", "End a job and all it started."),
    "offers": ("sites", "Show which sites could serve a need, and why others cannot."),
    "status": ("sites", "Show how the site fares."),
    "site": ("sites", "The site itself: its identity, stopping it."),
    "serve": ("serving", "Run a site in the foreground."),
    "machine": ("machines", "Machines at your clouds: start, log in, lengthen, stop."),
    "stack": ("stacks", "Machines and volumes described in one file: plan, up, down."),
    "volume": ("volumes", "Disks that outlive machines: list, create, remove."),
    "sweep": ("sweep", "Find and remove what is left over at providers."),
    "costs": ("costs", "Show what your machines at clouds cost."),
    "lent": ("lent", "Show and end loans of this site's capacity."),
    "usage": ("usage", "Show what was lent and borrowed."),
    "receipts": ("receipts", "Its proofs, signed by both sides: list, export, verify."),
    "provider": ("providers", "The machines this site may use."),
    "grid": ("grid", "Look at the sites of all communities."),
    "community": ("communities", "Found, join and leave communities, and decide who is in them."),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"gridcloud.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gridcloud")
def cli() -> None:
    """Use, lend and borrow compute across organisations, with no central server.

    \b
    gridcloud run -- python analysis.py          run it, watch it, get its exit status
    gridcloud run --cpus 8 --in data --out 'results/*' -- python analysis.py
    gridcloud community join CODE                borrow from others, and lend to them
    """


def main() -> None:
    """Run the command line; the exit status follows `gridcloud.errors.STATUSES`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # 'gridcloud jobs | head' ends quietly
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - told apart where importing costs nothing any more
        _report(error)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: Exception) -> None:
    """Tell a known error in two lines and end; let any other be the bug that it is."""
    from pydantic import ValidationError

    from gridcloud.cli import render
    from gridcloud.errors import STATUSES, GridcloudError, InvalidSpec

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        text = str(first["msg"]).removeprefix("Value error, ")
        error = InvalidSpec(f"{field}: {text}.")
    if not isinstance(error, GridcloudError):
        raise error
    click.echo(f"error: {render.safe_lines(error.message)}", err=True)
    if error.hint:
        click.echo(f"  {render.safe_lines(error.hint)}", err=True)
    sys.exit(STATUSES[error.code][1])
