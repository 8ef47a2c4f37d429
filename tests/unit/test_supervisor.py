"""What the supervisor promises, asked of it as the executors do: over stdin and stdout."""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gridcloud.executors import supervisor

SOURCE = Path(supervisor.__file__)
BOOTSTRAP = (
    "import sys;exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())),"
    '"supervisor","exec"))'
)
#: The whole file can be run against another Python, such as the oldest one supported.
PYTHON = os.environ.get("GRIDCLOUD_SUPERVISOR_PYTHON", sys.executable)
Frame = dict[str, Any]


class Talk:
    """One supervisor process and what it says; output bytes go to ``take``."""

    def __init__(
        self,
        request: Frame,
        *,
        sent: bytes = b"",
        argv: tuple[str, ...] = (str(SOURCE),),
        under: tuple[str, ...] = (),
    ) -> None:
        self.output: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        self.process = subprocess.Popen(
            [*under, PYTHON, "-I", "-S", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(sent + json.dumps(request).encode() + b"\n")
        self.process.stdin.close()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def take(self, stream: str, data: bytes) -> None:
        self.output[stream] += data

    def frames(self) -> Iterator[Frame]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            frame = json.loads(line)
            if frame["event"] == "output":
                data = self.process.stdout.read(frame["size"])
                assert len(data) == frame["size"]
                self.take(frame["stream"], data)
            yield frame

    def until(self, event: str) -> Frame:
        return next(frame for frame in self.frames() if frame["event"] == event)

    def finish(self) -> Frame:
        """Read on to the end; return the last frame."""
        last = list(self.frames())[-1]
        assert self.process.stderr is not None
        assert self.process.stderr.read() == b""
        assert self.process.wait() == (98 if last["event"] == "error" else 0)
        return last


def ask(**request: Any) -> Frame:
    with Talk(request) as talk:
        return talk.finish()


class Folder:
    """One job folder and the requests about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / "work"

    def request(self, do: str, **more: Any) -> Frame:
        return {"do": do, "folder": str(self.path), **more}

    def run(self, *command: str, **spec: Any) -> Talk:
        return Talk(self.request("run", spec=as_spec(command, **spec)))

    def done(self, *command: str, **spec: Any) -> Frame:
        with self.run(*command, **spec) as talk:
            return talk.finish()

    def ask(self, do: str, **more: Any) -> Frame:
        return ask(**self.request(do, **more))

    def running(self) -> Frame:
        status = json.loads((self.path / "status.json").read_text())
        return status if status["state"] == "running" else {}

    def guard(self) -> int:
        return int((self.path / "guard.lock").read_text().split()[0])


def as_spec(command: tuple[str, ...], **spec: Any) -> Frame:
    return {"command": list(command), "grace_seconds": 0.3, **spec}


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, IndexError):
            if value := condition():
                return value
        time.sleep(0.01)
    raise AssertionError("what was waited for did not happen")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def make_job(tmp_path: Path) -> Iterator[Callable[[str], Folder]]:
    made: list[Folder] = []

    def make(name: str) -> Folder:
        made.append(Folder(tmp_path / "jobs" / name))
        return made[-1]

    yield make
    for folder in made:
        if folder.path.is_dir():
            ask(do="remove", folder=str(folder.path), grace_seconds=0)


@pytest.fixture
def job(make_job: Callable[[str], Folder]) -> Folder:
    return make_job("job")


def test_exit_status_and_streams_are_the_commands(job: Folder) -> None:
    """Both streams arrive apart, and the exit status is the command's."""
    with job.run("sh", "-c", "echo out; echo err >&2; exit 3") as talk:
        done = talk.finish()
    assert talk.output == {"stdout": b"out\n", "stderr": b"err\n"}
    assert (done["exit_code"], done["signal"], done["reason"]) == (3, None, "")
    assert done["started_at"] <= done["ended_at"]
    assert done["cpu_seconds"] > 0
    assert done["max_rss_bytes"] > 100_000
    assert json.loads((job.path / "status.json").read_text())["state"] == "ended"


def test_a_signal_that_ends_the_command_is_told(job: Folder) -> None:
    """A command killed by a signal has that signal and no exit status."""
    done = job.done("sh", "-c", "kill -9 $$")
    assert (done["exit_code"], done["signal"], done["reason"]) == (None, 9, "")


@pytest.mark.parametrize(
    ("limit", "reason"),
    [({"time_limit_seconds": 0.2}, "time-limit"), ({"ends_at_epoch": None}, "lease-end")],
)
def test_a_job_ends_at_its_limit(job: Folder, limit: Frame, reason: str) -> None:
    """Its own time limit and the end of its lease both end a job, and the cause is told."""
    if "ends_at_epoch" in limit:
        limit = {"ends_at_epoch": time.time() + 1.5}
    done = job.done("sleep", "60", **limit)
    assert (done["reason"], done["signal"]) == (reason, signal.SIGTERM)
    assert done["message"]


def test_a_job_whose_lease_has_ended_never_starts(job: Folder) -> None:
    """A command is not started after its end."""
    done = job.done("touch", "made", ends_at_epoch=time.time() - 1)
    assert (done["reason"], done["started_at"]) == ("lease-end", None)
    assert not (job.work / "made").exists()


def test_cancel_kills_what_ignores_term(job: Folder) -> None:
    """After the grace of the cancel, which beats the job's own, nothing resists."""
    script = "trap '' TERM; sleep 60 & echo up; while :; do sleep 0.1; done"
    with job.run("sh", "-c", script, grace_seconds=60) as talk:
        talk.until("output")
        done = job.ask("cancel", grace_seconds=0.2)
        assert talk.finish() == done
    assert (done["reason"], done["signal"]) == ("canceled", signal.SIGKILL)
    assert job.ask("cancel", grace_seconds=0.2) == done


def test_cancel_lets_a_command_clean_up(job: Folder) -> None:
    """TERM comes first, and what the command does then still counts."""
    script = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.02; done"
    with job.run("sh", "-c", script, grace_seconds=20) as talk:
        talk.until("output")
        done = job.ask("cancel", grace_seconds=20)
        talk.finish()
    assert (done["reason"], done["exit_code"]) == ("canceled", 7)
    assert talk.output["stdout"] == b"up\nbye\n"


def test_cancel_before_run_prevents_the_start(job: Folder) -> None:
    """A job canceled first is ended, and a later run only reports it."""
    assert job.ask("cancel")["reason"] == "canceled"
    done = job.done("touch", "made")
    assert (done["reason"], done["started_at"]) == ("canceled", None)
    assert not (job.work / "made").exists()


def test_daemons_of_a_job_do_not_outlive_it(job: Folder) -> None:
    """Even a process in its own session, orphaned and deaf to TERM, ends with its job."""
    job.work.mkdir(parents=True)
    (job.work / "daemon.sh").write_text("trap '' TERM HUP; echo $$ > daemon; exec sleep 60")
    script = "(setsid sh daemon.sh >/dev/null 2>&1 &); until [ -s daemon ]; do sleep 0.01; done"
    done = job.done("sh", "-c", script)
    assert done["exit_code"] == 0
    assert not alive(int((job.work / "daemon").read_text()))


def test_processes_that_fork_anew_when_told_to_end_are_ended(job: Folder) -> None:
    """All are stopped before any is killed, so that respawning does not help."""
    (job.work).mkdir(parents=True)
    respawn = "import os, signal, time\nsignal.signal(15, lambda *_: os.fork())\n"
    respawn += "os.fork(); os.fork()\nopen(f'pid.{os.getpid()}', 'w').close()\n"
    (job.work / "respawn.py").write_text(respawn + "while True: time.sleep(0.01)\n")
    done = job.done(sys.executable, "respawn.py", time_limit_seconds=0.5)
    assert (done["reason"], done["signal"]) == ("time-limit", signal.SIGKILL)
    pids = [int(path.suffix[1:]) for path in job.work.glob("pid.*")]
    assert len(pids) == 4
    assert not any(map(alive, pids))


def test_any_bytes_pass(job: Folder) -> None:
    """NULs, bytes that are no UTF-8, frames in the text and a missing newline change nothing."""
    nasty = b'a\0b\xff\xfe\r\n{"event": "done"}\n\x80 no newline'
    job.work.mkdir(parents=True)
    (job.work / "nasty").write_bytes(nasty)
    with job.run("cat", "nasty") as talk:
        talk.finish()
    assert talk.output["stdout"] == nasty


def test_a_hundred_megabytes_pass_unharmed(job: Folder) -> None:
    """A long log arrives whole, in frames of bounded size."""
    script = "import sys\nfor n in range(100): sys.stdout.buffer.write(bytes([n]) * 2**20)"
    expected = hashlib.blake2b()
    for number in range(100):
        expected.update(bytes([number]) * 2**20)
    got = hashlib.blake2b()
    with job.run(sys.executable, "-c", script) as talk:
        talk.take = lambda _, data: got.update(data)  # type: ignore[method-assign]
        sizes = [frame["size"] for frame in talk.frames() if frame["event"] == "output"]
    assert got.digest() == expected.digest()
    assert max(sizes) <= 256 * 1024


def test_reconnecting_gives_the_whole_log_once(job: Folder) -> None:
    """Watchers killed midway are followed by others from their offsets, with no gap or repeat."""
    script = "i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); sleep 0.002; done"
    got = b""
    with job.run("sh", "-c", script) as talk:
        talk.until("output")
        talk.process.kill()
        got += talk.output["stdout"]
    for frames in (2, 10**9):
        with Talk(job.request("watch", offsets={"stdout": len(got), "stderr": 0})) as talk:
            for number, _ in enumerate(talk.frames()):
                if number == frames:
                    break
            got += talk.output["stdout"]
    assert got == b"".join(b"line %d\n" % number for number in range(300))


def test_the_job_goes_on_without_its_watcher(job: Folder) -> None:
    """Neither kill -9 of the watcher nor a closed reader harms the job or its log."""
    with job.run("sh", "-c", "until [ -e go ]; do sleep 0.01; done; echo late") as talk:
        talk.until("started")
        talk.process.kill()
    with Talk(job.request("watch")) as other:
        other.until("started")
        assert other.process.stdout is not None
        other.process.stdout.close()
        assert other.process.wait(20) == 0
        assert other.process.stderr is not None
        assert other.process.stderr.read() == b""
    (job.work / "go").touch()
    with Talk(job.request("watch")) as last:
        assert last.finish()["exit_code"] == 0
    assert last.output["stdout"] == b"late\n"


def test_a_job_without_its_guard_is_lost_and_cleared_away(job: Folder) -> None:
    """When the guard is killed, a watch says so, and what is left of the job is killed."""
    script = "setsid sleep 60 & echo $! $$; exec sleep 60"
    with job.run("sh", "-c", script) as talk:
        talk.until("output")
        pids = [int(pid) for pid in talk.output["stdout"].split()]
        os.kill(job.guard(), signal.SIGKILL)
        done = talk.finish()
    assert (done["reason"], done["exit_code"]) == ("lost", None)
    assert not any(map(alive, pids))
    assert job.ask("watch")["reason"] == "lost"
    assert job.done("true")["reason"] == "lost"


def test_losing_the_guard_harms_no_process_of_others(job: Folder) -> None:
    """A recorded number that now belongs to another process is left alone."""
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        with job.run("sleep", "60") as talk:
            talk.until("started")
            talk.process.kill()
            talk.process.wait()
        status = wait_for(job.running)
        os.kill(job.guard(), signal.SIGKILL)
        os.kill(status["pid"], signal.SIGKILL)
        status.update(pid=bystander.pid, session=bystander.pid)
        (job.path / "status.json").write_text(json.dumps(status))
        assert job.ask("watch")["reason"] == "lost"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_concurrent_runs_start_the_command_once(job: Folder) -> None:
    """Whoever asks again, at the same time or after the end, gets the one job's result."""
    command = ("sh", "-c", "echo start >> ../starts; sleep 0.1; exit 5")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: job.done(*command), range(4)))
    guard = job.guard()
    assert [done["exit_code"] for done in [*results, job.done(*command)]] == [5] * 5
    assert job.guard() == guard
    assert (job.path / "starts").read_text() == "start\n"


def test_without_output_only_the_end_is_told(job: Folder) -> None:
    """A caller that reads the files itself gets no output frames."""
    request = job.request("run", spec=as_spec(("echo", "x")), send_output=False)
    with Talk(request) as talk:
        assert [frame["event"] for frame in talk.frames()] == ["started", "done"]
    assert (job.path / "stdout").read_bytes() == b"x\n"


def make_results(work: Path) -> None:
    (work / "deep/er").mkdir(parents=True)
    (work / "empty").mkdir()
    for name in ("a.csv", "b.csv", "deep/c.csv", "deep/er/d.csv", "deep/.hidden", ".dot.csv"):
        (work / name).write_text(name)
    (work / "latest").symlink_to("deep/er")
    (work / "round").symlink_to(".")
    (work / "out.csv").symlink_to("/etc/passwd")
    (work / "etc").symlink_to("/etc")
    (work / "nowhere").symlink_to("missing")
    os.mkfifo(work / "fifo.csv")


@pytest.mark.parametrize(
    ("pattern", "names", "unmatched", "escaping"),
    [
        ("a.csv", ["a.csv"], False, []),
        ("./?.csv", ["a.csv", "b.csv"], False, []),
        ("*.csv", ["a.csv", "b.csv"], False, ["out.csv"]),
        (".*.csv", [".dot.csv"], False, []),
        ("deep", ["deep/.hidden", "deep/c.csv", "deep/er/d.csv"], False, []),
        ("deep/**", ["deep/.hidden", "deep/c.csv", "deep/er/d.csv"], False, []),
        ("**/d.csv", ["deep/er/d.csv"], False, []),
        ("**/*c.csv", ["deep/c.csv"], False, []),
        ("latest/", ["latest/d.csv"], False, []),
        ("round/round/a.csv", ["round/round/a.csv"], False, []),
        ("etc/passwd", [], False, ["etc"]),
        ("/etc/passwd", [], False, ["/etc/passwd"]),
        ("deep/../../x", [], False, ["deep/../../x"]),
        ("empty", [], True, []),
        ("nowhere", [], True, []),
        ("fifo.csv", [], True, []),
        ("", [], True, []),
    ],
)
def test_outputs_are_the_regular_files_inside(
    job: Folder, pattern: str, names: list[str], unmatched: bool, escaping: list[str]
) -> None:
    """Patterns name files and folders; nothing outside the work folder is ever listed."""
    make_results(job.work)
    done = job.done("true", outputs=[pattern])
    assert [path for path, _ in done["outputs"]] == names
    assert done["unmatched"] == ([pattern] if unmatched else [])
    assert done["escaping"] == escaping


def test_names_of_any_bytes_come_back_as_they_went(job: Folder) -> None:
    """Arguments, variables and file names that are no UTF-8 survive as surrogate escapes."""
    odd = os.fsdecode(b"\xff\xe9 odd\n")
    done = job.done(
        "sh", "-c", 'printf %s "$ODD" > "$1"', "sh", odd, env={"ODD": odd}, outputs=["*"]
    )
    assert done["outputs"] == [[odd, 7]]
    assert (job.work / odd).read_bytes() == os.fsencode(odd)


def test_outputs_in_very_deep_folders_are_found_and_removed(job: Folder) -> None:
    """A thousand folders in one another neither break the search nor the removal."""
    script = (
        "import os\nfor _ in range(1200): os.mkdir('d'); os.chdir('d')\nopen('x.csv', 'w').close()"
    )
    done = job.done(sys.executable, "-c", script, outputs=["**/x.csv"])
    assert [path for path, _ in done["outputs"]] == ["d/" * 1200 + "x.csv"]
    assert job.ask("remove") == {"event": "removed"}
    assert not job.path.exists()


@pytest.mark.parametrize(
    ("command", "reason", "code"),
    [
        ("no-such-command", "command-not-found", 127),
        ("./data", "not-executable", 126),
        ("./plain", "not-executable", 126),
        ("./orphan", "command-not-found", 127),
    ],
)
def test_what_cannot_be_executed_is_told(job: Folder, command: str, reason: str, code: int) -> None:
    """Missing commands, interpreters, permissions and formats are causes, not mysteries."""
    job.work.mkdir(parents=True)
    for name, text, mode in (
        ("data", "x", 0o644),
        ("plain", "no program", 0o755),
        ("orphan", "#!/no/such/interpreter\n", 0o755),
    ):
        (job.work / name).write_text(text)
        (job.work / name).chmod(mode)
    done = job.done(command)
    assert (done["reason"], done["exit_code"]) == (reason, code)
    assert command in done["message"]


def test_the_environment_is_as_told(job: Folder) -> None:
    """Own variables always, the machine's only if wanted, and PATH where commands are found."""
    bare = job.done("sh", "-c", "env > e", env={"OWN": "1"}, outputs=["e"])
    names = {line.split("=")[0] for line in (job.work / "e").read_text().splitlines()}
    assert bare["exit_code"] == 0
    kept = {"PATH", "HOME", "LANG", "USER", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "_", "OWN"}
    assert {"PATH", "OWN"} <= names <= kept
    os.environ["GRIDCLOUD_TEST_INHERITED"] = "yes"
    try:
        other = Folder(job.path / "other")
        talk = other.done("sh", "-c", '[ "$GRIDCLOUD_TEST_INHERITED" = yes ]', inherit_env=True)
    finally:
        del os.environ["GRIDCLOUD_TEST_INHERITED"]
    assert talk["exit_code"] == 0


def test_the_command_gets_clean_signals_and_no_descriptors(job: Folder) -> None:
    """Nothing of the guard's own workings is inherited by the command."""
    script = "grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd"
    with job.run("sh", "-c", script) as talk:
        talk.finish()
    lines = talk.output["stdout"].decode().split()
    realtime = 0x180000000  # glibc keeps these two signals to itself
    assert [int(lines[at], 16) & ~realtime for at in (1, 3)] == [0, 0]
    assert lines[4:] == ["0", "1", "2", "3"]  # 3 is the listing's own


def test_a_command_may_signal_its_own_group(job: Folder) -> None:
    """``kill 0``, common in scripts, does not reach the guard."""
    done = job.done("sh", "-c", "kill -9 0")
    assert (done["reason"], done["signal"]) == ("", signal.SIGKILL)


def test_prepare_makes_a_private_folder(job: Folder) -> None:
    """The folder is its owner's alone, prepare may be repeated, and staged files stay."""
    assert job.ask("prepare") == {"event": "prepared", "work": str(job.work)}
    (job.work / "staged").touch()
    assert job.ask("prepare")["event"] == "prepared"
    assert job.path.stat().st_mode & 0o777 == 0o700
    assert (job.work / "staged").exists()


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    """A file in the way or a pseudo file system is told, with no traceback."""
    (tmp_path / "file").touch()
    assert ask(do="prepare", folder=str(tmp_path / "file"))["event"] == "error"
    assert ask(do="prepare", folder="/proc/gridcloud/job")["event"] == "error"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    try:
        yield disk
        ask(do="remove", folder=str(disk / "job"), grace_seconds=0)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.component
def test_a_full_disk_is_told_before_anything_starts(small_disk: Path) -> None:
    """Prepare and run say so and leave a job that may be run once there is room."""
    job = Folder(small_disk / "job")
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", 0) as ballast:
        while True:
            ballast.write(bytes(4096))
    assert job.ask("prepare")["code"] == "disk-full"
    assert job.done("touch", "made")["code"] == "disk-full"
    assert not (job.work / "made").exists()
    (small_disk / "ballast").unlink()
    assert job.done("touch", "made")["exit_code"] == 0
    assert job.ask("remove") == {"event": "removed"}


@pytest.mark.component
def test_a_job_that_fills_the_disk_still_has_its_end_recorded(small_disk: Path) -> None:
    """Cancel and the final status need no room, and the folder can be removed."""
    job = Folder(small_disk / "job")
    with job.run("sh", "-c", "cat /dev/zero > fill; echo full >&2; exec sleep 60") as talk:
        # One block may come free again, of the status that the guard replaces meanwhile.
        wait_for(lambda: os.statvfs(small_disk).f_bavail <= 1)
        assert job.ask("cancel", grace_seconds=5)["reason"] == "canceled"
        assert talk.finish()["reason"] == "canceled"
    assert json.loads((job.path / "status.json").read_text())["reason"] == "canceled"
    assert job.ask("remove") == {"event": "removed"}


def test_remove_ends_the_job_and_deletes_all(job: Folder) -> None:
    """A running job is ended first, folders without permissions go too, and twice is once."""
    script = "mkdir -p ro/in; touch ro/in/x; chmod 0 ro/in; chmod 500 ro; echo up; exec sleep 60"
    with job.run("sh", "-c", script) as talk:
        talk.until("output")
        # Permissions do not hold root unless it gives up the right to override them.
        weak = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
        under = weak if os.geteuid() == 0 else ()
        with Talk(job.request("remove", grace_seconds=1), under=under) as other:
            assert other.finish() == {"event": "removed"}
    assert not job.path.exists()
    assert job.ask("remove") == {"event": "removed"}


def test_all_processes_are_stopped_before_any_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork bomb is killed only once a look finds no process that could still fork."""
    sent: list[tuple[set[int], int]] = []
    monkeypatch.setattr(supervisor, "send", lambda pids, signo: sent.append((pids, signo)))
    looks = iter([{1}, {1, 2, 3}, {1, 2, 3}, {4}, {4}])
    left = iter([False] * 5 + [True])
    assert supervisor.kill_all(lambda: next(looks), lambda: next(left))
    stop, kill = signal.SIGSTOP, signal.SIGKILL
    expected = [({1}, stop), ({2, 3}, stop), ({1, 2, 3}, kill), ({4}, stop), ({4}, kill)]
    assert [(pids, signo) for pids, signo in sent if pids] == expected


def test_remove_deletes_nothing_that_is_no_job(tmp_path: Path) -> None:
    """A folder with other things in it, and the home folder, are left alone."""
    (tmp_path / "precious").touch()
    assert ask(do="remove", folder=str(tmp_path))["event"] == "error"
    assert ask(do="remove", folder="~")["code"] == "invalid-request"
    assert (tmp_path / "precious").exists()


def test_remove_follows_no_links(job: Folder, tmp_path: Path) -> None:
    """What links of the job point to stays, with its permissions."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o500)
    job.work.mkdir(parents=True)
    (job.work / "link").symlink_to(outside)
    (job.path / "link").symlink_to(outside)
    assert job.ask("remove") == {"event": "removed"}
    assert outside.stat().st_mode & 0o777 == 0o500


def test_list_tells_each_jobs_state(make_job: Callable[[str], Folder], tmp_path: Path) -> None:
    """Prepared, running, ended and lost jobs are told apart; other folders are no jobs."""
    (tmp_path / "jobs" / "other").mkdir(parents=True)
    make_job("a").ask("prepare")
    make_job("b").done("true")
    running, lost = make_job("c"), make_job("d")
    with running.run("sleep", "60") as first, lost.run("sleep", "60") as second:
        first.until("started")
        second.until("started")
        second.process.kill()
        second.process.wait()
        os.kill(lost.guard(), signal.SIGKILL)
        wait_for(lambda: not alive(lost.guard()))
        jobs = ask(do="list", root=str(tmp_path / "jobs"))["jobs"]
    expected = {"a": "prepared", "b": "ended", "c": "running", "d": "lost"}
    assert jobs == [{"id": name, "state": state} for name, state in expected.items()]
    assert ask(do="list", root=str(tmp_path / "none"))["jobs"] == []


def test_probe_tells_what_the_machine_is() -> None:
    """The numbers are this machine's, for this process."""
    machine = ask(do="probe")
    assert machine["event"] == "machine"
    assert machine["cpus"] == len(os.sched_getaffinity(0))
    version = subprocess.run([PYTHON, "--version"], capture_output=True, text=True, check=True)
    assert machine["python"] == version.stdout.split()[1]
    assert machine["memory_bytes"] > 2**28
    assert machine["home"] == str(Path.home())


def test_the_source_travels_over_stdin(job: Folder) -> None:
    """Nothing needs installing: the source is read from stdin, then the request."""
    source = SOURCE.read_bytes()
    request = job.request("run", spec=as_spec(("echo", "hello")))
    sent = b"%d\n" % len(source) + source
    with Talk(request, sent=sent, argv=("-c", BOOTSTRAP)) as talk:
        assert talk.finish()["exit_code"] == 0
    assert talk.output["stdout"] == b"hello\n"


def test_an_old_python_is_told(tmp_path: Path) -> None:
    """A machine with a Python that is too old gets a clear message and a status of its own."""
    prelude = "import sys; sys.version_info = (3, 6, 8); sys.version = '3.6.8 (x)'; "
    source = SOURCE.read_bytes()
    sent = b"%d\n" % len(source) + source
    with Talk({"do": "probe"}, sent=sent, argv=("-c", prelude + BOOTSTRAP)) as talk:
        frames = list(talk.frames())
        assert talk.process.wait() == 97
    assert [(frame["event"], frame["code"]) for frame in frames] == [("error", "old-python")]
    assert "3.6.8" in frames[0]["message"]


def test_the_source_needs_no_newer_python_and_no_packages() -> None:
    """It parses as Python 3.8 (3.6, for its version check) and imports the standard library."""
    text = SOURCE.read_text()
    ast.parse(text, feature_version=(3, 8))
    tree = ast.parse(text, feature_version=(3, 6))
    imports = Counter(
        name.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    )
    assert set(imports) <= set(sys.stdlib_module_names)
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert sources == {"collections.abc", "typing", "fnmatch"}  # the first two for types alone
    for newer in ("removeprefix", "removesuffix", "pidfd", "waitstatus_to_exitcode", "randbytes"):
        assert newer not in text


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"do": "dance"},
        {"do": "run"},
        {"do": "run", "folder": "{tmp}/j", "spec": {"command": []}},
        {"do": "run", "folder": "{tmp}/j", "spec": {"command": ["true"], "env": {"A": 1}}},
        {"do": "run", "folder": "{tmp}/j", "spec": {"command": ["true"], "grace_seconds": "x"}},
        {"do": "watch", "folder": "{tmp}/never"},
        {"do": "prepare", "folder": "/"},
        {"do": "prepare", "folder": "~"},
        {"do": "prepare", "folder": "a\0b"},
        {"do": "list"},
    ],
)
def test_a_malformed_request_is_an_error_frame(request_: Frame, tmp_path: Path) -> None:
    """Whatever is asked, the answer is a frame and never a traceback."""
    if "folder" in request_:
        request_ = {**request_, "folder": request_["folder"].replace("{tmp}", str(tmp_path))}
    frame = ask(**request_)
    assert frame["event"] == "error"
    assert frame["code"]
    assert frame["message"]


def test_input_that_is_not_json_is_an_error_frame() -> None:
    """Neither is garbage answered by a traceback."""
    with Talk({}, sent=b"garbage\n") as talk:
        assert talk.finish()["code"] == "invalid-request"
