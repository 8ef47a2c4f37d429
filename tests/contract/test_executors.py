"""Running jobs, on this host and over SSH: one suite for both shells."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import stat
import subprocess
from pathlib import Path

import psutil
import pytest

from gridcloud.access import keys
from gridcloud.access.connect import Credentials, connect
from gridcloud.access.session import CHANNELS_EACH, SSHSession
from gridcloud.data.files import LocalFiles, SFTPFiles
from gridcloud.data.staging import check_inputs, stage_in, stage_out
from gridcloud.errors import Conflict, Forbidden, InvalidSpec, NotFound, Unavailable
from gridcloud.executors.executor import Executor, Launch, LogFiles
from gridcloud.executors.shells import LocalShell, SSHShell
from gridcloud.model.lease import Endpoint
from testbeds import sshd as testbed

pytestmark = pytest.mark.component
ODD_NAMES = [
    b"with space",
    b"-rf",
    b"new\nline",
    b"caf\xe9 \xff",
    b"*?[x]",
    b".hidden",
    b"back\\slash",
    b"'\"$HOME",
    b"x" * 255,
    b"x" * 254 + b"y",
]


_numbers = itertools.count()


class Ground:
    """A machine to run jobs on: how to, and where its files are seen from here."""

    def __init__(self, shell, files, root, seen):
        self.executor = Executor(shell, root)
        self.shell = shell
        self.files = files
        self.seen = seen  # the root, as a path on this host


@pytest.fixture(scope="module")
def machine():
    key = keys.ephemeral()
    with testbed.sshd(authorized=[keys.public_line(key)], host="127.0.0.32") as machine:
        yield machine, key


def new_session(machine):
    there, key = machine
    endpoint = Endpoint(
        host=there.host, port=there.port, user=there.user, host_keys=(there.host_key_line,)
    )
    return SSHSession(lambda: connect(endpoint, Credentials(key=key)))


@pytest.fixture
async def session(machine):
    session = new_session(machine)
    yield session
    await session.close()


@pytest.fixture(params=["local", "ssh"])
async def ground(request, machine, tmp_path):
    if request.param == "local":
        root = tmp_path / "jobs"
        yield Ground(LocalShell(), LocalFiles(), str(root), root)
        return
    session = new_session(machine)
    name = f"jobs {next(_numbers)}"
    yield Ground(SSHShell(session), SFTPFiles(session), name, machine[0].home / name)
    await session.close()


@pytest.fixture
def logs(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    return LogFiles(stdout=folder / "stdout", stderr=folder / "stderr")


def launch(*command, **more):
    known = {
        "command": command,
        "env": {},
        "inherit_env": True,
        "time_limit_seconds": None,
        "grace_seconds": 2.0,
        "outputs": (),
        "ends_at_epoch": None,
    }
    return Launch(**(known | more))


def sh(script, **more):
    return launch("sh", "-c", script, **more)


def output(ground, logs, name, stream="stdout"):
    """What the job printed, wherever it is kept."""
    here = ground.seen / name / stream if ground.shell.files_are_here else getattr(logs, stream)
    return here.read_bytes() if here.exists() else b""


async def start(ground, logs, name, spec):
    """Start a job; return the task that follows it, once the command runs."""
    begun = asyncio.Event()
    task = asyncio.create_task(ground.executor.run(name, spec, logs, begun.set))
    await asyncio.wait({task, asyncio.ensure_future(begun.wait())}, return_when="FIRST_COMPLETED")
    return task


async def test_status_streams_and_environment(ground, logs):
    """The command's own status, both streams apart, the variables it was given."""
    await ground.executor.prepare("a")
    spec = sh('printf "$WORD"; echo err >&2; exit 3', env={"WORD": "hi ü"})
    ending = await ground.executor.run("a", spec, logs, lambda: None)
    assert ending.outcome.exit_code == 3
    assert output(ground, logs, "a") == "hi ü".encode()
    assert output(ground, logs, "a", "stderr") == b"err\n"
    await ground.executor.remove("a")
    assert not (ground.seen / "a").exists()


async def test_running_twice_runs_once(ground, logs):
    """A caller that lost the answer asks again and gets it."""
    spec = sh("echo x >> ran; echo out")
    first = await ground.executor.run("a", spec, logs, lambda: None)
    again = await ground.executor.run("a", spec, logs, lambda: None)
    watched = await ground.executor.watch("a", logs)
    assert first == again == watched
    assert output(ground, logs, "a") == b"out\n"
    assert (ground.seen / "a/work/ran").read_text() == "x\n"
    await ground.executor.remove("a")
    await ground.executor.remove("a")


async def test_a_follower_that_goes_leaves_the_job(ground, logs):
    """Whoever follows next gets the rest, and everything once."""
    task = await start(ground, logs, "a", sh("for i in 1 2 3 4 5 6; do echo $i; sleep 0.2; done"))
    while b"2" not in output(ground, logs, "a"):
        await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    ending = await ground.executor.watch("a", logs)
    assert ending.outcome.succeeded
    assert output(ground, logs, "a").split() == list(b"1 2 3 4 5 6".split())
    await ground.executor.remove("a")


async def test_cancel_ends_the_whole_tree(ground, logs):
    """Also what ignores TERM and what went into a session of its own."""
    script = "setsid sh -c 'trap \"\" TERM; echo $$ > pid; sleep 300' & sleep 300"
    task = await start(ground, logs, "a", sh(script))
    pid = ground.seen / "a/work/pid"
    while not (pid.exists() and pid.read_text().strip()):
        await asyncio.sleep(0.02)
    stubborn = int(pid.read_text())
    await ground.executor.cancel("a", 0.3)
    assert (await task).outcome.reason == "canceled"
    assert not psutil.pid_exists(stubborn)
    await ground.executor.remove("a")


async def test_the_time_limit_ends_it(ground, logs):
    """The reason is told apart from other ends."""
    ending = await ground.executor.run(
        "a", sh("sleep 300", time_limit_seconds=0.3), logs, lambda: None
    )
    assert ending.outcome.reason == "time-limit"
    await ground.executor.remove("a")


async def test_states(ground, logs):
    """Each folder's state is told; none is no error."""
    assert await ground.executor.states() == {}
    await ground.executor.prepare("p")
    await ground.executor.run("e", sh("true"), logs, lambda: None)
    task = await start(ground, logs, "r", sh("sleep 300"))
    assert await ground.executor.states() == {"p": "prepared", "e": "ended", "r": "running"}
    for name in "per":
        await ground.executor.remove(name)
    await asyncio.gather(task, return_exceptions=True)
    assert await ground.executor.states() == {}


async def test_watching_what_never_started_is_not_found(ground, logs):
    """There is nothing to wait for, and a hint what to do."""
    with pytest.raises(NotFound, match="No job was started") as told:
        await ground.executor.watch("never", logs)
    assert told.value.hint


async def test_bytes_pass_unharmed(ground, logs):
    """NULs, no text, no newline at the end, 20 MB of it on both streams at once."""
    script = "import os; b = bytes(range(256)) * 4096\nfor _ in range(10): os.write(1, b); "
    script += "os.write(2, b)\nos.write(1, b'end')"
    await ground.executor.run("a", launch("python3", "-c", script), logs, lambda: None)
    block = bytes(range(256)) * 40960
    for stream, expected in (("stdout", block + b"end"), ("stderr", block)):
        found = output(ground, logs, "a", stream)
        assert hashlib.sha256(found).digest() == hashlib.sha256(expected).digest()
    await ground.executor.remove("a")


async def test_a_great_many_outputs_are_named(ground, logs):
    """The list of outputs may be long: no line limit of any stream library cuts it."""
    script = """
import os
for folder in range(20):
    os.mkdir(f"{folder:0100}")
    for number in range(1000):
        os.close(os.open(f"{folder:0100}/{number:0100}", os.O_CREAT | os.O_WRONLY))
"""
    spec = launch("python3", "-c", script, outputs=("0*/*",))
    ending = await ground.executor.run("a", spec, logs, lambda: None)
    assert len(ending.outputs) == 20_000
    assert all(size == 0 and len(name) == 201 for name, size in ending.outputs)
    await ground.executor.remove("a")


def make_tree(top):
    """A folder of awkward names, links and modes."""
    top.mkdir()
    for number, name in enumerate(ODD_NAMES):
        (top / os.fsdecode(name)).write_bytes(b"%d" % number)
    (top / "empty").mkdir()
    (top / "none").touch()
    (top / "deep/er").mkdir(parents=True)
    (top / "deep/er/run.sh").write_text("#!/bin/sh\n")
    (top / "deep/er/run.sh").chmod(0o755)
    (top / "read-only").write_text("r")
    (top / "read-only").chmod(0o444)
    os.utime(top / "none", (1e9, 1e9))
    (top / "again").symlink_to("deep")
    (top / "linked").symlink_to("read-only")


def read_tree(top):
    return {
        os.fsencode(path.relative_to(top)): path.read_bytes() if path.is_file() else None
        for path in top.rglob("*")
        if path != top
    }


async def test_awkward_files_go_in_and_come_out(ground, logs, tmp_path):
    """Names, bytes, modes, times, empty folders; links followed; twice over, and back again."""
    tree = tmp_path / "tree é"
    make_tree(tree)
    await asyncio.to_thread(check_inputs, [str(tree)])
    work = await ground.executor.prepare("a")
    await stage_in(ground.files, [str(tree)], work)
    await stage_in(ground.files, [str(tree)], work)
    there = ground.seen / "a/work" / tree.name
    expected = read_tree(tree) | {
        b"again/er": None,
        b"again/er/run.sh": b"#!/bin/sh\n",
    }
    assert read_tree(there) == expected
    assert not [path for path in there.rglob("*") if path.is_symlink()]
    assert stat.S_IMODE((there / "deep/er/run.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((there / "read-only").stat().st_mode) == 0o644
    assert (there / "none").stat().st_mtime == 1e9
    patterns = (tree.name, f"{tree.name}/.hidden")
    ending = await ground.executor.run("a", sh("true", outputs=patterns), logs, lambda: None)
    await stage_out(ground.files, work, ending.outputs, tmp_path / "back", ["**"])
    files = {name: data for name, data in expected.items() if data is not None}
    back = read_tree(tmp_path / "back" / tree.name)
    assert {name: data for name, data in back.items() if data is not None} == files
    assert os.access(tmp_path / "back" / tree.name / "deep/er/run.sh", os.X_OK)
    await ground.executor.remove("a")


async def test_a_link_to_an_output_comes_back_as_a_file(ground, logs, tmp_path):
    """What a link inside the job folder leads to is what was asked for."""
    work = await ground.executor.prepare("a")
    spec = sh("echo data > a.txt; ln -s a.txt b.txt", outputs=("*.txt",))
    ending = await ground.executor.run("a", spec, logs, lambda: None)
    await stage_out(ground.files, work, ending.outputs, tmp_path / "out", ["**"])
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir() if not p.is_symlink()} == {
        "a.txt": "data\n",
        "b.txt": "data\n",
    }
    await ground.executor.remove("a")


async def test_thousands_of_small_files(ground, logs, tmp_path):
    """They all go and come back, none torn."""
    tree = tmp_path / "many"
    tree.mkdir()
    for number in range(2000):
        (tree / f"{number}.dat").write_bytes(b"%04d" % number * 256)
    work = await ground.executor.prepare("a")
    await stage_in(ground.files, [str(tree)], work)
    ending = await ground.executor.run("a", sh("true", outputs=("many",)), logs, lambda: None)
    await stage_out(ground.files, work, ending.outputs, tmp_path / "out", ["**"])
    assert read_tree(tmp_path / "out/many") == read_tree(tree)
    await ground.executor.remove("a")


async def test_a_large_file_goes_and_comes_back(ground, logs, tmp_path):
    """Larger than any chunk, and no multiple of one."""
    data = os.urandom(1024) * 10_000 + b"end"
    (tmp_path / "big").write_bytes(data)
    work = await ground.executor.prepare("a")
    await stage_in(ground.files, [str(tmp_path / "big")], work)
    await stage_out(ground.files, work, [("big", len(data))], tmp_path / "out", ["**"])
    assert (tmp_path / "out/big").read_bytes() == data
    await ground.executor.remove("a")


async def test_a_file_that_vanished_is_named(ground, tmp_path):
    """On either side, and nothing half-made is left where outputs go."""
    work = await ground.executor.prepare("a")
    with pytest.raises(NotFound, match=r"absent\.txt") as told:
        await stage_in(ground.files, [str(tmp_path / "absent.txt")], work)
    assert told.value.hint
    with pytest.raises(NotFound, match=r"gone\.txt"):
        await stage_out(ground.files, work, [("gone.txt", 5)], tmp_path / "out", ["**"])
    assert list((tmp_path / "out").iterdir()) == []
    await ground.executor.remove("a")


async def test_outputs_never_leave_their_folder(ground, tmp_path):
    """Not by name, nor by a link to a neighbour whose name begins alike."""
    work = await ground.executor.prepare("a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out-side").mkdir()
    (tmp_path / "out/link").symlink_to("../out-side")
    for name in ("../x", "/x", "a/../../x", "link/x"):
        with pytest.raises(Forbidden):
            await stage_out(ground.files, work, [(name, 0)], tmp_path / "out", ["**"])
    assert list((tmp_path / "out-side").iterdir()) == []
    await ground.executor.remove("a")


async def test_more_jobs_at_once_than_a_connection_carries(ground, tmp_path):
    """sshd's limit of sessions on a connection is nobody's limit on jobs."""
    count = 2 * CHANNELS_EACH + 3

    async def one(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        mine = LogFiles(stdout=folder / "stdout", stderr=folder / "stderr")
        (folder / f"in{number}").write_text(str(number))
        work = await ground.executor.prepare(f"j{number}")
        await stage_in(ground.files, [str(folder / f"in{number}")], work)
        script = f"cat in{number}; sleep 1"
        ending = await ground.executor.run(f"j{number}", sh(script), mine, lambda: None)
        text = output(ground, mine, f"j{number}")
        await ground.executor.remove(f"j{number}")
        return ending.outcome.exit_code, text

    found = await asyncio.gather(*map(one, range(count)))
    assert found == [(0, str(number).encode()) for number in range(count)]


def test_a_link_to_a_neighbour_is_no_circle(tmp_path):
    """Only a link to a folder it is in itself is refused."""
    (tmp_path / "top/a").mkdir(parents=True)
    (tmp_path / "top/latest").symlink_to("a")
    check_inputs([str(tmp_path / "top")])
    (tmp_path / "top/a/round").symlink_to("..")
    with pytest.raises(InvalidSpec, match="circle"):
        check_inputs([str(tmp_path / "top")])


# What only another machine can do to us.


async def cut(machine):
    """Kill every session process of the machine's user."""
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if words.startswith(f"sshd: {machine.user}"):
            process.kill()


async def test_a_cut_connection_is_told_and_taken_up(machine, session, tmp_path, logs):
    """The job goes on; the next who follows gets all output once."""
    there, _ = machine
    executor = Executor(SSHShell(session), "cut-jobs")
    ground = Ground(SSHShell(session), SFTPFiles(session), "cut-jobs", there.home / "cut-jobs")
    task = await start(ground, logs, "a", sh("for i in 1 2 3 4 5; do echo $i; sleep 0.3; done"))
    while not output(ground, logs, "a"):
        await asyncio.sleep(0.02)
    await cut(there)
    with pytest.raises(Unavailable, match="connection") as told:
        await task
    assert told.value.retryable
    ending = await executor.watch("a", logs)
    assert ending.outcome.succeeded
    assert output(ground, logs, "a") == b"1\n2\n3\n4\n5\n"
    await executor.remove("a")


async def test_sftp_that_broke_off_works_again(machine, session, tmp_path):
    """A cut while copying is retryable, and the next copy dials anew."""
    there, _ = machine
    executor, files = Executor(SSHShell(session), "sftp-jobs"), SFTPFiles(session)
    work = await executor.prepare("a")
    (tmp_path / "big").write_bytes(b"\0" * 64 * 1024 * 1024)
    copying = asyncio.create_task(stage_in(files, [str(tmp_path / "big")], work))
    while not (Path(work) / "big").exists():
        await asyncio.sleep(0.001)
    await cut(there)
    with pytest.raises(Unavailable) as told:
        await copying
    assert told.value.retryable
    await stage_in(files, [str(tmp_path / "big")], work)
    assert (Path(work) / "big").stat().st_size == 64 * 1024 * 1024
    await executor.remove("a")


@pytest.fixture
async def odd_machine():
    """Return a maker of machines whose logins run a command of ours instead of what is asked."""
    sessions = []
    with contextlib.ExitStack() as stack:

        def make(forced):
            key = keys.ephemeral()
            line = keys.public_line(key)
            quoted = forced.replace("\\", "\\\\").replace('"', '\\"')
            there = stack.enter_context(
                testbed.sshd(authorized=[f'command="{quoted}" {line}'], host="127.0.0.33")
            )
            sessions.append(new_session((there, key)))
            return Executor(SSHShell(sessions[-1]), "jobs")

        yield make
        for session in sessions:
            await session.close()


ODD = {
    "no python": ("PATH=/nonexistent; eval $SSH_ORIGINAL_COMMAND", NotFound, "no python3"),
    "csh's words": (
        "echo 'python3: Command not found.' >&2; exit 1",
        NotFound,
        "no python3",
    ),
    "no login": ("echo This account is not available.; exit 1", Unavailable, "not available"),
    "old python": (
        "echo gridcloud-supervisor-begins; "
        'echo \'{"event": "error", "code": "old-python", "message": "Python 3.6.8 is too old."}\'; '
        "exit 97",
        NotFound,
        "3.6.8 is too old",
    ),
    "nonsense": (
        "echo gridcloud-supervisor-begins; echo hello",
        Conflict,
        "something else than the supervisor",
    ),
    "silence": ("exit 0", Unavailable, "did not run the supervisor"),
}


@pytest.mark.parametrize("case", ODD)
async def test_a_machine_that_cannot_is_told_with_the_cause(odd_machine, case):
    """What is wrong there, and what to do."""
    forced, kind, words = ODD[case]
    executor = odd_machine(forced)
    with pytest.raises(kind, match=words) as told:
        await executor.probe()
    assert told.value.hint


async def test_noise_of_the_login_shell_is_passed_over(odd_machine, logs):
    """What a login script prints comes before our mark, and harms nothing."""
    executor = odd_machine("echo Welcome; echo '{}'; eval \"$SSH_ORIGINAL_COMMAND\"")
    assert (await executor.probe())["cpus"] > 0
    ending = await executor.run("a", sh("echo hi"), logs, lambda: None)
    assert ending.outcome.succeeded
    assert logs.stdout.read_bytes() == b"hi\n"
    await executor.remove("a")


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small file system takes root")
async def test_a_full_disk_there_is_told(machine, session, logs, tmp_path):
    """Copying in and starting say so, as an error that is not tried again."""
    there, _ = machine
    small = there.home / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=777", "tmpfs", small], check=True)
    try:
        executor, files = Executor(SSHShell(session), "small/jobs"), SFTPFiles(session)
        work = await executor.prepare("a")
        (tmp_path / "big").write_bytes(b"x" * 8 * 1024 * 1024)
        with pytest.raises(Conflict, match="no space is left") as told:
            await stage_in(files, [str(tmp_path / "big")], work)
        assert told.value.hint
        with pytest.raises(Conflict, match="No space"):
            await executor.run("a", sh("true"), logs, lambda: None)
        (Path(work) / "big").unlink()
        assert (await executor.run("a", sh("true"), logs, lambda: None)).outcome.succeeded
        await executor.remove("a")
    finally:
        await session.close()
        subprocess.run(["umount", "--lazy", small], check=True)


async def test_a_home_that_is_not_writable_is_told(machine, session):
    """The folder that is to blame is named."""
    there, _ = machine
    locked = there.home / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(Forbidden, match=r"Permission denied.*locked") as told:
        await Executor(SSHShell(session), "locked/jobs").prepare("a")
    assert told.value.hint
