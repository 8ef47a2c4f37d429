"""An SFTP server that shows one folder and cannot leave it (SFTP version 3, with extensions).

asyncssh's own server checks paths and then uses them, which whoever can change the folder can
outrun; here everything goes through `gridcloud.access.beneath`. The folder is shown under the
name it has inside a sandbox, so that one absolute path means the same to a command and to SFTP.
What is elsewhere does not exist. Symbolic links are shown but neither followed nor made.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import posixpath
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncssh

from gridcloud.access.beneath import Beneath

_OPEN_FILES_LIMIT = 256
_OPEN_LISTINGS_LIMIT = 64
_READ_LIMIT_BYTES = 4 * 1024 * 1024
_LONG_READ_BYTES = 256 * 1024


class ConfinedSFTPServer(asyncssh.SFTPServer):
    """Serves ``root``, shown as the absolute path ``shown_as``, where a session also begins.

    ``drained`` returns once the peer has taken enough of what was sent, so that one that asks
    and never reads cannot fill the memory. Paths are resolved lexically: ``a/../b`` is ``b``.
    """

    def __init__(
        self,
        channel: asyncssh.SSHServerChannel[bytes],
        root: Path,
        shown_as: str,
        drained: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(channel)
        self._beneath = Beneath(root)
        self._home = _lexical(b"/", os.fsencode(shown_as))
        self._drained = drained
        self._files: set[io.FileIO] = set()
        self._listings = 0

    def exit(self) -> None:
        """End of the session: let go of everything."""
        for file in self._files:
            file.close()
        self._files.clear()
        self._beneath.close()

    # Paths

    def map_path(self, path: bytes) -> bytes:
        """Return the path relative to the root; raises ENOENT for what is elsewhere."""
        shown = _lexical(self._home, path)
        prefix = self._home.rstrip(b"/") + b"/"
        if shown == self._home:
            return b""
        if not shown.startswith(prefix):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return shown[len(prefix) :]

    def reverse_map_path(self, path: bytes) -> bytes:
        """Return how a path relative to the root is shown."""
        return posixpath.join(self._home, path) if path else self._home

    def realpath(self, path: bytes) -> bytes:
        """Return the absolute path, without looking whether there is anything."""
        return _lexical(self._home, path)

    def _step_to_home(self, path: bytes) -> bytes | None:
        """Return the next name towards the root if ``path`` is a folder above it, else None."""
        above = _lexical(self._home, path).rstrip(b"/") + b"/"
        if above != self._home + b"/" and self._home.startswith(above):
            return self._home[len(above) :].split(b"/")[0]
        return None

    # Open files

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
        """Open a regular file."""
        reading, writing = pflags & asyncssh.FXF_READ, pflags & asyncssh.FXF_WRITE
        flags = os.O_RDWR if reading and writing else os.O_WRONLY if writing else os.O_RDONLY
        for asked, flag in (
            (asyncssh.FXF_APPEND, os.O_APPEND),
            (asyncssh.FXF_CREAT, os.O_CREAT),
            (asyncssh.FXF_TRUNC, os.O_TRUNC),
            (asyncssh.FXF_EXCL, os.O_EXCL),
        ):
            if pflags & asked:
                flags |= flag
        if len(self._files) >= _OPEN_FILES_LIMIT:
            raise OSError(errno.EMFILE, f"More than {_OPEN_FILES_LIMIT} open files")
        mode = 0o666 if attrs.permissions is None else attrs.permissions
        fd = self._beneath.open_file(self.map_path(path), flags, mode)
        file = io.FileIO(fd, "r+b" if flags & os.O_RDWR else "wb" if writing else "rb")
        self._files.add(file)
        return file

    def open56(
        self, path: bytes, desired_access: int, flags: int, attrs: asyncssh.SFTPAttrs
    ) -> object:
        """Version 5 and later is not spoken here."""
        raise asyncssh.SFTPOpUnsupported("SFTP version 5 is not served")

    def close(self, file_obj: object) -> None:
        """Close a file."""
        file = _file(file_obj)
        self._files.discard(file)
        file.close()

    async def read(self, file_obj: object, offset: int, size: int) -> bytes:
        """Return at most ``size`` bytes from ``offset``, b"" at the end."""
        await self._drained()
        fd, size = _file(file_obj).fileno(), min(size, _READ_LIMIT_BYTES)
        if size > _LONG_READ_BYTES:
            return await asyncio.to_thread(os.pread, fd, size, offset)
        await asyncio.sleep(0)  # a long queue of requests lets others have their turn
        return os.pread(fd, size, offset)

    async def write(self, file_obj: object, offset: int, data: bytes) -> int:
        """Write all of ``data`` at ``offset``."""
        await asyncio.sleep(0)
        # Never in a thread: were the session cut meanwhile, the number could by then be another's.
        fd, rest = _file(file_obj).fileno(), memoryview(data)
        while rest:
            written = os.pwrite(fd, rest, offset)
            rest, offset = rest[written:], offset + written
        return len(data)

    def fstat(self, file_obj: object) -> os.stat_result:
        """Return the status of an open file."""
        return os.fstat(_file(file_obj).fileno())

    def fstatvfs(self, file_obj: object) -> os.statvfs_result:
        """Return the status of the file system of an open file."""
        return os.fstatvfs(_file(file_obj).fileno())

    def fsetstat(self, file_obj: object, attrs: asyncssh.SFTPAttrs) -> None:
        """Set size, permission bits or times of an open file."""
        fd = _file(file_obj).fileno()
        found = os.fstat(fd)
        _refuse_new_owner(attrs, found)
        if attrs.size is not None:
            os.ftruncate(fd, attrs.size)
        if attrs.permissions is not None:
            os.fchmod(fd, attrs.permissions & 0o777)
        times = _times(attrs, found)
        if times:
            os.utime(fd, ns=times)

    async def fsync(self, file_obj: object) -> None:
        """Wait until a file is on disk."""
        fd = os.dup(_file(file_obj).fileno())
        try:
            await asyncio.to_thread(os.fsync, fd)
        finally:
            os.close(fd)

    def lock(self, file_obj: object, offset: int, length: int, flags: int) -> None:
        """Locks are not offered."""
        raise asyncssh.SFTPOpUnsupported("Locks are not served")

    def unlock(self, file_obj: object, offset: int, length: int) -> None:
        """Locks are not offered."""
        raise asyncssh.SFTPOpUnsupported("Locks are not served")

    # Names

    def stat(self, path: bytes) -> os.stat_result | asyncssh.SFTPAttrs:
        """Return the status of a file or folder; raises ELOOP for a symbolic link."""
        found = self.lstat(path)
        if isinstance(found, os.stat_result) and stat.S_ISLNK(found.st_mode):
            raise OSError(errno.ELOOP, "Symbolic links are not followed", path)
        return found

    def lstat(self, path: bytes) -> os.stat_result | asyncssh.SFTPAttrs:
        """Return the status of a file, folder or symbolic link."""
        if self._step_to_home(path):
            # The folders above the root are shown as bare steps, so that clients can walk down.
            return asyncssh.SFTPAttrs(
                permissions=stat.S_IFDIR | 0o555, size=0, uid=0, gid=0, atime=0, mtime=0, nlink=1
            )
        return self._beneath.stat(self.map_path(path))

    def setstat(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
        """Set size, permission bits or times of a file or folder, never through a link."""
        inside = self.map_path(path)
        found = self._beneath.stat(inside)
        _refuse_new_owner(attrs, found)
        if attrs.size is not None:
            self._beneath.truncate(inside, attrs.size)
        if attrs.permissions is not None:
            self._beneath.set_mode(inside, attrs.permissions)
        times = _times(attrs, found)
        if times:
            self._beneath.set_times(inside, *times)

    def lsetstat(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
        """As `setstat`: links are not followed anyhow, and their own attributes not set."""
        self.setstat(path, attrs)

    def statvfs(self, path: bytes) -> os.statvfs_result:
        """Return the status of the file system of the root."""
        return self._beneath.filesystem(b"" if self._step_to_home(path) else self.map_path(path))

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        """List a folder."""
        step = self._step_to_home(path)
        if step:
            yield await self._named(path, b".")
            yield await self._named(posixpath.join(path, step), step)
            return
        if self._listings >= _OPEN_LISTINGS_LIMIT:
            raise OSError(errno.EMFILE, f"More than {_OPEN_LISTINGS_LIMIT} open listings")
        folder = self._beneath.open_folder(self.map_path(path))
        self._listings += 1
        try:
            for name in (b".", *map(os.fsencode, await asyncio.to_thread(os.listdir, folder))):
                try:
                    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:  # removed since it was listed
                    continue
                yield asyncssh.SFTPName(name, attrs=_attributes(found))
        finally:
            self._listings -= 1
            os.close(folder)

    async def _named(self, path: bytes, name: bytes) -> asyncssh.SFTPName:
        return asyncssh.SFTPName(name, attrs=await self.convert_attrs(self.lstat(path)))

    def format_user(self, uid: int | None) -> str:
        """Users are shown as numbers: this host's names are none of the guest's business."""
        return "" if uid is None else str(uid)

    def format_group(self, gid: int | None) -> str:
        """Groups are shown as numbers."""
        return "" if gid is None else str(gid)

    def remove(self, path: bytes) -> None:
        """Remove a file, or a symbolic link itself."""
        self._beneath.remove(self.map_path(path))

    def mkdir(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
        """Make a folder."""
        if self._step_to_home(path):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        mode = 0o777 if attrs.permissions is None else attrs.permissions
        self._beneath.make_folder(self.map_path(path), mode)

    def rmdir(self, path: bytes) -> None:
        """Remove an empty folder."""
        self._beneath.remove_folder(self.map_path(path))

    def rename(self, oldpath: bytes, newpath: bytes) -> None:
        """Rename; raises EEXIST rather than overwrite."""
        self._beneath.rename(self.map_path(oldpath), self.map_path(newpath), replace=False)

    def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
        """Rename; what has the new name is replaced."""
        self._beneath.rename(self.map_path(oldpath), self.map_path(newpath), replace=True)

    def readlink(self, path: bytes) -> bytes:
        """Return what a symbolic link says, as its maker wrote it."""
        return self._beneath.link_text(self.map_path(path))

    def symlink(self, oldpath: bytes, newpath: bytes) -> None:
        """Symbolic links are not made."""
        raise asyncssh.SFTPPermissionDenied("Symbolic links cannot be made over SFTP")

    def link(self, oldpath: bytes, newpath: bytes) -> None:
        """Hard links are not made."""
        raise asyncssh.SFTPPermissionDenied("Hard links cannot be made over SFTP")


def _lexical(start: bytes, path: bytes) -> bytes:
    """Return the absolute path without ``.``, ``..`` or doubled slashes, looking at no file."""
    # POSIX gives two leading slashes a meaning of their own, and normpath keeps them.
    return b"/" + posixpath.normpath(posixpath.join(start, path)).lstrip(b"/")


def _file(file_obj: object) -> io.FileIO:
    if not isinstance(file_obj, io.FileIO) or file_obj.closed:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return file_obj


def _attributes(found: os.stat_result) -> asyncssh.SFTPAttrs:
    return asyncssh.SFTPAttrs(
        size=found.st_size,
        uid=found.st_uid,
        gid=found.st_gid,
        permissions=found.st_mode,
        atime=int(found.st_atime),
        mtime=int(found.st_mtime),
        nlink=found.st_nlink,
    )


def _refuse_new_owner(attrs: asyncssh.SFTPAttrs, found: os.stat_result) -> None:
    if attrs.uid not in (None, found.st_uid) or attrs.gid not in (None, found.st_gid):
        raise asyncssh.SFTPPermissionDenied("Owners cannot be changed over SFTP")


def _times(attrs: asyncssh.SFTPAttrs, found: os.stat_result) -> tuple[int, int] | None:
    if attrs.atime is None and attrs.mtime is None:
        return None
    accessed, modified = found.st_atime_ns, found.st_mtime_ns
    if attrs.atime is not None:
        accessed = attrs.atime * 10**9 + (attrs.atime_ns or 0)
    if attrs.mtime is not None:
        modified = attrs.mtime * 10**9 + (attrs.mtime_ns or 0)
    return accessed, modified
