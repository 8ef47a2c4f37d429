"""A machine's files, here or over SFTP: the two operations staging needs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Protocol

import asyncssh

from gridcloud.access.session import SSHSession
from gridcloud.data.at_once import each
from gridcloud.errors import Conflict, Forbidden, GridcloudError, InvalidSpec, NotFound, Unavailable

#: Read and written in one go, as many SFTP requests under way together.
_CHUNK_BYTES = 4 * 1024 * 1024
_ROOM_BYTES = 1024 * 1024
_FREE_SPACE = "Free space on the machine's disk, then run the job again."


class Files(Protocol):
    """Moves whole files and folders between this host and where a job runs."""

    async def put(self, source: Path, folder: str) -> None:
        """Copy a file or folder into ``folder`` there, under its own name, links followed.

        Modes and times come along, but the owner may always read and write, so that a copy that
        was cut off can be done again. Raises `NotFound` for what vanished meanwhile.
        """
        ...

    async def get(self, source: str, target: Path, size: int) -> None:
        """Copy the regular file ``source`` of ``size`` bytes to ``target``, whole or not at all."""
        ...


class LocalFiles:
    """Job folders on this host. Copies run in threads."""

    async def put(self, source: Path, folder: str) -> None:
        """See `Files`."""
        await asyncio.to_thread(_copy_in, source, Path(folder) / source.name)

    async def get(self, source: str, target: Path, size: int) -> None:
        """See `Files`."""
        await asyncio.to_thread(_copy_out, source, target)


class SFTPFiles:
    """Job folders on a machine reached by SSH. Many files are under way at once, and of each
    many requests, so that neither small files nor a distant machine make it slow."""

    def __init__(self, session: SSHSession) -> None:
        self._session = session

    async def put(self, source: Path, folder: str) -> None:
        """See `Files`."""
        tree = await asyncio.to_thread(_Tree.of, source)
        top = os.fsencode(f"{folder}/{source.name}")

        def there(path: Path) -> bytes:
            return b"/".join([top, *map(os.fsencode, path.relative_to(source).parts)])

        async with self._session.sftp() as sftp:

            async def make(path: Path) -> None:
                async with _told(sftp, path, folder):
                    await _make_folder(sftp, path, there(path))

            async def send(path: Path) -> None:
                async with _told(sftp, path, folder):
                    await _send(sftp, path, there(path))

            for _, level in groupby(tree.folders, key=lambda path: len(path.parts)):
                await each(level, make)
            await each(tree.files, send)

    async def get(self, source: str, target: Path, size: int) -> None:
        """See `Files`."""
        async with self._session.sftp() as sftp, _told(sftp, source, ""):
            with _arriving(target) as partial:
                await _fetch(sftp, os.fsencode(source), partial, size)


@dataclass
class _Tree:
    """The folders of an input, outer ones first, and its files; links are followed."""

    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, source: Path) -> _Tree:
        """Look through ``source``. Blocks."""
        tree = cls()
        level = [source]
        while level:
            inner: list[Path] = []
            for path in level:
                try:
                    mode = path.stat().st_mode
                    if stat.S_ISDIR(mode):
                        tree.folders.append(path)
                        inner += path.iterdir()
                    elif stat.S_ISREG(mode):
                        tree.files.append(path)
                    else:
                        raise InvalidSpec(f"The input {str(path)!r} is neither file nor folder.")
                except OSError as error:
                    raise _local(error, path) from error
            level = inner
        return tree


def _kept_mode(found: os.stat_result) -> int:
    return found.st_mode & 0o777 | (0o700 if stat.S_ISDIR(found.st_mode) else 0o600)


async def _make_folder(sftp: asyncssh.SFTPClient, source: Path, target: bytes) -> None:
    attrs = asyncssh.SFTPAttrs(permissions=_kept_mode(source.stat()))
    try:
        await sftp.mkdir(target, attrs)
    except (asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists):
        if not await sftp.isdir(target):
            raise


async def _send(sftp: asyncssh.SFTPClient, source: Path, target: bytes) -> None:
    file, found, data = await asyncio.to_thread(_open_and_read, source)
    with file:
        async with sftp.open(target, "wb") as there:
            while data:
                await there.write(data)
                whole = len(data) < _CHUNK_BYTES
                data = b"" if whole else await asyncio.to_thread(file.read, _CHUNK_BYTES)
            times = {"atime": int(found.st_atime), "mtime": int(found.st_mtime)}
            await there.setstat(asyncssh.SFTPAttrs(permissions=_kept_mode(found), **times))


def _open_and_read(source: Path) -> tuple[BinaryIO, os.stat_result, bytes]:
    file = source.open("rb")
    try:
        return file, os.fstat(file.fileno()), file.read(_CHUNK_BYTES)
    except BaseException:
        file.close()
        raise


async def _fetch(sftp: asyncssh.SFTPClient, source: bytes, partial: Path, size: int) -> None:
    async with sftp.open(source, "rb") as there:
        mode = (await there.stat()).permissions or 0o644
        with partial.open("wb") as file:
            left = size
            while left > 0 and (data := await there.read(min(left, _CHUNK_BYTES))):
                assert isinstance(data, bytes)
                left -= len(data)
                await asyncio.to_thread(file.write, data)
    if left:
        raise Unavailable(
            f"{os.fsdecode(source)!r} arrived with {size - left} of {size} bytes.",
            hint="Something there still changes it.",
        )
    partial.chmod(0o600 | mode & 0o177)


@contextlib.asynccontextmanager
async def _told(sftp: asyncssh.SFTPClient, name: object, folder: str) -> AsyncIterator[None]:
    """Turn what goes wrong with one file into an error that names it."""
    shown = repr(str(name))
    try:
        yield
    except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection):
        raise  # the session knows what to do
    except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath) as error:
        raise NotFound(
            f"{shown}: the machine does not have it, or not the folder for it.",
            hint="It was removed there meanwhile; run the job again.",
        ) from error
    except asyncssh.SFTPPermissionDenied as error:
        raise Forbidden(
            f"{shown}: the machine does not permit to copy it.",
            hint="Look at the modes of the job folder and of what is in it there.",
        ) from error
    except (asyncssh.SFTPNoSpaceOnFilesystem, asyncssh.SFTPQuotaExceeded) as error:
        raise Conflict(f"{shown}: no space is left on the machine.", hint=_FREE_SPACE) from error
    except asyncssh.SFTPError as error:
        # SFTP of version 3, which OpenSSH speaks, has no word for a full disk.
        if folder and await _is_full(sftp, folder):
            raise Conflict(
                f"{shown}: no space is left on the machine.", hint=_FREE_SPACE
            ) from error
        raise Unavailable(
            f"{shown} could not be copied: {error.reason or type(error).__name__}.",
            hint="Look at the machine's disk.",
        ) from error
    except ConnectionError:
        raise
    except OSError as error:
        raise _local(error, name) from error


async def _is_full(sftp: asyncssh.SFTPClient, folder: str) -> bool:
    try:
        found = await sftp.statvfs(os.fsencode(folder))
    except asyncssh.SFTPError:
        return False
    return (found.bavail or 0) * (found.frsize or 0) < _ROOM_BYTES


def _copy_in(source: Path, target: Path) -> None:
    tree = _Tree.of(source)
    path = source
    try:
        for path in tree.folders:
            mode = _kept_mode(path.stat())
            (target / path.relative_to(source)).mkdir(exist_ok=True, mode=mode)
        for path in tree.files:
            copy = target / path.relative_to(source)
            shutil.copy2(path, copy)
            copy.chmod(_kept_mode(path.stat()))
    except OSError as error:
        raise _local(error, path) from error


def _copy_out(source: str, target: Path) -> None:
    try:
        with _arriving(target) as partial:
            shutil.copy2(source, partial)
    except OSError as error:
        raise _local(error, target) from error


@contextlib.contextmanager
def _arriving(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` that replaces it only when everything went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The same at every try, so that none is left over; and short, as the name may be at its limit.
    mark = hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()
    partial = target.with_name(f".{mark}.part")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _local(error: OSError, name: object) -> GridcloudError:
    shown = repr(str(error.filename or name))
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{shown} is not there.", hint="Put it back, then run the job again.")
    return Unavailable(
        f"{shown}: {error.strerror or error}.", hint="Check the disk's space and your rights."
    )
