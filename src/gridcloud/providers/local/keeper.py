"""The keeper of one sandbox: a small process that outlives the site and holds it to its lease.

Started by path, isolated, with the standard library alone (``python -I -S keeper.py FOLDER``),
since its start-up time is part of every borrowed job. Everything decided about the sandbox stands
in ``FOLDER/sandbox.json`` (see `bubblewrap.sandbox_plan`); the keeper only carries it out:

- goes into the background, takes a lock on ``keeper.lock`` (whose holder the kernel names to
  whoever asks), listens on ``agent.sock`` for the agent, starts bubblewrap, and, once the agent
  is ready, writes ``keeper.json`` and lets its starter go with exit status 0;
- a few times a second compares memory, disk and end with the lease, and ends the sandbox when
  one is exceeded, whether or not the site lives. A new ``sandbox.json`` is noticed by its time;
- whatever ended it, writes ``ended.json`` with reason, message and time.

Should the keeper itself be killed, the kernel kills bubblewrap and with it the whole sandbox.

Limits per process are the kernel's (the agent sets them). Those for the sandbox as a whole are
watched from here, so they can be overrun for a fraction of a second. A delegated cgroup would
close that gap.

One file of over 400 lines: what it would import it would have to find, at every start.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time

TYPE_CHECKING = False  # `typing` itself would cost a tenth of the start-up
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, NoReturn

#: Descriptors as bubblewrap and the agent inherit them.
LISTENER_FD, SECCOMP_FD, STATUS_FD, READY_FD, USERNS_FD = range(40, 45)

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
READY_SECONDS = 20.0
BUSY_SECONDS, IDLE_SECONDS = 0.25, 0.5
#: A look that is dear may take this part of the time at most.
SHARE_OF_TIME = 0.05
#: The agent and bubblewrap's own first process live in the sandbox at the owner's cost.
OWN_MEMORY_BYTES = 16 << 20
MAX_DEPTH = 128
#: Files cost an inode beside their blocks; without this a million empty files would be free.
INODE_BYTES = 512
CLONE_NEWUSER = 0x1000_0000
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Ended(Exception):
    """The sandbox must not live on; ``args`` are the reason (one word) and a sentence."""


def write_json(path: str, value: dict[str, Any]) -> None:
    """Replace a file of this folder at once, so that no reader ever sees half of it."""
    with open(f"{path}.new", "w", opener=lambda p, f: os.open(p, f, 0o600)) as file:
        json.dump(value, file)
    os.rename(f"{path}.new", path)  # noqa: PTH104 - pathlib costs start-up time


def listen() -> socket.socket:
    """Return the listening socket of the agent, made here where the guest cannot reach its file."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink("agent.sock")  # noqa: PTH108 - see write_json
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.umask(0o077)
    listener.bind("agent.sock")  # relative: an absolute path may not exceed 107 bytes
    listener.listen(64)
    return listener


def guest_namespace(uid: int, gid: int, inside: int) -> int:
    """Return a user namespace in which root is root and ``inside`` is the unused ``uid``.

    Only root can make one. So what a guest of root's site runs is nobody on the host: it owns
    no file, and the kernel counts its processes (it would not count root's).
    """
    import ctypes  # noqa: PLC0415 - os.unshare came with Python 3.12

    made, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWUSER):
                status = ctypes.get_errno()
            else:
                # No namespaces within this one: the kernel's word, beside the filter's.
                with open("/proc/sys/user/max_user_namespaces", "w") as file:  # noqa: PTH123
                    file.write("0")
                status = 0
                os.write(made[1], b"x")
                os.close(go_on[1])
                os.read(go_on[0], 1)
        finally:
            os._exit(status)
    os.close(made[1])
    os.close(go_on[0])
    try:
        if not os.read(made[0], 1):
            _, status = os.waitpid(child, 0)
            cause = os.strerror(os.waitstatus_to_exitcode(status))
            raise Ended("failed", f"making a user namespace: {cause}")
        for name, host in (("uid_map", uid), ("gid_map", gid)):
            with open(f"/proc/{child}/{name}", "wb", buffering=0) as map_file:  # noqa: PTH123
                map_file.write(b"0 0 1\n%d %d 1\n" % (inside, host))
        namespace = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
        os.close(go_on[1])
        os.waitpid(child, 0)
        return namespace
    finally:
        os.close(made[0])


def become_bubblewrap(plan: dict[str, Any], fds: dict[int, int], errors: int) -> NoReturn:
    """In the child: what a guest must not undo, then bubblewrap; never returns."""
    try:
        os.sched_setaffinity(0, plan["cpus"])
        os.nice(10)
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("1000")
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.dup2(errors, 2)
        for target, fd in fds.items():
            os.dup2(fd, target)
        os.execv(plan["argv"][0], plan["argv"])  # noqa: S606 - no shell is meant
    except OSError as error:
        os.write(2, f"starting {plan['argv'][0]}: {error}".encode(errors="replace"))
    finally:
        os._exit(1)


class Sandbox:
    """A running bubblewrap, and what can be seen of it from outside."""

    def __init__(self, plan: dict[str, Any], listener: socket.socket) -> None:
        """Start it; return when its agent answers. Raises `Ended` with bubblewrap's own words."""
        errors, ready, status = os.pipe(), os.pipe(), os.pipe()
        seccomp = os.open("seccomp.bpf", os.O_RDONLY)
        fds = {
            LISTENER_FD: listener.fileno(),
            SECCOMP_FD: seccomp,
            STATUS_FD: status[1],
            READY_FD: ready[1],
        }
        if plan["host_uid"] is not None:
            uid, gid, inside = plan["host_uid"], plan["host_gid"], plan["agent"]["uid"]
            fds[USERNS_FD] = guest_namespace(uid, gid, inside)
        self.pid = os.fork()
        if self.pid == 0:
            become_bubblewrap(plan, fds, errors[1])
        for fd in (seccomp, errors[1], ready[1], status[1], fds.get(USERNS_FD, -1)):
            if fd >= 0:
                os.close(fd)
        listener.close()
        self.init: int | None = None
        try:
            self._await_ready(ready[0], errors[0])
            told = os.read(status[0], 4096).split(b"\n")[0]
            pid = int(json.loads(told)["child-pid"])
            self.init_start = start_time(pid)
            self.init = os.pidfd_open(pid)
            self.init_pid = pid
            root = f"/proc/{pid}/root"
            # Held open: the guest's own view, which holds its processes and nothing else.
            self.proc = os.open(f"{root}/proc", os.O_RDONLY | os.O_DIRECTORY)
            self.memory_folders = [
                os.open(f"{root}{name}", os.O_RDONLY | os.O_DIRECTORY)
                for name in ("/tmp", "/dev/shm")  # noqa: S108 - the sandbox's own
            ]
        except BaseException:
            self.kill()
            raise
        finally:
            for fd in (errors[0], ready[0], status[0]):
                os.close(fd)

    def _await_ready(self, ready: int, errors: int) -> None:
        if not select.select([ready], [], [], READY_SECONDS)[0]:
            raise Ended("failed", f"the sandbox was not ready within {READY_SECONDS:.0f} s")
        if os.read(ready, 16):
            return
        if select.select([errors], [], [], 1.0)[0] and (text := os.read(errors, 2000)):
            raise Ended("failed", text.decode(errors="replace").strip())
        raise Ended("failed", "bubblewrap ended without a word")

    def kill(self) -> None:
        """Kill every process in it; return when the last is gone."""
        if self.init is None:
            self._kill_children()
        else:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.init, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        if self.init is not None:
            select.select([self.init], [], [])

    def _kill_children(self) -> None:
        # A moment after its birth the sandbox's first process waits for bubblewrap and does not
        # yet die with it. Stopped, bubblewrap has no further child meanwhile.
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        children = f"/proc/{self.pid}/task/{self.pid}/children"
        with contextlib.suppress(OSError), open(children) as file:  # noqa: PTH123
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)

    def has_exited(self) -> bool:
        """Whether bubblewrap has ended, which it does with the agent."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def processes(self) -> tuple[dict[str, int], int]:
        """Return the resident bytes of each process by the guest's PID, and all CPU ticks.

        The ticks of children that have ended count with those of their parents.
        """
        resident, ticks = {}, 0
        for name in os.listdir(self.proc):  # noqa: PTH208 - see write_json
            if name.isdigit() and (stat := self.read(f"{name}/stat")):
                fields = stat.rpartition(b")")[2].split()
                ticks += sum(map(int, fields[11:15]))
                resident[name] = int(fields[21]) * _PAGE
        return resident, ticks

    def tmpfs_bytes(self) -> int:
        """Return the memory that files in the sandbox's /tmp and /dev/shm take."""
        total = 0
        for fd in self.memory_folders:
            stat = os.fstatvfs(fd)
            total += (stat.f_blocks - stat.f_bfree) * stat.f_frsize
        return total

    def exact_memory_bytes(self, resident: dict[str, int]) -> int:
        """Return the memory in use, with what several processes share counted once.

        Files in tmpfs that are mapped stand in both sums of shared memory, so the larger counts.
        """
        anonymous = shared = 0
        for pid, bytes_at_most in resident.items():
            lines = self.read(f"{pid}/smaps_rollup").splitlines()
            if not lines and self.read(f"{pid}/statm"):
                anonymous += bytes_at_most  # it hides its memory, so none of it counts as shared
            for line in lines:
                name, _, value = line.partition(b":")
                if name in (b"Pss_Anon", b"SwapPss"):
                    anonymous += int(value.split()[0]) << 10
                elif name == b"Pss_Shmem":
                    shared += int(value.split()[0]) << 10
        return anonymous + max(shared, self.tmpfs_bytes())

    def deleted_bytes(self, pids: Iterable[str], device: int) -> int:
        """Return the disk that files take which are deleted but still open."""
        seen: dict[int, int] = {}
        for pid in pids:
            with contextlib.suppress(OSError):
                folder = os.open(f"{pid}/fd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
                try:
                    for fd in os.listdir(folder):  # noqa: PTH208 - see write_json
                        with contextlib.suppress(OSError):
                            stat = os.stat(fd, dir_fd=folder)
                            if stat.st_nlink == 0 and stat.st_dev == device:
                                seen[stat.st_ino] = stat.st_blocks * 512
                finally:
                    os.close(folder)
        return sum(seen.values())

    def read(self, name: str) -> bytes:
        """Return a file of the guest's /proc; empty when its process is gone."""
        try:
            fd = os.open(name, os.O_RDONLY, dir_fd=self.proc)
            try:
                return os.read(fd, 1 << 16)
            finally:
                os.close(fd)
        except OSError:
            return b""


def folder_bytes(name: str) -> Iterator[int | None]:
    """Measure the disk a folder takes, in small steps: yields None now and then, at last the sum.

    Never follows a symlink, even one that takes a folder's place meanwhile: each folder is opened
    from the one above. Raises `Ended` for folders nested so deep that nobody could walk them.
    """
    total, steps = 0, 0
    linked: set[int] = set()
    stack: list[tuple[int, Iterator[os.DirEntry[str]]]] = []

    def enter(child: str, parent: int | None) -> None:
        with contextlib.suppress(OSError):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            fd = os.open(child, flags, dir_fd=parent)
            stack.append((fd, os.scandir(fd)))

    enter(name, None)
    try:
        while stack:
            fd, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                os.close(stack.pop()[0])
                continue
            steps += 1
            if steps % 256 == 0:
                yield None
            try:
                stat = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if stat.st_nlink == 1 or stat.st_ino not in linked:
                total += stat.st_blocks * 512 + INODE_BYTES
            if entry.is_dir(follow_symlinks=False):
                if len(stack) >= MAX_DEPTH:
                    raise Ended("disk", f"Folders were nested more than {MAX_DEPTH} deep.")
                enter(entry.name, fd)
            elif stat.st_nlink > 1:
                linked.add(stat.st_ino)
    finally:
        for fd, _ in stack:
            os.close(fd)
    yield total


class Watch:
    """Compares a sandbox with its lease, again and again; each look is cheap or rare."""

    def __init__(self, sandbox: Sandbox, plan: dict[str, Any]) -> None:
        self.sandbox = sandbox
        self.plan = plan
        self.ticks = -1
        self.walks_due = 2
        self.exact_after = 0.0
        self.device = os.stat("home").st_dev  # noqa: PTH116 - see write_json
        self.walk = folder_bytes("home")

    def look(self) -> float:
        """Look once; return the seconds until the next look. Raises `Ended` with the reason."""
        self.renew()
        ends_at = self.plan["ends_at"]
        if ends_at is not None and time.time() >= ends_at:
            raise Ended("lease-end", "The lease has come to its end.")
        resident, ticks = self.sandbox.processes()
        busy = ticks != self.ticks
        self.ticks = ticks
        self.check_memory(resident)
        if busy:
            self.walks_due = 2  # the one under way, and one that begins after the last write
        if self.walks_due:
            self.check_disk(resident)
        pause = BUSY_SECONDS if busy else IDLE_SECONDS
        return pause if ends_at is None else max(0.0, min(pause, ends_at - time.time()))

    def renew(self) -> None:
        """Take over a changed end of the lease."""
        if identity(os.stat("sandbox.json")) != self.plan["identity"]:  # noqa: PTH116
            self.plan = read_plan()

    def check_memory(self, resident: dict[str, int]) -> None:
        """End a sandbox whose processes and tmpfs files together are over the limit."""
        limit = self.plan["memory_bytes"]
        allowed = limit + OWN_MEMORY_BYTES
        now = time.monotonic()
        at_most = sum(resident.values()) + self.sandbox.tmpfs_bytes()
        if at_most <= allowed or now < self.exact_after:
            return
        used = self.sandbox.exact_memory_bytes(resident)
        took = time.monotonic() - now
        self.exact_after = now + took / SHARE_OF_TIME
        if used > allowed:
            raise Ended(
                "memory",
                f"Its processes together used {used >> 20} MiB of memory; the lease has"
                f" {limit >> 20} MiB.",
            )

    def check_disk(self, pids: Iterable[str]) -> None:
        """Go on measuring the home for a moment; end a sandbox that is over the limit."""
        until = time.monotonic() + BUSY_SECONDS * SHARE_OF_TIME
        for size in self.walk:
            if size is not None:
                self.walk = folder_bytes("home")
                self.walks_due -= 1
                used = size + self.sandbox.deleted_bytes(pids, self.device)
                limit = self.plan["disk_bytes"]
                if used > limit:
                    raise Ended(
                        "disk",
                        f"Its files took {used >> 20} MiB of disk; the lease has"
                        f" {limit >> 20} MiB.",
                    )
                return
            if time.monotonic() > until:
                return


def read_plan() -> dict[str, Any]:
    """Return the plan of this folder's sandbox."""
    with open("sandbox.json") as file:  # noqa: PTH123 - see write_json
        plan: dict[str, Any] = json.load(file)
        plan["identity"] = identity(os.fstat(file.fileno()))
    return plan


def identity(stat: os.stat_result) -> tuple[int, int]:
    """Return what tells a file from the one that replaced it; the clock alone is too coarse."""
    return stat.st_ino, stat.st_mtime_ns


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot (proc(5)): tells reused PIDs."""
    with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - see write_json
        return int(file.read().rpartition(b")")[2].split()[19])


def keep(sandbox: Sandbox, plan: dict[str, Any]) -> NoReturn:
    """Watch until something ends the sandbox; always raises `Ended`."""
    watch = Watch(sandbox, plan)
    while True:
        caught = signal.sigtimedwait(SIGNALS, watch.look())
        if sandbox.has_exited():
            raise Ended("exited", "The sandbox's first process was ended from within.")
        if caught and caught.si_signo != signal.SIGCHLD:
            raise Ended("terminated", "The owner has ended the sandbox.")


def background(report: int) -> None:
    """As the background process: run one sandbox from start to end."""
    os.setsid()
    # Blocked, and taken one by one in `keep`: so they interrupt neither start nor end.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    # A POSIX lock: unlike flock, the kernel tells others who holds it (F_GETLK).
    lock = os.open("keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.write(report, b"a keeper holds this folder already")
        return
    sandbox = None
    try:
        plan = read_plan()
        sandbox = Sandbox(plan, listen())
        started = {"pid": os.getpid(), "init": sandbox.init_pid, "init_start": sandbox.init_start}
        write_json("keeper.json", started)
        os.write(report, b"ready")
        os.close(report)
        keep(sandbox, plan)
    except Ended as end:
        reason, message = end.args
    except OSError as error:
        reason, message = "failed", str(error)
    if sandbox:
        sandbox.kill()
        write_json("ended.json", {"reason": reason, "message": message, "at": time.time()})
    else:
        os.write(report, message.encode(errors="replace"))


def main() -> None:
    """Start the background process and wait until it is ready or says why it cannot be."""
    os.chdir(sys.argv[1])
    reading, report = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        background(report)
        return
    os.close(report)
    told = os.read(reading, 4096)
    if told != b"ready":
        sys.exit(told.decode(errors="replace") or "the keeper ended without a word")


if __name__ == "__main__":
    main()
