"""Job folders on this host that somebody else writes to, such as a container's home.

What lies there may be changed at any moment, and lead out by symbolic links. So nothing beneath
the root is ever reached by its path, and no link is followed: see `gridcloud.access.beneath`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gridcloud.access.beneath import Beneath
from gridcloud.data.files import _arriving, _kept_mode, _local, _Tree
from gridcloud.errors import Forbidden, InvalidSpec, Unavailable

_CHUNK_BYTES = 1024 * 1024


class ConfinedFiles:
    """Files beneath ``root``, which is called ``shown_as`` by those that name them. In threads."""

    def __init__(self, root: Path, shown_as: str) -> None:
        self._root = root
        self._shown_as = shown_as.rstrip("/")

    async def put(self, source: Path, folder: str) -> None:
        """See `gridcloud.data.files.Files`."""
        await asyncio.to_thread(self._put, source, f"{folder}/{source.name}")

    async def get(self, source: str, target: Path, size: int) -> None:
        """See `gridcloud.data.files.Files`."""
        await asyncio.to_thread(self._get, source, target, size)

    def _put(self, source: Path, top: str) -> None:
        tree = _Tree.of(source)
        with self._beneath(top) as (beneath, base):

            def there(path: Path) -> bytes:
                return b"/".join([base, *map(os.fsencode, path.relative_to(source).parts)])

            for path in tree.folders:
                with contextlib.suppress(FileExistsError):
                    beneath.make_folder(there(path), _kept_mode(path.stat()))
            for path in tree.files:
                with path.open("rb") as file:
                    found = os.fstat(file.fileno())
                    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
                    with os.fdopen(beneath.open_file(there(path), flags), "wb") as copy:
                        shutil.copyfileobj(file, copy, _CHUNK_BYTES)
                    beneath.set_mode(there(path), _kept_mode(found))
                    beneath.set_times(there(path), found.st_atime_ns, found.st_mtime_ns)

    def _get(self, source: str, target: Path, size: int) -> None:
        with self._beneath(source) as (beneath, path):
            descriptor = beneath.open_file(path, os.O_RDONLY)
            with os.fdopen(descriptor, "rb") as file, _arriving(target) as partial:
                mode = os.fstat(descriptor).st_mode
                with partial.open("wb") as copy:
                    left = _copied(file, copy, size)
                if left:
                    raise Unavailable(
                        f"{source!r} arrived with {size - left} of {size} bytes.",
                        hint="Something there still changes it.",
                    )
                partial.chmod(0o600 | mode & 0o177)

    @contextlib.contextmanager
    def _beneath(self, path: str) -> Iterator[tuple[Beneath, bytes]]:
        """Give the root, and a path relative to it; tell what goes wrong by name."""
        inner = path.removeprefix(f"{self._shown_as}/")
        if inner == path or ".." in inner.split("/"):
            raise InvalidSpec(f"{path!r} is not in the job's home.", hint="Name a file that is.")
        try:
            with contextlib.closing(Beneath(self._root)) as beneath:
                yield beneath, os.fsencode(inner)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EXDEV, errno.EOPNOTSUPP):
                raise Forbidden(
                    f"{path!r} leads out of the job's home, or is no regular file.",
                    hint="Let the job copy what it means instead of linking to it.",
                ) from error
            raise _local(error, path) from error


def _copied(source: BinaryIO, target: BinaryIO, size: int) -> int:
    """Copy at most ``size`` bytes; return how many were missing."""
    left = size
    while left and (data := source.read(min(left, _CHUNK_BYTES))):
        target.write(data)
        left -= len(data)
    return left
