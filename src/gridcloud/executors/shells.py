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
from gridcloud.errors import TimedOut
from gridcloud.executors.frames import Reader

SUPERVISOR = Path(__file__).with_name("supervisor.py")
# The supervisor's text comes first on standard input: nothing needs to be on the machine.
# Free of single quotes and backslashes, which login shells (sh, csh, fish) read differently. All
# that was printed before the mark is noise of the login shell.
_MARK = "gridcloud-supervisor-begins"
_BOOTSTRAP = (
    f'import sys;print("{_MARK}",flush=True);'
    'exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())),"supervisor","exec"))'
)
# Here it is imported instead: a module, unlike a script, is compiled but once.
_IMPORT_IT = (
    "import sys; sys.path[:0] = sys.argv[1:]; import supervisor; sys.exit(supervisor.main())"
)
#: How long a machine may take to log in and start Python.
_START_SECONDS = 60.0


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
            *("-I", "-S", "-c", _IMPORT_IT, SUPERVISOR.parent),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
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
    """``noise`` is what the login shell printed, to be told when there is nothing better."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self._process = process
        self._noise = b""
        self.reader: Reader = self

    async def past_noise(self) -> None:
        """Wait until Python is there; whether it came, the frames tell."""
        mark = f"{_MARK}\n".encode()
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._process.stdout.readuntil(mark)
        except asyncio.IncompleteReadError as error:
            self._noise = error.partial[-4096:]
        except (asyncssh.Error, OSError) as error:
            if isinstance(error, TimeoutError):
                raise TimedOut(
                    f"The machine did not start Python within {_START_SECONDS:g} s.",
                    hint="Log in there and look what keeps 'python3 -c pass' from ending.",
                ) from error

    async def read(self, size: int) -> bytes:
        """Return what comes next; a connection that was cut is an end, as `ended` tells."""
        try:
            return await self._process.stdout.read(size)
        except (asyncssh.Error, OSError):
            return b""

    async def ended(self) -> tuple[int | None, str]:
        try:
            errors = await self._process.stderr.read(4096)
            await self._process.wait_closed()
        except (asyncssh.Error, OSError):
            return None, ""
        return self._process.exit_status, (errors or self._noise).decode(errors="replace")


class SSHShell:
    """Runs the supervisor over SSH; connections are shared and made anew when they break."""

    files_are_here = False

    def __init__(self, session: SSHSession) -> None:
        self._session = session

    @asynccontextmanager
    async def converse(self, request: bytes) -> AsyncIterator[Conversation]:
        """See `Shell`. Raises `GridcloudError` when the machine cannot be reached."""
        source = _supervisor_source()
        async with self._session.process(f"python3 -c {shlex.quote(_BOOTSTRAP)}") as process:
            with contextlib.suppress(asyncssh.Error, OSError):
                process.stdin.write(b"%d\n" % len(source) + source + request)
                process.stdin.write_eof()
            conversation = _SSHConversation(process)
            await conversation.past_noise()
            yield conversation


@cache
def _supervisor_source() -> bytes:
    return SUPERVISOR.read_bytes()
