"""Running Ansible playbooks against a machine that is ready, as its person would from a terminal.

``ansible-playbook`` is a program of its own (GPL) and is started as one, never imported. All that
it needs is in a folder that only this user can read, and that is gone afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gridcloud.errors import InvalidSpec, TimedOut, Unavailable
from gridcloud.model.lease import Endpoint
from gridcloud.model.machine import Playbook

#: How long one playbook may take.
MOST_SECONDS = 3600.0
_CHECK_SECONDS = 60.0
#: How often the certificate is renewed, which is good for some minutes only.
_RENEW_SECONDS = 120.0
_UNREACHABLE = 4
_LAST_LINES = 40
_LINE_BYTES = 4096
_BATCH_SECONDS = 0.5
_HOST = "machine"
_CONFIG = """[defaults]
host_key_checking = True
interpreter_python = auto_silent
local_tmp = {folder}/tmp
nocows = True
retry_files_enabled = False
[ssh_connection]
pipelining = True
control_path_dir = {folder}
ssh_args = -F {folder}/ssh_config -o ControlMaster=auto -o ControlPersist=60s
"""
_SSH_CONFIG = """Host {host}
  HostName {address}
  Port {port}
  User {user}
  HostKeyAlias {host}
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  IdentityFile {folder}/key
  CertificateFile {folder}/key-cert.pub
  IdentitiesOnly yes
  IdentityAgent none
  PreferredAuthentications publickey
  ServerAliveInterval 15
"""


@dataclass(frozen=True)
class Login:
    """How to log in: a private key in OpenSSH's format, and where to get a certificate for it."""

    key: str
    certificate: Callable[[], str]


async def check_playbooks(playbooks: Sequence[Playbook]) -> None:
    """Look whether playbooks are there and are playbooks. Nothing is contacted.

    Raises `InvalidSpec` with what Ansible says of the syntax, `Unavailable` without Ansible.
    """
    for playbook in playbooks:
        if not Path(playbook.path).is_file():
            raise InvalidSpec(f"There is no playbook {playbook.path}.")
    for playbook in playbooks:
        async with _folder(playbook) as folder:
            (folder / "inventory").write_text(f"{_HOST}\n")
            status, lines = await _ansible(
                ["--syntax-check"], playbook, folder, _CHECK_SECONDS, _ignored
            )
            if status:
                raise _failed(playbook, lines, "is no playbook that Ansible understands")


async def run_playbook(
    playbook: Playbook,
    endpoint: Endpoint,
    login: Login,
    told: Callable[[str], Awaitable[None]],
    *,
    timeout_seconds: float = MOST_SECONDS,
) -> None:
    """Run a playbook on a machine, and give its output to ``told`` as it comes, some lines at once.

    The playbook sees one host, whose variables are those of the playbook. To run it again must be
    harmless, as is the custom with playbooks. Raises `InvalidSpec` with the end of the output if it
    fails, `Unavailable` if the machine is lost or there is no Ansible, `TimedOut`. Cancelling
    ends it.
    """
    if endpoint.gateway is not None:
        raise InvalidSpec("A playbook cannot be run on a machine that is behind a gateway.")
    async with _folder(playbook) as folder:
        _write_login(folder, endpoint, login)
        (folder / "inventory").write_text(f"{_HOST}\n")
        renewing = asyncio.create_task(_renew(folder, login))
        try:
            status, lines = await _ansible([], playbook, folder, timeout_seconds, told)
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
            await _close_master(folder)
        if status == _UNREACHABLE:
            error = _failed(playbook, lines, "lost the machine")
            raise Unavailable(error.message, hint=error.hint)
        if status:
            raise _failed(playbook, lines, f"failed with status {status}")


@contextlib.asynccontextmanager
async def _folder(playbook: Playbook) -> AsyncIterator[Path]:
    # Short, since the path of a socket in it may have some hundred characters only.
    folder = Path(tempfile.mkdtemp(prefix="gcpb-"))
    try:
        (folder / "ansible.cfg").write_text(_CONFIG.format(folder=folder))
        (folder / "variables.yml").write_text(_variables(playbook))
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _variables(playbook: Playbook) -> str:
    """Write the variables so that each is just its text: Ansible would take ``{{ }}`` in it for a
    template, which may run programs here."""
    return (
        "{}\n"
        if not playbook.variables
        else "".join(
            f"{_quoted(name)}: !unsafe {_quoted(value)}\n"
            for name, value in playbook.variables.items()
        )
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _write_login(folder: Path, endpoint: Endpoint, login: Login) -> None:
    keys = "".join(f"{_HOST} {line}\n" for line in endpoint.host_keys)
    (folder / "known_hosts").write_text(keys)
    key = folder / "key"
    key.touch(0o600)
    key.write_text(login.key)
    (folder / "key-cert.pub").write_text(login.certificate() + "\n")
    for text in (endpoint.host, endpoint.user):
        if not text or any(character.isspace() or character in "\"'%" for character in text):
            raise InvalidSpec(f"{text!r} cannot be the address or the account of a machine.")
    text = _SSH_CONFIG.format(
        host=_HOST, address=endpoint.host, port=endpoint.port, user=endpoint.user, folder=folder
    )
    (folder / "ssh_config").write_text(text)


async def _renew(folder: Path, login: Login) -> None:
    while True:
        await asyncio.sleep(_RENEW_SECONDS)
        aside = folder / "key-cert.new"
        aside.write_text(login.certificate() + "\n")
        aside.replace(folder / "key-cert.pub")


async def _ansible(
    options: Sequence[str],
    playbook: Playbook,
    folder: Path,
    seconds: float,
    told: Callable[[str], Awaitable[None]],
) -> tuple[int, list[str]]:
    """Run the program; return its status and its last lines."""
    variables = ["--extra-vars", f"@{folder / 'variables.yml'}"]
    command = [_program(), *options, "--inventory", str(folder / "inventory"), *variables]
    process = await asyncio.create_subprocess_exec(
        *command,
        playbook.path,
        cwd=Path(playbook.path).parent,
        env=_environment(folder),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=_LINE_BYTES,
        start_new_session=True,
    )
    last: deque[str] = deque(maxlen=_LAST_LINES)
    try:
        async with asyncio.timeout(seconds):
            await _follow(process, last, told)
            return await process.wait(), list(last)
    except TimeoutError as error:
        raise TimedOut(
            f"The playbook {playbook.path} was not done within {seconds:g} s.\n" + "\n".join(last),
            hint="Look at the last lines for what hangs.",
        ) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _follow(
    process: asyncio.subprocess.Process,
    last: deque[str],
    told: Callable[[str], Awaitable[None]],
) -> None:
    assert process.stdout
    now = asyncio.get_running_loop().time
    waiting: list[str] = []
    since = now()
    line: str | None = ""
    while line is not None:
        try:
            # What a task began to say is told while that task is still at it.
            async with asyncio.timeout(_BATCH_SECONDS if waiting else None):
                line = await _line(process.stdout)
        except TimeoutError:
            line = ""
        if line:
            last.append(line)
            waiting.append(line)
        if waiting and (not line or now() - since >= _BATCH_SECONDS):
            await told("\n".join(waiting))
            waiting, since = [], now()


async def _line(reader: asyncio.StreamReader) -> str | None:
    """Return the next line that says something, only the end of a very long one; None at the end of
    the output. What is read is not lost if this is cancelled."""
    while True:
        try:
            data = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial.decode(errors="replace").rstrip() or None
        except asyncio.LimitOverrunError as error:
            await reader.readexactly(error.consumed)
            continue
        if line := data.decode(errors="replace").rstrip():
            return line


async def _close_master(folder: Path) -> None:
    """End the connection that was kept open for the next task."""
    for socket in folder.glob("*"):
        if socket.is_socket():
            process = await asyncio.create_subprocess_exec(
                *("ssh", "-F", str(folder / "ssh_config"), "-S", str(socket), "-O", "exit", _HOST),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            await process.wait()


def _environment(folder: Path) -> dict[str, str]:
    # Ansible runs nothing without a locale of UTF-8.
    kept = {name: os.environ[name] for name in ("HOME", "PATH", "TMPDIR") if name in os.environ}
    return kept | {
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_CONFIG": str(folder / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _program() -> str:
    beside = Path(sys.executable).parent / "ansible-playbook"
    found = str(beside) if beside.exists() else shutil.which("ansible-playbook")
    if not found:
        raise Unavailable(
            "Ansible is not installed here, which playbooks are run by.",
            hint="Install it with: pip install 'gridcloud[ansible]'.",
        )
    return found


def _failed(playbook: Playbook, lines: Sequence[str], how: str) -> InvalidSpec:
    return InvalidSpec(
        f"The playbook {playbook.path} {how}:\n" + "\n".join(lines),
        hint="Mend the playbook; it is run again from its beginning.",
    )


async def _ignored(_: str) -> None:
    return
