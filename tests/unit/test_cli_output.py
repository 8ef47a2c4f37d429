"""What comes from elsewhere cannot steer the reader's terminal."""

import pytest

from gridcloud.cli import main, render
from gridcloud.cli.jobs_run import _explain
from gridcloud.errors import Forbidden
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
