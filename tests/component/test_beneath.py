"""Files beneath a folder: no trick with paths, links or races leads out of it."""

import contextlib
import errno
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridcloud.access import beneath as module
from gridcloud.access.beneath import Beneath
from gridcloud.errors import Unavailable

pytestmark = pytest.mark.component


@pytest.fixture
def place(tmp_path):
    """A root with something in it, and a secret beside it."""
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (tmp_path / "other").mkdir()
    return root


@pytest.fixture
def files(place):
    opened = Beneath(place)
    yield opened
    opened.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fails(code, call, *args, **kwargs):
    with pytest.raises(OSError) as failed:
        call(*args, **kwargs)
    assert failed.value.errno == code


def read(files, path):
    fd = files.open_file(path, os.O_RDONLY)
    try:
        return os.read(fd, 1000)
    finally:
        os.close(fd)


def write(files, path, content, flags=0):
    fd = files.open_file(path, os.O_WRONLY | os.O_CREAT | flags)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def test_what_is_inside_works(files, place):
    """Every operation does what its name says, within the root."""
    assert read(files, b"folder/file") == b"inside"
    write(files, b"new", b"content")
    assert (place / "new").read_bytes() == b"content"
    files.rename(b"new", b"folder/moved", replace=False)
    assert files.stat(b"folder/moved").st_size == 7
    files.truncate(b"folder/moved", 3)
    files.set_mode(b"folder/moved", 0o640)
    files.set_times(b"folder/moved", 10**9, 2 * 10**9)
    found = (place / "folder/moved").stat()
    assert (found.st_size, found.st_mode & 0o7777, found.st_mtime) == (3, 0o640, 2)
    files.make_folder(b"folder/deeper", 0o750)
    fd = files.open_folder(b"folder")
    with os.scandir(fd) as entries:
        assert sorted(entry.name for entry in entries) == ["deeper", "file", "moved"]
    os.close(fd)
    files.remove_folder(b"folder/deeper")
    files.remove(b"folder/moved")
    assert names(place / "folder") == ["file"]
    assert files.filesystem(b"").f_bsize == os.statvfs(place).f_bsize
    assert files.stat(b"").st_ino == place.stat().st_ino == files.stat(b".").st_ino


def operations(files, path):
    return [
        (files.stat, path),
        (files.open_folder, path),
        (files.open_file, path, os.O_RDONLY),
        (files.open_file, path, os.O_WRONLY | os.O_CREAT),
        (files.make_folder, path),
        (files.remove_folder, path),
        (files.remove, path),
        (files.set_mode, path, 0o600),
        (files.set_times, path, 0, 0),
        (files.truncate, path, 0),
        (files.filesystem, path),
        (files.link_text, path),
    ]


@pytest.mark.parametrize(
    "path", [b"../secret", b"folder/../../secret", b"/etc/passwd", b"/", b".."]
)
def test_no_path_leads_out(files, place, path):
    """Neither dots nor absolute paths reach anything outside, for any operation."""
    for call, *args in operations(files, path):
        with pytest.raises(OSError) as failed:
            call(*args)
        assert failed.value.errno in (errno.EXDEV, errno.EBUSY, errno.EEXIST, errno.EISDIR)
    for old, new in ((path, b"x"), (b"folder/file", path)):
        for replace in (True, False):
            with pytest.raises(OSError) as failed:
                files.rename(old, new, replace=replace)
            assert failed.value.errno in (errno.EXDEV, errno.EBUSY)
    assert (place.parent / "secret").read_bytes() == b"outside"
    assert read(files, b"folder/file") == b"inside"


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "folder/file", "/proc/self/root"])
def test_no_symbolic_link_is_followed(files, place, target):
    """A planted link is shown, renamed and removed as a link, and never gone through."""
    (place / "link").symlink_to(target)
    (place / "hop").symlink_to("..")
    fails(errno.ELOOP, files.open_file, b"link", os.O_RDONLY)
    fails(errno.ELOOP, files.open_file, b"link", os.O_WRONLY | os.O_CREAT)
    fails(errno.ELOOP, files.open_file, b"link", os.O_WRONLY | os.O_TRUNC)
    fails(errno.ELOOP, files.truncate, b"link", 0)
    fails(errno.ELOOP, files.set_mode, b"link", 0o777)
    fails(errno.ELOOP, files.set_times, b"link", 0, 0)
    fails(errno.EEXIST, files.make_folder, b"link")
    for call, *args in operations(files, b"hop/secret"):
        fails(errno.ELOOP, call, *args)
    fails(errno.ELOOP, files.rename, b"hop/secret", b"mine", replace=True)
    fails(errno.ELOOP, files.rename, b"folder/file", b"hop/secret", replace=True)
    assert files.link_text(b"link") == target.encode()
    files.rename(b"link", b"folder/link", replace=True)
    fails(errno.ELOOP, files.open_file, b"folder/link", os.O_RDONLY)
    files.remove(b"folder/link")
    assert (place.parent / "secret").read_bytes() == b"outside"


def test_creating_over_a_dangling_link_makes_nothing(files, place):
    """A link to where nothing is yet does not make a file appear there."""
    (place / "link").symlink_to("../made")
    fails(errno.ELOOP, files.open_file, b"link", os.O_WRONLY | os.O_CREAT)
    fails(errno.EEXIST, files.open_file, b"link", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    assert not (place.parent / "made").exists()


def test_race_of_folder_and_link_is_never_won(files, place):
    """While a folder is swapped for a link to the outside again and again, nothing gets out."""
    stop = threading.Event()
    # Someone else has the run of the folder: now it is a folder, now a link, now nothing.
    (place / "trap").symlink_to("../other")
    (place.parent / "other" / "file").write_bytes(b"outside")

    def swap():
        while not stop.is_set():
            (place / "folder").rename(place / "aside")
            (place / "trap").rename(place / "folder")
            (place / "folder").rename(place / "trap")
            (place / "aside").rename(place / "folder")

    racer = threading.Thread(target=swap)
    racer.start()
    refused = 0
    try:
        for number in range(3000):
            try:
                assert read(files, b"folder/file") == b"inside"
                write(files, b"folder/new", b"x")
                files.make_folder(b"folder/d%d" % number)
                files.rename(b"folder/new", b"folder/newer", replace=True)
                files.set_mode(b"folder/newer", 0o600)
                files.remove(b"folder/newer")
            except OSError as error:
                assert error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EAGAIN)
                refused += 1
    finally:
        stop.set()
        racer.join()
    assert refused  # the race was on
    assert names(place.parent / "other") == ["file"]
    assert (place.parent / "other" / "file").read_bytes() == b"outside"


def test_folder_moved_out_while_open_is_not_a_way_back(files, place):
    """Dots cannot climb from a folder that was moved elsewhere."""
    (place / "folder").rename(place.parent / "moved")
    fails(errno.ENOENT, files.stat, b"folder/../../secret")


def test_rename_overwrites_only_if_told(files, place):
    """The plain rename never destroys a file."""
    (place / "a").write_text("a")
    (place / "b").write_text("b")
    fails(errno.EEXIST, files.rename, b"a", b"b", replace=False)
    assert (place / "b").read_text() == "b"
    files.rename(b"a", b"b", replace=True)
    assert (place / "b").read_text() == "a"


def test_rename_without_kernel_help_still_does_not_overwrite(files, place, monkeypatch):
    """On a file system without RENAME_NOREPLACE the rule holds all the same."""

    def refuse(*_):
        module.ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(module._libc, "renameat2", refuse, raising=False)
    (place / "a").write_text("a")
    (place / "b").write_text("b")
    fails(errno.EEXIST, files.rename, b"a", b"b", replace=False)
    files.rename(b"a", b"c", replace=False)
    assert (place / "c").read_text() == "a"


def test_pipes_sockets_and_folders_are_no_files(files, place):
    """Opening what could block or do something is refused, at once."""
    os.mkfifo(place / "pipe")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        here = os.open(place, os.O_RDONLY)  # a socket's path must be short
        listening.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
        fails(errno.EOPNOTSUPP, files.open_file, b"pipe", os.O_RDONLY)
        fails(errno.ENXIO, files.open_file, b"pipe", os.O_WRONLY)
        fails(errno.ENXIO, files.open_file, b"socket", os.O_RDONLY)
        fails(errno.EISDIR, files.open_file, b"folder", os.O_RDONLY)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_devices_are_refused(files, place):
    """A device that got into the folder is not opened."""
    try:
        os.mknod(place / "null", 0o666 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("devices cannot be made here")
    fails(errno.EOPNOTSUPP, files.open_file, b"null", os.O_RDWR)


def test_set_user_id_cannot_be_set(files, place):
    """No program that runs as the site's user can be left behind."""
    files.set_mode(b"folder/file", 0o6755)
    fd = files.open_file(b"fresh", os.O_WRONLY | os.O_CREAT, 0o4777)
    os.close(fd)
    files.make_folder(b"sticky", 0o7777)
    for name in ("folder/file", "fresh", "sticky"):
        assert (place / name).stat().st_mode & 0o7000 == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_new_things_belong_to_the_owner_of_the_root(place):
    """What the site's root puts into a guest's home is the guest's; what was there is left."""
    os.chown(place, 65534, 65534)
    files = Beneath(place)
    write(files, b"made", b"")
    write(files, b"excl", b"", os.O_EXCL)
    write(files, b"folder/file", b"found")
    files.make_folder(b"deep")
    files.close()
    for name, uid in (("made", 65534), ("excl", 65534), ("deep", 65534), ("folder/file", 0)):
        assert (place / name).stat().st_uid == uid


def test_odd_names_are_names(files, place):
    """Any bytes but NUL and slash make a name; what cannot be one is an error, not a crash."""
    for name in (b"\xff\xfe", "ünïcödé ☃".encode(), b"-rf", b"a\nb", b" ", b"..x", b"x" * 255):
        write(files, name, name)
        assert read(files, name) == name
    fails(errno.EINVAL, files.stat, b"a\0b")
    fails(errno.EINVAL, files.rename, b"folder/file", b"a\0b", replace=True)
    fails(errno.ENAMETOOLONG, files.stat, b"x" * 256)
    fails(errno.ENAMETOOLONG, files.open_file, b"folder/" + b"x" * 256, os.O_CREAT | os.O_RDWR)
    fails(errno.ENAMETOOLONG, files.stat, b"a/" * 3000)


@given(st.lists(st.sampled_from([b"..", b".", b"", b"a", b"up", b"folder", b"\xff", b"file"])))
def test_no_mixture_of_steps_leads_out(tmp_path_factory, steps):
    """Whatever is strung together, what is found is inside or there is an error."""
    base = tmp_path_factory.getbasetemp() / "mixture"
    root = base / "root"
    if not root.exists():
        (root / "folder" / "a").mkdir(parents=True)
        (root / "folder" / "file").touch()
        (root / "up").symlink_to("..")
        (base / "file").touch()
    inside = {path.lstat().st_ino for path in (root, *root.rglob("*"))}
    files = Beneath(root)
    try:
        with contextlib.suppress(OSError):
            assert files.stat(b"/".join(steps)).st_ino in inside
    finally:
        files.close()


def test_root_itself_stays(files):
    """The root can be neither removed, renamed nor replaced."""
    for path in (b"", b".", b"folder/.."):
        fails(errno.EBUSY, files.remove_folder, path)
        fails(errno.EISDIR, files.remove, path)
        fails(errno.EEXIST, files.make_folder, path)
        fails(errno.EBUSY, files.rename, path, b"x", replace=True)
        fails(errno.EBUSY, files.rename, b"folder", path, replace=True)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_old_kernel_is_told(place, monkeypatch, code):
    """Without openat2 nothing is served, rather than served unsafely."""

    def refuse(*_):
        module.ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(module._libc, "syscall", refuse)
    with pytest.raises(Unavailable, match="openat2"):
        Beneath(place)


def test_no_descriptor_is_left_open(files):
    """Success or failure, every call gives back what it opened."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (b"folder/file", b"missing/x", b"folder", b"../x", b"fresh"):
        for call, *args in operations(files, path):
            with contextlib.suppress(OSError):
                found = call(*args)
                if isinstance(found, int):
                    os.close(found)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
