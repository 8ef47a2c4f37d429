"""Logging in to a machine with the system's ssh, by what is made for this once."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gridcloud.errors import InvalidSpec, Unavailable

if TYPE_CHECKING:
    from gridcloud.model.fleet import MachineLogin
    from gridcloud.model.lease import Endpoint


def log_in(name: str, forwards: tuple[str, ...], command: tuple[str, ...]) -> int:
    """Run ssh to a machine, with this terminal, and return its exit status.

    The key exists for as long as ssh runs, in a folder of this user's alone.
    """
    from gridcloud.access.keys import ephemeral, public_line
    from gridcloud.client import Client

    program = shutil.which("ssh")
    if program is None:
        raise Unavailable(
            "There is no 'ssh' program here.", hint="Install an OpenSSH client, then try again."
        )
    key = ephemeral()
    with Client() as client:
        login = client.login_machine(name, public_line(key))
    with _folder() as folder:
        _put(folder / "key", key.export_private_key("openssh"))
        _put(folder / "key-cert.pub", f"{login.certificate}\n".encode())
        _put(folder / "known_hosts", _known_hosts(login).encode())
        arguments = [*_arguments(login.endpoint, folder, program), *_forwarding(forwards)]
        # As ssh itself does: the words are one line for the shell there.
        words = [" ".join(command)] if command else []
        where = _destination(login.endpoint)
        with subprocess.Popen([program, *arguments, "--", where, *words]) as process:
            try:
                return _status(process.wait())
            except BaseException:  # this program is to end: ssh with it
                process.terminate()
                raise


def _arguments(endpoint: Endpoint, folder: Path, program: str) -> list[str]:
    """Return what makes ssh use nothing but what is in the folder."""
    options = [
        "-F", os.devnull,
        "-i", str(folder / "key"),
        "-p", str(endpoint.port),
        *_option("CertificateFile", f'"{folder / "key-cert.pub"}"'),
        *_option("UserKnownHostsFile", f'"{folder / "known_hosts"}"'),
        *_option("GlobalKnownHostsFile", os.devnull),
        *_option("IdentitiesOnly", "yes"),
        *_option("IdentityAgent", "none"),
        *_option("StrictHostKeyChecking", "yes"),
        *_option("PreferredAuthentications", "publickey"),
        *_option("ServerAliveInterval", "15"),
        *_option("LogLevel", "ERROR"),
    ]  # fmt: skip
    if endpoint.gateway is not None:
        through = [program, *_arguments(endpoint.gateway, folder, program), "-W", "[%h]:%p"]
        jump = shlex.join([*through, _destination(endpoint.gateway)])
        options += _option("ProxyCommand", jump)
    return options


def _option(name: str, value: str) -> list[str]:
    return ["-o", f"{name}={value}"]


def _forwarding(forwards: tuple[str, ...]) -> list[str]:
    each = [word for forward in forwards for word in ("-L", forward)]
    return [*each, *_option("ExitOnForwardFailure", "yes")] if each else []


def _destination(endpoint: Endpoint) -> str:
    if endpoint.user.startswith("-"):  # ssh would take it for an option
        raise InvalidSpec(f"{endpoint.user!r} cannot be the name of a user.")
    return f"{endpoint.user}@{endpoint.host}"


def _known_hosts(login: MachineLogin) -> str:
    lines = []
    endpoint: Endpoint | None = login.endpoint
    while endpoint is not None:
        host = endpoint.host if endpoint.port == 22 else f"[{endpoint.host}]:{endpoint.port}"
        lines += [f"{host} {' '.join(key.split()[:2])}\n" for key in endpoint.host_keys]
        endpoint = endpoint.gateway
    return "".join(lines)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Give a folder of this user's alone, removed in the end, also when this program is to end.

    An interrupt is for ssh, which shares the terminal, and is passed over here.
    """
    handlers = {
        number: signal.signal(number, _pass_over if number == signal.SIGINT else _end)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        with tempfile.TemporaryDirectory(prefix="gridcloud-ssh-") as folder:
            yield Path(folder)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _pass_over(number: int, _: object) -> None:
    """Do nothing: unlike what is ignored, ssh does not inherit this."""


def _put(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code
