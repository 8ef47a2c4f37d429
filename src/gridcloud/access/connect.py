"""SSH connections to endpoints, whose host keys are known beforehand and never learnt on the way.

Nothing of the user's own SSH set-up is read: no ~/.ssh/config, known_hosts, default keys or
agent, unless the caller names it. Every failure becomes one of our errors, with its cause.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncssh

from gridcloud.access.certificates import parse_certificate
from gridcloud.access.keys import fingerprint, load, parse_public, public_line
from gridcloud.errors import Forbidden, GridcloudError, InvalidSpec, TimedOut, Unavailable
from gridcloud.model.lease import Endpoint

#: A dead peer is noticed after KEEPALIVE_SECONDS × KEEPALIVE_COUNT without any answer.
KEEPALIVE_SECONDS = 15
KEEPALIVE_COUNT = 3
#: What may be under way in a channel. asyncssh's 2 MiB hold a 20 ms path at 100 MB/s.
WINDOW_BYTES = 32 * 1024 * 1024
_HOST_KEY_ALGORITHMS = {
    "ssh-ed25519": ["ssh-ed25519"],
    "ecdsa-sha2-nistp256": ["ecdsa-sha2-nistp256"],
    "ecdsa-sha2-nistp384": ["ecdsa-sha2-nistp384"],
    "ecdsa-sha2-nistp521": ["ecdsa-sha2-nistp521"],
    "ssh-rsa": ["rsa-sha2-512", "rsa-sha2-256"],
}


@dataclass(frozen=True)
class Credentials:
    """What a client proves itself with: any of a key, with a certificate, a file, or an agent.

    ``certificate`` is the OpenSSH line for ``key``. ``agent`` is the path of an SSH agent's
    socket; without it no agent is asked.
    """

    key: asyncssh.SSHKey | None = None
    certificate: str = ""
    identity_file: Path | None = None
    agent: str = ""


@dataclass(frozen=True)
class Carrier:
    """A connected socket that leads to an endpoint, in place of a connection to its address.

    ``name`` tells a person where it leads.
    """

    link: socket.socket
    name: str


class UnexpectedHost(Forbidden):
    """Another server than the one expected answers there: nothing was said to it."""


async def connect(
    endpoint: Endpoint,
    credentials: Credentials,
    *,
    gateway_credentials: Credentials | None = None,
    over: Carrier | None = None,
    timeout: float = 20.0,
) -> asyncssh.SSHClientConnection:
    """Return a new, authenticated connection, made through the endpoint's gateway if it has one.

    The server must show one of ``endpoint.host_keys``; otherwise nothing more is said to it.
    The gateway is given ``gateway_credentials``, or else the same. ``over`` leads to the first
    server that is spoken to, whose address is then not used; its socket is taken over. ``timeout``
    (seconds) is for all together. Closing the connection closes the one to the gateway as well.

    Raises `UnexpectedHost` (another host key), `Forbidden` (no host key is known, or the
    credentials are not accepted), `Unavailable` (name, network, no SSH there), `TimedOut`, or
    `InvalidSpec` (unusable keys).
    """
    deadline = asyncio.get_running_loop().time() + timeout
    gateway = None
    if endpoint.gateway is not None:
        gateway = await connect(
            endpoint.gateway, gateway_credentials or credentials, over=over, timeout=timeout
        )
        over = None
    try:
        async with asyncio.timeout_at(deadline):
            return await _connect(endpoint, credentials, gateway, over)
    except BaseException as error:
        if gateway is not None:
            gateway.abort()
        if over is not None:
            over.link.close()
        if isinstance(error, TimeoutError):
            raise TimedOut(
                f"{_where(endpoint, over)} did not answer within {timeout:g} s.",
                hint="Check that the machine is up and that no firewall drops connections to it.",
            ) from error
        raise


async def fetch_host_keys(host: str, port: int = 22, *, timeout: float = 10.0) -> list[str]:
    """Return the host key lines a server shows, one for each common kind it has.

    They are unverified: show their fingerprints to a person at first contact, who compares them
    with what the machine's administrator says. Nothing is logged in to. Raises `Unavailable` or
    `TimedOut`.
    """
    where = f"{_bracketed(host)}:{port}"
    lines: list[str] = []
    left = dict(_HOST_KEY_ALGORITHMS)
    try:
        async with asyncio.timeout(timeout):
            while left:
                names = [name for kind in left.values() for name in kind]
                key = await asyncssh.get_server_host_key(
                    host, port, server_host_key_algs=names, config=None
                )
                if key is None or left.pop(key.get_algorithm(), None) is None:
                    break
                lines.append(public_line(key))
    except TimeoutError as error:
        raise TimedOut(f"{where} did not show its host keys within {timeout:g} s.") from error
    except (OSError, asyncssh.Error) as error:
        # A server asked for a kind of key it has not hangs up, so the last question always fails.
        if not lines:
            raise _translated(error, where, "") from error
    except ValueError as error:
        raise InvalidSpec(f"{where} cannot be connected to: {error}.") from error
    return lines


class _Client(asyncssh.SSHClient):
    """Remembers a host key that was not expected; closes the gateway behind a connection."""

    def __init__(self, closed: Callable[[], None]) -> None:
        self._closed = closed
        self.unexpected: asyncssh.SSHKey | None = None

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        """Called for a key that is not among the pinned ones: never accepted."""
        self.unexpected = key
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection ended."""
        self._closed()


class _Tunnel:
    """A gateway as asyncssh's connector, with the larger window it has no option for."""

    def __init__(self, gateway: asyncssh.SSHClientConnection) -> None:
        self._gateway = gateway

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        """Open a connection from the gateway on."""
        return await self._gateway.create_connection(*args, window=WINDOW_BYTES, **kwargs)


async def _connect(
    endpoint: Endpoint,
    credentials: Credentials,
    gateway: asyncssh.SSHClientConnection | None,
    over: Carrier | None,
) -> asyncssh.SSHClientConnection:
    where = _where(endpoint, over)
    expected = [parse_public(line) for line in endpoint.host_keys]
    if not expected:
        raise Forbidden(
            f"No host key of {where} is known, so its identity cannot be verified.",
            hint="Add the machine's host key, as its administrator tells it.",
        )
    client = _Client(gateway.close if gateway else _nothing)
    try:
        async with _client_keys(credentials) as client_keys:
            connection = await asyncssh.connect(
                # With a socket it is not dialled, but asyncssh needs some name.
                endpoint.host or ("unnamed" if over else ""),
                endpoint.port,
                sock=over.link if over else None,
                username=endpoint.user,
                tunnel=_Tunnel(gateway) if gateway else (),
                client_factory=lambda: client,
                known_hosts=(expected, [], []),
                server_host_key_algs=_algorithms(expected),
                client_keys=client_keys,
                agent_path=None,
                preferred_auth="publickey",
                config=None,
                x509_trusted_certs=None,
                x509_trusted_cert_paths=None,
                compression_algs=["none"],
                keepalive_interval=KEEPALIVE_SECONDS,
                keepalive_count_max=KEEPALIVE_COUNT,
                window=WINDOW_BYTES,
            )
    except asyncssh.HostKeyNotVerifiable as error:
        expectation = " or ".join(map(fingerprint, endpoint.host_keys))
        got = client.unexpected.get_fingerprint("sha256") if client.unexpected else "none we know"
        raise UnexpectedHost(
            f"The host key of {where} changed: expected {expectation}, got {got}; not connected.",
            hint="Someone may be in between. If the change is legitimate, replace the host key on "
            "record after comparing it with what the machine's administrator says.",
        ) from error
    except TimeoutError:
        raise
    except (OSError, asyncssh.Error) as error:
        raise _translated(error, where, endpoint.user) from error
    except ValueError as error:  # a user or host name that cannot be one
        raise InvalidSpec(
            f"{endpoint.user!r} at {where} cannot be connected to: {error}."
        ) from error
    return connection


@contextlib.asynccontextmanager
async def _client_keys(credentials: Credentials) -> AsyncIterator[list[Any]]:
    found: list[Any] = []
    if credentials.key is not None and credentials.certificate:
        found.append((credentials.key, parse_certificate(credentials.certificate)))
    elif credentials.key is not None:
        found.append(credentials.key)
    if credentials.identity_file is not None:
        found.append(load(credentials.identity_file))
    if not credentials.agent:
        if not found:
            raise InvalidSpec("No SSH key was given to log in with.")
        yield found
        return
    try:
        agent = await asyncssh.connect_agent(credentials.agent)
    except OSError as error:
        raise Unavailable(
            f"The SSH agent at {credentials.agent} cannot be reached: {error.strerror}.",
            hint="Start one with ssh-agent, or use an identity file.",
        ) from error
    async with agent:
        yield found + list(await agent.get_keys())


def _algorithms(expected: list[asyncssh.SSHKey]) -> list[str]:
    """Return the kinds of host keys to ask for: those expected first, then all others.

    A server that has none of the expected kind then shows what it has, and is found out by its
    key, where it would else hang up and look broken.
    """
    kinds = dict.fromkeys([key.get_algorithm() for key in expected]) | _HOST_KEY_ALGORITHMS
    return [name for kind in kinds for name in _HOST_KEY_ALGORITHMS.get(kind, [])]


def _translated(error: Exception, where: str, user: str) -> GridcloudError:
    if isinstance(error, asyncssh.PermissionDenied):
        return Forbidden(
            f"{where} does not let {user!r} in with this key: {error.reason}.",
            hint="Check the user name, and that the machine knows the key or trusts the "
            "certificate's authority; a certificate ends with its lease.",
        )
    if isinstance(error, asyncssh.ChannelOpenError):
        if error.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
            return Forbidden(f"The gateway does not allow going on to {where}: {error.reason}.")
        return Unavailable(
            f"The gateway cannot reach {where}: {error.reason}.",
            hint="Check that the machine behind it is up.",
        )
    if isinstance(error, socket.gaierror):
        return Unavailable(
            f"The name of {where} could not be resolved: {error.strerror}.",
            hint="Check the name, and this machine's network.",
        )
    if isinstance(error, ConnectionRefusedError):
        return Unavailable(
            f"Nothing answers at {where}: connection refused.",
            hint="Check the port, and that an SSH server runs there.",
        )
    cause = error.reason if isinstance(error, asyncssh.DisconnectError) else str(error)
    return Unavailable(
        f"{where} could not be reached by SSH: {cause or type(error).__name__}.",
        hint="Check the address and port, and that an SSH server answers there.",
    )


def _address(endpoint: Endpoint) -> str:
    return f"{_bracketed(endpoint.host)}:{endpoint.port}"


def _where(endpoint: Endpoint, over: Carrier | None) -> str:
    return over.name if over else _address(endpoint)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _nothing() -> None:
    return
