"""The first process in a sandbox: starts what the site asks for on descriptors the site hands in.

Runs with the standard library alone, isolated (``python -I -S``), and is shown in the sandbox
read-only. It is trusted by nobody but its own guest: the site treats its replies as hostile.

Protocol, on a Unix stream socket whose listening end is inherited (the socket's file lies
outside the sandbox): the site sends a 4-byte big-endian length and a JSON object
``{"argv": [...], "env": {...}}``, with three descriptors (SCM_RIGHTS) for standard input, output
and error. When the process has ended the agent sends one line, ``{"exit": code}`` or
``{"signal": number}``, or ``{"errno": number}`` if it could not be started at all. A closed
connection ends nothing: what was started lives until it ends or the sandbox does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import sys
import termios

TYPE_CHECKING = False  # `typing` itself would cost a tenth of the start-up
if TYPE_CHECKING:
    from typing import Any, NoReturn

MAX_REQUEST_BYTES = 4 << 20
NOT_EXECUTABLE, NOT_FOUND = 126, 127
_SCOPE_ABSTRACT_SOCKETS = 1
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446


def settle(plan: dict[str, Any]) -> None:
    """Take on the limits and the guest's identity, for good: hard limits, no way back to root."""
    for name, value in plan["limits"].items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (limit, limit))
    if plan["scope"]:
        scope_abstract_sockets()
    if plan["uid"] is not None:
        os.setgroups([])
        os.setresgid(plan["gid"], plan["gid"], plan["gid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    os.umask(0o022)
    os.chdir(plan["home"])


def scope_abstract_sockets() -> None:
    """Keep the guest off the host's abstract Unix sockets, which a shared network would show.

    Landlock, since Linux 6.12 (landlock(7)); older kernels offer no way and leave them in reach.
    """
    import ctypes  # noqa: PLC0415 - takes half of the start-up time, and few sandboxes need it

    libc = ctypes.CDLL(None, use_errno=True)
    ruleset = (ctypes.c_uint64 * 3)(0, 0, _SCOPE_ABSTRACT_SOCKETS)
    fd = libc.syscall(_LANDLOCK_CREATE_RULESET, ruleset, ctypes.sizeof(ruleset), 0)
    if fd >= 0:
        libc.syscall(_LANDLOCK_RESTRICT_SELF, fd, 0)
        os.close(fd)


def execute(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Become the process asked for; never returns."""
    status = NOT_FOUND
    try:
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        argv = request["argv"]
        os.execvpe(argv[0], argv, os.environ | request["env"])  # noqa: S606 - no shell is meant
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        status = NOT_FOUND if missing else NOT_EXECUTABLE
        with contextlib.suppress(OSError):
            os.write(2, f"{request['argv'][0]}: {error.strerror}\n".encode(errors="replace"))
    finally:
        os._exit(status)


class Connection:
    """One request of the site, from its first byte to the reply."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = bytearray()
        self.fds: list[int] = []

    def receive(self) -> dict[str, Any] | None:
        """Take what has come; return the request once whole. EOFError: none will come."""
        data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 3)
        self.fds += fds
        self.data += data
        size = int.from_bytes(self.data[:4], "big")
        if not data or size > MAX_REQUEST_BYTES or len(self.fds) > 3:
            raise EOFError
        if len(self.data) < 4 + size or len(self.data) < 4:
            return None
        request: dict[str, Any] = json.loads(self.data[4:])
        return request

    def reply(self, word: str, number: int) -> None:
        """Send the one reply and close."""
        with contextlib.suppress(OSError):
            self.sock.send(json.dumps({word: number}).encode() + b"\n", socket.MSG_DONTWAIT)
        self.close()

    def close(self) -> None:
        """Let go of the socket and of the descriptors handed in."""
        self.sock.close()
        while self.fds:
            os.close(self.fds.pop())


class Agent:
    """Accepts connections and waits for what it started; single-threaded."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.running: dict[int, Connection] = {}
        self.selector = selectors.DefaultSelector()
        wakeup, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.wakeup = wakeup
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(wakeup, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until the sandbox ends."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self.accept()
                elif key.fileobj == self.wakeup:
                    os.read(self.wakeup, 4096)
                    self.reap()
                else:
                    self.hear(key.data)

    def accept(self) -> None:
        """Take a connection, if there is one and room for it."""
        with contextlib.suppress(OSError):
            sock, _ = self.listener.accept()
            sock.setblocking(False)
            self.selector.register(sock, selectors.EVENT_READ, Connection(sock))

    def hear(self, connection: Connection) -> None:
        """Read from a connection; start its process once the request is whole."""
        try:
            request = connection.receive()
        except BlockingIOError:
            return
        except (OSError, EOFError, ValueError):
            self.selector.unregister(connection.sock)
            connection.close()
            return
        if request is None:
            return
        # From here on nothing is read, so that a closed connection goes unnoticed.
        self.selector.unregister(connection.sock)
        try:
            pid = os.fork()
        except OSError as error:
            connection.reply("errno", error.errno or 0)
            return
        if pid == 0:
            execute(request, connection.fds)
        self.running[pid] = connection
        while connection.fds:
            os.close(connection.fds.pop())

    def reap(self) -> None:
        """Reply for every process that has ended."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                connection = self.running.pop(pid)
                if os.WIFSIGNALED(status):
                    connection.reply("signal", os.WTERMSIG(status))
                else:
                    connection.reply("exit", os.WEXITSTATUS(status))


def main() -> None:
    """Settle, tell the keeper that all is ready, serve."""
    plan = json.loads(sys.argv[1])
    listener = socket.socket(fileno=plan["listener"])
    ready = plan["ready"]
    for fd in (listener.fileno(), ready):
        os.set_inheritable(fd, False)
    listener.setblocking(False)
    settle(plan)
    agent = Agent(listener)
    os.write(ready, b"ready")
    os.close(ready)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    agent.serve()


if __name__ == "__main__":
    main()
