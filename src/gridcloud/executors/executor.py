"""Running jobs by supervisor, the same over every shell. See `gridcloud.executors.supervisor`
for the protocol: one request line in, JSON frames and raw output out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from gridcloud.errors import (
    Conflict,
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NotFound,
    TimedOut,
    Unavailable,
)
from gridcloud.executors.frames import frames
from gridcloud.executors.shells import Conversation, Shell
from gridcloud.model.frozen import Frozen
from gridcloud.model.job import Ending, Outcome
from gridcloud.model.lease import PLACE_GONE_STATUS

_NO_COMMAND = 127
#: How long the supervisor may take for one answer, on top of a grace; a slow disk needs some.
_ANSWER_SECONDS = 120.0
#: The supervisor's error codes → what they are here, and the next step. Whatever is retryable is
#: tried again for as long as the lease lasts, so only what may pass by itself is.
_ERRORS: dict[str, tuple[type[GridcloudError], str]] = {
    "disk-full": (Conflict, "Free space on the machine's disk, then run the job again."),
    "not-writable": (Forbidden, "Make the folder writable there for the user that logs in."),
    "os-error": (Unavailable, "Look at the machine's disk and its limits for that user."),
    "invalid-request": (InvalidSpec, "The job folder there may have been changed by hand."),
    "not-started": (NotFound, "Its folder was removed from the machine; run the job again."),
    "start-failed": (Conflict, "Look at the limits on processes and memory there."),
    "timed-out": (TimedOut, "Some process there cannot be ended; look at it."),
    "old-python": (NotFound, "Install Python 3.8 or newer as python3 on the machine."),
}


class Launch(Frozen):
    """What the supervisor is told of a command."""

    command: tuple[str, ...]
    env: dict[str, str]
    inherit_env: bool
    time_limit_seconds: float | None
    grace_seconds: float
    outputs: tuple[str, ...]
    ends_at_epoch: float | None


class LogFiles(Frozen):
    """Where a job's output is kept by its site."""

    stdout: Path
    stderr: Path

    def offsets(self) -> dict[str, int]:
        """Return how much of each is here already."""
        return {
            name: path.stat().st_size if path.exists() else 0
            for name, path in (("stdout", self.stdout), ("stderr", self.stderr))
        }

    def open(self, stream: str) -> IO[bytes]:
        """Open one of them to append to."""
        return (self.stderr if stream == "stderr" else self.stdout).open("ab")


class Executor:
    """Jobs in folders below ``root`` on the machine that ``shell`` reaches.

    Every method is idempotent and raises `Unavailable` (retryable) when the machine cannot be
    reached or the connection breaks; the job goes on meanwhile and keeps its log.
    """

    def __init__(self, shell: Shell, root: str) -> None:
        self._shell = shell
        self._root = root

    def folder(self, name: str) -> str:
        """Return the job folder called ``name``, as the supervisor and SFTP see it."""
        return f"{self._root}/{name}"

    async def prepare(self, name: str) -> str:
        """Make the job's folder; return the absolute path of the work folder in it."""
        frame = await self._ask({"do": "prepare", "folder": self.folder(name)})
        return str(frame["work"])

    async def run(
        self, name: str, launch: Launch, logs: LogFiles, started: Callable[[], None]
    ) -> Ending:
        """Start the job unless that was done before, and stay with it to its end."""
        spec = launch.model_dump(mode="json")
        return await self._follow({"do": "run", "spec": spec}, name, logs, started)

    async def watch(self, name: str, logs: LogFiles) -> Ending:
        """Stay with a job that was started before; output continues where ``logs`` end."""
        return await self._follow({"do": "watch"}, name, logs, lambda: None)

    async def cancel(self, name: str, grace_seconds: float) -> None:
        """End the job: TERM, then KILL after the grace, its whole process tree."""
        await self._ask(
            {"do": "cancel", "folder": self.folder(name), "grace_seconds": grace_seconds}
        )

    async def remove(self, name: str) -> None:
        """End the job if it runs, and remove its folder."""
        await self._ask({"do": "remove", "folder": self.folder(name)})

    async def states(self) -> dict[str, str]:
        """Return name → prepared, running, ended or lost, of all job folders below the root."""
        frame = await self._ask({"do": "list", "root": self._root})
        return {job["id"]: job["state"] for job in frame["jobs"]}

    async def probe(self) -> dict[str, Any]:
        """Return what the machine is: python, cpus, memory_bytes, gpus, hostname."""
        return await self._ask({"do": "probe"})

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        frame: dict[str, Any] = {}
        seconds = _ANSWER_SECONDS + float(request.get("grace_seconds", 0.0))
        try:
            async with (
                asyncio.timeout(seconds),
                self._shell.converse(_line(request)) as conversation,
            ):
                async for frame, _ in frames(conversation.reader):
                    if frame["event"] == "error":
                        raise _error(frame)
                await _expect_frame(frame, conversation)
        except TimeoutError as error:
            raise TimedOut(
                f"The machine did not answer within {seconds:g} s.",
                hint="Look whether its disk hangs.",
            ) from error
        return frame

    async def _follow(
        self, request: dict[str, Any], name: str, logs: LogFiles, started: Callable[[], None]
    ) -> Ending:
        carry = not self._shell.files_are_here
        line = _line(
            request | {"folder": self.folder(name), "offsets": logs.offsets(), "send_output": carry}
        )
        async with self._shell.converse(line) as conversation:
            with contextlib.ExitStack() as files:
                sinks: dict[str, IO[bytes]] = {}
                async for frame, data in frames(conversation.reader):
                    match frame["event"]:
                        case "output":
                            stream = str(frame["stream"])
                            if stream not in sinks:
                                sinks[stream] = files.enter_context(logs.open(stream))
                            _write(sinks[stream], data)
                        case "started":
                            started()
                        case "error":
                            raise _error(frame)
                        case "done":
                            return _ended(frame)
            await _expect_frame({}, conversation)
        raise Unavailable(f"The supervisor of {name} stopped without a word.")


def _write(sink: IO[bytes], data: bytes) -> None:
    try:
        sink.write(data)
        sink.flush()
    except OSError as error:
        raise Unavailable(
            f"The job's output cannot be kept: {error.strerror}.", hint="Free space on this disk."
        ) from error


def _line(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode() + b"\n"


async def _expect_frame(frame: dict[str, Any], conversation: Conversation) -> None:
    """Turn a supervisor that ended without an answer into an error that says why."""
    if frame:
        return
    status, errors = await conversation.ended()
    if status is None:
        raise Unavailable(
            "The connection to the machine was cut.",
            hint="What runs there goes on; it is picked up when the machine is back.",
        )
    if status == PLACE_GONE_STATUS:
        raise NotFound(errors.strip().removeprefix("gridcloud: "))
    # A csh that finds no command says so with a status of 1.
    if status == _NO_COMMAND or (status and "python3: command not found" in errors.lower()):
        raise NotFound(
            "There is no python3 on the machine.",
            hint="Install Python 3.8 or newer there, where a login without terminal finds it.",
        )
    said = errors.strip().splitlines()[-1:] or ["nothing"]
    raise Unavailable(
        f"The machine did not run the supervisor: status {status}, and it said {said[0]!r}.",
        hint="Check that a command can be run there: ssh USER@HOST python3 --version.",
    )


def _error(frame: dict[str, Any]) -> GridcloudError:
    code, message = str(frame.get("code", "")), str(frame.get("message", ""))
    kind, hint = _ERRORS.get(code, (Unavailable, "The machine may run another gridcloud."))
    return kind(_shown(message), hint=hint)


def _shown(text: str) -> str:
    """Return text that can be written down: names on a machine need not be UTF-8."""
    return text.encode(errors="replace").decode()


def _ended(frame: dict[str, Any]) -> Ending:
    outcome = Outcome(
        exit_code=frame.get("exit_code"),
        signal=frame.get("signal"),
        reason=str(frame.get("reason") or ""),
        message=str(frame.get("message") or ""),
        cpu_seconds=float(frame.get("cpu_seconds") or 0.0),
        max_rss_bytes=int(frame.get("max_rss_bytes") or 0),
    )
    return Ending(
        outcome=outcome,
        outputs=tuple((str(p), int(s)) for p, s in frame.get("outputs", [])),
        unmatched=tuple(map(_shown, frame.get("unmatched", []))),
        escaping=tuple(map(_shown, frame.get("escaping", []))),
    )
