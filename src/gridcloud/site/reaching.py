"""How machines are reached by SSH: with the user's own identity, or with a lease's certificate."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import asyncssh
from pydantic import ValidationError

from gridcloud.access.connect import Credentials, connect
from gridcloud.access.session import SSHSession
from gridcloud.errors import Forbidden, GridcloudError, NotFound, Unavailable
from gridcloud.executors.executor import Executor
from gridcloud.executors.shells import SSHShell
from gridcloud.model.lease import Endpoint, Lease, LeaseRole
from gridcloud.providers.base import MachineFacts, Provider
from gridcloud.site.keyring import Keyring
from gridcloud.site.ways import Overlay, Ways

_FACTS = tuple(MachineFacts.model_fields)


class Reaching:
    """Makes SSH sessions for leases. Nothing is contacted until a session is used.

    Without an ``overlay`` what is borrowed is reached straight at its address only.
    """

    def __init__(
        self,
        keyring: Keyring,
        providers: Mapping[str, Provider],
        overlay: Overlay | None = None,
    ) -> None:
        self._keyring = keyring
        self._providers = providers
        self._ways = Ways(overlay) if overlay else None

    def session(self, lease: Lease) -> SSHSession:
        """Return a session to the lease's machine."""
        machine = lease.machine
        assert machine and machine.endpoint
        endpoint = machine.endpoint
        if lease.role is LeaseRole.BORROWED:
            lender = lease.peer
            assert lender

            async def dial() -> asyncssh.SSHClientConnection:
                key, certificate = self._keyring.loan_login(lease.id)
                credentials = Credentials(key=key, certificate=certificate)
                if self._ways is None:
                    return await connect(endpoint, credentials)
                return await self._ways.connect(lender, endpoint, credentials)

            return SSHSession(dial)
        if machine.certified:
            return self.machine_session(lease, endpoint)
        return self._own_session(endpoint, lambda: self._identity(lease.provider))

    def machine_session(self, lease: Lease, endpoint: Endpoint) -> SSHSession:
        """Return a session to a machine that was made for an own lease, perhaps a moment ago.

        Each connection logs in with a certificate of its own, so that it may be used for as long as
        the machine is there.
        """

        async def dial() -> asyncssh.SSHClientConnection:
            key, certificate = self._keyring.machine_login(lease.id)
            return await connect(endpoint, Credentials(key=key, certificate=certificate))

        return SSHSession(dial)

    async def probe(self, endpoint: Endpoint, identity: Path | None) -> MachineFacts:
        """Log in and look what is there; see `gridcloud.providers.base.ProviderContext`."""
        session = self._own_session(endpoint, lambda: identity)
        try:
            facts = await Executor(SSHShell(session), "").probe()
        finally:
            await session.close()
        try:
            return MachineFacts.model_validate({name: facts.get(name) for name in _FACTS})
        except ValidationError as error:
            raise Unavailable(
                f"{endpoint.host} describes itself in a way that makes no sense: {facts!r}.",
                hint="Check what python3 is there.",
            ) from error

    async def close(self) -> None:
        """Let go of what still leads to lenders; the sessions are closed before."""
        if self._ways is not None:
            await self._ways.close()

    def _own_session(self, endpoint: Endpoint, identity: Callable[[], Path | None]) -> SSHSession:
        async def dial() -> asyncssh.SSHClientConnection:
            return await connect(endpoint, _own_credentials(identity()))

        return SSHSession(dial)

    def _identity(self, provider: str) -> Path | None:
        found = self._providers.get(provider)
        if found is None:
            raise NotFound(
                f"The provider {provider!r} is no longer in the settings, or does not load.",
                hint="Put its section back to reach what runs there.",
            )
        identity = getattr(found, "identity", None)
        if identity is not None and not isinstance(identity, Path):
            raise GridcloudError(f"Provider {provider!r} names no identity file.")
        return identity


def _own_credentials(identity: Path | None) -> Credentials:
    """Return the key the settings name; or else the user's agent, or the usual key files."""
    if identity is not None:
        return Credentials(identity_file=identity)
    if agent := os.environ.get("SSH_AUTH_SOCK"):
        return Credentials(agent=agent)
    for name in ("id_ed25519", "id_ecdsa", "id_rsa"):
        if (path := Path.home() / ".ssh" / name).exists():
            return Credentials(identity_file=path)
    raise Forbidden(
        "There is no SSH key to log in with.", hint="Name one with --identity, or run an SSH agent."
    )
