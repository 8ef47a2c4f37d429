"""A machine's files, here or over SFTP: the two operations staging needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import asyncssh

from gridcloud.access.session import SSHSession
from gridcloud.errors import GridcloudError, NotFound, Unavailable


class Files(Protocol):
    """Moves whole files and folders between this host and where a job runs."""

    async def put(self, source: Path, folder: str) -> None:
        """Copy a file or folder into ``folder`` there, under its own name, links followed."""
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
    """Job folders on a machine reached by SSH."""

    def __init__(self, session: SSHSession) -> None:
        self._session = session

    async def put(self, source: Path, folder: str) -> None:
        """See `Files`."""
        async with self._client() as sftp:
            await sftp.put(source, folder, recurse=True, follow_symlinks=True, preserve=False)
            if source.is_file():
                mode = stat.S_IMODE(source.stat().st_mode)
                await sftp.chmod(f"{folder}/{source.name}", mode)
            else:
                await _copy_modes(sftp, source, f"{folder}/{source.name}")

    async def get(self, source: str, target: Path, size: int) -> None:
        """See `Files`."""
        with _arriving(target) as partial:
            async with self._client() as sftp:
                await sftp.get(os.fsencode(source), partial, follow_symlinks=False)
                mode = (await sftp.stat(os.fsencode(source))).permissions or 0o644
            arrived = partial.stat().st_size
            if arrived != size:
                raise Unavailable(f"{target.name} arrived with {arrived} of {size} bytes.")
            partial.chmod(0o600 | mode & 0o177)

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[asyncssh.SFTPClient]:
        try:
            async with self._session.sftp() as sftp:
                yield sftp
        except asyncssh.SFTPNoSuchFile as error:
            raise NotFound(f"A file to be copied is not there: {error}.") from error
        except (asyncssh.SFTPError, asyncssh.Error, ConnectionError) as error:
            raise Unavailable(f"Copying by SFTP failed: {error}.") from error
        except OSError as error:
            raise _local(error) from error


async def _copy_modes(sftp: asyncssh.SFTPClient, source: Path, target: str) -> None:
    """Carry over which files are executable; all else follows the receiver's umask."""
    for path in source.rglob("*"):
        if path.is_file() and path.stat().st_mode & stat.S_IXUSR:
            await sftp.chmod(f"{target}/{path.relative_to(source)}", 0o755)


def _copy_in(source: Path, target: Path) -> None:
    try:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
    except shutil.Error as error:
        raise NotFound(f"{source} could not be copied: {error.args[0][0][2]}.") from error
    except OSError as error:
        raise _local(error) from error


def _copy_out(source: str, target: Path) -> None:
    try:
        with _arriving(target) as partial:
            shutil.copy2(source, partial, follow_symlinks=True)
    except OSError as error:
        raise _local(error) from error


@contextlib.contextmanager
def _arriving(target: Path) -> Iterator[Path]:
    """Give a path beside ``target`` that replaces it only when everything went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name[:200]}.part")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _local(error: OSError) -> GridcloudError:
    name = error.filename or "a file"
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{name} is not there.")
    return Unavailable(
        f"{name}: {error.strerror or error}.", hint="Check the disk's space and your rights."
    )
