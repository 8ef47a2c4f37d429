"""A machine that is booted with user-data: a Debian with real cloud-init, sshd and sudo.

    with booted(user_data) as machine:
        machine.host, machine.log()

It is a set of processes in namespaces of their own (files, processes, host name, network) over a
copy-on-write view of one root file system, which is made once and kept in /var/tmp. Its first
process stands for an init: cloud-init in its stages, then sshd, until it is powered off. Root in it
cannot touch the real kernel's settings nor power the host off. Needs root and `PROGRAMS`.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from testbeds.sshd import _network

CACHE = Path("/var/tmp/gridcloud-testbeds")
PROGRAMS = ("mmdebstrap", "unshare", "ip", "setpriv", "mkfs.ext4", "losetup")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_PACKAGES = (
    *("cloud-init", "openssh-server", "sudo", "python3-minimal", "e2fsprogs"),
    *("iproute2", "procps", "netbase", "ca-certificates"),
)
_CLOUD = """datasource_list: [NoCloud, None]
network: {config: disabled}
apt: {preserve_sources_list: true}
"""
_INIT = """#!/bin/bash
trap 'echo "powered off"; exit 0' TERM
do_() { "$@" </dev/null & wait $!; }
do_ cloud-init init --local
do_ cloud-init init
ssh-keygen -A; /usr/sbin/sshd
do_ cloud-init modules --mode=config
do_ cloud-init modules --mode=final
while :; do do_ sleep infinity; done
"""
_WITHOUT_CLOUD_INIT = """#!/bin/bash
trap 'echo "powered off"; exit 0' TERM
rm -rf /usr/bin/cloud-init /run/cloud-init
bash /seed/user-data
/usr/sbin/sshd
while :; do sleep infinity & wait $!; done
"""
_POWEROFF = "#!/bin/sh\nkill -TERM 1\n"
_BOOT = r"""set -eu
root=$1 folder=$2 init=$3
mount --make-rprivate /
mkdir -p "$folder"/{upper,work,view}
layers=lowerdir=$root,upperdir=$folder/upper,workdir=$folder/work
mount -t overlay overlay -o "$layers" "$folder/view"
cd "$folder/view"
mkdir -p var/lib/cloud/seed/nocloud-net seed
cp "$folder"/seed/* var/lib/cloud/seed/nocloud-net/
cp "$folder"/seed/* seed/
install -m 755 "$folder/$init" sbin/testbed-init
mount -t proc proc proc
# It is root on the real kernel: nothing in it may touch that.
[ ! -e proc/sysrq-trigger ] || mount --bind /dev/null proc/sysrq-trigger
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=755 dev dev
for device in null zero full random urandom tty; do cp -a "/dev/$device" dev/; done
[ ! -f "$folder/disk" ] || cp -a "$(cat "$folder/disk")" dev/vdb
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mkdir -p run/sshd run/lock old
hostname unnamed
pivot_root . old
umount -l /old
exec setpriv --bounding-set -sys_time,-sys_module,-sys_rawio,-sys_boot \
    --inh-caps -sys_time,-sys_module,-sys_rawio,-sys_boot chroot . /sbin/testbed-init
"""


@dataclass(frozen=True)
class Booted:
    """A machine that boots, or has; its files are below ``files``, seen from here."""

    host: str
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def files(self) -> Path:
        """The machine's root, through its first process."""
        (child,) = psutil.Process(self.process.pid).children()
        return Path(f"/proc/{child.pid}/root")

    def log(self) -> str:
        """What it wrote to its console."""
        return (self.folder / "console.log").read_text()

    def off(self, seconds: float) -> bool:
        """Wait until it has powered itself off; return whether it has."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def lacking() -> str:
    """Return why nothing can be booted here; empty if it can."""
    if os.geteuid() != 0:
        return "booting a machine needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    return f"booting a machine needs {', '.join(absent)}" if absent else ""


@contextlib.contextmanager
def booted(user_data: bytes, *, cloud_init: bool = True, disk_bytes: int = 0) -> Iterator[Booted]:
    """Boot a machine, and end all of it afterwards.

    Without ``cloud_init`` the user-data is a script that is run instead. ``disk_bytes`` gives it a
    blank disk /dev/vdb.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="gridcloud-booted-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "seed").mkdir()
        (folder / "seed/user-data").write_bytes(user_data)
        (folder / "seed/meta-data").write_text(f"instance-id: {folder.name}\n")
        (folder / "init").write_text(_INIT if cloud_init else _WITHOUT_CLOUD_INIT)
        if disk_bytes:
            (folder / "disk").write_text(stack.enter_context(_disk(folder, disk_bytes)))
        host, enter = stack.enter_context(_network())
        with (folder / "console.log").open("wb") as console:
            process = subprocess.Popen(
                [
                    *(*enter, "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork"),
                    *("--kill-child", "bash", "-c", _BOOT, "boot", root(), folder, "init"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        stack.callback(_stop, process)
        yield Booted(host, process, folder)


def _stop(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            child.kill()  # the first process of its namespace: all the others go with it
    process.kill()
    process.wait()


@contextlib.contextmanager
def _disk(folder, size):
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(size)
    found = subprocess.check_output(
        ["losetup", "--find", "--show", str(image)], text=True, env={"PATH": _PATH}
    ).strip()
    try:
        yield found
    finally:
        deadline = time.monotonic() + 10
        while subprocess.run(["losetup", "-d", found], env={"PATH": _PATH}, check=False).returncode:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)


def root() -> Path:
    """Return the root file system that all machines begin with; made if it is not there."""
    digest = hashlib.sha256(" ".join((*_PACKAGES, _CLOUD, _POWEROFF)).encode()).hexdigest()
    found = CACHE / f"booted-{digest[:10]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "booted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            partial = found.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            include = f"--include={','.join(_PACKAGES)}"
            make = ["mmdebstrap", "--quiet", "--variant=minbase", include, "bookworm", str(partial)]
            subprocess.run(make, check=True)
            (partial / "etc/cloud/cloud.cfg.d/90-testbed.cfg").write_text(_CLOUD)
            (partial / "etc/hosts").write_text("127.0.0.1 localhost\n")
            for name in ("poweroff", "halt", "shutdown"):
                (partial / "usr/sbin" / name).unlink(missing_ok=True)
                (partial / "usr/sbin" / name).write_text(_POWEROFF)
                (partial / "usr/sbin" / name).chmod(0o755)
            for key in (partial / "etc/ssh").glob("ssh_host_*"):
                key.unlink()
            partial.rename(found)
    return found
