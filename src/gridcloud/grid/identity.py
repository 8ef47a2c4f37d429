"""A site's identity: its Ed25519 key. The public half is the site's name among peers."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from gridcloud.errors import Forbidden, InvalidSpec, Unavailable

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_P = 2**255 - 19
#: The points of small order (RFC 8032, 8.9), by their y, also where it is not reduced. Under such
#: a key anybody makes signatures that hold, so it is nobody's.
_WEAK = frozenset(
    {
        *(0, 1, _P - 1, _P, _P + 1),
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
    }
)


class Identity:
    """A site's secret key, and what can be done with it."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._key = private.public_key().public_bytes_raw().hex()

    def __repr__(self) -> str:
        return f"Identity({short(self._key)})"

    @classmethod
    def generate(cls) -> Identity:
        """Return a new identity that is kept nowhere."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """Return the identity in ``path``, made first if there is none; its folder must exist.

        The file is PKCS #8 in PEM, readable by its owner alone. Of two processes that create at
        once one wins, and both return its key; a crash never leaves half a file. Blocks for a
        small file's reading. Raises `Forbidden` if others may read the file, `InvalidSpec` if it
        holds no Ed25519 key, `Unavailable` if it can be neither read nor made.
        """
        try:
            if not path.exists():
                _create(path)
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = file.read(65536)
        except OSError as error:
            raise Unavailable(
                f"The site's key {path} can be neither read nor made: {error.strerror}.",
                hint="Check the folder's owner and the space on its disk.",
            ) from error
        if mode & _OTHERS:
            raise Forbidden(
                f"The site's key {path} is open to other users (mode {stat.S_IMODE(mode):04o}).",
                hint=f"If nobody can have read it, run: chmod 600 {path}",
            )
        return cls(_parse(content, path))

    @property
    def key(self) -> str:
        """The public key: 64 lowercase hex digits."""
        return self._key

    @property
    def secret_bytes(self) -> bytes:
        """The 32 bytes of the secret key (its seed, RFC 8032); never to be logged or sent."""
        return self._private.private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return the 64 bytes of the Ed25519 signature (RFC 8032) of ``message``."""
        return self._private.sign(message)


def is_weak(key: str) -> bool:
    """Whether a key (64 hex digits) is one under which anybody can sign."""
    return int.from_bytes(bytes.fromhex(key), "little") & (2**255 - 1) in _WEAK


def short(key: str) -> str:
    """Return the first 8 hex digits of a key, for people; never enough to trust it by."""
    return key[:8]


def _create(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike rename this never replaces a key that came first
        except FileExistsError:
            return
    finally:
        draft.unlink()


def _parse(content: bytes, path: Path) -> Ed25519PrivateKey:
    hint = "Restore it from a backup; a new key would be a new site to every peer."
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidSpec(f"{path} holds no unencrypted private key in PEM.", hint=hint) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidSpec(f"{path} holds a key that is not Ed25519.", hint=hint)
    return key
