"""Commands on a machine over SSH, with bounded answers in bounded time."""

from __future__ import annotations

import asyncio
import shlex

import asyncssh
from pydantic import ValidationError

from gridcloud.access.session import SSHSession
from gridcloud.errors import InvalidSpec, TimedOut, Unavailable
from gridcloud.executors.executor import Executor
from gridcloud.executors.shells import SSHShell
from gridcloud.providers.base import MachineFacts

ANSWER_SECONDS = 30.0
_MOST_BYTES = 256 * 1024
_FACTS = tuple(MachineFacts.model_fields)


async def run(
    session: SSHSession, command: str, stdin: bytes = b"", seconds: float = ANSWER_SECONDS
) -> tuple[int, str]:
    """Run a command; return its status and what it printed, or if it failed its complaints.

    Raises `Unavailable` or `TimedOut`, and what logging in raises.
    """
    try:
        async with asyncio.timeout(seconds), session.process(command) as process:
            process.stdin.write(stdin)
            process.stdin.write_eof()
            output, errors = await asyncio.gather(
                _bounded(process.stdout), _bounded(process.stderr)
            )
            await process.wait_closed()
            status = process.exit_status
    except TimeoutError as error:
        raise TimedOut(f"The machine did not answer within {seconds:g} s.") from error
    except (asyncssh.Error, OSError) as error:
        raise Unavailable("The connection to the machine was cut.") from error
    if status is None:
        raise Unavailable("The connection to the machine was cut.")
    return status, (output if status == 0 else errors or output).decode(errors="replace")


async def run_as_root(
    session: SSHSession, user: str, script: str, *arguments: str, seconds: float = ANSWER_SECONDS
) -> str:
    """Run a shell script as root, logged in as ``user``; return what it printed.

    Raises `InvalidSpec` with its last words if it fails, and as `run` does.
    """
    sudo = [] if user == "root" else ["sudo", "-n"]
    command = shlex.join([*sudo, "sh", "-s", "--", *arguments])
    status, said = await run(session, command, script.encode(), seconds)
    if status:
        raise InvalidSpec(
            f"On the machine: {last_line(said) or f'status {status}'}.",
            hint="Root's rights without a password are needed there, and what a Linux comes with.",
        )
    return said


async def facts_of(session: SSHSession) -> MachineFacts:
    """Return what a machine is; raises `NotFound` if it has no Python to run jobs by."""
    found = await Executor(SSHShell(session), "").probe()
    try:
        return MachineFacts.model_validate({name: found.get(name) for name in _FACTS})
    except ValidationError as error:
        raise Unavailable(
            "The machine describes itself in a way that makes no sense.",
            hint="Check what python3 is in the image.",
        ) from error


def last_line(text: str) -> str:
    """Return the last line that says something, without its full stop, at most 300 characters."""
    lines = text.strip().splitlines()
    return lines[-1].strip().removeprefix("gridcloud: ").rstrip(".")[:300] if lines else ""


async def _bounded(reader: asyncssh.SSHReader[bytes]) -> bytes:
    """Read to the end, and keep only so much."""
    kept = b""
    while data := await reader.read(65536):
        kept = (kept + data)[:_MOST_BYTES]
    return kept
