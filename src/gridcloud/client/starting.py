"""Finding the user's own site, and starting it when none runs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gridcloud.errors import Unavailable

_START_WITHIN_SECONDS = 30.0


def answers(state: Path) -> bool:
    """Return whether a site's daemon listens for the state folder. Does not block."""
    with _socket_path(state) as path, socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _socket_path(state: Path) -> Iterator[str]:
    """Give a path to the site's socket short enough for the kernel, however deep the folder."""
    try:
        folder = os.open(state, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        yield str(state / "api.sock")[:100]
        return
    try:
        yield f"/proc/self/fd/{folder}/api.sock"
    finally:
        os.close(folder)


def ensure(state: Path, settings_file: Path) -> None:
    """Start the site's daemon unless it runs; return once it answers. Blocks up to half a minute.

    The daemon outlives its caller. Raises `Unavailable` with the daemon's own words when it
    does not come up.
    """
    if answers(state):
        return
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = state / "site.log"
        log.touch(mode=0o600)
    except OSError as error:
        raise Unavailable(
            f"The state folder {state} cannot be used: {error.strerror}.",
            hint="Choose another with GRIDCLOUD_STATE.",
        ) from error
    environment = os.environ | {
        "GRIDCLOUD_STATE": str(state),
        "GRIDCLOUD_SETTINGS": str(settings_file),
    }
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "gridcloud.site"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=state,
            env=environment,
        )
    deadline = time.monotonic() + _START_WITHIN_SECONDS
    while time.monotonic() < deadline:
        if answers(state):
            # From here on the daemon is on its own: forget the child so that none warns of it.
            process.returncode = 0
            return
        if process.poll() is not None and not answers(state):
            raise Unavailable(f"The site did not start: {_last_words(log, start)}")
        time.sleep(0.02)
    raise Unavailable(f"The site did not answer in time; see {log}.")


def _last_words(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace").strip()
    return text.removeprefix("error: ") or f"see {log}"
