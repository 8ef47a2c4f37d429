"""The system call filter, executed by a small interpreter of classic BPF."""

import errno
import struct

import pytest

from gridcloud.errors import Unavailable
from gridcloud.providers.local import seccomp
from gridcloud.providers.local.seccomp import ALLOW, AUDIT_ARCH, ERRNO, KILL_PROCESS

REFUSED = ERRNO | errno.EPERM
ABSENT = ERRNO | errno.ENOSYS
HARMLESS = {
    "x86_64": (0, 1, 57, 59, 101, 202, 262),
    "aarch64": (56, 63, 64, 117, 221, 260),
}


def verdict(program: bytes, arch: int, number: int, argument: int = 0) -> int:
    """Run the program as the kernel would; any step out of it is an IndexError."""
    data = struct.pack("=iIQ6Q", number, arch, 0, argument, 0, 0, 0, 0, 0)
    code = [struct.unpack_from("=HBBI", program, i) for i in range(0, len(program), 8)]
    at, accumulator = 0, 0
    while True:
        operation, true, false, value = code[at]
        at += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x15:
            at += true if accumulator == value else false
        elif operation == 0x45:
            at += true if accumulator & value else false
        elif operation == 0x06:
            return value
        else:
            raise AssertionError(f"unknown operation {operation:#x}")


@pytest.fixture(params=sorted(AUDIT_ARCH))
def machine(request):
    return request.param


@pytest.fixture
def program(machine):
    return seccomp.seccomp_program(machine)


def test_every_listed_call_gets_its_verdict(machine, program):
    """No call on the lists passes, on either architecture."""
    column = list(AUDIT_ARCH).index(machine)
    for calls, expected in ((seccomp.REFUSED, REFUSED), (seccomp.ABSENT, ABSENT)):
        for name, numbers in calls.items():
            if numbers[column] is not None:
                assert verdict(program, AUDIT_ARCH[machine], numbers[column]) == expected, name


def test_ordinary_calls_pass(machine, program):
    """Reading, writing, forking, executing and ptrace work."""
    for number in HARMLESS[machine]:
        assert verdict(program, AUDIT_ARCH[machine], number) == ALLOW


@pytest.mark.parametrize("flag", [1 << 17, 1 << 25, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30])
def test_clone_makes_processes_but_no_namespaces(machine, program, flag):
    """Each namespace flag alone is refused, whatever other flags stand beside it."""
    clone = seccomp.CLONE[list(AUDIT_ARCH).index(machine)]
    ordinary = 0x0125_0000 | 17  # what posix_spawn and fork ask for
    assert verdict(program, AUDIT_ARCH[machine], clone, ordinary) == ALLOW
    assert verdict(program, AUDIT_ARCH[machine], clone, ordinary | flag) == REFUSED


def test_another_architecture_is_killed(program, machine):
    """A 32-bit program, whose numbers mean other calls, cannot slip by the list."""
    for arch in (0x4000_0003, 0x4000_0028, *(set(AUDIT_ARCH.values()) - {AUDIT_ARCH[machine]})):
        assert verdict(program, arch, 0) == KILL_PROCESS


def test_x32_calls_are_refused():
    """The x32 numbers of x86_64, a second way to the same calls, are closed."""
    program = seccomp.seccomp_program("x86_64")
    assert verdict(program, AUDIT_ARCH["x86_64"], seccomp.X32_BIT | 1) == REFUSED


def test_an_unknown_processor_is_a_clear_error():
    """Without a table there is no sandbox, rather than one without a filter."""
    with pytest.raises(Unavailable, match="riscv64"):
        seccomp.seccomp_program("riscv64")
