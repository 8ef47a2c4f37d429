"""A driver takes a job to its end from any state it was left in, whatever fails on the way."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import Forbidden, InvalidSpec, NotFound, Unavailable
from gridcloud.model.job import Ending, Job, JobSpec, JobState, Outcome
from gridcloud.model.lease import Endpoint, Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.need import Need
from gridcloud.orchestration.driver import InterruptedByStore, JobDriver
from simulation.virtual_time import EPOCH, now, run

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DONE = Ending(outcome=Outcome(exit_code=0))


class Keeper:
    """Remembers in memory what was saved."""

    def __init__(self):
        self.saved, self.notes, self.current = [], [], None

    async def save(self, job, message="", *, held_by=None):
        if not await self.holds(held_by):
            return False
        self.current = job
        self.saved.append(job)
        self.notes.append(message)
        return True

    async def holds(self, job):
        return self.current is None or self.current.held_by(job)

    async def note(self, job, kind, message):
        self.notes.append(f"{kind}: {message}")

    @property
    def states(self):
        return [job.state.value for job in self.saved]


class Recourse:
    """Lets a job go back in line unless there is a refusal, and lengthens leases if told to."""

    def __init__(self):
        self.patience, self.no, self.asked = timedelta(minutes=2), "", []
        self.renewals, self.renewed = [], []

    async def refusal(self, job):
        self.asked.append(job)
        return self.no

    async def renew(self, lease, until):
        self.renewed.append(until)
        if self.renewals:
            raise self.renewals.pop(0)
        return lease.model_copy(update={"ends_at": until})


class Place:
    """A place whose steps are scripted: an error is raised as often as it is listed."""

    def __init__(self, ending=DONE, found=None, **failures):
        self.ending, self.found, self.failures = ending, found, failures
        self.calls = []
        self.canceled = asyncio.Event()
        self.hold = False
        self.never = asyncio.Event()

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


def make(place, state=JobState.QUEUED, *, lease_ends=None, role=LeaseRole.OWN, **spec):
    job = Job(
        id="j",
        spec=JobSpec(command=("true",), **spec),
        state=state,
        created_at=NOW,
        attempts=1,
        lease_id="l",
        site="there",
        provider="lent",
    )
    lease = Lease(
        id="l",
        role=role,
        state=LeaseState.ACTIVE,
        provider="lent",
        peer="key" if role is LeaseRole.BORROWED else None,
        need=Need(),
        created_at=NOW,
        ends_at=lease_ends,
    )
    keeper = Keeper()
    clock = [NOW]

    async def sleep(seconds):
        clock[0] += timedelta(seconds=seconds)
        await asyncio.sleep(0)

    driver = JobDriver(
        job,
        lease,
        place,
        keeper,
        cancel_grace=1,
        recourse=Recourse(),
        now=lambda: clock[0],
        sleep=sleep,
    )
    driver.clock = clock
    return driver, keeper


def lend(place, state=JobState.ACTIVE, *, hours=1.0, **spec):
    """As `make`, at a peer, by default for a job with a time limit."""
    spec = {"need": Need(time=timedelta(hours=1))} | spec
    ends = NOW + timedelta(hours=hours)
    return make(place, state, lease_ends=ends, role=LeaseRole.BORROWED, **spec)


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

    async def failing(job, message="", *, held_by=None):
        if job.state in (JobState.STAGE_OUT, JobState.COMPLETED) and failures:
            raise failures.pop()
        return await save(job, message, held_by=held_by)

    keeper.save = failing
    for _ in range(2):
        with pytest.raises(InterruptedByStore):
            await driver.drive()
    assert (await driver.drive()).state is JobState.COMPLETED
    assert (await driver.drive()).state is JobState.COMPLETED
    assert keeper.states[-1] == "COMPLETED"


# A place that is lost


@pytest.mark.parametrize("error", [NotFound("Its sandbox is gone."), Forbidden("not let in")])
async def test_a_place_that_is_gone_puts_the_job_back_in_line(error):
    """The job may go elsewhere, and its person is told what may happen twice."""
    place = Place(run=[error])
    driver, keeper = lend(place)
    job = await driver.drive()
    assert (job.state, job.resubmitted, job.lost_at) == (JobState.QUEUED, 1, ("key/lent",))
    assert (job.lease_id, job.site, job.outcome) == (None, None, None)
    assert driver.left.folder_name == "j-1"
    assert error.message in keeper.notes[-1]
    assert "happen twice" in keeper.notes[-1]
    assert "stage_out" not in place.calls


async def test_a_place_out_of_reach_is_waited_for_with_patience():
    """Short absences change nothing; after the patience, counted from the first failure, the job
    goes elsewhere."""
    short = Place(run=[Unavailable("no route")] * 5)
    driver, _ = lend(short)
    assert (await driver.drive()).state is JobState.COMPLETED
    place = Place(run=[Unavailable("no route")] * 500)
    driver, keeper = lend(place)
    assert (await driver.drive()).state is JobState.QUEUED
    assert driver.silent
    waited = driver.clock[0] - NOW
    assert timedelta(minutes=2) <= waited < timedelta(minutes=3)
    assert "out of reach for 2m" in keeper.notes[-1]


async def test_patience_begins_anew_with_each_answer():
    """A connection that breaks now and then is not a lost place."""
    place = Place()
    driver, _ = lend(place)
    tries = []

    async def run(job, lease, started):
        tries.append(driver.clock[0])
        if len(tries) < 40:
            if len(tries) % 4 == 0:
                started()
            raise Unavailable("cut")
        return DONE

    place.run = run
    assert (await driver.drive()).state is JobState.COMPLETED
    assert tries[-1] - tries[0] > timedelta(minutes=5)


async def test_a_silent_place_is_kept_where_there_is_no_other():
    """Then waiting for its return is all that can be done, as long as its lease lasts."""
    place = Place(run=[Unavailable("no route")] * 40)
    driver, keeper = lend(place)
    driver._recourse.no = "nothing else here could serve it"
    assert (await driver.drive()).state is JobState.COMPLETED
    assert sum("nothing else here" in note for note in keeper.notes) == 1


async def test_a_gone_place_fails_the_job_where_there_is_no_other():
    """With the cause, and why it was not placed anew."""
    driver, keeper = lend(Place(run=[NotFound("Its sandbox is gone.")]))
    driver._recourse.no = "that was done 2 times, as was allowed"
    job = await driver.drive()
    assert job.state is JobState.FAILED
    assert "sandbox is gone" in job.message
    assert any("done 2 times" in note for note in keeper.notes)


async def test_what_ended_by_itself_is_never_run_again():
    """A place lost after the command ended costs the results, but nothing happens twice."""
    place = Place(stage_out=[NotFound("gone")])
    driver, _ = lend(place)
    job = await driver.drive()
    assert (job.state, job.outcome.reason) == (JobState.FAILED, "stage-out-failed")
    failed = Place(Ending(outcome=Outcome(exit_code=3)))
    driver, _ = lend(failed)
    assert (await driver.drive()).state is JobState.FAILED
    assert failed.calls.count("run") == 1


async def test_a_lease_that_ended_as_agreed_is_no_loss():
    """The job took longer than it was given; elsewhere it would again."""
    driver, _ = lend(Place(run=[NotFound("The lease has ended.")]), hours=0.0)
    job = await driver.drive()
    assert (job.state, job.outcome.reason) == (JobState.FAILED, "lease-end")


@pytest.mark.parametrize("reason", ["lost", "terminated"])
async def test_a_command_cut_off_by_its_machine_goes_elsewhere(reason):
    """At a peer; on this host such an end is told, as it was nobody else's machine."""
    ending = Ending(outcome=Outcome(reason=reason, message="the machine restarted"))
    driver, keeper = lend(Place(ending))
    assert (await driver.drive()).state is JobState.QUEUED
    assert "the machine restarted" in keeper.notes[-1]
    driver, _ = make(Place(ending), JobState.ACTIVE)
    assert (await driver.drive()).state is JobState.FAILED


async def test_a_missing_input_is_not_a_lost_place():
    """Nor is what cannot be read here; a place that is gone while inputs are copied is."""
    driver, _ = lend(Place(stage_in=[NotFound("data is not there")]), JobState.STAGE_IN)
    assert (await driver.drive()).state is JobState.FAILED
    gone = Place(stage_in=[NotFound("gone")], state=[NotFound("gone")])
    driver, keeper = lend(gone, JobState.QUEUED)
    assert (await driver.drive()).state is JobState.QUEUED
    assert "twice" not in keeper.notes[-1]


async def test_a_canceled_job_does_not_go_back_in_line():
    """It ends, though its place is lost as well."""
    place = Place(run=[NotFound("gone")])
    driver, _ = lend(place)
    driver.cancel()
    job = await driver.drive()
    assert job.state is JobState.CANCELED


async def test_a_recalled_job_may_end_in_time_else_it_goes_elsewhere():
    """Until then it runs on; after that nobody waits for the machine."""
    place = Place()
    driver, _ = lend(place)
    driver.recall(NOW + timedelta(minutes=5), "its own users need it")
    assert (await driver.drive()).state is JobState.COMPLETED

    async def run(job, lease, started):
        started()
        driver.recall(NOW, "its own users need it.")
        await place.never.wait()

    driver, keeper = lend(place)
    place.run = run
    job = await driver.drive()
    assert job.state is JobState.QUEUED
    assert "recalled it: its own users need it." in keeper.notes[-1]
    assert driver.lease.ends_at == NOW


@pytest.mark.parametrize("way", ["silent", "gone early", "cut off", "copying"])
async def test_a_recalled_job_that_cannot_go_elsewhere_says_so(way):
    """Its message names the recall, the owner's reason, and why it was not placed anew."""
    place = Place(ending=Ending(outcome=Outcome(signal=15, reason="terminated")))
    driver, _ = lend(place)
    driver._recourse.no = "nothing else here could serve it"

    async def run(job, lease, started):
        started()
        ahead = timedelta(seconds=0 if way == "silent" else 10)
        driver.recall(NOW + ahead, "its own users need it.")
        if way == "silent":
            await place.never.wait()
        if way == "gone early":
            raise NotFound("gone")
        if way == "copying":
            driver.clock[0] += timedelta(seconds=11)
            return DONE
        return place.ending

    place.run = run
    place.failures = {"stage_out": [NotFound("gone")]} if way == "copying" else {}
    job = await driver.drive()
    assert (job.state, job.outcome.reason) == (JobState.FAILED, "recalled")
    told = "Its owner recalled the machine before the job was done: its own users need it."
    stays = "" if way == "copying" else " Not placed anew: nothing else here could serve it."
    assert job.message == told + stays


async def test_a_job_that_failed_by_itself_after_a_recall_says_that():
    """A recall is no excuse for a command that ended in time."""
    driver, _ = lend(Place(ending=Ending(outcome=Outcome(exit_code=3))))
    driver.recall(NOW + timedelta(minutes=5), "its own users need it")
    job = await driver.drive()
    assert (job.outcome.exit_code, job.outcome.reason) == (3, "")
    driver, _ = lend(Place(run=[InvalidSpec("no such command")]))
    driver.recall(NOW + timedelta(minutes=5), "its own users need it")
    job = await driver.drive()
    assert "no such command" in job.message


async def test_a_recall_before_a_restart_is_remembered_by_the_lease():
    """The reason stands in the lease, which is all that is left of it."""
    driver, _ = lend(Place(run=[NotFound("gone")]), hours=0.0)
    recalled = driver.lease.model_copy(update={"reason": "its own users need it"})
    again = JobDriver(
        driver.job,
        recalled,
        driver.place,
        Keeper(),
        cancel_grace=1,
        recourse=Recourse(),
        now=lambda: NOW,
    )
    assert (await again.drive()).state is JobState.QUEUED


# Fencing


@pytest.mark.parametrize("state", [JobState.ACTIVE, JobState.STAGE_OUT])
async def test_an_attempt_that_was_replaced_writes_nothing(state):
    """Whatever it brings back is not copied, and no state of it is saved; its folder goes."""
    place = Place()
    driver, keeper = lend(place, state)
    keeper.current = driver.job.model_copy(update={"attempts": 2, "lease_id": "other"})
    await driver.drive()
    assert keeper.saved == []
    assert "stage_out" not in place.calls
    assert place.calls[-2:] == ["remove", "close"]
    assert keeper.notes == ["fenced: attempt 1 at there/lent came back and was ended"]


async def test_an_attempt_replaced_while_it_copied_does_not_end_the_job():
    """The last word is looked at in the same breath as the attempt's number."""
    place = Place()
    driver, keeper = lend(place)

    async def stage_out(job, ending):
        keeper.current = job.model_copy(update={"attempts": 2, "state": JobState.QUEUED})

    place.stage_out = stage_out
    await driver.drive()
    assert keeper.current.attempts == 2
    assert keeper.states[-1] == "STAGE_OUT"


# Renewal


async def test_a_lease_near_its_end_is_lengthened_while_the_job_runs():
    """By its first length each time; a refusal is told once, and the job goes on to the end."""
    place = Place()
    driver, keeper = lend(place, need=Need())
    done = asyncio.Event()

    async def run(job, lease, started):
        started()
        await done.wait()
        return DONE

    async def note(job, kind, message, note=keeper.note):
        await note(job, kind, message)
        if "not lengthened" in message:
            done.set()

    place.run, keeper.note = run, note
    refuse = Forbidden("This site lends for 3h at most.")
    recourse = driver._recourse
    renew = recourse.renew

    async def twice(lease, until):
        if len(recourse.renewed) == 2:
            raise refuse
        return await renew(lease, until)

    recourse.renew = twice
    assert (await driver.drive()).state is JobState.COMPLETED
    assert recourse.renewed == [NOW + timedelta(hours=2), NOW + timedelta(hours=3)]
    assert driver.lease.ends_at == NOW + timedelta(hours=3)
    assert sum("was lengthened" in note for note in keeper.notes) == 2
    assert sum("3h at most" in note for note in keeper.notes) == 1


async def test_an_own_machine_at_a_cloud_is_lengthened_by_an_hour_at_a_time():
    """Also after a restart, when its lease has grown to many: should the site vanish, it ends."""
    for so_far in (1, 9):
        place = Place()
        driver, _ = make(place, lease_ends=NOW + timedelta(hours=so_far))
        holding = driver._holding
        holding.lease = holding.lease.model_copy(update={"shape": "small", "region": "eu"})
        done = asyncio.Event()

        async def run(job, lease, started, done=done):
            started()
            await done.wait()
            return DONE

        async def renew(lease, until, recourse=driver._recourse, done=done):
            recourse.renewed.append(until)
            if len(recourse.renewed) == 2:
                done.set()
            return lease.model_copy(update={"ends_at": until})

        place.run, driver._recourse.renew = run, renew
        assert (await driver.drive()).state is JobState.COMPLETED
        ends = [NOW + timedelta(hours=so_far + more) for more in (1, 2)]
        assert driver._recourse.renewed[:2] == ends
        assert holding.source == "own/lent/eu/small"


async def test_a_job_with_a_limit_of_its_own_asks_for_no_more():
    """It was given what it asked for; and what is recalled is not lengthened either."""
    for spec, recall in (({}, False), ({"need": Need()}, True)):
        place = Place()
        place.hold = True
        driver, _ = lend(place, **spec)
        if recall:
            driver.recall(NOW + timedelta(minutes=30), "needed")
        task = asyncio.create_task(driver.drive())
        for _ in range(20):
            await asyncio.sleep(0)
        driver.cancel()
        assert (await task).state is JobState.CANCELED
        assert driver._recourse.renewed == []


# A machine made for the job


def made(place, state=JobState.ACTIVE, *, hours=1.0, **spec):
    """As `make`, on a machine of a cloud that was made for the job."""
    spec = {"need": Need(time=timedelta(hours=1))} | spec
    driver, keeper = make(place, state, lease_ends=NOW + timedelta(hours=hours), **spec)
    where = Endpoint(host="10.0.0.1", user="debian", host_keys=())
    machine = Machine(lease_id="l", provider="lent", folder="jobs", endpoint=where, certified=True)
    holding = driver._holding
    update = {"shape": "small", "region": "eu", "machine": machine}
    holding.lease = holding.lease.model_copy(update=update)
    return driver, keeper


async def test_a_machine_deleted_by_somebody_else_is_made_again():
    """Of the same shape if need be: the next is another machine. The reason is told."""
    place = Place()

    async def run(job, lease, started):
        started()
        driver.lose("somebody else deleted its machine")
        await place.never.wait()

    driver, keeper = made(place)
    place.run = run
    job = await driver.drive()
    assert (job.state, job.resubmitted, job.lost_at) == (JobState.QUEUED, 1, ())
    assert driver._recourse.asked[-1].lost_at == ()
    assert "was lost: somebody else deleted its machine. Back in line." in keeper.notes[-1]

    driver, keeper = made(place)
    driver._recourse.no = "that was done 2 times, as was allowed"
    job = await driver.drive()
    assert (job.state, job.outcome.reason) == (JobState.FAILED, "lost")
    assert job.message == (
        "The machine was lost before the job was done: somebody else deleted its machine. "
        "Not placed anew: that was done 2 times, as was allowed."
    )


async def test_a_machine_that_went_silent_is_not_asked_for_again_where_it_was():
    """It may be the cloud's network that is cut: elsewhere, or it is waited for."""
    driver, _ = made(Place(run=[Unavailable("no route")] * 500))
    assert (await driver.drive()).lost_at == ("own/lent/eu/small",)
    assert driver._recourse.asked[0].lost_at == ("own/lent/eu/small",)


FULL = Unavailable("'r.txt': No space left on device.")


async def test_results_are_waited_for_on_a_machine_that_would_take_them_along():
    """However long it takes within its time; whoever stays with the job is told, once."""
    place = Place(stage_out=[FULL] * 40)
    driver, keeper = made(place)
    assert (await driver.drive()).state is JobState.COMPLETED
    assert timedelta(minutes=30) < driver.clock[0] - NOW < timedelta(minutes=45)
    (told,) = [note for note in keeper.notes if note.startswith("results: ")]
    assert "No space left" in told
    assert told.endswith("they are kept where they are until 2026-01-01 01:00 UTC.")


@pytest.mark.parametrize("error", [FULL, Forbidden("The folder for outputs cannot be made.")])
async def test_results_are_given_up_with_the_machine(error):
    """At its end, not before, and with the reason: its time is all that was asked for."""
    place = Place(stage_out=[error] * 500)
    driver, _ = made(place)
    job = await driver.drive()
    assert (job.state, job.outcome.reason) == (JobState.FAILED, "lease-end")
    assert job.message.startswith("The lease ended before its results were brought back. ")
    assert error.message in job.message
    assert timedelta(hours=1) <= driver.clock[0] - NOW < timedelta(hours=1, minutes=1)
    assert place.calls[-2:] == ["remove", "close"], "so that its logs are kept"


async def test_results_are_waited_for_on_a_loan_unless_its_owner_says_no():
    """What is refused there, or is not there any more, does not come back."""
    place = Place(stage_out=[FULL] * 40)
    driver, _ = lend(place)
    assert (await driver.drive()).state is JobState.COMPLETED
    driver, _ = lend(Place(stage_out=[Forbidden("not asked for")]))
    job = await driver.drive()
    assert (job.state, job.outcome.reason) == (JobState.FAILED, "stage-out-failed")
    assert "remain" not in job.message


async def test_a_cancel_ends_the_waiting_for_results():
    """At once, also between two tries."""
    place = Place(stage_out=[FULL] * 500)
    driver, _ = made(place)
    asleep = asyncio.Event()

    async def sleep(seconds):
        asleep.set()
        await place.never.wait()

    driver._sleep = sleep
    task = asyncio.create_task(driver.drive())
    await asleep.wait()
    driver.cancel()
    driver._sleep = lambda seconds: asyncio.sleep(0)
    assert (await asyncio.wait_for(task, 5)).state is JobState.CANCELED


def test_a_machine_without_an_agreed_end_is_kept_a_day_for_results():
    """It is lengthened as while its job ran, and then given up: it has to be paid for."""

    async def story():
        driver, _ = made(Place(stage_out=[FULL] * 5000), need=Need())
        driver._now = driver._holding._now = lambda: EPOCH + timedelta(seconds=now())
        driver._sleep = asyncio.sleep
        job = await driver.drive()
        assert job.state is JobState.FAILED
        assert 24 <= now() / 3600 <= 26
        assert len(driver._recourse.renewed) in (24, 25)

    run(story)


async def test_a_machine_deleted_with_its_results_is_told_as_that():
    """Nobody waits for what is there no more."""
    place = Place()
    driver, _ = made(place)

    async def stage_out(job, ending):
        driver.lose("somebody else deleted its machine")
        raise Unavailable("no route")

    place.stage_out = stage_out
    job = await driver.drive()
    assert (job.state, job.outcome.reason) == (JobState.FAILED, "lost")
    assert "somebody else deleted its machine" in job.message
    assert driver.clock[0] - NOW < timedelta(minutes=1)
