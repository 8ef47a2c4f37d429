"""The system calls a sandbox may not make, as a classic BPF program for ``bwrap --seccomp``.

The namespaces and the missing capabilities already refuse most of these; the filter takes away
the kernel's most attacked interfaces altogether, and the calls by which a guest could undo a
limit. ``ptrace`` stays allowed: debuggers and profilers need it, and it reaches nothing outside
the sandbox's own PID namespace.

Format: ``struct sock_filter`` and ``struct seccomp_data`` of the kernel, see seccomp(2) and
Documentation/userspace-api/seccomp_filter.rst. Numbers: the kernel's tables for x86_64 and for
the generic table that aarch64 uses; from 424 on all architectures share them.
"""

from __future__ import annotations

import errno
import platform
import struct

from gridcloud.errors import Unavailable

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x4000_0000
ALLOW = 0x7FFF_0000
KILL_PROCESS = 0x8000_0000
ERRNO = 0x0005_0000

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_FIRST_ARGUMENT = 0, 4, 16

#: CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}: a guest makes no namespaces.
NEW_NAMESPACES = 0x7E02_0000

#: name → (x86_64, aarch64); None where the architecture has no such call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # Limits that must not be undone, and the host's clock.
    "sched_setaffinity": (203, 122),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    # Interfaces of the kernel that namespaces do not divide.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "iopl": (172, None),
    "ioperm": (173, None),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    # Mounts, namespaces, and files by handle, which bypass what a path would forbid.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "setns": (308, 268),
    "unshare": (272, 97),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
}

#: Refused as "no such system call", so that programs fall back to their older way. ``clone3``
#: hides its flags from a filter, and ``clone`` does all that is needed; the others make memory
#: that belongs to no process's size and that the keeper therefore could not count.
ABSENT: dict[str, tuple[int, int]] = {
    "clone3": (435, 435),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
}

CLONE = (56, 220)


def seccomp_program(machine: str = "") -> bytes:
    """Return the filter for ``machine`` (as ``platform.machine()`` says; default: this one).

    Does not block, changes nothing. Raises `Unavailable` for an architecture without a table.
    """
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCH:
        raise Unavailable(
            f"There is no system call filter for the processor {machine!r}.",
            hint="Lending in a sandbox works on x86_64 and aarch64.",
        )
    column = list(AUDIT_ARCH).index(machine)
    refused = [number for pair in REFUSED.values() if (number := pair[column]) is not None]
    absent = [pair[column] for pair in ABSENT.values()]

    # Jumps go forward only and at most 255 steps, so the returns stand at the end.
    checks = [
        *(("refuse", _EQUAL, number) for number in refused),
        *(("absent", _EQUAL, number) for number in absent),
    ]
    if machine == "x86_64":
        checks.insert(0, ("refuse", _ANY_BIT, X32_BIT))
    head = [
        struct.pack("=HBBI", _LOAD, 0, 0, _OFFSET_ARCH),
        struct.pack("=HBBI", _EQUAL, 1, 0, AUDIT_ARCH[machine]),
        struct.pack("=HBBI", _RETURN, 0, 0, KILL_PROCESS),
        struct.pack("=HBBI", _LOAD, 0, 0, _OFFSET_NUMBER),
    ]
    tail = [
        struct.pack("=HBBI", _EQUAL, 0, 2, CLONE[column]),
        struct.pack("=HBBI", _LOAD, 0, 0, _OFFSET_FIRST_ARGUMENT),
        struct.pack("=HBBI", _ANY_BIT, 1, 0, NEW_NAMESPACES),
        struct.pack("=HBBI", _RETURN, 0, 0, ALLOW),
        struct.pack("=HBBI", _RETURN, 0, 0, ERRNO | errno.EPERM),
        struct.pack("=HBBI", _RETURN, 0, 0, ERRNO | errno.ENOSYS),
    ]
    landing = {"refuse": len(tail) - 2, "absent": len(tail) - 1}
    body = [
        struct.pack("=HBBI", operation, len(checks) - index - 1 + landing[verdict], 0, value)
        for index, (verdict, operation, value) in enumerate(checks)
    ]
    return b"".join(head + body + tail)
