"""A real LXD with images that run cloud-init, on this machine alone, by its unix socket.

    with lxd.running() as server, server.project() as project:
        project.socket, project.name, project.image("debian")    # what a client needs
        project.instances(), project.left()                      # what there is, by LXD itself

or in a component test the fixture ``lxd``: a project of its own, removed with all that is in it.
Machines get an address by DHCP that this host reaches; they do not reach beyond it. The image is
Debian 12 with cloud-init, an SSH server, python3 and sudo; `lxd_image.VARIANTS` are others, and
``tiny`` is made, started and removed in a moment, and does nothing.

There is one LXD on a machine at most, shared by all tests that run at the same time, each in its
own project. Everybody who uses it holds a lock; a keeper (this module run as a program) starts it,
waits until nobody holds the lock any more, be it that all were killed, and ends it with all it has.
What a killed keeper left is cleared by the next. The image is built once and kept in `FOLDER`:
``python -m testbeds.lxd build`` does that ahead, which takes a minute.

Needs root, and the programs in `PROGRAMS`.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from testbeds import lxd_image

FOLDER = Path("/var/tmp/gridcloud-testbeds/lxd")
RUN = FOLDER / "run"
PROGRAMS = ("lxd", "lxc", "lxcfs", "dnsmasq", "mmdebstrap", "mkfs.btrfs", "ip", "losetup")
BRIDGE, POOL = "gclxdbr0", "default"
_PATIENCE = 60.0
_ENVIRONMENT = os.environ | {
    "LXD_DIR": str(RUN / "lxd"),
    "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
}
_count = itertools.count()


def problem() -> str:
    """Return why there can be no LXD here; empty when there can."""
    if os.geteuid() != 0:
        return "LXD needs root"
    missing = [p for p in PROGRAMS if shutil.which(p, path=_ENVIRONMENT["PATH"]) is None]
    return f"there is no {', '.join(missing)}" if missing else ""


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Give the LXD of this machine, started if it does not run, for as long as it is wanted."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with _locked("users", fcntl.LOCK_SH):
        with _locked("start", fcntl.LOCK_EX):
            image = lxd_image.built(FOLDER)
            if not (_answers() and _kept()):
                _start()
            server = Server(RUN / "lxd" / "unix.socket", image)
            server.forget_the_dead()
        yield server


@dataclass(frozen=True)
class Server:
    """The LXD. ``socket`` is where its API is."""

    socket: Path
    rootfs: Path

    @contextlib.contextmanager
    def project(self, **config: str) -> Iterator[Project]:
        """Make a project, with limits if told, and remove it with all that is in it at the end."""
        name = f"gc{os.getpid()}n{next(_count)}"
        features = {"features.images": "false", "features.profiles": "false"}
        body = {"name": name, "config": features | {k.replace("_", "."): config[k] for k in config}}
        self.query("POST", "/1.0/projects", body)
        project = Project(self, name)
        try:
            yield project
        finally:
            project.clear()
            self.query("DELETE", f"/1.0/projects/{name}")

    def forget_the_dead(self) -> None:
        """Remove the projects of test runs that were killed."""
        for one in self.query("GET", "/1.0/projects?recursion=1"):
            pid = one["name"].removeprefix("gc").partition("n")[0]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                with contextlib.suppress(RuntimeError):  # another run does so as well
                    Project(self, one["name"]).clear()
                    self.query("DELETE", f"/1.0/projects/{one['name']}")

    def query(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API, wait for the operation that this begins, and return its metadata."""
        answer = self._ask(method, path, None if body is None else json.dumps(body), {})
        return self._awaited(answer)

    def import_image(self, variant: str) -> str:
        """Import a variant of the image unless it is there; return its alias."""
        with _locked("images", fcntl.LOCK_EX):
            aliases = self.query("GET", "/1.0/images/aliases?recursion=1")
            if variant not in {alias["name"] for alias in aliases}:
                metadata, rootfs = RUN / f"{variant}.tar", self.rootfs
                lxd_image.write_metadata(metadata, variant)
                if variant == "tiny":
                    rootfs = RUN / "tiny-rootfs.tar"
                    lxd_image.write_tiny(rootfs, self.rootfs)
                _run("lxc", "image", "import", "-q", metadata, rootfs, f"--alias={variant}")
        return variant

    @contextlib.contextmanager
    def https(self, folder: Path) -> Iterator[str]:
        """Let LXD answer over TLS; give where, with what it trusts and what proves it in a folder
        as ``lxc remote add far`` leaves them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        _run(
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "1", "-subj", "/CN=test", "-keyout", folder / "client.key"),
            *("-out", folder / "client.crt"),
        )
        shutil.copy(RUN / "lxd/server.crt", folder / "servercerts/far.crt")
        _run("lxc", "config", "trust", "add", folder / "client.crt", "--name=far")
        _run("lxc", "config", "set", "core.https_address", address)
        try:
            yield address
        finally:
            _run("lxc", "config", "unset", "core.https_address")
            for trusted in self.query("GET", "/1.0/certificates?recursion=1"):
                self.query("DELETE", f"/1.0/certificates/{trusted['fingerprint']}")

    def _awaited(self, answer: Any) -> Any:
        if answer["type"] == "error":
            raise RuntimeError(answer["error"])
        if answer["type"] == "sync":
            return answer["metadata"]
        done = self._ask("GET", f"{answer['operation']}/wait", None, {})
        if done["type"] == "error" or done["metadata"]["status_code"] != 200:
            raise RuntimeError(done.get("error") or done["metadata"]["err"])
        return done["metadata"]

    def _ask(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> Any:
        link = _UnixConnection(self.socket)
        try:
            link.request(method, path, body, headers)
            return json.loads(link.getresponse().read())
        finally:
            link.close()


@dataclass(frozen=True)
class Project:
    """A part of the LXD that one test has for itself; images are shared by all."""

    server: Server
    name: str

    @property
    def socket(self) -> Path:
        """Where the API is."""
        return self.server.socket

    def image(self, variant: str = "debian") -> str:
        """Return the alias of a variant of the image, which is imported when first asked for."""
        return self.server.import_image(variant)

    def query(self, method: str, path: str, body: Any = None) -> Any:
        """Ask the API about this project; see `Server.query`."""
        return self.server.query(
            method, f"{path}{'&' if '?' in path else '?'}project={self.name}", body
        )

    def lxc(self, *arguments: str | Path) -> str:
        """Run LXD's own command line here; return what it prints."""
        return _run("lxc", "--project", self.name, *arguments)

    def instances(self) -> list[dict[str, Any]]:
        """Return the instances, as LXD shows them."""
        return self.query("GET", "/1.0/instances?recursion=1")

    def volumes(self) -> list[dict[str, Any]]:
        """Return the custom volumes."""
        found = self.query("GET", f"/1.0/storage-pools/{POOL}/volumes/custom?recursion=1")
        return [volume for volume in found if volume.get("project", self.name) == self.name]

    def left(self) -> list[str]:
        """Return the names of all that is there."""
        return [thing["name"] for thing in (*self.instances(), *self.volumes())]

    def clear(self) -> None:
        """Remove all that is there."""
        deadline = time.monotonic() + _PATIENCE
        while left := self.instances():
            for instance in left:
                path = f"/1.0/instances/{instance['name']}"
                # One that is ephemeral goes by being stopped; others may be on their way as well.
                with contextlib.suppress(RuntimeError):
                    self.query("PUT", f"{path}/state", {"action": "stop", "force": True})
                with contextlib.suppress(RuntimeError):
                    self.query("DELETE", path)
            if time.monotonic() > deadline:
                raise RuntimeError(f"LXD does not remove {left}")
        for volume in self.volumes():
            self.query("DELETE", f"/1.0/storage-pools/{POOL}/volumes/custom/{volume['name']}")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("lxd", timeout=_PATIENCE)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@contextlib.contextmanager
def _locked(name: str, how: int) -> Iterator[None]:
    # The kernel gives a lock back when its holder ends, however that ends.
    with (FOLDER / f"{name}.lock").open("ab") as lock:
        fcntl.flock(lock, how)
        yield


def _answers() -> bool:
    with contextlib.suppress(OSError, ValueError, RuntimeError, http.client.HTTPException):
        Server(RUN / "lxd" / "unix.socket", Path()).query("GET", "/1.0")
        return (RUN / "ready").exists()
    return False


def _kept() -> bool:
    """Tell whether a keeper waits for the end."""
    with (FOLDER / "keeper.lock").open("ab") as lock:
        return not _taken(lock)


def _start() -> None:
    with (FOLDER / "keeper.log").open("wb") as log:
        # It is nobody's child, since it may outlive whoever starts it.
        subprocess.run(
            ["sh", "-c", 'setsid "$@" &', "sh", sys.executable, "-m", "testbeds.lxd"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parent.parent)},
            check=True,
        )
    deadline = time.monotonic() + _PATIENCE
    while not _answers():
        told = (FOLDER / "keeper.log").read_text(errors="replace")
        if "Traceback" in told or time.monotonic() > deadline:
            raise RuntimeError(f"LXD did not start: {told}")
        time.sleep(0.05)


def keep() -> None:
    """Start an LXD, wait until nobody uses it, and end it: the life of the keeper."""
    with _locked("keeper", fcntl.LOCK_EX):
        _clear()
        (RUN / "lxd").mkdir(parents=True)
        for folder in (FOLDER.parent, FOLDER, RUN, RUN / "lxd"):
            folder.chmod(0o711)  # the root of a container is a stranger here, and needs its files
        with (RUN / "lxd.log").open("wb") as log:
            daemon = subprocess.Popen(
                ["lxd", "--group", "root"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        try:
            _run("lxd", "waitready", f"--timeout={_PATIENCE:.0f}")
            _configure()
            (RUN / "ready").touch()
            with (FOLDER / "users.lock").open("ab") as users:
                # One that died is cleared away at once: whoever comes next starts another.
                while daemon.poll() is None and not _taken(users):
                    time.sleep(0.1)
                with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
                    _run("lxd", "shutdown", "--timeout=20", patience=30.0)
                _reap(daemon)
                _clear()
        finally:
            _reap(daemon)


def _taken(lock: IO[bytes]) -> bool:
    """Take a lock for oneself alone if nobody has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _configure() -> None:
    _run("lxc", "storage", "create", POOL, "btrfs", "size=12GiB")
    _run(
        *("lxc", "network", "create", BRIDGE, "ipv4.address=10.214.7.1/24", "ipv6.address=none"),
        *("ipv4.nat=false", "ipv4.firewall=false", "dns.mode=none"),
    )
    device = ("lxc", "profile", "device", "add", "default")
    _run(*device, "root", "disk", "path=/", f"pool={POOL}")
    _run(*device, "eth0", "nic", f"network={BRIDGE}", "name=eth0")


def _reap(daemon: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.wait(10)
    daemon.kill()
    daemon.wait()


def _clear() -> None:
    """End and remove all that an LXD in `RUN` has or had: processes, mounts, disks, a bridge."""
    if not RUN.exists():
        return
    deadline = time.monotonic() + _PATIENCE
    while pids := _processes():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"these do not end: {pids}")
        time.sleep(0.05)
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed([one for one in mounts if one.startswith(f"{RUN}/")]):
        _run("umount", "--lazy", mount)
    for line in _run("losetup", "--list", "--noheadings", "--output=NAME,BACK-FILE").splitlines():
        if f"{RUN}/" in line:
            _run("losetup", "--detach", line.split()[0])
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        _run("ip", "link", "delete", BRIDGE)
    for group in _cgroups():
        for inner, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                Path(inner).rmdir()
    shutil.rmtree(RUN)


def _processes() -> list[int]:
    """Return what LXD started: what names its folder, and what is in a container of a test."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                named = (entry / "cmdline").read_bytes() + b"\0"
                if named.startswith(b"lxd\0"):
                    named += (entry / "environ").read_bytes()
                if os.fsencode(f"{RUN}/") in named:
                    found.add(int(entry.name))
    for group in _cgroups():
        for tasks in group.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in tasks.read_text().split()}
    return sorted(found)


def _cgroups() -> list[Path]:
    return [
        group
        for kind in ("payload", "monitor")
        for group in Path("/sys/fs/cgroup").glob(f"**/lxc.{kind}.gc*n*_*")
        if group.is_dir()
    ]


def _run(*command: str | Path, patience: float = _PATIENCE * 2) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=patience,
        env=_ENVIRONMENT,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:4]))}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def build() -> None:
    """Build the image ahead, where there can be an LXD."""
    if not problem():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with _locked("start", fcntl.LOCK_EX):
            lxd_image.built(FOLDER)


if __name__ == "__main__":
    build() if sys.argv[1:] == ["build"] else keep()
