"""``gridcloud serve``: the site as a process in the foreground."""

from __future__ import annotations

import os
import sys

import click


@click.command()
@click.option(
    "--ephemeral",
    is_flag=True,
    help="End with standard input, cancel all jobs and take back all loans then.",
)
def serve(*, ephemeral: bool) -> None:
    """Run this site in the foreground until it is stopped (Ctrl-C, TERM).

    An institution runs this under its service manager. The state folder is GRIDCLOUD_STATE, the
    settings file GRIDCLOUD_SETTINGS ('gridcloud site show' prints both). Running jobs go on when
    the site stops and are found again when it starts.
    """
    # A process of its own kind: the site's code is not part of the command line's.
    command = [sys.executable, "-m", "gridcloud.site", *(["--ephemeral"] if ephemeral else [])]
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ.copy())  # noqa: S606 - becomes the daemon
