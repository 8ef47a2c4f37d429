"""File operations that cannot leave a folder, whatever is done to the folder meanwhile.

Someone else may change what lies beneath the root at any moment: plant symbolic links, swap a
folder for a link between a check and a use. So nothing is checked by path and then used: every
path is resolved once, by the kernel, with openat2(2) and RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS |
RESOLVE_NO_MAGICLINKS, and what follows is done to the file descriptor that gave, or to one name
in it. No symbolic link is ever followed, not even one that stays inside.

Paths are bytes relative to the root; b"" and b"." are the root itself. Everything raises
`OSError` as the kernel says (EXDEV for ``..`` out of the root, ELOOP at a symbolic link), and
blocks only as long as one system call.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from pathlib import Path

from gridcloud.errors import Unavailable

_SYS_OPENAT2 = 437  # the same on every architecture, as all numbers from 424 on
_RESOLVE = 0x02 | 0x04 | 0x08  # NO_MAGICLINKS, NO_SYMLINKS, BENEATH
_RENAME_NOREPLACE = 1
_TRIES = 32
_NAME_LIMIT_BYTES = 255
_ANCHOR = os.O_PATH | os.O_NOFOLLOW
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    """``struct open_how`` of linux/openat2.h."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class Beneath:
    """The files beneath one folder. Close it when done; what was opened through it stays open.

    New files and folders belong to the owner of the root, when this process may say so, as a
    sandbox's user would not own what the site's root put there. Only the permission bits of
    user, group and others can be set: never set-user-id.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(self.open(b".", _ANCHOR))
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            raise Unavailable(
                "File access cannot be confined to a folder: this system has no openat2.",
                hint="Use Linux 5.6 or newer; in a container, let its seccomp profile allow it.",
            ) from error
        found = os.fstat(self._root)
        gives_away = os.geteuid() == 0 and (found.st_uid, found.st_gid) != (0, 0)
        self._owner = (found.st_uid, found.st_gid) if gives_away else None

    def close(self) -> None:
        """Let go of the root. Idempotent."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def open(self, path: bytes, flags: int, mode: int = 0) -> int:
        """Return a new file descriptor for anything at all, opened as ``flags`` say."""
        _check(path)
        creating = bool(flags & os.O_CREAT)
        how = _OpenHow(flags | os.O_CLOEXEC, mode & 0o777 if creating else 0, _RESOLVE)
        for _ in range(_TRIES):
            fd = _libc.syscall(
                ctypes.c_long(_SYS_OPENAT2),
                ctypes.c_int(self._root),
                ctypes.c_char_p(path or b"."),
                ctypes.byref(how),
                ctypes.c_size_t(ctypes.sizeof(how)),
            )
            if fd >= 0:
                return int(fd)
            code = ctypes.get_errno()
            # EAGAIN: something was renamed while ".." was resolved; the kernel asks to try again.
            if code not in (errno.EAGAIN, errno.EINTR):
                break
        raise OSError(code, os.strerror(code), path)

    def open_file(self, path: bytes, flags: int, mode: int = 0o666) -> int:
        """Return a descriptor of a regular file; raises ENOTSUP for pipes, sockets and devices."""
        fd = self._open_or_create(path, flags | os.O_NONBLOCK | os.O_NOCTTY, mode)
        found = os.fstat(fd).st_mode
        if not stat.S_ISREG(found):
            os.close(fd)
            code = errno.EISDIR if stat.S_ISDIR(found) else errno.EOPNOTSUPP
            raise OSError(code, "Not a regular file", path)
        return fd

    def open_folder(self, path: bytes) -> int:
        """Return a descriptor of a folder, to list it by."""
        return self.open(path, _FOLDER)

    def stat(self, path: bytes) -> os.stat_result:
        """Return the status of what is at ``path``; of a symbolic link, its own."""
        with _Held(self.open(path, _ANCHOR)) as fd:
            return os.fstat(fd)

    def filesystem(self, path: bytes) -> os.statvfs_result:
        """Return the status of the file system that ``path`` is on."""
        with _Held(self.open(path, _ANCHOR)) as fd:
            return os.fstatvfs(fd)

    def link_text(self, path: bytes) -> bytes:
        """Return what a symbolic link says, without going there."""
        with _Held(self.open(path, _ANCHOR)) as fd:
            return os.readlink(b"", dir_fd=fd)

    def make_folder(self, path: bytes, mode: int = 0o777) -> None:
        """Make a folder; raises EEXIST when there is anything."""
        parent, name = self._parent(path, errno.EEXIST)
        with _Held(parent):
            os.mkdir(name, mode & 0o777, dir_fd=parent)
        if self._owner:
            with _Held(self.open_folder(path)) as fd:
                os.fchown(fd, *self._owner)

    def remove_folder(self, path: bytes) -> None:
        """Remove an empty folder."""
        parent, name = self._parent(path, errno.EBUSY)
        with _Held(parent):
            os.rmdir(name, dir_fd=parent)

    def remove(self, path: bytes) -> None:
        """Remove a file, or a symbolic link itself."""
        parent, name = self._parent(path, errno.EISDIR)
        with _Held(parent):
            os.unlink(name, dir_fd=parent)

    def rename(self, old: bytes, new: bytes, *, replace: bool) -> None:
        """Rename within the root; without ``replace`` it raises EEXIST rather than overwrite."""
        old_parent, old_name = self._parent(old, errno.EBUSY)
        with _Held(old_parent):
            new_parent, new_name = self._parent(new, errno.EBUSY)
            with _Held(new_parent):
                if not replace and _rename_noreplace(old_parent, old_name, new_parent, new_name):
                    return
                os.rename(old_name, new_name, src_dir_fd=old_parent, dst_dir_fd=new_parent)

    def set_mode(self, path: bytes, mode: int) -> None:
        """Set the permission bits of a file or folder; raises ELOOP for a symbolic link."""
        with _Held(self._open_unlinked(path)) as fd:
            _by_descriptor(fd).chmod(mode & 0o777)

    def set_times(self, path: bytes, accessed_ns: int, modified_ns: int) -> None:
        """Set both times, in nanoseconds since 1970; raises ELOOP for a symbolic link."""
        with _Held(self._open_unlinked(path)) as fd:
            os.utime(_by_descriptor(fd), ns=(accessed_ns, modified_ns))

    def truncate(self, path: bytes, size: int) -> None:
        """Set the size of a regular file."""
        with _Held(self.open_file(path, os.O_WRONLY)) as fd:
            os.ftruncate(fd, size)

    def _open_or_create(self, path: bytes, flags: int, mode: int) -> int:
        if not flags & os.O_CREAT or self._owner is None:
            return self.open(path, flags, mode)
        # What is given away must be what was made here, so making and finding are kept apart.
        code = errno.EAGAIN
        for _ in range(_TRIES):
            try:
                if not flags & os.O_EXCL:
                    return self.open(path, flags & ~os.O_CREAT)
            except FileNotFoundError:
                pass
            try:
                fd = self.open(path, flags | os.O_EXCL, mode)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                continue
            os.fchown(fd, *self._owner)
            return fd
        raise OSError(code, os.strerror(code), path)

    def _open_unlinked(self, path: bytes) -> int:
        fd = self.open(path, _ANCHOR)
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        return fd

    def _parent(self, path: bytes, code_for_root: int) -> tuple[int, bytes]:
        """Return a descriptor of the folder that holds ``path``, and the last name in it."""
        _check(path)
        folder, _, name = path.rstrip(b"/").rpartition(b"/")
        if name in (b"", b".", b".."):
            raise OSError(code_for_root, os.strerror(code_for_root), path)
        return self.open(folder, os.O_PATH | os.O_DIRECTORY), name


class _Held:
    """Closes a descriptor at the end of a block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _check(path: bytes) -> None:
    if b"\0" in path:
        raise OSError(errno.EINVAL, "A name cannot hold a NUL", path)
    if any(len(name) > _NAME_LIMIT_BYTES for name in path.split(b"/")):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), path)
    if path.startswith(b"/"):
        # rpartition() would take the root of "/name" for our root.
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)


def _by_descriptor(fd: int) -> Path:
    # chmod and utimes do not take an O_PATH descriptor; this name leads to exactly that file.
    return Path(f"/proc/self/fd/{fd}")


def _rename_noreplace(old_parent: int, old: bytes, new_parent: int, new: bytes) -> bool:
    """Rename unless there is something, atomically; False when the file system cannot do that."""
    if hasattr(_libc, "renameat2"):
        if _libc.renameat2(old_parent, old, new_parent, new, _RENAME_NOREPLACE) == 0:
            return True
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), new)
    try:
        os.stat(new, dir_fd=new_parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), new)
