"""What is measured against: real sites, an SSH server of our own, PSI/J in a process of its own.

Everything made here is a context manager that leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

# The tests' own beds: the same real sites and servers as the component tests start.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from testbeds import sshd
from testbeds.sites import GRIDCLOUD, SiteProcess, wait_until

__all__ = ["GRIDCLOUD", "SiteProcess", "wait_until"]

_PSIJ = Path(__file__).with_name("psij_jobs.py")
_PR_SET_CHILD_SUBREAPER = 36
CAPACITY = '[providers.local]\ncpus = 2\nmemory = "8G"\n'
LENDING = '[lending]\nenabled = true\nmax_time = "1h"\ndisk = "1G"\n'


@contextlib.contextmanager
def site(base: Path, name: str, *, lending: bool = False) -> Iterator[SiteProcess]:
    """Start a site of two CPUs; end it and all it started."""
    made = SiteProcess(base / name, name, CAPACITY + (LENDING if lending else ""))
    try:
        made.start()
        made.stop()  # a first start also makes the store, and loads what that takes
        made.start()
        yield made
        made.stop()
    finally:
        made.close()


@contextlib.contextmanager
def ssh_command(base: Path) -> Iterator[list[str] | None]:
    """Start an SSH server on a loopback address; give a command that logs in there by key.

    None where there is no OpenSSH to start.
    """
    if not sshd.available():
        yield None
        return
    key = base / "ssh_key"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bench", "-f", key], check=True
    )
    with sshd.sshd(host="127.0.0.19", authorized=[key.with_suffix(".pub").read_text()]) as machine:
        known = base / "known_hosts"
        known.write_text(f"[{machine.host}]:{machine.port} {machine.host_key_line}\n")
        options = [f"UserKnownHostsFile={known}", "IdentitiesOnly=yes", "BatchMode=yes"]
        yield [
            *("ssh", "-F", "/dev/null", "-i", str(key), "-p", str(machine.port)),
            *(part for option in options for part in ("-o", option)),
            f"{machine.user}@{machine.host}",
        ]


class PsiJ:
    """PSI/J, once in a fresh Python or many times in a running one."""

    def __init__(self, base: Path) -> None:
        # It keeps launcher scripts in the home folder, which is not ours to fill.
        self._environment = os.environ | {"HOME": str(base)}
        self._process: subprocess.Popen[str] | None = None

    def fresh(self) -> None:
        """Start a Python that imports PSI/J, runs one job and ends."""
        subprocess.run([sys.executable, _PSIJ], env=self._environment, check=True)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Keep one Python with PSI/J imported, for `run`."""
        self._process = subprocess.Popen(
            [sys.executable, _PSIJ, "serve"],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield
        finally:
            self._process.kill()
            self._process.communicate()

    def run(self, count: int) -> tuple[float, float]:
        """Run jobs there; return wall and CPU seconds, as it measured them itself."""
        process = self._process
        assert process and process.stdin and process.stdout
        process.stdin.write(f"{count}\n")
        process.stdin.flush()
        wall, cpu = process.stdout.readline().split()
        return float(wall), float(cpu)


def adopt_orphans() -> None:
    """Make guards, which detach from their site, our children, so that their CPU time is told."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (1, 0, 0, 0)))


def bury_orphans() -> float:
    """Bury ended children and return the CPU seconds they took. No `Popen` may have ended."""
    seconds = 0.0
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if child.status() == psutil.STATUS_ZOMBIE:
                _, _, usage = os.wait4(child.pid, os.WNOHANG)
                seconds += usage.ru_utime + usage.ru_stime
    return seconds


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and of its ended children."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)
