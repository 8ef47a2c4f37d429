"""The images of the LXD testbed: Debian 12 with cloud-init, variants, and one that does nothing."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

_PATIENCE = 900.0
#: What each variant of the image writes besides. A unit that is empty is masked.
VARIANTS = {
    "debian": {},
    "no-cloud-init": {
        "/etc/cloud/cloud-init.disabled": "",
        "/etc/systemd/system/ssh.service.d/keys.conf": "[Service]\nExecStartPre=\n"
        "ExecStartPre=/usr/bin/ssh-keygen -A\n",
    },
    "no-sshd": {"/etc/systemd/system/ssh.service": "", "/etc/systemd/system/ssh.socket": ""},
}
#: What of the image is in ``tiny``, besides an init that waits until it is told to end.
_TINY = {
    "./usr/bin/dash": "bin/sh",
    "./usr/lib/x86_64-linux-gnu/libc.so.6": "lib/x86_64-linux-gnu/libc.so.6",
    "./usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": "lib64/ld-linux-x86-64.so.2",
}
_TINY_INIT = "#!/bin/sh\ntrap 'exit 0' PWR TERM INT\nwhile :; do read line <>/fifo; done\n"
_PACKAGES = "systemd-sysv,dbus,cloud-init,openssh-server,python3,sudo,iproute2,udev,ca-certificates"
_MASKED = ("systemd-binfmt", "e2scrub_reap", "systemd-pstore", "systemd-udev-settle")
_TIMERS = ("apt-daily", "apt-daily-upgrade", "e2scrub_all", "fstrim", "dpkg-db-backup")
# In a container udev may touch the network devices only; networkd waits until it has.
_CUSTOMIZE = f"""
set -eu
cd "$1"
rm -rf usr/share/doc usr/share/man usr/share/info usr/share/locale/* usr/share/i18n \
    usr/share/lintian usr/lib/udev/hwdb.* usr/lib/x86_64-linux-gnu/gconv var/cache/debconf/*-old \
    etc/ssh/ssh_host_*
printf '[Match]\\nName=eth0\\n[Network]\\nDHCP=ipv4\\nLinkLocalAddressing=no\\nIPv6AcceptRA=no\\n' \
    >etc/systemd/network/eth0.network
mkdir -p etc/systemd/system/systemd-udev-trigger.service.d
printf '[Service]\\nExecStart=\\nExecStart=-udevadm trigger -c add --subsystem-match=net\\n' \
    >etc/systemd/system/systemd-udev-trigger.service.d/net.conf
chroot . systemctl -q enable systemd-networkd
for unit in {" ".join(f"{n}.service" for n in _MASKED)} {" ".join(f"{n}.timer" for n in _TIMERS)} \
        getty.target; do
    ln -sf /dev/null etc/systemd/system/$unit
done
printf 'datasource_list: [NoCloud, None]\\nnetwork: {{config: disabled}}\\nlocale: C.UTF-8\\n\
ssh_genkeytypes: [ed25519]\\n' >etc/cloud/cloud.cfg.d/99-testbed.cfg
: >etc/machine-id
"""
_SEED = "/var/lib/cloud/seed/nocloud-net"
_TEMPLATES = {
    f"{_SEED}/meta-data": "instance-id: {{ container.name }}\nlocal-hostname: "
    "{{ container.name }}\n",
    f"{_SEED}/user-data": '{{ config_get("user.user-data", "#cloud-config") }}',
    f"{_SEED}/vendor-data": '{{ config_get("user.vendor-data", "#cloud-config") }}',
    "/etc/hostname": "{{ container.name }}\n",
}


def built(folder: Path) -> Path:
    """Return the root file system that is kept in a folder, built if it is not there."""
    recipe = hashlib.sha256(f"{_PACKAGES}{_CUSTOMIZE}".encode()).hexdigest()[:12]
    rootfs = folder / f"rootfs-{recipe}.tar"
    if not rootfs.exists():
        for old in folder.glob("rootfs-*"):
            old.unlink()
        with tempfile.TemporaryDirectory(prefix="gridcloud-lxd-") as work:
            hook = Path(work) / "customize"
            hook.write_text(_CUSTOMIZE)
            part = rootfs.with_suffix(".part.tar")
            command = (
                *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={_PACKAGES}"),
                *("--aptopt=APT::Install-Recommends false", "--dpkgopt=force-unsafe-io"),
                *(
                    "--dpkgopt=path-exclude=/usr/share/doc/*",
                    "--dpkgopt=path-exclude=/usr/share/man/*",
                ),
                f'--customize-hook=sh {hook} "$1"',
                *("bookworm", str(part)),
            )
            subprocess.run(command, check=True, timeout=_PATIENCE)
            part.rename(rootfs)
    return rootfs


def write_metadata(path: Path, variant: str) -> None:
    """Write what LXD wants to know of an image: which files it fills in for each instance."""
    files = {}
    if variant != "tiny":
        files = _TEMPLATES | {path: text or "{# #}" for path, text in VARIANTS[variant].items()}
    named = {f"t{number}.tpl": file for number, file in enumerate(files)}
    metadata = {
        "architecture": "x86_64",
        "creation_date": 1_700_000_000,
        "properties": {"os": "debian", "release": "bookworm", "description": variant},
        "templates": {
            file: {"when": ["create", "copy"], "template": name} for name, file in named.items()
        },
    }
    with tarfile.open(path, "w") as tar:
        texts = {f"templates/{name}": files[file] for name, file in named.items()}
        for name, text in ({"metadata.yaml": json.dumps(metadata)} | texts).items():
            _add(tar, name, text.encode())


def write_tiny(path: Path, rootfs: Path) -> None:
    """Write a root file system of a shell that waits."""
    with tarfile.open(rootfs) as whole, tarfile.open(path, "w") as tar:
        for folder in ("dev", "proc", "sys", "run", "tmp", "etc", "mnt"):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        fifo = tarfile.TarInfo("fifo")
        fifo.type, fifo.mode = tarfile.FIFOTYPE, 0o600
        tar.addfile(fifo)
        for source, name in _TINY.items():
            file = whole.extractfile(source)
            assert file is not None
            _add(tar, name, file.read(), 0o755)
        _add(tar, "sbin/init", _TINY_INIT.encode(), 0o755)


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), mode
    tar.addfile(member, io.BytesIO(data))
