"""Ways to run the supervisor: as a process here, over an SSH connection, or in a place on this
host that is entered, as a container is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Protocol

import asyncssh

from gridcloud.access.session import SSHSession
from gridcloud.errors import NotFound, TimedOut, Unavailable
from gridcloud.executors.frames import Reader
from gridcloud.model.lease import PLACE_GONE_STATUS

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


class Enter(Protocol):
    """Runs a command line in a place on this host, as a provider's ``enter`` does for a lease."""

    async def __call__(
        self, command: str, descriptors: tuple[int, int, int], env: Mapping[str, str]
    ) -> int:
        """Run it on descriptors that stay open here; return its exit status.

        Raises `NotFound` once the place has ended, `Unavailable` when it cannot be reached.
        """
        ...


class _EnteredConversation:
    """``noise`` is what was printed where the supervisor should have begun."""

    def __init__(
        self,
        entered: asyncio.Task[int],
        output: asyncio.StreamReader,
        errors: asyncio.StreamReader,
    ) -> None:
        self._entered = entered
        self._errors = errors
        self._output = output
        self._noise = b""
        self.reader: Reader = output

    async def past_noise(self) -> None:
        """Wait until Python is there; whether it came, the frames tell."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._output.readuntil(f"{_MARK}\n".encode())
        except asyncio.IncompleteReadError as error:
            self._noise = error.partial[-4096:]
        except asyncio.LimitOverrunError:
            return
        except TimeoutError as error:
            raise TimedOut(
                f"Python did not start there within {_START_SECONDS:g} s.",
                hint="Look whether this host is overloaded.",
            ) from error

    async def ended(self) -> tuple[int | None, str]:
        try:
            errors = await self._errors.read(4096)
            return await self._entered, (errors or self._noise).decode(errors="replace")
        except NotFound as error:
            return PLACE_GONE_STATUS, str(error)
        except Unavailable:
            return None, ""


class EnteredShell:
    """Runs the supervisor in a place on this host that is entered by ``enter``."""

    #: Its user there may be another than this one, and what it wrote may be a trap.
    files_are_here = False

    def __init__(self, enter: Enter) -> None:
        self._enter = enter

    @asynccontextmanager
    async def converse(self, request: bytes) -> AsyncIterator[Conversation]:
        """See `Shell`."""
        source = _supervisor_source()
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            stdin, stdout, stderr = os.pipe(), os.pipe(), os.pipe()
            for descriptor in (stdin[0], stdout[1], stderr[1]):
                theirs.callback(os.close, descriptor)
            command = f"exec python3 -c {shlex.quote(_BOOTSTRAP)}"
            entered = asyncio.create_task(self._run(command, (stdin[0], stdout[1], stderr[1])))
            # What it was given is closed here once it is over: only then come the ends of files.
            entered.add_done_callback(lambda _: theirs.close())
            try:
                output, errors = await _read(ours, stdout[0]), await _read(ours, stderr[0])
                await _write(ours, stdin[1], b"%d\n" % len(source) + source + request)
                conversation = _EnteredConversation(entered, output, errors)
                await conversation.past_noise()
                yield conversation
            finally:
                entered.cancel()
                await asyncio.gather(entered, return_exceptions=True)

    async def _run(self, command: str, descriptors: tuple[int, int, int]) -> int:
        return await self._enter(command, descriptors, {})


async def _read(stack: contextlib.ExitStack, descriptor: int) -> asyncio.StreamReader:
    """Return what reads from the end of a pipe, which it takes over until the stack unwinds."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
    )
    stack.callback(transport.close)
    return reader


async def _write(stack: contextlib.ExitStack, descriptor: int, data: bytes) -> None:
    """Begin to write into a pipe, and close it then, or when the stack unwinds."""
    transport, _ = await asyncio.get_running_loop().connect_write_pipe(
        asyncio.BaseProtocol, os.fdopen(descriptor, "wb", buffering=0)
    )

    def drop() -> None:
        # abort() after a close that has nothing left to write would end the transport twice.
        if not transport.is_closing() or transport.get_write_buffer_size():
            transport.abort()

    stack.callback(drop)
    transport.write(data)
    transport.write_eof()


@cache
def _supervisor_source() -> bytes:
    return SUPERVISOR.read_bytes()
