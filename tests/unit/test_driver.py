"""A driver takes a job to its end from any state it was left in, whatever fails on the way."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import InvalidSpec, Unavailable
from gridcloud.model.job import Ending, Job, JobSpec, JobState, Outcome
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.orchestration.driver import InterruptedByStore, JobDriver

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DONE = Ending(outcome=Outcome(exit_code=0))


class Keeper:
    """Remembers in memory what was saved."""

    def __init__(self):
        self.saved, self.notes = [], []

    async def save(self, job, message=""):
        self.saved.append(job)
        self.notes.append(message)

    async def note(self, job, kind, message):
        self.notes.append(f"{kind}: {message}")

    @property
    def states(self):
        return [job.state.value for job in self.saved]


class Place:
    """A place whose steps are scripted: an error is raised as often as it is listed."""

    def __init__(self, ending=DONE, found=None, **failures):
        self.ending, self.found, self.failures = ending, found, failures
        self.calls = []
        self.canceled = asyncio.Event()
        self.hold = False

    def _step(self, name):
        self.calls.append(name)
        if queued := self.failures.get(name):
            raise queued.pop(0)

    async def state(self):
        self._step("state")
        return self.found

    async def stage_in(self, job):
        self._step("stage_in")

    async def run(self, job, lease, started):
        self._step("run")
        started()
        if self.hold:
            await self.canceled.wait()
            return Ending(outcome=Outcome(signal=15, reason="canceled"))
        return self.ending

    async def watch(self, job):
        self._step("watch")
        return self.ending

    async def stage_out(self, job, ending):
        self._step("stage_out")

    async def cancel(self, grace_seconds):
        self._step("cancel")
        self.canceled.set()

    async def remove(self, job):
        self._step("remove")

    async def close(self):
        self._step("close")


def make(place, state=JobState.QUEUED, *, lease_ends=None, **spec):
    job = Job(
        id="j",
        spec=JobSpec(command=("true",), **spec),
        state=state,
        created_at=NOW,
        attempts=1,
    )
    lease = Lease(
        id="l",
        role=LeaseRole.OWN,
        state=LeaseState.ACTIVE,
        provider="local",
        need=Need(),
        created_at=NOW,
        ends_at=lease_ends,
    )
    keeper = Keeper()
    clock = [NOW]

    async def sleep(seconds):
        clock[0] += timedelta(seconds=seconds)
        await asyncio.sleep(0)

    driver = JobDriver(job, lease, place, keeper, cancel_grace=1, now=lambda: clock[0], sleep=sleep)
    return driver, keeper


async def test_the_whole_way():
    """Each state is saved before the next step is taken."""
    place = Place()
    driver, keeper = make(place)
    job = await driver.drive()
    assert job.state is JobState.COMPLETED
    assert keeper.states == ["STAGE_IN", "ACTIVE", "STAGE_OUT", "CLEANUP", "COMPLETED"]
    assert place.calls == ["stage_in", "run", "stage_out", "remove", "close"]


@pytest.mark.parametrize(
    ("state", "found", "calls"),
    [
        (JobState.STAGE_IN, None, ["state", "stage_in", "run", "stage_out", "remove", "close"]),
        (JobState.STAGE_IN, "running", ["state", "run", "stage_out", "remove", "close"]),
        (JobState.STAGE_IN, "ended", ["state", "run", "stage_out", "remove", "close"]),
        (JobState.ACTIVE, "running", ["run", "stage_out", "remove", "close"]),
        (JobState.STAGE_OUT, "ended", ["watch", "stage_out", "remove", "close"]),
    ],
)
async def test_it_continues_where_a_crash_left_it(state, found, calls):
    """Inputs are never written again under a command that may run."""
    place = Place(found=found)
    driver, _ = make(place, state)
    assert (await driver.drive()).state is JobState.COMPLETED
    assert place.calls == calls


async def test_a_machine_out_of_reach_is_tried_again():
    """A broken connection does not end a running job."""
    place = Place(run=[Unavailable("cut"), Unavailable("cut"), Unavailable("cut")])
    driver, keeper = make(place)
    assert (await driver.drive()).state is JobState.COMPLETED
    assert place.calls.count("run") == 4
    assert sum("trying again" in note for note in keeper.notes) == 1


async def test_after_the_lease_nobody_is_asked_any_more():
    """A machine that stays away until after the lease's end fails the job with the cause."""
    place = Place(run=[Unavailable("no route")] * 50)
    driver, _ = make(place, lease_ends=NOW + timedelta(minutes=2))
    job = await driver.drive()
    assert job.state is JobState.FAILED
    assert "no route" in job.message


async def test_a_lasting_error_fails_the_job_at_once():
    """What cannot get better is not tried twice."""
    place = Place(stage_in=[InvalidSpec("gone")])
    driver, _ = make(place)
    job = await driver.drive()
    assert (job.state, job.message) == (JobState.FAILED, "gone")
    assert place.calls == ["stage_in", "remove", "close"]


async def test_results_that_cannot_be_stored_are_not_removed():
    """After a stage-out that fails for good, the job folder stays where it is."""
    place = Place(stage_out=[Unavailable("disk full")] * 50)
    driver, _ = make(place)
    job = await driver.drive()
    assert job.state is JobState.FAILED
    assert "disk full" in job.message
    assert "remain" in job.message
    assert "remove" not in place.calls


async def test_cancel_while_it_runs():
    """The command is ended, nothing is brought back, the job is CANCELED."""
    place = Place()
    place.hold = True
    driver, keeper = make(place)
    task = asyncio.create_task(driver.drive())
    while "ACTIVE" not in keeper.states:
        await asyncio.sleep(0)
    driver.cancel()
    assert (await task).state is JobState.CANCELED
    assert "stage_out" not in place.calls


async def test_cancel_before_it_begins():
    """A job canceled in line never touches a machine but to clean up."""
    place = Place()
    driver, _ = make(place)
    driver.cancel()
    assert (await driver.drive()).state is JobState.CANCELED
    assert place.calls == ["remove", "close"]


@pytest.mark.parametrize(
    ("ending", "word"),
    [
        (Ending(outcome=Outcome(exit_code=0), unmatched=("*.csv",)), "no file matches *.csv"),
        (Ending(outcome=Outcome(exit_code=0), escaping=("leak",)), "leads out of the job folder"),
        (Ending(outcome=Outcome(exit_code=3)), "exit status 3"),
        (Ending(outcome=Outcome(signal=11)), "signal 11"),
        (Ending(outcome=Outcome(reason="lost", message="guard killed")), "guard killed"),
    ],
)
async def test_failures_say_why(ending, word):
    """A job that did not do what was asked is FAILED, with the cause."""
    driver, _ = make(Place(ending))
    job = await driver.drive()
    assert job.state is JobState.FAILED
    assert word in job.message


async def test_a_failing_store_loses_nothing():
    """Where the store fails the job stays in the state it last kept, and can be driven again."""
    place = Place()
    driver, keeper = make(place)
    save, failures = keeper.save, [Unavailable("disk full")] * 2

    async def failing(job, message=""):
        if job.state in (JobState.STAGE_OUT, JobState.COMPLETED) and failures:
            raise failures.pop()
        await save(job, message)

    keeper.save = failing
    for _ in range(2):
        with pytest.raises(InterruptedByStore):
            await driver.drive()
    assert (await driver.drive()).state is JobState.COMPLETED
    assert (await driver.drive()).state is JobState.COMPLETED
    assert keeper.states[-1] == "COMPLETED"
