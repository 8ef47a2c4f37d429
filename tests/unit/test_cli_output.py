"""What a person is told: in time, once, and so that nothing from elsewhere steers the terminal."""

import threading

import pytest

from gridcloud.cli import main, render
from gridcloud.cli.jobs_run import _explain, _tell_why_it_waits
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
    """A client whose job waits, look after look: what each finds happens before it."""

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
        found = enumerate(self.said, start=1)
        at = "2026-05-01T00:00:00Z"
        return [
            JobEvent(number=number, job_id=job_id, at=at, kind="QUEUED", message=message)
            for number, message in found
            if number > after
        ]


def told(monkeypatch, capsys, *looks):
    """Return what is said of a job at the end of some looks, and the looks not taken."""
    monkeypatch.setattr("gridcloud.cli.jobs_run._PATIENT_SECONDS", 0.0)
    client = Waiting(*looks)
    _tell_why_it_waits(client, "j", threading.Event())
    return capsys.readouterr().err.splitlines(), client.looks


def test_whoever_follows_a_job_is_told_once_why_it_waits(monkeypatch, capsys):
    """What holds it up and who refused it, as it comes; nothing of the rest, nothing twice."""
    first, second = ["submitted", "waiting: no room"], ["refused by away/lent: not you"]
    lines, left = told(monkeypatch, capsys, first, [], second, [], JobState.STAGE_IN, ["more"])
    assert lines == ["gridcloud: waiting: no room", "gridcloud: refused by away/lent: not you"]
    assert left == [["more"]], "a job that has a place is not looked at any more"


def test_a_job_that_begins_at_once_is_no_news(monkeypatch, capsys):
    """Not even what it waited for before."""
    assert told(monkeypatch, capsys, JobState.ACTIVE) == ([], [])


def test_why_a_job_waits_is_shown_plainly(monkeypatch, capsys):
    """It may be the words of a site that refused it."""
    lines, _ = told(monkeypatch, capsys, [f"refused by x: {HOSTILE}"], JobState.ACTIVE)
    assert lines[0] == "gridcloud: refused by x: first"
    assert not set("".join(lines)) & {"\x1b", "\x07", "\x9b"}


def test_telling_why_a_job_waits_ends_with_the_site_or_the_job(monkeypatch, capsys):
    """A site that is gone is told by the output's own thread; an end is waited for no longer."""
    assert told(monkeypatch, capsys, Unavailable("gone"), ["waiting: x"]) == ([], [["waiting: x"]])
    ended = threading.Event()
    ended.set()
    client = Waiting()
    _tell_why_it_waits(client, "j", ended)
    assert not client.looks
    assert capsys.readouterr().err == ""
