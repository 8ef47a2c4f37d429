"""The site's secrets: its identity, gateway host key, user CA, and short-lived keys of leases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import asyncssh

from gridcloud.access.certificates import UserCA
from gridcloud.access.keys import ephemeral, load, load_or_create, public_line
from gridcloud.grid.identity import Identity

_LOANS = "loans"
#: How long a certificate for a machine is good: enough to log in once. It begins as long ago, since
#: the clock of a machine that has just been made may be behind.
_LOGIN_LASTS = timedelta(minutes=10)


class Keyring:
    """Files below ``folder``, readable by the site's user alone; each made at first use."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder

    @cached_property
    def identity(self) -> Identity:
        """The Ed25519 key that *is* this site."""
        return Identity.load_or_create(self._folder / "identity.pem")

    @cached_property
    def gateway_host_key(self) -> asyncssh.SSHKey:
        """What the gateway proves itself with."""
        return load_or_create(self._folder / "gateway_host_key")

    @cached_property
    def user_ca(self) -> UserCA:
        """Signs the certificates of leases."""
        return UserCA(load_or_create(self._folder / "user_ca"))

    def trusted_line(self) -> str:
        """Return the line that makes an SSH server trust this site's certificates."""
        return self.user_ca.trusted_line()

    def new_loan_key(self, lease_id: str) -> str:
        """Make the key pair of a borrowed lease, once; return its public line. Idempotent."""
        return public_line(load_or_create(self._loan(lease_id)))

    def put_certificate(self, lease_id: str, certificate: str) -> None:
        """Keep the certificate a lender gave for the loan's key."""
        self._certificate(lease_id).write_text(certificate + "\n")

    def loan_login(self, lease_id: str) -> tuple[asyncssh.SSHKey, str]:
        """Return the private key and certificate of a loan."""
        return load(self._loan(lease_id)), self._certificate(lease_id).read_text().strip()

    def machine_login(self, lease_id: str) -> tuple[asyncssh.SSHKey, str]:
        """Return a new key, kept nowhere, and a certificate that a lease's machine lets in now."""
        key = ephemeral()
        return key, self.machine_certificate(lease_id, public_line(key))

    def machine_certificate(self, lease_id: str, public_key_line: str) -> str:
        """Return a certificate for somebody's key that a lease's machine lets in now.

        It is good for some minutes, for that machine alone. Raises `InvalidSpec` for what is no
        public key.
        """
        now = datetime.now(UTC)
        return self.user_ca.issue(
            public_key_line, lease_id, now - _LOGIN_LASTS, now + _LOGIN_LASTS, port_forwarding=True
        )

    def forget_loan(self, lease_id: str) -> None:
        """Remove the loan's key and certificate. Idempotent."""
        for path in (self._loan(lease_id), self._certificate(lease_id)):
            path.unlink(missing_ok=True)

    def _loan(self, lease_id: str) -> Path:
        return self._folder / _LOANS / lease_id

    def _certificate(self, lease_id: str) -> Path:
        return self._folder / _LOANS / f"{lease_id}-cert.pub"
