"""The scheduler places, waits, cancels and picks up again; no job is lost or run twice."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import InvalidSpec, NoCapacity
from gridcloud.model.job import Ending, Job, JobSpec, JobState, Outcome
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.orchestration.scheduler import Scheduler
from gridcloud.store.database import Database
from gridcloud.store.jobs import JobStore


class Leasing:
    """One offer of so many CPUs; every lease is remembered."""

    def __init__(self, cpus=2):
        self.cpus, self.leases, self.refusals = cpus, {}, []

    async def offers(self):
        used = sum(lease.need.cpus for lease in self.leases.values() if lease.live)
        memory = 64 * GIB
        return [
            Offer(
                site="home",
                provider="local",
                capacity=Resources(cpus=self.cpus, memory_bytes=memory),
                free=Resources(cpus=max(0, self.cpus - used), memory_bytes=memory),
            )
        ]

    async def intend(self, job, offer):
        lease = Lease(
            id=f"l-{job.folder_name}",
            role=LeaseRole.OWN,
            state=LeaseState.INTENT,
            provider=offer.provider,
            need=job.spec.need,
            created_at=datetime.now(UTC),
            job_id=job.id,
        )
        self.leases[lease.id] = lease
        return lease

    async def fulfil(self, lease, offer):
        if self.refusals:
            raise self.refusals.pop(0)
        machine = Machine(lease_id=lease.id, provider="local", folder="/x")
        active = lease.model_copy(update={"state": LeaseState.ACTIVE, "machine": machine})
        self.leases[lease.id] = active
        return active

    async def find(self, lease_id):
        return self.leases.get(lease_id)

    async def release(self, lease, reason):
        self.leases[lease.id] = lease.model_copy(update={"state": LeaseState.RELEASED})

    @property
    def live(self):
        return [lease for lease in self.leases.values() if lease.live]


class Places:
    """Counts how many jobs run at once; a job named "hold" runs until it is canceled."""

    def __init__(self):
        self.running, self.most, self.ran, self.found = 0, 0, [], None

    def open(self, job, lease):
        return Place(self, job)


class Place:
    def __init__(self, places, job):
        self.places, self.job, self.canceled = places, job, asyncio.Event()

    async def state(self):
        return self.places.found

    async def stage_in(self, job):
        pass

    async def run(self, job, lease, started):
        self.places.running += 1
        self.places.most = max(self.places.most, self.places.running)
        self.places.ran.append(job.id)
        started()
        if job.spec.name == "hold":
            await self.canceled.wait()
        else:
            await asyncio.sleep(0.001)
        self.places.running -= 1
        reason = "canceled" if self.canceled.is_set() else ""
        return Ending(outcome=Outcome(exit_code=None if reason else 0, reason=reason))

    async def watch(self, job):
        return Ending(outcome=Outcome(exit_code=0))

    async def stage_out(self, job, ending):
        pass

    async def cancel(self, grace_seconds):
        self.canceled.set()

    async def remove(self, job):
        pass

    async def close(self):
        pass


@pytest.fixture
async def store(tmp_path):
    database = Database(tmp_path / "site.db")
    await database.open()
    yield JobStore(database)
    await database.close()


@pytest.fixture
async def world(store):
    leasing, places = Leasing(), Places()
    scheduler = Scheduler(store, leasing, places, cancel_grace=1)
    await scheduler.start()
    yield scheduler, leasing, places
    await scheduler.stop()


def spec(**more):
    return JobSpec(command=("true",), **more)


async def test_an_array_runs_within_what_there_is(world):
    """Every task runs exactly once, never more at a time than there are CPUs."""
    scheduler, leasing, places = world
    jobs = await scheduler.submit(spec(tasks=tuple(range(1, 31))))
    ended = await scheduler.wait(jobs[0].array_id, 30)
    assert {job.state for job in ended} == {JobState.COMPLETED}
    assert sorted(places.ran) == sorted(job.id for job in jobs)
    assert 1 <= places.most <= 2
    assert leasing.live == []


async def test_what_never_fits_is_refused_with_reasons(world):
    """A need that no site could ever serve does not wait for ever."""
    scheduler, _, _ = world
    with pytest.raises(InvalidSpec, match="has 2 of 64 CPUs"):
        await scheduler.submit(spec(need=Need(cpus=64)))


async def test_what_does_not_fit_now_waits_and_says_why(world, store):
    """The reason is an event; once there is room the job runs."""
    scheduler, _, _ = world
    holders = [(await scheduler.submit(spec(name="hold")))[0] for _ in range(2)]
    (waiting,) = await scheduler.submit(spec())
    while not any("waiting" in e.message for _, e in await store.events([waiting.id])):
        await asyncio.sleep(0.01)
    await scheduler.cancel(holders[0].id)
    (job,) = await scheduler.wait(waiting.id, 10)
    assert job.state is JobState.COMPLETED
    await scheduler.cancel(holders[1].id)


async def test_cancel_in_line_and_while_running(world):
    """Both end as CANCELED, and cancelling again changes nothing."""
    scheduler, leasing, _ = world
    running = [(await scheduler.submit(spec(name="hold")))[0] for _ in range(2)]
    (queued,) = await scheduler.submit(spec())
    for job in (queued, *running):
        await scheduler.cancel(job.id)
        (ended,) = await scheduler.wait(job.id, 10)
        assert ended.state is JobState.CANCELED
        assert (await scheduler.cancel(job.id))[0] == ended
    while leasing.live:
        await asyncio.sleep(0.01)


async def test_a_refusal_puts_the_job_back_in_line(world, store, monkeypatch):
    """The refuser is left alone for a moment, then asked again; the intent is given up."""
    monkeypatch.setattr("gridcloud.orchestration.scheduler._SHUN_A_REFUSER_FOR", 0.05)
    scheduler, leasing, _ = world
    leasing.refusals = [NoCapacity("just taken")]
    (job,) = await scheduler.submit(spec())
    (ended,) = await scheduler.wait(job.id, 10)
    assert ended.state is JobState.COMPLETED
    assert ended.attempts == 2
    events = [event.message for _, event in await store.events([job.id])]
    assert any("just taken" in message for message in events)


@pytest.mark.parametrize(
    ("state", "lease_state", "found", "end"),
    [
        (JobState.QUEUED, None, None, JobState.COMPLETED),
        (JobState.STAGE_IN, LeaseState.INTENT, None, JobState.COMPLETED),
        (JobState.STAGE_IN, LeaseState.ACTIVE, "running", JobState.COMPLETED),
        (JobState.ACTIVE, LeaseState.ACTIVE, "running", JobState.COMPLETED),
        (JobState.ACTIVE, None, None, JobState.FAILED),
    ],
)
async def test_after_a_crash(store, state, lease_state, found, end):
    """Whatever a crash left is picked up, or failed with the cause; no lease stays behind."""
    leasing, places = Leasing(), Places()
    places.found = found
    now = datetime.now(UTC) - timedelta(minutes=1)
    job = Job(id="j", spec=spec(), state=state, created_at=now, attempts=1, lease_id="l")
    await store.add([job], "submitted")
    if lease_state:
        active = lease_state is LeaseState.ACTIVE
        leasing.leases["l"] = Lease(
            id="l",
            role=LeaseRole.OWN,
            state=lease_state,
            provider="local",
            need=Need(),
            created_at=now,
            job_id="j",
            machine=Machine(lease_id="l", provider="local", folder="/x") if active else None,
        )
    scheduler = Scheduler(store, leasing, places, cancel_grace=1)
    await scheduler.start()
    (ended,) = await scheduler.wait("j", 10)
    assert ended.state is end, ended.message
    assert ended.message
    while leasing.live:
        await asyncio.sleep(0.01)
    assert len(places.ran) <= 1
    await scheduler.stop()


async def test_stopping_the_site_leaves_running_jobs_alone(store):
    """A site that stops cancels nothing: the job is still ACTIVE in the store."""
    leasing, places = Leasing(), Places()
    scheduler = Scheduler(store, leasing, places, cancel_grace=1)
    await scheduler.start()
    (job,) = await scheduler.submit(spec(name="hold"))
    while (await store.get(job.id)).state is not JobState.ACTIVE or not places.ran:
        await asyncio.sleep(0.01)
    await scheduler.stop()
    assert (await store.get(job.id)).state is JobState.ACTIVE
    assert len(leasing.live) == 1


async def test_a_fault_of_ours_fails_the_job_alone(world):
    """An error nobody foresaw ends its own job with a message; others go on."""
    scheduler, _, places = world

    def broken(job, lease):
        if job.spec.name == "broken":
            raise RuntimeError("unforeseen")
        return Place(places, job)

    places.open = broken
    (bad,) = await scheduler.submit(spec(name="broken"))
    (good,) = await scheduler.submit(spec())
    (ended,) = await scheduler.wait(bad.id, 10)
    assert (ended.state, ended.outcome.reason) == (JobState.FAILED, "internal")
    assert (await scheduler.wait(good.id, 10))[0].state is JobState.COMPLETED


async def test_a_cancel_while_offers_are_asked_for(world):
    """A job canceled between reading the line and placing it does not run."""
    scheduler, leasing, places = world
    asked, go_on = asyncio.Event(), asyncio.Event()
    offers = leasing.offers

    (holder,) = await scheduler.submit(spec(name="hold", need=Need(cpus=2)))
    (job,) = await scheduler.submit(spec())

    async def slow():
        asked.set()
        await go_on.wait()
        return await offers()

    leasing.offers = slow
    await scheduler.cancel(holder.id)
    await asked.wait()
    (canceled,) = await scheduler.cancel(job.id)
    assert canceled.state is JobState.CANCELED
    go_on.set()
    await asyncio.sleep(0.1)
    assert (await scheduler.wait(job.id, 1))[0].state is JobState.CANCELED
    assert job.id not in places.ran


async def test_an_intent_that_cannot_be_written_is_tried_again(world, monkeypatch):
    """Neither the job nor those placed with it are forgotten."""
    monkeypatch.setattr("gridcloud.orchestration.scheduler._LOOK_AGAIN_AFTER", 0.05)
    scheduler, leasing, _ = world
    intend, failures = leasing.intend, [NoCapacity("disk full")]

    async def failing(job, offer):
        if failures:
            raise failures.pop()
        return await intend(job, offer)

    leasing.intend = failing
    jobs = [(await scheduler.submit(spec()))[0] for _ in range(2)]
    for job in jobs:
        assert (await scheduler.wait(job.id, 10))[0].state is JobState.COMPLETED


async def test_cancel_an_array_right_after_it_was_handed_in(world):
    """Every task ends, none is stuck, none that ended is changed."""
    scheduler, leasing, _ = world
    jobs = await scheduler.submit(spec(tasks=tuple(range(60))))
    await asyncio.sleep(0.03)
    await scheduler.cancel(jobs[0].array_id)
    ended = await scheduler.wait(jobs[0].array_id, 20)
    assert {job.state for job in ended} <= {JobState.CANCELED, JobState.COMPLETED}
    while leasing.live:
        await asyncio.sleep(0.01)
