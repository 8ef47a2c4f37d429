"""Jobs move only as they may, and a spec that cannot be meant is refused."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from gridcloud.cli.options import STRATEGIES
from gridcloud.errors import Conflict
from gridcloud.model.choice import Constraints, Strategy
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
        {"command": ("a",), "resubmit": -1},
        {"command": ("a",), "strategy": "luckiest"},
        {"command": ("a",), "constraints": {"countries": ["Denmark"]}},
        {"command": ("a",), "constraints": {"within": ["Not a name"]}},
        {"command": ("a",), "constraints": {"max_price": -1}},
        {"command": ("a",), "constraints": {"max_price": "NaN"}},
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


def test_a_task_is_placed_as_its_array_was_asked_to_be():
    """What says where it may run, and how often, holds for each."""
    spec = JobSpec(
        command=("run",),
        tasks=(1,),
        constraints=Constraints(countries=("dk",), max_price=1),
        strategy=Strategy.CHEAPEST,
        resubmit=0,
    )
    task = spec.for_task(1)
    assert task.constraints == spec.constraints
    assert task.constraints.countries == ("DK",)
    assert (task.strategy, task.resubmit) == (Strategy.CHEAPEST, 0)


def test_an_attempt_is_current_by_its_number_and_lease():
    """Of a job that went back in line, or has ended, no attempt is."""
    job = Job(
        id="a",
        spec=JobSpec(command=("true",)),
        state=JobState.ACTIVE,
        created_at=datetime.now(UTC),
        attempts=2,
        lease_id="l",
    )
    assert job.held_by(job)
    assert not job.held_by(job.model_copy(update={"attempts": 1}))
    assert not job.advanced(JobState.QUEUED, lease_id=None).held_by(job)
    assert not job.advanced(JobState.FAILED).held_by(job)


def test_the_command_line_offers_every_strategy():
    """They are listed there by hand, so that --help stays quick."""
    assert tuple(Strategy) == STRATEGIES


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
