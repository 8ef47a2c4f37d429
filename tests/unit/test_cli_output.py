"""What a person is told: in time, once, and so that nothing from elsewhere steers the terminal."""

import subprocess
import sys
import threading

import pytest

from gridcloud.cli import main, render
from gridcloud.cli.job_news import tell
from gridcloud.cli.jobs_run import _explain
from gridcloud.client.asynchronous import JobEvent
from gridcloud.errors import Forbidden, Unavailable
from gridcloud.model.job import Job, JobSpec, JobState, Outcome

HOSTILE = "first\nsecond\x1b]0;title\x07\x1b[2J\x9b31m"


def test_control_characters_are_replaced_but_lines_stay():
    """A message of several lines is still readable."""
    shown = render.safe_lines(HOSTILE)
    assert shown.splitlines()[0] == "first"
    assert shown.startswith("first\nsecond")
    assert all(character.isprintable() or character == "\n" for character in shown)


def test_an_error_from_elsewhere_is_shown_plainly(capsys):
    """Neither its message nor its hint reaches the terminal as it came."""
    with pytest.raises(SystemExit):
        main._report(Forbidden(HOSTILE, hint=HOSTILE))
    said = capsys.readouterr().err
    assert "first\nsecond" in said
    assert not set(said) & {"\x1b", "\x07", "\x9b"}


def test_why_a_job_failed_is_shown_plainly(capsys):
    """It may be the words of another site's machine."""
    job = Job(
        id="j",
        spec=JobSpec(command=("true",)),
        state=JobState.FAILED,
        created_at="2026-05-01T00:00:00Z",
        outcome=Outcome(reason="lost", message=HOSTILE),
        message=HOSTILE,
    )
    _explain(job)
    said = capsys.readouterr().err
    assert "job j failed: first" in said
    assert not set(said) & {"\x1b", "\x07", "\x9b"}


class Waiting:
    """A client whose job waits, look after look: what each finds happens before it, as messages, or
    as pairs with the kind of event."""

    def __init__(self, *looks):
        self.looks, self.said, self.state = list(looks), [], JobState.QUEUED

    def wait(self, job_id, seconds):
        look = self.looks.pop(0)
        if isinstance(look, Exception):
            raise look
        if isinstance(look, JobState):
            self.state = look
        else:
            self.said += look
        spec = JobSpec(command=("true",))
        return [Job(id=job_id, spec=spec, state=self.state, created_at="2026-05-01T00:00:00Z")]

    def events(self, job_id, after=0):
        at = "2026-05-01T00:00:00Z"
        said = [one if isinstance(one, tuple) else ("QUEUED", one) for one in self.said]
        return [
            JobEvent(number=number, job_id=job_id, at=at, kind=kind, message=message)
            for number, (kind, message) in enumerate(said, start=1)
            if number > after
        ]


def told(monkeypatch, capsys, *looks):
    """Return what is said of a job at the end of some looks, and the looks not taken."""
    monkeypatch.setattr("gridcloud.cli.job_news._PATIENT_SECONDS", 0.0)
    monkeypatch.setattr("gridcloud.cli.job_news._RUNNING_SECONDS", 0.0)
    client = Waiting(*looks)
    tell(client, "j", threading.Event())
    return capsys.readouterr().err.splitlines(), client.looks


def test_whoever_follows_a_job_is_told_once_why_it_waits(monkeypatch, capsys):
    """What holds it up and who refused it, as it comes; nothing of the rest, nothing twice."""
    first, second = ["submitted", "waiting: no room"], ["refused by away/lent: not you"]
    ends = [JobState.STAGE_IN, [("ACTIVE", "inputs are in place")], JobState.COMPLETED, ["more"]]
    lines, left = told(monkeypatch, capsys, first, [], second, [], *ends)
    assert lines == ["gridcloud: waiting: no room", "gridcloud: refused by away/lent: not you"]
    assert left == [["more"]], "a job that ended is not looked at any more"


def test_whoever_follows_a_job_sees_its_machine_being_made(monkeypatch, capsys):
    """Step by step as with 'machine start', cloud-init's and the console's lines below."""
    steps = [("create", "creating small from debian"), ("ready", "line 1\nline 2\x1b[2J")]
    ends = [JobState.ACTIVE, [("setup", "a volume")], JobState.COMPLETED]
    lines, _ = told(monkeypatch, capsys, steps, *ends)
    step = ["create: creating small from debian", "ready: line 1", "setup: a volume"]
    assert [line.split(" ", 2)[-1] for line in lines if line[0] != " "] == step
    assert lines[2] == "    line 2\N{REPLACEMENT CHARACTER}[2J"


def test_whoever_follows_a_job_hears_that_its_place_is_lost(monkeypatch, capsys):
    """And what holds up its results; not each connection that broke for a moment."""
    later = [("retry", "trying again: cut"), ("QUEUED", "attempt 1 at x was lost: deleted.")]
    results = [("results", "not brought back yet: disk full")]
    ends = [results, [], JobState.FAILED, ["more"]]
    lines, _ = told(monkeypatch, capsys, JobState.ACTIVE, later, *ends)
    assert lines == [
        "gridcloud: attempt 1 at x was lost: deleted.",
        "gridcloud: not brought back yet: disk full",
    ]


def test_a_job_that_begins_at_once_is_no_news(monkeypatch, capsys):
    """Not even what it waited for before."""

    class Begun(Waiting):
        def __init__(self, *looks):
            super().__init__(*looks)
            self.said = ["submitted", "waiting: no room", ("create", "creating")]

    monkeypatch.setattr(f"{__name__}.Waiting", Begun)
    ends = [JobState.ACTIVE, JobState.COMPLETED]
    assert told(monkeypatch, capsys, *ends) == ([], [])


def test_why_a_job_waits_is_shown_plainly(monkeypatch, capsys):
    """It may be the words of a site that refused it."""
    looks = [[f"refused by x: {HOSTILE}"], JobState.COMPLETED]
    lines, _ = told(monkeypatch, capsys, *looks)
    assert lines[0] == "gridcloud: refused by x: first"
    assert not set("".join(lines)) & {"\x1b", "\x07", "\x9b"}


def test_telling_why_a_job_waits_ends_with_the_site_or_the_job(monkeypatch, capsys):
    """A site that is gone is told by the output's own thread; an end is waited for no longer."""
    assert told(monkeypatch, capsys, Unavailable("gone"), ["waiting: x"]) == ([], [["waiting: x"]])
    ended = threading.Event()
    ended.set()
    client = Waiting()
    tell(client, "j", ended)
    assert not client.looks
    assert capsys.readouterr().err == ""


def test_a_connection_that_is_closed_does_not_kill_a_command(tmp_path):
    """As it would by SIGPIPE, of which a command dies where its output is closed. A site that is
    started for it, and with that its jobs, still know SIGPIPE."""
    code = """
import asyncio, signal, socket, sys
from pathlib import Path
from gridcloud.client import Client, starting

signal.signal(signal.SIGPIPE, signal.SIG_DFL)

def ensure(state, settings):
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "the site would inherit it"

starting.ensure = ensure

async def write():
    ours, theirs = socket.socketpair()
    theirs.close()
    try:
        ours.send(b"x")
    except BrokenPipeError:
        return "told"

with Client(state=Path(sys.argv[1])) as client:
    print(asyncio.run_coroutine_threadsafe(write(), client._loop).result())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr
