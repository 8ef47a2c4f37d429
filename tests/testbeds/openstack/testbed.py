"""The real OpenStack on this machine: keystone, glance, placement, nova, neutron and cinder.

    with openstack_testbed() as cloud:
        with cloud.project() as project:        # its own users, quota and network range
            clouds_yaml.write_text(project.clouds_yaml())

There is one on a machine at a time, shared by all who ask for it, and it ends with the last of
them, killed or not. It lives in namespaces of its own (processes, mounts, network): nothing of it
is left on the host but the caches in `layout.CACHE`. The first time takes some minutes, for it is
installed and its databases are made; later ones half a minute. Needs root and `layout.PROGRAMS`.

Servers are Debians of their own that run cloud-init: see `inside/gridcloud_virt.py`. Their fixed
addresses, and floating ones, are reached from this host. Security groups are kept, not enforced.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import openstack

from testbeds.openstack.keeper import AGAIN
from testbeds.openstack.layout import (
    ADMIN,
    AUTH_URL,
    CACHE,
    DEVICE,
    GUEST_PACKAGES,
    HERE,
    INSIDE,
    OUTSIDE,
    PACKAGES,
    PROGRAMS,
    RANGE,
    REGION,
)

_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_START_SECONDS = 900.0


def lacking() -> str:
    """Return why there can be none here; empty if there can."""
    if os.geteuid() != 0:
        return "OpenStack's testbed needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
    return f"OpenStack's testbed needs {', '.join(absent)}" if absent else ""


@contextlib.contextmanager
def openstack_testbed() -> Iterator[OpenStackTestbed]:
    """Give the machine's OpenStack, started if it does not run."""
    folder = CACHE / "openstack"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "users.lock").open("w") as users:
        with _alone(folder / "start.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            if not _kept(folder):
                _start(folder)
        yield OpenStackTestbed(folder / "run")
        fcntl.flock(users, fcntl.LOCK_UN)
        _await_end(folder)


@dataclass(frozen=True)
class OpenStackTestbed:
    """A running cloud; ``folder`` holds the logs and the servers of this run."""

    folder: Path

    @cached_property
    def admin(self) -> openstack.connection.Connection:
        """The administrator's connection."""
        return openstack.connect(auth=ADMIN | {"auth_url": AUTH_URL}, region_name=REGION)

    @contextlib.contextmanager
    def project(self) -> Iterator[Project]:
        """Make a project with one user; it is removed afterwards, and so is what is in it."""
        name = f"project-{secrets.token_hex(4)}"
        identity = self.admin.identity
        made = identity.create_project(name=name, domain_id="default")
        password = secrets.token_urlsafe(12)
        user = identity.create_user(
            name=name, password=password, domain_id="default", default_project_id=made.id
        )
        identity.assign_project_role_to_user(made, user, identity.find_role("member"))
        project = Project(self, made.id, name, password)
        try:
            yield project
        finally:
            project.clear()
            identity.delete_user(user)
            identity.delete_project(made)


@dataclass(frozen=True)
class Project:
    """A user's own part of the cloud; ``name`` is the user's as well."""

    cloud: OpenStackTestbed
    id: str
    name: str
    password: str

    @property
    def auth(self) -> dict[str, str]:
        """The user's credentials."""
        return {
            "auth_url": AUTH_URL,
            "username": self.name,
            "password": self.password,
            "project_id": self.id,
            "user_domain_id": "default",
        }

    @cached_property
    def user(self) -> openstack.connection.Connection:
        """The user's own connection."""
        return openstack.connect(auth=self.auth, region_name=REGION)

    @property
    def subnet(self) -> str:
        """A range of addresses that nobody else here is likely to use."""
        return f"198.18.{16 + int(self.id[:4], 16) % 16}.{int(self.id[4:8], 16) % 16 * 16}/28"

    def clouds_yaml(self, **more: Any) -> str:
        """Return the text of a `clouds.yaml` with the cloud ``testbed`` (JSON is YAML too)."""
        cloud = {"auth": self.auth, "region_name": REGION} | more
        return json.dumps({"clouds": {"testbed": cloud}}, indent=1)

    def limit(self, **quota: int) -> None:
        """Set quotas of nova, as ``instances=2``."""
        self.cloud.admin.compute.update_quota_set(self.id, **quota)

    def clear(self) -> None:
        """Remove everything in it, whoever made it."""
        compute, network, volumes = self.user.compute, self.user.network, self.user.block_storage
        for server in compute.servers():
            compute.delete_server(server, force=True, ignore_missing=True)
        _until(lambda: not list(compute.servers()))
        for address in network.ips():
            network.delete_ip(address)
        for router in network.routers():
            for port in network.ports(device_id=router.id):
                for fixed in port.fixed_ips:
                    network.remove_interface_from_router(router, fixed["subnet_id"])
            network.delete_router(router)
        for port in network.ports(project_id=self.id):
            network.delete_port(port)
        for one in network.networks(project_id=self.id):
            network.delete_network(one)
        for group in network.security_groups(project_id=self.id):
            if group.name != "default":
                network.delete_security_group(group)
        _until(lambda: all(one.status in {"available", "error"} for one in volumes.volumes()))
        for volume in volumes.volumes():
            volumes.delete_volume(volume)
        _until(lambda: not list(volumes.volumes()))


def _until(true: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "a project cannot be cleared"
        time.sleep(0.2)


# --- one on this machine


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _kept(folder: Path) -> bool:
    """Whether there is a keeper that lives: it holds a lock as long as it does."""
    with (folder / "keeper.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return (folder / "run/ready").exists()
        return False


def _await_end(folder: Path) -> None:
    """Wait for the end of the keeper, unless others use it, so that nothing is left behind."""
    end = time.monotonic() + 15
    while _kept(folder) and time.monotonic() < end:
        with (folder / "users.lock").open("w") as users:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        time.sleep(0.1)
    if not _kept(folder):
        _free_volumes(folder / "run")
        shutil.rmtree(folder / "run", ignore_errors=True)


def _start(folder: Path) -> None:
    venv, root = _installed(), _guest_root()
    configuration = b"".join(
        (HERE / name).read_bytes() for name in ("schemas.py", "configuration.py", "register.py")
    )
    template = folder / f"template-{_digest(configuration, *PACKAGES)}"
    while (ended := _launch(folder, template, venv, root)) == AGAIN:
        continue
    if ended is not None:
        log = (folder / "keeper.log").read_text()[-2000:]
        raise RuntimeError(f"OpenStack does not start (status {ended}): {log}")


def _launch(folder: Path, template: Path, venv: Path, root: Path) -> int | None:
    """Start a keeper; return None once it is ready, or what it ended with."""
    run = folder / "run"
    _free_volumes(run)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    with (folder / "keeper.lock").open("a") as lock, (folder / "keeper.log").open("wb") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keeper = subprocess.Popen(
            [
                *("nice", "-n", "5", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("--mount", "--net", "--uts", "--ipc"),
                *(sys.executable, "-m", "testbeds.openstack.keeper"),
                *map(str, (run, template, venv, root)),
            ],
            cwd=HERE.parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
    try:
        _await(run / "network", keeper)
        _lay_cable(keeper.pid)
        _await(run / "ready", keeper)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()
        raise
    return keeper.poll()


def _free_volumes(run: Path) -> None:
    """Give the loop devices of volumes back that were attached when a run ended: they are of the
    host, not of the namespaces."""
    told = ["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"]
    listed = subprocess.run(told, capture_output=True, text=True, check=False)
    for line in listed.stdout.splitlines():
        loop, _, file = line.partition(" ")
        if file.strip().startswith(f"{run}/volumes/"):
            subprocess.run(["losetup", "--detach", loop], check=False)


def _await(file: Path, keeper: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_SECONDS
    while not file.exists() and keeper.poll() is None:
        if time.monotonic() > end:
            raise TimeoutError(f"OpenStack does not come up: no {file}")
        time.sleep(0.1)


def _lay_cable(pid: int) -> None:
    """Join this host to the network of the keeper; the cable goes with that network."""
    listed = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True)
    if any(line.startswith(("198.18.", "198.19.")) for line in listed.stdout.splitlines()):
        raise RuntimeError(f"something else on this host uses {RANGE}")
    for line in (
        f"link add {DEVICE} type veth peer name uplink netns {pid}",
        f"address add {OUTSIDE}/30 dev {DEVICE}",
        f"link set {DEVICE} up",
        f"route add {RANGE} via {INSIDE} dev {DEVICE}",
    ):
        if line.startswith("route"):
            inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "--", "ip"]
            for more in (f"address add {INSIDE}/30 dev uplink", "link set uplink up"):
                subprocess.run([*inside, *more.split()], check=True)
        subprocess.run(["ip", *line.split()], check=True)


# --- what is installed once


def _digest(*parts: bytes | str) -> str:
    whole = b"\n".join(one.encode() if isinstance(one, str) else one for one in parts)
    return hashlib.sha256(whole).hexdigest()[:10]


def _installed() -> Path:
    """Return the virtual environment with OpenStack; made if it is not there."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    venv = CACHE / f"openstack-{_digest(version, *PACKAGES)}"
    if (venv / "complete").exists():
        return venv
    # A Python of the same version, but not the one of the tests: their environment may go.
    base = sys._base_executable  # type: ignore[attr-defined]
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([base, "-m", "venv", venv], check=True)
    python = venv / "bin/python"
    uv = Path(sys.executable).with_name("uv")
    with_uv = [uv, "pip", "install", "-q", "--compile-bytecode", "--python", python, *PACKAGES]
    if not uv.exists() or subprocess.run(with_uv, check=False).returncode:
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    (venv / "complete").touch()
    return venv


def _guest_root() -> Path:
    """Return the root file system that all servers begin with; made if it is not there."""
    inside = HERE / "inside"
    own = [(inside / name).read_bytes() for name in ("init", "poweroff")]
    root = CACHE / f"openstack-guest-{_digest(*own, *GUEST_PACKAGES, *_GUEST_SETTINGS.values())}"
    if root.exists():
        return root
    partial = root.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    packages = f"--include={','.join(GUEST_PACKAGES)}"
    make = ["mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", str(partial)]
    subprocess.run(make, check=True)
    for name, target in {"init": "sbin/testbed-init", "poweroff": "sbin/poweroff"}.items():
        shutil.copy(inside / name, partial / target)
    for name in ("halt", "shutdown"):
        (partial / "usr/sbin" / name).unlink(missing_ok=True)
        (partial / "usr/sbin" / name).symlink_to("poweroff")
    for path, text in _GUEST_SETTINGS.items():
        (partial / path).write_text(text)
    for key in (partial / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    partial.rename(root)
    return root


_GUEST_SETTINGS = {
    "etc/cloud/cloud.cfg.d/90-testbed.cfg": (
        "datasource_list: [ConfigDrive, None]\n"
        # The virt driver has laid its cable already.
        "network: {config: disabled}\n"
        "resize_rootfs: false\n"
        "growpart: {mode: 'off'}\n"
        "ssh_genkeytypes: [ed25519]\n"
        # Any other would be generated at each boot, for seconds.
        "locale: C.UTF-8\n"
        "apt: {preserve_sources_list: true}\n"
    ),
    "etc/hosts": "127.0.0.1 localhost\n",
}
