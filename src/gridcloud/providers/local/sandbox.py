"""Lent sandboxes as the site handles them: launch, run in, extend, end, remove.

The state of a sandbox is in its folder and its processes alone, so a site that was killed finds
its sandboxes again. Whether a keeper lives is asked of the kernel, by the lock it holds.

Protocol with the agent: see `gridcloud.providers.local.agent`. Whatever comes from there may have
been made up by the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import select
import shlex
import signal
import socket
import stat
import struct
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

from gridcloud.errors import GridcloudError, InvalidSpec, NotFound, TimedOut, Unavailable
from gridcloud.model.frozen import Frozen
from gridcloud.providers.local.bubblewrap import (
    START_SECONDS,
    SandboxSpec,
    explain,
    keeper_command,
    prepare,
    write_plan,
)
from gridcloud.providers.local.keeper import start_time

__all__ = [
    "SandboxSpec",
    "SandboxState",
    "extend",
    "launch",
    "remove_tree",
    "run",
    "state",
    "terminate",
]

MAX_REPLY_BYTES = 256
#: How long the connection to a live agent may take; a guest could stop it from answering.
CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.01
#: ``struct flock`` of fcntl(2) on 64-bit Linux: type, whence, start, length, PID.
_FLOCK = "hhqqi"
_launching: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()


class SandboxState(Frozen):
    """Whether a sandbox lives; once ended, ``reason`` is one word and ``message`` a sentence.

    Reasons: ``lease-end``, ``memory``, ``disk``, ``terminated``, ``exited`` (from within),
    ``keeper`` (its keeper was killed, as by a reboot), ``unstarted``, ``failed``.
    """

    phase: Literal["running", "ended", "absent"]
    reason: str = ""
    message: str = ""


async def launch(spec: SandboxSpec) -> None:
    """Start the sandbox; return when commands can be run in it. Does not block the loop.

    Idempotent: one that lives in ``spec.folder`` is kept as it is. One that has ended is started
    anew, with the home it had. On an error, and when cancelled, nothing is left running; the
    folder stays until `terminate`. Raises `InvalidSpec` or `Unavailable` with the cause.
    """
    async with _launching.setdefault(spec.folder, asyncio.Lock()):
        if await asyncio.to_thread(_await_started, spec.folder):
            return
        await asyncio.to_thread(_end, spec.folder, START_SECONDS)
        await asyncio.to_thread(prepare, spec)
        await _start_keeper(spec.folder)


async def run(
    folder: Path,
    command: str | Sequence[str],
    stdin: int,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run a command in the sandbox, on descriptors of the site; return its exit status.

    A text is run by the sandbox's shell. A process ended by signal n returns 128 + n, a program
    that is not there 127. The descriptors go to the guest for good: give pipes, sockets or a
    terminal made for it, never a file of the host. They stay open here too; the caller closes
    its own. Does not block the loop. Cancelling leaves the command running.

    Raises `NotFound` if there is no such sandbox, `Unavailable` if it has ended (with the
    reason) or ends meanwhile, `InvalidSpec` for a command that cannot be passed on.
    """
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    if not argv or any("\0" in text for text in (*argv, *(env or {}), *(env or {}).values())):
        raise InvalidSpec(f"{shlex.join(argv)!r} cannot be run: it is empty or holds a NUL.")
    request = json.dumps({"argv": argv, "env": dict(env or {})}).encode()
    message = len(request).to_bytes(4, "big") + request
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await _connect(sock, folder)
                sent = socket.send_fds(sock, [message], [stdin, stdout, stderr])
                # Once it has all of it, the agent may answer and close before we look again.
                if rest := message[sent:]:
                    await loop.sock_sendall(sock, rest)
            reply = b""
            while len(reply) < MAX_REPLY_BYTES and not reply.endswith(b"\n"):
                piece = await loop.sock_recv(sock, MAX_REPLY_BYTES - len(reply))
                if not piece:
                    break
                reply += piece
        except TimeoutError as error:
            raise Unavailable("The sandbox does not answer; its guest may have stopped it.") from (
                error
            )
        except OSError as error:
            raise await asyncio.to_thread(_lost, folder) from error
    if not reply:
        raise await asyncio.to_thread(_lost, folder)
    return _exit_status(reply)


async def terminate(folder: Path, timeout: float = 20.0) -> None:
    """End the sandbox, wait until its last process is gone, remove its folder with the home.

    Idempotent; a folder that does not exist is no error. Does not block the loop. ``timeout`` in
    seconds. Raises `TimedOut` if processes remain, and then removes nothing.
    """
    await asyncio.to_thread(_terminate, folder, timeout)


def state(folder: Path) -> SandboxState:
    """Return what has become of a sandbox. Reads two small files at most."""
    if not folder.is_dir():
        return SandboxState(phase="absent")
    if _keeper(folder):
        return SandboxState(phase="running")
    ended = _read(folder / "ended.json")
    if ended:
        return SandboxState(phase="ended", reason=ended["reason"], message=ended["message"])
    if _read(folder / "keeper.json"):
        message = "Its keeper was killed, or the host restarted."
        return SandboxState(phase="ended", reason="keeper", message=message)
    return SandboxState(phase="ended", reason="unstarted", message="It was never started.")


def extend(folder: Path, ends_at: datetime) -> None:
    """Move the end of the lease, to later or earlier; the keeper follows within a second.

    Writes one small file; idempotent. Raises `NotFound` if there is no sandbox, `InvalidSpec`
    for a time without a zone. Has no effect on a sandbox that has ended.
    """
    if ends_at.tzinfo is None:
        raise InvalidSpec("The end of a lease needs a time zone.")
    plan = _read(folder / "sandbox.json")
    if plan is None:
        raise NotFound(f"There is no sandbox {folder.name!r}.")
    write_plan(folder, plan | {"ends_at": ends_at.timestamp()})


async def _start_keeper(folder: Path) -> None:
    starter = await asyncio.create_subprocess_exec(
        *keeper_command(folder),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        cwd="/",
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            _, told = await starter.communicate()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            starter.kill()
        await asyncio.shield(asyncio.to_thread(_end, folder, START_SECONDS))
        await starter.wait()
        if isinstance(error, TimeoutError):
            raise Unavailable(f"The sandbox did not start in {START_SECONDS} s.") from error
        raise
    if starter.returncode:
        await asyncio.to_thread(_end, folder, START_SECONDS)
        raise explain(told.decode(errors="replace").strip().removesuffix("."))


async def _connect(sock: socket.socket, folder: Path) -> None:
    # By way of a descriptor: a socket's path may not exceed 107 bytes.
    try:
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise NotFound(f"There is no sandbox {folder.name!r}.") from error
    try:
        while True:
            try:
                return sock.connect(f"/proc/self/fd/{fd}/agent.sock")
            except BlockingIOError:  # the agent's queue is full; there is no event for that
                await asyncio.sleep(_POLL_SECONDS)
    finally:
        os.close(fd)


def _exit_status(reply: bytes) -> int:
    """Return the exit status in an agent's reply, believing nothing but a small number."""
    try:
        ((word, number),) = json.loads(reply).items()
    except (ValueError, AttributeError, RecursionError):
        word, number = "", -1
    if type(number) is int:
        if word == "exit" and 0 <= number <= 255:
            return number
        if word == "signal" and 1 <= number <= 64:
            return 128 + number
        if word == "errno" and 0 <= number <= 255:
            raise Unavailable(
                f"The sandbox could not start the command: {os.strerror(number)}.",
                hint="It may have reached its limit of processes.",
            )
    raise Unavailable("The sandbox gave an answer that makes no sense; its guest may have done it.")


def _lost(folder: Path) -> GridcloudError:
    """Return the error for a sandbox that does not answer (any more), with why it ended."""
    until = time.monotonic() + 2.0
    while (now := state(folder)).phase == "running" and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    if now.phase == "running":
        return Unavailable("The sandbox's agent broke off; its guest may have ended it.")
    if now.phase == "absent":
        return NotFound(f"There is no sandbox {folder.name!r}.")
    return Unavailable(f"The sandbox has ended ({now.reason}): {now.message}")


def _keeper(folder: Path) -> int | None:
    """Return the PID of the keeper that holds the folder's lock at this moment."""
    try:
        fd = os.open(folder / "keeper.lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, question))
        return None if kind == fcntl.F_UNLCK else int(pid)
    finally:
        os.close(fd)


def _await_started(folder: Path) -> bool:
    """Return whether a sandbox is ready; waits for a keeper that is still starting."""
    while _keeper(folder):
        if (folder / "keeper.json").exists():
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _end(folder: Path, timeout: float) -> None:
    """End keeper and sandbox; return when no process is left. Blocks; raises `TimedOut`.

    Without a sandbox it does nothing.
    """
    until = time.monotonic() + timeout
    asked = False
    while pid := _keeper(folder):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            # Asked again: now the descriptor surely means the lock's holder.
            if _keeper(folder) == pid:
                # Killed, it takes the sandbox with it; terminated, it writes down why first.
                number = signal.SIGKILL if asked else signal.SIGTERM
                signal.pidfd_send_signal(fd, number)
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll(max(0.0, min(5.0, until - time.monotonic())) * 1000)
                asked = True
        except ProcessLookupError:
            continue
        finally:
            os.close(fd)
        if time.monotonic() > until:
            break
    while _keeper(folder) or _first_process_lives(folder) or _kill_stillborn(folder):
        if time.monotonic() > until:
            raise TimedOut(
                f"The sandbox {folder.name!r} could not be ended in {timeout:.0f} s.",
                hint="A process may hang in the kernel, on a dead disk; try again later.",
            )
        time.sleep(_POLL_SECONDS)


def _first_process_lives(folder: Path) -> bool:
    """Whether the sandbox's PID 1 lives; once it is dead the kernel has ended all the others."""
    started = _read(folder / "keeper.json")
    if not started:
        return False
    try:
        fields = Path(f"/proc/{started['init']}/stat").read_bytes().rpartition(b")")[2].split()
        return start_time(started["init"]) == started["init_start"] and fields[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _kill_stillborn(folder: Path) -> bool:
    """Kill what is left of a keeper that was itself killed; return whether there was anything.

    Killed within milliseconds of its start, before any of the guest's code runs, it can leave a
    child that has yet to become bubblewrap, or one of bubblewrap's that waits forever for a dead
    parent. They are known by their whole command lines, which name this folder.
    """
    plan = _read(folder / "sandbox.json")
    if plan is None or (folder / "ended.json").exists():
        return False
    ours = [
        b"".join(os.fsencode(word) + b"\0" for word in argv)
        for argv in (plan["argv"], keeper_command(folder))
    ]
    found = False
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fd = os.pidfd_open(int(path.name))
            try:
                if (path / "cmdline").read_bytes() in ours:
                    found = True
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)
    return found


def _terminate(folder: Path, timeout: float) -> None:
    if not folder.is_dir() or folder.is_symlink():
        return
    _end(folder, timeout)
    try:
        remove_tree(folder)
    except OSError as error:
        raise Unavailable(f"The sandbox's folder could not be removed: {error}.") from error


def remove_tree(folder: Path) -> None:
    """Remove a folder, however its guest left it: any depth, any permissions.

    No process of the guest lives any more, so nothing changes meanwhile. A folder's folders are
    moved up before it goes, so neither the length of a path nor the depth of a stack matters.
    """
    moved = 0
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                Path(entry).unlink()
                continue
            Path(entry).chmod(stat.S_IRWXU)
            for inner in list(os.scandir(entry)):
                if inner.is_dir(follow_symlinks=False):
                    Path(inner).chmod(stat.S_IRWXU)
                    moved += 1
                    Path(inner).rename(folder / f".removing-{moved}")
                else:
                    Path(inner).unlink()
            Path(entry).rmdir()
    folder.rmdir()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return value
