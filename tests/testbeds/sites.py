"""Real sites as processes of their own, for tests: started, killed, started again, cleaned up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gridcloud import Client
from gridcloud.client import starting

GRIDCLOUD = Path(sys.executable).with_name("gridcloud")
PATIENCE = 60.0


class SiteProcess:
    """One site in ``folder``. Nothing of it outlives `close`, whatever a test did.

    ``enter`` is what its daemon's command line begins with, to run it in another network.
    """

    def __init__(
        self, folder: Path, name: str, settings: str = "", enter: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.folder = folder
        self.enter = enter
        self.state = folder / "state"
        self.settings_file = folder / "settings.toml"
        folder.mkdir(parents=True, exist_ok=True)
        self.settings_file.write_text(f'name = "{name}"\n{settings}')
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a command line needs to speak to this site."""
        return os.environ | {
            "GRIDCLOUD_STATE": str(self.state),
            "GRIDCLOUD_SETTINGS": str(self.settings_file),
        }

    def start(self, dying: str = "") -> None:
        """Start the daemon and wait until it answers; ``dying`` names the step to die at."""
        program = [str(Path(__file__).with_name("dying.py")), dying]
        with (self.folder / "site.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.enter, sys.executable, *(program if dying else ["-m", "gridcloud.site"])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        wait_until(lambda: starting.answers(self.state) or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()

    def client(self) -> Client:
        """Return an open client."""
        return Client(state=self.state, start=False)

    def cli(self, *arguments: str, **more) -> subprocess.CompletedProcess[str]:
        """Run a gridcloud command against this site."""
        return subprocess.run(
            [GRIDCLOUD, *arguments],
            env=self.environment | more.pop("env", {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **more,
        )

    def kill(self) -> None:
        """kill -9, as the worst moment would."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to stop, and return its exit status."""
        assert self.process
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def log(self) -> str:
        """Return what the daemon said."""
        return (self.folder / "site.log").read_text(errors="replace")

    def left(self) -> list[int]:
        """Return the processes that have to do with this site's folder."""
        found = []
        marks = (os.fsencode(self.state), os.fsencode(self.folder / "settings.toml"))
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    text += os.fsencode((entry / "cwd").readlink())
                    if any(mark in text for mark in marks):
                        found.append(int(entry.name))
        return found

    def close(self) -> None:
        """End the daemon and everything that it started."""
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process:
            self.process.wait()
        wait_until(lambda: not self.left())


def wait_until(condition, patience: float = PATIENCE) -> None:
    """Return once ``condition()`` is true; fail when it does not become so."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
