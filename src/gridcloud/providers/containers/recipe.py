"""What a container is made of: the settings, and the request to the engine. Pure.

Its first process is a few lines of shell that sleep until the lease's end, which a file says that
only this site can write: the dead-man's switch. In a guest's container it is another user than
the guest, who can neither stop nor trace it. Commands come in later, by exec.
"""

from __future__ import annotations

import os
import re
import resource
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from gridcloud.errors import InvalidSpec
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Lease, LeaseRole
from gridcloud.model.things import Tags
from gridcloud.model.written import Bytes, Duration

#: Where a guest's home is in its container. The owner's is where it is on the host.
GUEST_HOME = "/home/guest"
KEPT = "/run/gridcloud"
END_FILE, SECCOMP_FILE = "ends-at", "seccomp.json"
ROLE_LABEL, GPUS_LABEL = "gridcloud-role", "gridcloud-gpus"
_NOBODY = 65534
_OPEN_FILES, _TASKS = 65536, 16384
#: It asks again so often; a shell that waits for `sleep` also buries orphans.
_SWITCH = (
    "trap 'exit 0' TERM; "
    'while read -r end <"$0" && [ "$(date +%s)" -lt "$end" ]; do sleep 2; done'
)
_IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ContainersSection(Frozen):
    """``[providers.NAME]`` with ``kind = "containers"``.

    ``image`` is what jobs run in where they name none; guests always get it. ``engine`` is the
    socket's address, found by itself if not told. ``cpus`` and ``memory`` bound what is used of
    the host. Each of ``gpus`` is one GPU: a device file, a CDI name (``nvidia.com/gpu=0``), or
    what the engine's own GPU support calls it (``0``, a UUID). ``network`` is what own jobs get:
    the engine's default if empty, ``none``, ``host``, or a network's name; guests get it (never
    ``host``) if the terms of their loan have a network. ``lingers`` is how long a container
    without an end of its own outlives a site that is gone.
    """

    image: Annotated[str, Field(min_length=1, max_length=512, pattern=_IMAGE)]
    engine: Annotated[str, Field(max_length=1024)] = ""
    cpus: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[Bytes, Field(ge=2**20)] | None = None
    gpus: Annotated[tuple[str, ...], Field(max_length=64)] = ()
    network: Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,127})?$")] = ""
    processes: Annotated[int, Field(ge=16)] = 4096
    read_only: bool = True
    pull: bool = True
    pull_time: Annotated[Duration, Field(gt=timedelta(0), le=timedelta(days=1))] = timedelta(
        minutes=30
    )
    lingers: Annotated[Duration, Field(ge=timedelta(seconds=1), le=timedelta(days=365))] = (
        timedelta(days=1)
    )

    @field_validator("gpus")
    @classmethod
    def _one_each(cls, gpus: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(gpus)) != len(gpus):
            raise ValueError("the same GPU stands there twice")
        if any(not gpu or "," in gpu for gpu in gpus):
            raise ValueError("a GPU's name cannot be empty or hold a comma")
        return gpus


class Host(Frozen):
    """What of the engine and of this process decides how a container is made.

    ``rootless`` engines map their root to this user; podman can be told to show this user under
    its own id, and has to be told to keep namespaces from guests. ``open_files`` and ``tasks``
    are this process's own hard limits, beyond which an engine may not be able to go.
    """

    uid: int
    gid: int
    rootless: bool
    podman: bool
    selinux: bool = False
    open_files: int = resource.RLIM_INFINITY
    tasks: int = resource.RLIM_INFINITY


class Users(Frozen):
    """As whom things run in a container; ``files`` owns the home on the host, None: this user."""

    switch: str
    commands: str
    files: tuple[int, int] | None = None


def users(host: Host, role: LeaseRole, guest_ids: tuple[int, int]) -> Users:
    """Return as whom a lease's switch and commands run.

    A guest of a root's site is ``guest_ids``, which is nobody on the host.
    """
    lent = role is LeaseRole.LENT
    own = f"{host.uid}:{host.gid}"
    if host.rootless and not host.podman:
        return Users(switch="0:0", commands="0:0")
    if lent and host.uid == 0 and not host.rootless:
        guest = f"{guest_ids[0]}:{guest_ids[1]}"
        return Users(switch=f"{_NOBODY}:{_NOBODY}", commands=guest, files=guest_ids)
    if lent:
        switch = "0:0" if host.rootless else f"{_NOBODY}:{_NOBODY}"
        return Users(switch=switch, commands=own)
    return Users(switch=own, commands=own)


def image_name(wanted: str) -> str:
    """Return an image's name with the tag that is meant, for without one an engine fetches all.

    Raises `InvalidSpec` for what is no such name.
    """
    if not re.fullmatch(_IMAGE, wanted):
        raise InvalidSpec(
            f"{wanted!r} is no name of a container image.",
            hint="Give it as REGISTRY/NAME:TAG, such as docker.io/library/python:3.12.",
        )
    tagged = ":" in wanted.rpartition("/")[2] or "@" in wanted
    return wanted if tagged else f"{wanted}:latest"


def home_inside(lease: Lease, home: Path) -> str:
    """Return where a lease's home is in its container."""
    return GUEST_HOME if lease.role is LeaseRole.LENT else str(home)


def create_request(
    lease: Lease,
    section: ContainersSection,
    host: Host,
    who: Users,
    tags: Tags,
    folder: Path,
    gpus: tuple[str, ...],
    image: str,
) -> dict[str, Any]:
    """Return the body of POST /containers/create. Raises `InvalidSpec` for what cannot be."""
    home = home_inside(lease, folder / "home")
    lent = lease.role is LeaseRole.LENT
    terms = lease.terms
    memory = lease.need.memory_bytes
    software = terms.software if lent and terms else ()
    # All are said, as an engine's own defaults may be more than it is allowed to give.
    open_files, tasks = _within(host.open_files, _OPEN_FILES), _within(host.tasks, _TASKS)
    bounds = {"core": 0, "nofile": open_files, "nproc": tasks}
    if lent and terms:
        bounds["fsize"] = terms.disk_bytes
    mounts = [(folder / "home", home, "rw,Z" if host.selinux else "rw")]
    mounts += [(folder / "kept", KEPT, "ro,Z" if host.selinux else "ro")]
    mounts += [(path, str(path), "ro") for path in software]
    security = ["no-new-privileges"]
    if lent and host.podman:
        security.append(f"seccomp={folder / SECCOMP_FILE}")
    config: dict[str, Any] = {
        "Binds": [_bind(*mount) for mount in mounts],
        "Mounts": [
            {"Type": "volume", "Source": volume_name(tags, v.name), "Target": v.path}
            for v in lease.order.volumes
        ],
        "AutoRemove": True,
        "NetworkMode": _network(lease, section),
        "Memory": memory,
        "MemorySwap": memory,
        "NanoCpus": lease.need.cpus * 10**9,
        "PidsLimit": terms.processes if lent and terms else section.processes,
        "ShmSize": memory,
        "Tmpfs": {"/tmp": f"rw,nosuid,nodev,mode=1777,size={memory}"},  # noqa: S108 - its own
        "CapDrop": ["ALL"],
        "SecurityOpt": security,
        "ReadonlyRootfs": lent or section.read_only,
        "Ulimits": [{"Name": name, "Soft": most, "Hard": most} for name, most in bounds.items()],
        **_devices(gpus),
    }
    if host.podman and host.rootless:
        config["UsernsMode"] = "keep-id"
    labels = tags.written() | {ROLE_LABEL: lease.role.value, GPUS_LABEL: ",".join(gpus)}
    return {
        "Image": image,
        "Entrypoint": ["/bin/sh", "-c", _SWITCH, f"{KEPT}/{END_FILE}"],
        "Cmd": [],
        "User": who.switch,
        "Env": _environment(home, software),
        "WorkingDir": "/",
        "Hostname": "guest" if lent else lease.order.name or "job",
        "Labels": labels,
        "HostConfig": config,
    }


def volume_name(tags: Tags, name: str) -> str:
    """Return what the engine calls a volume of this site."""
    return f"gridcloud-{tags.site[:12]}-{name}"


def _within(hard: int, wanted: int) -> int:
    return wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)


def _bind(source: Path, target: str, options: str) -> str:
    if ":" in str(source):
        raise InvalidSpec(
            f"{str(source)!r} cannot be shown in a container: it holds a colon.",
            hint="Move it, or the site's state folder (GRIDCLOUD_STATE).",
        )
    return f"{source}:{target}:{options}"


def _network(lease: Lease, section: ContainersSection) -> str:
    if lease.role is not LeaseRole.LENT:
        return section.network
    if not (lease.terms and lease.terms.network):
        return "none"
    return "" if section.network == "host" else section.network


def _environment(home: str, software: tuple[Path, ...]) -> list[str]:
    path = os.pathsep.join([*(f"{folder}/bin" for folder in software), _PATH])
    values = {"HOME": home, "USER": "guest", "LOGNAME": "guest", "TMPDIR": "/tmp"}  # noqa: S108
    if software:
        values["PATH"] = path
    return [f"{name}={value}" for name, value in values.items()]


def _devices(gpus: tuple[str, ...]) -> dict[str, Any]:
    """Return what shows GPUs: device files as they are, others by the engine's own support."""
    files = [gpu for gpu in gpus if gpu.startswith("/")]
    cdi = [gpu for gpu in gpus if "=" in gpu and not gpu.startswith("/")]
    plain = [gpu for gpu in gpus if gpu not in files and gpu not in cdi]
    requests: list[dict[str, Any]] = []
    if cdi:
        requests.append({"Driver": "cdi", "DeviceIDs": cdi})
    if plain:
        requests.append({"Driver": "nvidia", "DeviceIDs": plain, "Capabilities": [["gpu"]]})
    return {
        "Devices": [
            {"PathOnHost": file, "PathInContainer": file, "CgroupPermissions": "rw"}
            for file in files
        ],
        "DeviceRequests": requests,
    }
