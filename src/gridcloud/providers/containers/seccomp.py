"""Which system calls a guest's container may make, where the engine's own choice is too wide.

Docker keeps namespaces from containers without power; podman's profile lets everybody make them,
and with a user namespace of its own a guest reaches parts of the kernel that only root reaches
otherwise. So for podman its profile is taken and narrowed, for guests.
Format: https://github.com/containers/common/tree/main/pkg/seccomp
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gridcloud.errors import Unavailable

PROFILES = (Path("/etc/containers/seccomp.json"), Path("/usr/share/containers/seccomp.json"))
#: Making or entering namespaces, mounting, and what unprivileged code has no other use for.
_DENIED = frozenset(
    [
        "unshare",
        "setns",
        "clone3",
        "mount",
        "umount",
        "umount2",
        "pivot_root",
        "open_tree",
        "move_mount",
        "fsopen",
        "fsconfig",
        "fsmount",
        "fspick",
        "mount_setattr",
        "keyctl",
        "add_key",
        "request_key",
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "process_vm_readv",
        "process_vm_writev",
        "kexec_load",
        "kexec_file_load",
    ]
)
#: The flags of clone(2) that make a namespace.
_NAMESPACE_FLAGS = 0x7E02_0000
_ENOSYS, _EPERM = 38, 1


def guest_profile(profiles: tuple[Path, ...] = PROFILES) -> str:
    """Return podman's profile, narrowed, as JSON. Blocks for reading one file.

    Raises `Unavailable` where there is none that could be narrowed.
    """
    file = next((each for each in profiles if each.exists()), None)
    if file is None:
        raise Unavailable(
            f"Guests cannot be confined: none of {', '.join(map(str, profiles))} is there.",
            hint="Install containers-common (Debian: golang-github-containers-common).",
        )
    try:
        return json.dumps(narrowed(json.loads(file.read_bytes())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unavailable(
            f"Guests cannot be confined: {file} is no seccomp profile: {error!r}.",
            hint="Put back the file that came with podman.",
        ) from error


def narrowed(profile: dict[str, Any]) -> dict[str, Any]:
    """Return a profile that allows nothing more, and neither namespaces nor mounts. Pure."""
    rules = []
    for rule in profile["syscalls"]:
        names = [name for name in rule["names"] if name not in _DENIED and name != "clone"]
        if names:
            rules.append({**rule, "names": names})
    no_namespace = {
        "index": 0,
        "value": _NAMESPACE_FLAGS,
        "valueTwo": 0,
        "op": "SCMP_CMP_MASKED_EQ",
    }
    rules.append({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [no_namespace]})
    # The C library takes it for an old kernel, and uses clone instead.
    denied = {"action": "SCMP_ACT_ERRNO", "args": []}
    rules.append({**denied, "names": ["clone3"], "errnoRet": _ENOSYS})
    rules.append({**denied, "names": sorted(_DENIED - {"clone3"}), "errnoRet": _EPERM})
    return {**profile, "syscalls": rules}
