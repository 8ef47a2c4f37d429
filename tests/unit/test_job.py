"""Jobs move only as they may, and a spec that cannot be meant is refused."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from gridcloud.errors import Conflict
from gridcloud.model.job import TRANSITIONS, Job, JobSpec, JobState, Outcome


def test_every_state_leads_to_an_end():
    """From each state some final state can be reached, and none leads on from there."""
    for state in JobState:
        seen, frontier = set(), {state}
        while frontier:
            seen |= frontier
            frontier = {n for s in frontier for n in TRANSITIONS[s]} - seen
        assert any(s.final for s in seen)
        assert not state.final or seen == {state}


def test_a_step_that_makes_no_sense_is_refused():
    """A completed job does not run again."""
    job = Job(id="a", spec=JobSpec(command=("true",)), created_at=datetime.now(UTC))
    with pytest.raises(Conflict, match="NEW and cannot become ACTIVE"):
        job.advanced(JobState.ACTIVE)


@pytest.mark.parametrize(
    "spec",
    [
        {"command": ()},
        {"command": ("",)},
        {"command": ("a\0b",)},
        {"command": ("a",), "outputs": ("../x",)},
        {"command": ("a",), "outputs": ("/etc/passwd",)},
        {"command": ("a",), "outputs": ("a/../../x",)},
        {"command": ("a",), "inputs": ("/x/data", "/y/data")},
        {"command": ("a",), "inputs": ("relative",)},
        {"command": ("a",), "env": {"a-b": "c"}},
        {"command": ("a",), "need": {"cpus": 0}},
        {"command": ("a",), "need": {"cpus": -3}},
        {"command": ("a",), "need": {"time": 0}},
        {"command": ("a",), "colour": "red"},
    ],
)
def test_impossible_specs(spec):
    """What cannot be meant never becomes a job."""
    with pytest.raises(ValidationError):
        JobSpec.model_validate(spec)


def test_a_task_knows_its_number():
    """{task} is replaced everywhere, and the variable is set."""
    spec = JobSpec(
        command=("run", "{task}.npy"), outputs=("o{task}",), into="/r/{task}", tasks=(7,)
    )
    task = spec.for_task(7)
    assert task.command == ("run", "7.npy")
    assert (task.outputs, task.into) == (("o7",), "/r/7")
    assert task.env["GRIDCLOUD_TASK"] == "7"
    assert task.tasks == ()


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome(exit_code=3), 3),
        (Outcome(signal=9), 137),
        (Outcome(signal=15, reason="time-limit"), 124),
        (Outcome(reason="lost"), 1),
    ],
)
def test_exit_status_is_what_a_shell_would_show(outcome, status):
    """Own status, 128 + signal, 124 for a limit as timeout(1) has it."""
    assert outcome.exit_status == status
