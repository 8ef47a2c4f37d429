"""A site's SSH user certificates: short-lived keys made good for one lease, and no longer.

Format and rules: OpenSSH's PROTOCOL.certkeys. A certificate says as whom it may log in (its
principals), from when until when, and what may be asked for; it names its lease as key id.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta

import asyncssh

from gridcloud.access.keys import parse_public, public_line
from gridcloud.errors import InvalidSpec

#: How far a certificate begins before it was asked for, so that slightly slow clocks accept it.
BACKDATE = timedelta(seconds=60)
_PRINCIPAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")


class UserCA:
    """Signs user certificates with one private key. Pure: neither blocks nor keeps anything."""

    def __init__(self, private_key: asyncssh.SSHKey) -> None:
        self._key = private_key
        self.public_line = public_line(private_key)

    def issue(
        self,
        public_key_line: str,
        lease_id: str,
        valid_from: datetime,
        valid_until: datetime,
        *,
        principals: Sequence[str] | None = None,
        source_address: Sequence[str] | None = None,
        port_forwarding: bool = False,
    ) -> str:
        """Return an OpenSSH certificate line for the holder of a public key.

        ``principals`` are the names to log in with, the lease id alone unless told; there is
        always one, because some servers take a certificate without principals for anybody's.
        ``source_address`` are networks it may be used from. A terminal is permitted; forwarding
        ports only if asked (a jump host needs it); agent, X11 and user files never. Times must
        have a time zone. Raises `InvalidSpec` for a bad key, name, network or period.
        """
        names = (lease_id,) if principals is None else tuple(principals)
        _check_names(lease_id, *names)
        if not names:
            raise InvalidSpec("A certificate needs a principal, or it would be good for anyone.")
        if valid_from.tzinfo is None or valid_until.tzinfo is None:
            raise InvalidSpec("A certificate's times need a time zone.")
        if valid_until <= valid_from:
            raise InvalidSpec(
                f"A certificate until {valid_until:%Y-%m-%d %H:%M:%S%z} would have ended before "
                "it begins.",
                hint="Check the lease's end and this machine's clock.",
            )
        certificate = self._key.generate_user_certificate(
            parse_public(public_key_line),
            lease_id,
            serial=secrets.randbits(63),
            principals=list(names),
            valid_after=int((valid_from - BACKDATE).timestamp()),
            valid_before=int(valid_until.timestamp()),
            source_address=_networks(source_address),
            permit_x11_forwarding=False,
            permit_agent_forwarding=False,
            permit_port_forwarding=port_forwarding,
            permit_pty=True,
            permit_user_rc=False,
            comment=lease_id,
        )
        return certificate.export_certificate("openssh").decode().strip()

    def trusted_line(self, *principals: str) -> str:
        """Return the line that makes an SSH server trust this CA.

        Without principals it is one for ``TrustedUserCAKeys``, where a certificate logs in as
        the user it names (or as ``AuthorizedPrincipalsFile`` says). With them it is one for a
        user's ``authorized_keys``, good only for certificates that name one of these.
        """
        if not principals:
            return self.public_line
        _check_names(*principals)
        return f'cert-authority,principals="{",".join(principals)}" {self.public_line}'


def parse_certificate(line: str) -> asyncssh.SSHCertificate:
    """Return the certificate of an OpenSSH line; raises `InvalidSpec` when it is none."""
    try:
        return asyncssh.import_certificate(line.strip())
    except asyncssh.KeyImportError as error:
        raise InvalidSpec(f"{line.strip()[:60]!r} is not an SSH certificate: {error}.") from error


def _check_names(*names: str) -> None:
    for name in names:
        if not _PRINCIPAL.fullmatch(name):
            raise InvalidSpec(
                f"{name!r} cannot be named in a certificate.",
                hint="Use letters, digits, '.', '_', '@' and '-', at most 128.",
            )


def _networks(addresses: Sequence[str] | None) -> list[str] | None:
    if addresses is None:
        return None
    if not addresses:
        raise InvalidSpec("A certificate for no source address could not be used by anyone.")
    try:
        return [str(ipaddress.ip_network(address)) for address in addresses]
    except ValueError as error:
        raise InvalidSpec(f"Not an address or network: {error}.") from error
