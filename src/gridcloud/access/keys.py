"""SSH keys: Ed25519 private keys in files or in memory, their public lines and fingerprints.

Key files have OpenSSH's own format, so that its tools can read them. Nothing here blocks for
longer than one small file takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

import asyncssh

from gridcloud.errors import Forbidden, InvalidSpec, Unavailable

_PUBLIC_LINE = re.compile(r"(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*( .*)?")
_KEY_FILE_LIMIT_BYTES = 64 * 1024


def load_or_create(path: Path) -> asyncssh.SSHKey:
    """Return the private key in ``path``, made anew if there is none. Idempotent.

    The folder is made for the owner alone if missing. Of several processes that create the same
    file at once, all get the one key that was there first. Raises as `load` does, and
    `Unavailable` when the file cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):
        return _read(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_once(path, ephemeral().export_private_key("openssh"))
    except OSError as error:
        raise Unavailable(
            f"The SSH key {path} cannot be written: {error.strerror}.",
            hint="Make its folder writable for this user.",
        ) from error
    return load(path)


def load(path: Path) -> asyncssh.SSHKey:
    """Return the private key in ``path``.

    Raises `Forbidden` when others could read or change the file or it cannot be read,
    `InvalidSpec` when it is missing, locked by a passphrase, or no private key.
    """
    try:
        return _read(path)
    except FileNotFoundError as error:
        raise InvalidSpec(
            f"There is no SSH key {path}.", hint="Name another one, or make it with ssh-keygen."
        ) from error


def ephemeral() -> asyncssh.SSHKey:
    """Return a fresh Ed25519 key pair that exists in memory only."""
    return asyncssh.generate_private_key("ssh-ed25519")


def public_line(key: asyncssh.SSHKey, comment: str = "") -> str:
    """Return the key's OpenSSH public key line, without an end of line."""
    line = key.export_public_key("openssh").decode().strip()
    algorithm, encoded = line.split()[:2]
    return f"{algorithm} {encoded} {comment}".rstrip()


def parse_public(line: str) -> asyncssh.SSHKey:
    """Return the public key of an OpenSSH line; raises `InvalidSpec` when it is none."""
    # asyncssh would also take a private key, or another file format, for its public half.
    if _PUBLIC_LINE.fullmatch(line.strip()):
        with contextlib.suppress(asyncssh.KeyImportError):
            return asyncssh.import_public_key(line.strip())
    raise InvalidSpec(
        f"{line.strip()[:30]!r} is not an OpenSSH public key.",
        hint="It looks like 'ssh-ed25519 AAAA...'; see the server's /etc/ssh/*.pub.",
    )


def fingerprint(line: str) -> str:
    """Return ``SHA256:...`` of a public key line, as ``ssh-keygen -l`` shows it."""
    return parse_public(line).get_fingerprint("sha256")


def _read(path: Path) -> asyncssh.SSHKey:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InvalidSpec(f"The SSH key {path} is not a file.")
            _refuse_lax(path, found)
            text = file.read(_KEY_FILE_LIMIT_BYTES)
    except PermissionError as error:
        raise Forbidden(
            f"The SSH key {path} may not be read by this user.", hint="Check its owner and mode."
        ) from error
    except IsADirectoryError as error:
        raise InvalidSpec(f"The SSH key {path} is a folder.") from error
    try:
        return asyncssh.import_private_key(text)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
        if "passphrase" in str(error).lower():
            raise InvalidSpec(
                f"The SSH key {path} is locked by a passphrase.",
                hint="Add it to an SSH agent with ssh-add and use the agent.",
            ) from error
        raise InvalidSpec(f"The SSH key {path} holds no private key: {error}.") from error


def _refuse_lax(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (os.geteuid(), 0):
        raise Forbidden(
            f"The SSH key {path} belongs to another user (uid {found.st_uid}).",
            hint="A private key must belong to the user who uses it.",
        )
    if found.st_mode & 0o077:
        raise Forbidden(
            f"The SSH key {path} is open to others (mode {found.st_mode & 0o777:04o}).",
            hint=f"Make it private: chmod 600 {path}; if it was exposed, replace it.",
        )


def _write_once(path: Path, text: bytes) -> None:
    # Written aside and linked into place: a reader never sees half a key, and link(2) refuses
    # to replace a key another process put there meanwhile.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()
