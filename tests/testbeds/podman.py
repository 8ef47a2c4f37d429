"""A real podman with an API of its own: its images are shared and kept, all else is thrown away.

    with podman() as engine:
        engine.address            # unix:///…/api.sock
        engine.cli("ps", "--all")

Needs root, podman, runc and mmdebstrap. The image (Debian with Python, called `IMAGE`) is built
once on a machine, below /var/tmp/gridcloud-testbeds. Each engine has its storage, its socket and
its configuration in one folder; what a run that was killed left there is removed by the next one.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IMAGE = "localhost/gridcloud-test:1"
PROGRAMS = ("podman", "runc", "mmdebstrap")
CACHE = Path("/var/tmp/gridcloud-testbeds/podman-1")
_PREFIX = "gridcloud-podman-"
_PATIENCE = 60.0
_CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{root}"
runroot = "{run}"
[storage.options]
additionalimagestores = [{more}]
"""


def missing() -> str:
    """Return why podman cannot be run here; empty when it can."""
    if os.geteuid():
        return "needs root"
    lacking = [name for name in PROGRAMS if not shutil.which(name)]
    return f"needs {', '.join(lacking)}" if lacking else ""


@dataclass
class Engine:
    """A running podman service; ``pid`` is the service's."""

    folder: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Where its API is."""
        return self.folder / "api.sock"

    @property
    def address(self) -> str:
        """Where its API is, as DOCKER_HOST has it."""
        return f"unix://{self.socket}"

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a podman command on the same storage."""
        return subprocess.run(
            _podman(self.folder, *arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=_PATIENCE * 2,
        )

    def start(self) -> None:
        """Start the service, and wait until it answers."""
        self.socket.unlink(missing_ok=True)
        with (self.folder / "service.log").open("ab") as log:
            self.process = subprocess.Popen(
                _podman(self.folder, "system", "service", "--time=0", self.address),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _PATIENCE
        while not self.socket.exists():
            assert self.process.poll() is None, (self.folder / "service.log").read_text()
            assert time.monotonic() < deadline, "podman's service did not come up"
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop the service; containers go on. Idempotent."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def labelled(self, label: str = "gridcloud-site") -> list[str]:
        """Return the names of all containers with a label, asked past the API."""
        listed = self.cli("ps", "--all", "--filter", f"label={label}", "--format", "{{.Names}}")
        return listed.stdout.split()


@contextlib.contextmanager
def podman() -> Iterator[Engine]:
    """Give an engine of its own, and remove everything of it in the end."""
    store = image_store()
    _clear_old()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
    (folder / "owner").write_text(f"{os.getpid()} {_started(os.getpid())}")
    engine = Engine(folder, _environment(folder, store))
    try:
        engine.start()
        yield engine
    finally:
        engine.cli("rm", "--all", "--force", "--time", "0", check=False)
        engine.stop()
        _clear(folder)


def _podman(folder: Path, *arguments: str) -> list[str]:
    return ["podman", "--tmpdir", str(folder / "tmp"), *arguments]


def _environment(folder: Path, *more_stores: Path) -> dict[str, str]:
    (folder / "containers.conf").write_text(_CONFIGURATION)
    (folder / "registries.conf").write_text("unqualified-search-registries = []\n")
    more = ", ".join(f'"{store}"' for store in more_stores)
    (folder / "storage.conf").write_text(
        _STORAGE.format(root=folder / "root", run=folder / "run", more=more)
    )
    return os.environ | {
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }


def image_store() -> Path:
    """Return a folder of images that any number of engines read; made once on a machine."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = CACHE / "root"
        if not (CACHE / "complete").exists():
            _clear(store)
            build = CACHE / "build"
            _clear(build)
            build.mkdir()
            archive = build / "image.tar"
            subprocess.run(
                [
                    *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"),
                    "--include=python3",
                    "--dpkgopt=path-exclude=/usr/share/doc/*",
                    "--dpkgopt=path-exclude=/usr/share/man/*",
                    "--dpkgopt=path-exclude=/usr/share/locale/*",
                    '--customize-hook=rm -rf "$1"/var/lib/apt/lists "$1"/var/cache/apt',
                    *("bookworm", str(archive)),
                ],
                check=True,
                capture_output=True,
            )
            environment = _environment(build)
            subprocess.run(
                [*_podman(build), "--root", str(store), "import", str(archive), IMAGE],
                env=environment,
                check=True,
                capture_output=True,
            )
            _clear(build)
            (CACHE / "complete").touch()
        return store


def _clear_old() -> None:
    """Remove what runs that were killed left behind."""
    for folder in Path("/tmp").glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):
            pid, started = (folder / "owner").read_text().split()
            if _started(int(pid)) != started:
                _clear(folder)


def _clear(folder: Path) -> None:
    """End what has to do with a folder, unmount what is mounted in it, and remove it."""
    for pid in _processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _PATIENCE
    while _processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


def _processes_of(folder: Path) -> set[int]:
    """Return the processes whose command line or control group names a folder, with children."""
    mark = os.fsencode(folder) + b"/"
    found, parents = set(), {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry.name)
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if mark in (entry / "cmdline").read_bytes() + b"/" and pid != os.getpid():
                found.add(pid)
    grown = True
    while grown:  # conmon is named, what it runs is its child
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found - {os.getpid()}


def _started(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""
