"""The supervisor: runs one job on a machine that has nothing but Linux and Python 3.8.

Its source text is sent over SSH and executed from memory, or it is run as a script for a job on
this host. One file of over 400 lines, with the standard library only, because it travels alone.
Protocol (ours): one JSON request line on stdin, answered by JSON frames, one a line, on stdout; an
``output`` frame is followed by ``size`` raw bytes. Exit status 0, 98 after an ``error`` frame, 97
where Python is too old. Names, arguments and environment are UTF-8 with surrogate escapes.

A job's folder has ``spec.json``, ``work/`` (where the command runs), ``stdout``, ``stderr``,
``status.json``, ``cancel`` (a wish) and ``guard.lock``. The *guard*, a detached process, holds the
lock while the job lives and writes the final status before it ends. So: lock held means running;
lock free and a status that is not final means the guard was killed, and the job is lost; lock free
and no status means that the command was never started, as the status is written before it is.
"""
# Quoted annotations let Python 3.6 get as far as the version check in `main`. The interface is the
# requests, not the functions. pathlib knows no bytes paths, and is slow to import.
# ruff: noqa: D102, D103, PTH101, PTH103, PTH104, PTH106, PTH108, PTH110, PTH111, PTH112, PTH113
# ruff: noqa: PTH116, PTH118, PTH123, PTH202, PTH208

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import sys
import time
from fnmatch import fnmatchcase

TYPE_CHECKING = False  # spares the import of typing, a good part of a short job's time
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Record = dict[str, Any]

STATUS_BYTES, CHUNK_BYTES = 4096, 256 * 1024
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.02, 0.25
KILL_SECONDS = 5.0  # how long killed processes may take to go, as when a disk hangs
AWAITED = (signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM)
NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
PASSED_OVER = (FileNotFoundError, ProcessLookupError, PermissionError)  # processes gone, not ours
CODES = {errno.ENOSPC: "disk-full", errno.EDQUOT: "disk-full", errno.EROFS: "not-writable"}
CODES.update({errno.EACCES: "not-writable", errno.EPERM: "not-writable"})


class Failure(Exception):
    """An expected failure, told to the caller as an error frame: its code and its message."""


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def to_text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def absolute(path: str) -> bytes:
    """Return a path of a request: absolute, or relative to the home folder."""
    home = os.path.expanduser(b"~")
    return os.path.normpath(os.path.join(home, os.path.expanduser(to_bytes(path))))


def emit(event: str, payload: bytes = b"", **fields: "Any") -> None:
    """Send one frame, waiting for a slow reader."""
    for data in (json.dumps({"event": event, **fields}).encode() + b"\n", payload):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]


def process(pid: int) -> "tuple[str, int, int, int]":
    """Return a process's state, parent, session and start time (proc(5), /proc/pid/stat)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        words = file.read().rpartition(b")")[2].split()  # the name before may hold anything
    return words[0].decode(), int(words[1]), int(words[3]), int(words[19])


def identity(pid: int) -> str:
    """Return what tells a process from a later one with its number, also after a reboot."""
    with contextlib.suppress(*PASSED_OVER), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{process(pid)[3]}"
    return ""


def family(is_seed: "Callable[[int, int, int], bool]") -> "set[int]":
    """Return live processes but this: seeds, told by number, parent, session; and descendants."""
    children: dict[int, list[int]] = {}
    found: set[int] = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(*PASSED_OVER):
            state, parent, session, _ = process(pid)
            if state not in "ZX" and pid != os.getpid():
                children.setdefault(parent, []).append(pid)
                found.update([pid] if is_seed(pid, parent, session) else ())
    stack = list(found)
    while stack:
        fresh = [pid for pid in children.get(stack.pop(), ()) if pid not in found]
        found.update(fresh)
        stack.extend(fresh)
    return found


def send(pids: "set[int]", *signals: int) -> None:
    for signo in signals:
        for pid in pids:
            with contextlib.suppress(*PASSED_OVER):
                os.kill(pid, signo)


def kill_all(find: "Callable[[], set[int]]", gone: "Callable[[], bool]") -> bool:
    """Kill what ``find`` finds until ``gone``; return False if that takes too long."""
    deadline = time.monotonic() + KILL_SECONDS
    stopped: set[int] = set()
    while time.monotonic() < deadline:
        if gone():
            return True
        found = find()
        if found <= stopped:  # only now, for a fork bomb would outrun one who kills at once
            send(found, signal.SIGKILL)
            time.sleep(0.005)
        send(found - stopped, signal.SIGSTOP)
        stopped |= found
    return False


def final_status(reason: str, message: str, started_at: "float | None" = None) -> "Record":
    """Return the status of a job whose command was not seen to end."""
    status = {"state": "ended", "exit_code": None, "signal": None, "reason": reason}
    measured = {"started_at": started_at, "ended_at": time.time(), "cpu_seconds": 0.0}
    return {**status, "message": message[:500], **measured, "max_rss_bytes": 0}


class Guard:
    """Starts the command, and stays until it and all its descendants are gone."""

    def __init__(self, job: "Job", spec: "Record") -> None:
        self.job = job
        self.command = [to_bytes(word) for word in spec["command"]]
        self.program = self.command[0]
        self.limit = float(spec.get("time_limit_seconds") or "inf")
        self.ends_at = float(spec.get("ends_at_epoch") or "inf")
        self.grace = float(spec.get("grace_seconds", 5.0))
        kept = (b"PATH", b"HOME", b"LANG", b"USER", b"TMPDIR")
        whole = spec.get("inherit_env", False)
        base = {name: value for name, value in os.environb.items() if whole or name in kept}
        own = {to_bytes(name): to_bytes(value) for name, value in spec.get("env", {}).items()}
        self.env = {b"PATH": os.fsencode(os.defpath), **base, **own}
        self.main, self.limit_at = 0, float("inf")
        self.wait_status: int | None = None
        self.started_at: float | None = None
        self.terminated = self.subreaper = False

    def live(self, lock: int, notice: int, logs: "list[int]") -> None:
        """Run the job from its start to its end. Blocks for as long as that takes."""
        self._detach({lock, notice, *logs})
        os.pwrite(lock, f"{os.getpid()} {identity(os.getpid())}".encode(), 0)
        reason, message = self._due()
        if not reason:
            reason, message = self._start(logs)
        while not reason and not self._reap() and self.wait_status is None:
            reason, message = self._due()
            if not reason:
                self._pause(self.limit_at)
        if not self._end_family():
            message = f"{message} Some of the job's processes could not be ended.".strip()
        status = final_status(reason, message, self.started_at)
        if self.wait_status is not None and os.WIFSIGNALED(self.wait_status):
            status["signal"] = os.WTERMSIG(self.wait_status)
        elif self.wait_status is not None:
            status["exit_code"] = os.WEXITSTATUS(self.wait_status)
        use = resource.getrusage(resource.RUSAGE_CHILDREN)
        status.update(cpu_seconds=use.ru_utime + use.ru_stime, max_rss_bytes=use.ru_maxrss * 1024)
        self.job.put_status(status)

    def _detach(self, keep: "set[int]") -> None:
        """Let go of all that belongs to the session which started this process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)  # they are waited for, never handled
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        null = os.open("/dev/null", os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        for inherited in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2} - keep:
            with contextlib.suppress(OSError):  # the one that did the listing is closed
                os.close(inherited)
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes  # noqa: PLC0415  (missing in some small Pythons)

            # PR_SET_CHILD_SUBREAPER: orphans of the job become our children.
            self.subreaper = ctypes.CDLL(None).prctl(36, *map(ctypes.c_ulong, (1, 0, 0, 0))) == 0

    def _start(self, logs: "list[int]") -> "tuple[str, str]":
        """Start the command; return reason and message if that fails, else empty texts."""
        self.started_at = time.time()
        known: Record = {"started_at": self.started_at, "session": os.getsid(0)}
        self.job.put_status({"state": "starting", **known, "pid": 0, "identity": ""})
        self.limit_at = time.monotonic() + self.limit
        os.environb[b"PATH"] = self.env[b"PATH"]  # where posix_spawnp looks
        actions = [(os.POSIX_SPAWN_DUP2, log, stream) for stream, log in enumerate(logs, 1)]
        reset = (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)
        # In a group of its own, as commands may signal their whole group.
        how: Any = {"file_actions": actions, "setpgroup": 0, "setsigmask": (), "setsigdef": reset}
        try:
            os.chdir(self.job.work)
            self.main = os.posix_spawnp(self.program, self.command, self.env, **how)
        except (OSError, ValueError) as error:  # the latter for an impossible name or a NUL
            number = getattr(error, "errno", errno.EINVAL)
            missing = number in NOT_THERE
            self.wait_status = (127 if missing else 126) << 8
            cause = f"Cannot execute {to_text(self.program)!r}: {os.strerror(number)}."
            return "command-not-found" if missing else "not-executable", cause
        known.update({"pid": self.main, "identity": identity(self.main)})
        self.job.put_status({"state": "running", **known})
        return "", ""

    def _due(self) -> "tuple[str, str]":
        """Return why the job has to end now, in a word and in a sentence, or empty texts."""
        if self.job.cancel_grace(0.0) is not None:
            return "canceled", "The job was canceled."
        if self.terminated:
            return "terminated", "The machine ended the job's guard process."
        if time.monotonic() >= self.limit_at:
            return "time-limit", f"The time limit of {self.limit:g} s was reached."
        if time.time() >= self.ends_at:
            return "lease-end", "The lease of the machine ended."
        return "", ""

    def _pause(self, until: float) -> None:
        """Sleep until a child ends, a signal comes, or ``until`` on the monotonic clock."""
        # Without a subreaper no signal tells of orphans' ends; and the wall clock may be set.
        often = 60.0 if self.subreaper else 0.2
        longest = min(often, until - time.monotonic(), self.ends_at - time.time())
        came = signal.sigtimedwait(AWAITED, max(longest, 0.01))
        self.terminated |= came is not None and came.si_signo == signal.SIGTERM

    def _reap(self) -> bool:
        """Bury dead children; return whether there are no others."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return False
                if pid == self.main:
                    self.wait_status = wait_status
        return True

    def _family(self) -> "set[int]":
        me, ours = os.getpid(), os.getsid(0)
        return family(lambda _, parent, session: parent == me or session == ours)

    def _gone(self) -> bool:
        """Bury dead children; return whether nothing of the job is left."""
        return self._reap() and (self.subreaper or not self._family())

    def _end_family(self) -> bool:
        """End what is left of the job, TERM and after the grace KILL; return whether all went."""
        send(set() if self._gone() else self._family(), signal.SIGTERM, signal.SIGCONT)
        began = time.monotonic()
        while not self._gone():
            grace = self.job.cancel_grace(self.grace)  # a cancel may shorten it
            until = began + (self.grace if grace is None else grace)
            if time.monotonic() >= until:
                return kill_all(self._family, self._gone)
            self._pause(until)
        return True


class Job:
    """The folder of one job; a method for each request about it, all of them idempotent."""

    def __init__(self, request: "Record") -> None:
        self.request = request
        self.folder = absolute(request["folder"])
        self.work = self._path("work")
        self.grace = float(request.get("grace_seconds", 5.0))
        if self.folder in (b"/", absolute("~")):
            raise Failure("invalid-request", "A job needs a folder of its own.")

    def run(self) -> None:
        """Start the job unless it was, and follow it to its end."""
        for _ in range(50):
            self._make()
            if self._follow(self._start(self.request["spec"])):
                return
            time.sleep(FIRST_POLL_SECONDS)  # someone who looked at the job had the lock just then
        raise Failure("start-failed", "The job's guard process does not start.")

    def watch(self) -> None:
        """Follow a job that was started before."""
        if not self.exists() or not self._follow():
            raise Failure("not-started", f"No job was started in {to_text(self.folder)}.")

    def cancel(self) -> None:
        """End the job, or see to it that it never starts, and tell its end."""
        self._done(self._end())

    def prepare(self) -> None:
        """Make the folder, for its owner's eyes only, and see that it can be written to."""
        self._make()
        self._write("trial", b" " * STATUS_BYTES)
        os.unlink(self._path("trial"))
        emit("prepared", work=to_text(self.work))

    def remove(self) -> None:
        """End the job if it runs, and delete its folder."""
        if self.exists():
            if self._settle():
                self._end()
            # The lock file marks a job's folder, so it goes last. Python's own ways of deleting
            # fail at folders nested a thousand deep.
            paths = [os.path.join(self.folder, name) for name in os.listdir(self.folder)]
            paths.remove(self._path("guard.lock"))
            for command in [b"chmod", b"-R", b"u+rwx", self.folder], [b"rm", b"-rf", *paths]:
                os.spawnvp(os.P_WAIT, command[0], command)  # noqa: S606
            os.unlink(self._path("guard.lock"))
        if os.path.isdir(self.folder):
            os.rmdir(self.folder)
        emit("removed")

    def exists(self) -> bool:
        return os.path.isdir(self.work) or os.path.exists(self._path("guard.lock"))

    def state(self) -> str:
        lock = self._try_lock()
        if lock is not None:
            os.close(lock)
        status = self._read("status.json")
        if status.get("state") == "ended":
            return "lost" if status["reason"] == "lost" else "ended"
        return "running" if lock is None else "lost" if status else "prepared"

    def put_status(self, status: "Record") -> None:
        """Replace the status in one step."""
        # Written over space that `_start` set aside, so that a disk now full cannot lose it.
        reserved = "status." + status["state"]
        self._write(reserved, json.dumps(status).encode().ljust(STATUS_BYTES))
        os.rename(self._path(reserved), self._path("status.json"))

    def cancel_grace(self, default: float) -> "float | None":
        """Return the grace in seconds if a cancel is wished, else None."""
        try:
            with open(self._path("cancel"), "rb") as file:
                return float(file.read() or default)  # a full disk takes the name alone
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> bytes:
        return os.path.join(self.folder, name.encode())

    def _make(self) -> None:
        os.makedirs(self.work, exist_ok=True)
        os.chmod(self.folder, 0o700)

    def _write(self, name: str, data: bytes) -> None:
        with open(os.open(self._path(name), os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(data)
            file.truncate()
            if name == "status.ended":
                os.fsync(file.fileno())

    def _try_lock(self) -> "int | None":
        """Return the lock, a descriptor to close, or None if a guard, or one who looks, has it."""
        lock = os.open(self._path("guard.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def _read(self, name: str) -> "Record":
        try:
            with open(self._path(name), "rb") as file:
                return dict(json.loads(file.read()))
        except FileNotFoundError:
            return {}

    def _settle(self, unstarted: "Record | None" = None) -> "Record":
        """Return the status, after writing it if no guard is left to; if unstarted, as told."""
        lock = self._try_lock()
        status = self._read("status.json")
        if lock is None:
            return status or {"state": "starting"}
        try:
            if status.get("state") == "ended":
                return status
            if status:
                kill_all(lambda: self._remains(status), lambda: not self._remains(status))
                message = "The job's guard process was killed, or the machine restarted."
                unstarted = final_status("lost", message, status["started_at"])
            if unstarted:
                self.put_status(unstarted)
            return unstarted or {}
        finally:
            os.close(lock)

    def _remains(self, status: "Record") -> "set[int]":
        """Return what is surely left of a lost job: its session, and what has its logs open."""
        paths = [self._path(name) for name in ("stdout", "stderr")]
        logs = [os.stat(path) for path in paths if os.path.exists(path)]
        known = status["pid"] and identity(status["pid"]) == status["identity"]

        def is_left(pid: int, _: int, session: int) -> bool:
            own = (os.stat(f"/proc/{pid}/fd/{stream}") for stream in (1, 2))
            in_session = bool(known) and session == status["session"]
            return in_session or any(os.path.samestat(log, to) for to in own for log in logs)

        return family(is_left)

    def _start(self, spec: "Record") -> "int | None":
        """Start the guard, once; return a pipe that ends with it, or None if it was started."""
        guard = Guard(self, spec)
        lock = self._try_lock()
        if lock is None:
            return None
        try:
            if self._read("status.json"):
                return None
            # All space that the guard needs is taken now, while a full disk can still be told.
            for reserved in ("starting", "running", "ended"):
                self._write(f"status.{reserved}", b" " * STATUS_BYTES)
            os.pwrite(lock, b" " * STATUS_BYTES, 0)
            self._write("spec.new", json.dumps(spec).encode())
            os.rename(self._path("spec.new"), self._path("spec.json"))
            append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            logs = [os.open(self._path(name), append, 0o600) for name in ("stdout", "stderr")]
            notice, notice_write = os.pipe()
            child = os.fork()
            if child == 0:
                try:  # forks again, so that the guard is nobody's child and leads no session
                    os.setsid()
                    if os.fork() == 0:
                        guard.live(lock, notice_write, logs)
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            os.close(notice_write)
            return notice
        finally:
            os.close(lock)  # the guard has the same lock by its own descriptor

    def _follow(self, notice: "int | None" = None) -> bool:
        """Send what the job writes, and its end; return False if it was never started."""
        sends = self.request.get("send_output", True)
        offsets = {"stdout": 0, "stderr": 0, **self.request.get("offsets", {})}
        poll = select.poll()
        poll.register(1, 0)  # tells when the other end is closed
        if notice is not None:
            poll.register(notice, select.POLLIN)
        interval, started = FIRST_POLL_SECONDS, False
        while True:
            status = self._settle()  # before the output, which after the end is then all there
            if not status:
                return False
            if not started and status.get("started_at"):
                started = True
                emit("started", started_at=status["started_at"])
            sent = [sends and self._send_output(name, offsets) for name in ("stdout", "stderr")]
            interval = FIRST_POLL_SECONDS if any(sent) else min(interval * 1.5, LAST_POLL_SECONDS)
            if status["state"] == "ended":
                self._done(status)
                return True
            timeout = interval * 1000 if sends or not (notice and started) else None
            for ready, _ in poll.poll(timeout):
                if ready == 1:
                    raise BrokenPipeError
                poll.unregister(ready)  # the guard has ended
                notice = None

    def _send_output(self, name: str, offsets: "dict[str, int]") -> int:
        first = offsets[name]
        with contextlib.suppress(FileNotFoundError), open(self._path(name), "rb") as log:
            for chunk in iter(lambda: os.pread(log.fileno(), CHUNK_BYTES, offsets[name]), b""):
                emit("output", chunk, stream=name, size=len(chunk))
                offsets[name] += len(chunk)
        return offsets[name] - first

    def _end(self) -> "Record":
        """Cancel, and wait for the end, which comes within the grace and some seconds."""
        self._make()
        with contextlib.suppress(OSError), open(self._path("cancel"), "wb") as file:
            file.write(b"%f" % self.grace)  # on a full disk the file's name alone does
        told, deadline = "", time.monotonic() + self.grace + 2 * KILL_SECONDS
        while time.monotonic() < deadline:
            status = self._settle(final_status("canceled", "It was canceled before it started."))
            if status["state"] == "ended":
                return status
            with open(self._path("guard.lock"), encoding="ascii") as file:
                pid, _, known = file.read().strip().partition(" ")
            if pid and pid != told and identity(int(pid)) == known:
                send({int(pid)}, signal.SIGUSR1)
                told = pid
            time.sleep(FIRST_POLL_SECONDS)
        raise Failure("timed-out", "The job was canceled, but did not end in time.")

    def _done(self, status: "Record") -> None:
        """Send the last frame: the final status and the outputs."""
        patterns = self._read("spec.json").get("outputs", [])
        files: dict[bytes, int] = {}
        escaping: set[bytes] = set()
        root = os.path.realpath(self.work)
        missed = [name for name in patterns if not find(root, to_bytes(name), files, escaping)]
        outputs = [[to_text(path), size] for path, size in sorted(files.items())]
        out = [to_text(path) for path in sorted(escaping)]
        emit("done", **status, outputs=outputs, unmatched=missed, escaping=out)


def find(root: bytes, pattern: bytes, files: "dict[bytes, int]", escaping: "set[bytes]") -> bool:
    """Add the regular files that a pattern names, or what leads out; return whether there is any.

    ``*`` and ``**`` pass over dot names as in a shell, ``**`` over links; a folder means all in it.
    """
    parts = tuple(part for part in pattern.split(b"/") if part not in (b"", b"."))
    if pattern.startswith(b"/") or b".." in parts:
        escaping.add(pattern)
        return True
    found = False
    seen = set()
    stack = [(b"", root, parts)] if pattern else []  # paths, real paths, the pattern's rests
    while stack:
        path, real, rest = stack.pop()
        folder = os.path.isdir(real)
        if real != root and not real.startswith(root + b"/"):
            escaping.update([path] if folder or not rest else ())
            found |= folder or not rest
        elif folder and (real, rest) not in seen:
            seen.add((real, rest))
            with contextlib.suppress(OSError):  # not readable
                enter(path, real, rest, stack)
        elif os.path.isfile(real) and not rest:
            files[path] = os.path.getsize(real)
            found = True
    return found


def enter(path: bytes, real: bytes, rest: "tuple[bytes, ...]", stack: "list[Any]") -> None:
    part = rest[0] if rest else b"*"
    deep = part == b"**"
    stack.extend([(path, real, rest[1:])] if deep else ())  # standing for nothing
    for entry in os.scandir(real):
        link = entry.is_symlink()
        hidden = entry.name.startswith(b".") and not part.startswith(b".")
        fits = not hidden and not (deep and link) and fnmatchcase(entry.name, part)
        if fits or not rest or entry.name == part:
            leads = os.path.realpath(entry.path) if link else entry.path
            then = (os.path.join(path, entry.name), leads, rest if deep else rest[1:])
            # Links go last: a folder is listed once, and under its own name.
            stack.insert(0 if link else len(stack), then)


def list_jobs(request: "Record") -> None:
    """Tell the jobs under a root and their states, changing nothing."""
    root = absolute(request["root"])
    names = sorted(os.listdir(root)) if os.path.isdir(root) else []
    jobs = {to_text(name): Job({"folder": to_text(os.path.join(root, name))}) for name in names}
    emit("jobs", jobs=[{"id": n, "state": job.state()} for n, job in jobs.items() if job.exists()])


def probe(_: "Record") -> None:
    """Tell what this machine is."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = sum(name[:6] == "nvidia" and name[6:].isdigit() for name in os.listdir("/dev"))
    sizes: Any = {"cpus": len(os.sched_getaffinity(0)), "gpus": gpus, "memory_bytes": memory_bytes}
    home = to_text(absolute("~"))
    emit("machine", python=python, hostname=os.uname().nodename, home=home, **sizes)


def main() -> int:
    """Serve the request on stdin and return the exit status."""
    if sys.version_info < (3, 8):  # noqa: UP036  (other machines' Pythons)
        emit("error", code="old-python", message=f"Python {sys.version.split()[0]} is too old.")
        return 97
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        request = json.loads(sys.stdin.buffer.readline())
        if request["do"] in ("run", "watch", "cancel", "prepare", "remove"):
            getattr(Job(request), request["do"])()
        else:
            {"list": list_jobs, "probe": probe}[request["do"]](request)
        return 0
    except BrokenPipeError:  # nobody reads any more; the job goes on
        return 0
    except Failure as failure:
        code, message = failure.args
    except OSError as error:
        code, message = CODES.get(error.errno or 0, "os-error"), f"{error}."
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        code, message = "invalid-request", f"The request or the job is malformed: {error!r}."
    with contextlib.suppress(BrokenPipeError):
        emit("error", code=code, message=message)
    return 98


if __name__ == "__main__":
    sys.exit(main())
