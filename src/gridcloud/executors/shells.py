"""Two ways to run the supervisor: as a process here, or over an SSH connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Protocol

import asyncssh

from gridcloud.access.session import SSHSession

SUPERVISOR = Path(__file__).with_name("supervisor.py")
# The supervisor's text comes first on standard input: nothing needs to be on the machine.
_BOOTSTRAP = (
    "import sys;"
    "exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())),'supervisor','exec'))"
)


class Reader(Protocol):
    """The bytes a supervisor prints."""

    async def readline(self) -> bytes:
        """Return the next line with its end, or b"" at the end."""
        ...

    async def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes, b"" at the end."""
        ...


class Conversation(Protocol):
    """One run of the supervisor."""

    reader: Reader

    async def ended(self) -> tuple[int | None, str]:
        """Wait for its end; return its exit status (None if cut off) and the end of stderr."""
        ...


class Shell(Protocol):
    """A way to run the supervisor somewhere."""

    #: Whether the job's folder can be read as local files, so that its output is not carried.
    files_are_here: bool

    def converse(self, request: bytes) -> contextlib.AbstractAsyncContextManager[Conversation]:
        """Run the supervisor with one request line; leaving the context ends it, not the job."""
        ...


class _ProcessConversation:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        self._process = process
        self.reader: Reader = process.stdout

    async def ended(self) -> tuple[int | None, str]:
        assert self._process.stderr
        errors = await self._process.stderr.read(4096)
        return await self._process.wait(), errors.decode(errors="replace")


class LocalShell:
    """Runs the supervisor as a child here, in a session of its own."""

    files_are_here = True

    @contextlib.asynccontextmanager
    async def converse(self, request: bytes) -> AsyncIterator[Conversation]:
        """See `Shell`."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            SUPERVISOR,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=2**20,
        )
        try:
            assert process.stdin
            with contextlib.suppress(ConnectionError):
                process.stdin.write(request)
                await process.stdin.drain()
                process.stdin.close()
            yield _ProcessConversation(process)
        except BaseException:
            # Not by the transport: it would reap the child behind the loop's back.
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            raise
        finally:
            await process.wait()


class _SSHConversation:
    def __init__(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._process = process
        self.reader: Reader = process.stdout

    async def ended(self) -> tuple[int | None, str]:
        errors = await self._process.stderr.read(4096)
        await self._process.wait_closed()
        return self._process.exit_status, errors.decode(errors="replace")


class SSHShell:
    """Runs the supervisor over SSH; the connection is shared and made anew when it breaks."""

    files_are_here = False

    def __init__(self, session: SSHSession) -> None:
        self._session = session

    @asynccontextmanager
    async def converse(self, request: bytes) -> AsyncIterator[Conversation]:
        """See `Shell`. Raises `GridcloudError` when the machine cannot be reached."""
        source = _supervisor_source()
        command = f"python3 -c {shlex.quote(_BOOTSTRAP)}"
        process = await self._session.start(command)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionError, asyncssh.Error):
                process.stdin.write(b"%d\n" % len(source) + source + request)
                await process.stdin.drain()
                process.stdin.write_eof()
            yield _SSHConversation(process)
        finally:
            process.close()


@cache
def _supervisor_source() -> bytes:
    return SUPERVISOR.read_bytes()
