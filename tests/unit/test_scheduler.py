"""The scheduler places, waits, cancels and picks up again; no job is lost or run twice."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import InvalidSpec, NoCapacity, NotFound, Unavailable
from gridcloud.model.choice import Constraints, Order, Strategy
from gridcloud.model.job import Ending, Job, JobSpec, JobState, Outcome
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.orchestration.scheduler import Scheduler
from gridcloud.settings import JobSettings
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
    monkeypatch.setattr("gridcloud.orchestration.choosing._SHUN_A_REFUSER_FOR", 0.05)
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
        (JobState.ACTIVE, None, None, JobState.COMPLETED),
        (JobState.STAGE_OUT, None, None, JobState.FAILED),
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


async def test_a_cancel_while_a_lease_is_asked_for_outlives_a_crash(store):
    """Who was told that a job is being canceled never sees it run after a restart."""
    leasing, places, asked = Leasing(), Places(), asyncio.Event()

    async def never(lease, offer):
        asked.set()
        await asyncio.Event().wait()

    leasing.fulfil, fulfil = never, leasing.fulfil
    scheduler = Scheduler(store, leasing, places, cancel_grace=1)
    await scheduler.start()
    (job,) = await scheduler.submit(spec())
    await asked.wait()
    assert scheduler.attends(job.id)
    await scheduler.cancel(job.id)
    await scheduler.stop()
    leasing.fulfil, leasing.cpus = fulfil, 0  # nor does it wait for room, only to end then
    scheduler = Scheduler(store, leasing, places, cancel_grace=1)
    await scheduler.start()
    assert (await scheduler.wait(job.id, 10))[0].state is JobState.CANCELED
    assert not places.ran
    assert not scheduler.attends(job.id)
    await scheduler.stop()


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


async def test_jobs_that_wait_for_an_absent_site_hold_up_no_other(world):
    """However many are in front: what there is room for is found behind them."""
    scheduler, leasing, places = world
    at_home, whole = leasing.offers, Resources(cpus=8, memory_bytes=64 * GIB)

    async def offers():
        away = Offer(site="away", provider="lent", peer="p", capacity=whole, free=Resources())
        return [*await at_home(), away]

    leasing.offers = offers
    await scheduler.submit(spec(site="away", tasks=tuple(range(1000))))
    (job,) = await scheduler.submit(spec())
    assert (await scheduler.wait(job.id, 10))[0].state is JobState.COMPLETED
    assert places.ran == [job.id]


# Places that are lost


class Peers(Leasing):
    """Peers of so many CPUs each, beside one at home too small for most."""

    def __init__(self, **sizes):
        super().__init__()
        self.sizes, self.kept = sizes, []

    async def offers(self):
        found = []
        for site, cpus in self.sizes.items():
            mine = [each for each in self.live if each.peer == site]
            have = {"memory_bytes": 64 * GIB}
            found.append(
                Offer(
                    site=site,
                    provider="lent",
                    peer=site,
                    community=f"physics.{0:064x}",
                    capacity=Resources(cpus=cpus, **have),
                    free=Resources(cpus=max(0, cpus - sum(e.need.cpus for e in mine)), **have),
                )
            )
        return found

    async def intend(self, job, offer):
        lease = await super().intend(job, offer)
        now = datetime.now(UTC)
        loan = {"role": LeaseRole.BORROWED, "peer": offer.peer, "ends_at": now + timedelta(hours=1)}
        self.leases[lease.id] = lease.model_copy(update=loan)
        return self.leases[lease.id]


class Losing(Places):
    """Places at peers that may be gone, out of reach, or hold a job until it is let go."""

    def __init__(self, **faults):
        super().__init__()
        self.faults, self.let_go, self.ended = faults, asyncio.Event(), []

    def open(self, job, lease):
        return LosingPlace(self, job, lease)


class LosingPlace(Place):
    def __init__(self, places, job, lease):
        super().__init__(places, job)
        self.at = lease.peer

    async def run(self, job, lease, started):
        self.places.ran.append((self.at, job.attempts))
        fault = self.places.faults.get(self.at)
        if fault == "away":
            raise Unavailable("no route")
        started()
        match fault:
            case "gone":
                raise NotFound("Its sandbox is gone.")
            case "slow":
                await self.places.let_go.wait()
        return Ending(outcome=Outcome(exit_code=0))

    async def remove(self, job):
        self.places.ended.append((self.at, job.attempts))


@pytest.fixture
async def lent(store):
    """Return a function that starts a scheduler over peers with faults."""
    started = []

    async def make(sizes, settings=None, **faults):
        leasing, places = Peers(**sizes), Losing(**faults)
        scheduler = Scheduler(
            store, leasing, places, cancel_grace=1, settings=lambda: settings or JobSettings()
        )
        await scheduler.start()
        started.append(scheduler)
        return scheduler, leasing, places

    yield make
    for scheduler in started:
        await scheduler.stop()


async def told(store, job, word):
    """Wait until an event of the job says a word; return all its messages."""
    while True:
        messages = [event.message for _, event in await store.events([job.id])]
        if any(word in message for message in messages):
            return messages
        await asyncio.sleep(0.01)


async def test_a_lost_job_runs_elsewhere(lent, store):
    """Once, at another place, and what it had is given back."""
    scheduler, leasing, places = await lent({"a": 8, "b": 4}, a="gone")
    (job,) = await scheduler.submit(spec())
    (ended,) = await scheduler.wait(job.id, 10)
    assert (ended.state, ended.site, ended.resubmitted) == (JobState.COMPLETED, "b", 1)
    assert places.ran == [("a", 1), ("b", 2)]
    messages = await told(store, job, "was given back")
    assert any("attempt 1 at a/lent was lost: Its sandbox is gone." in m for m in messages)
    while leasing.live:
        await asyncio.sleep(0.01)
    assert ("a", 1) in places.ended


@pytest.mark.parametrize(("times", "tried"), [(0, 1), (1, 2), (None, 3)])
async def test_no_more_often_than_allowed(lent, times, tried):
    """As often as the job says, or else the site; then it fails with the cause."""
    sizes = {"a": 8, "b": 4, "c": 2, "d": 1}
    scheduler, _, places = await lent(sizes, **dict.fromkeys(sizes, "gone"))
    (job,) = await scheduler.submit(spec(resubmit=times))
    (ended,) = await scheduler.wait(job.id, 10)
    assert ended.state is JobState.FAILED
    assert "sandbox is gone" in ended.message
    assert len(places.ran) == tried


async def test_no_other_place_fails_the_job_at_once(lent, store):
    """It is told so, rather than to wait for ever for a place that it may not go to."""
    scheduler, _, _ = await lent({"a": 8, "b": 1}, a="gone")
    (job,) = await scheduler.submit(spec(need=Need(cpus=4)))
    (ended,) = await scheduler.wait(job.id, 10)
    assert ended.state is JobState.FAILED
    await told(store, job, "nothing else here could serve it")


async def test_an_owner_that_vanished_is_left_after_the_patience(lent, store):
    """And told once it came back and the attempt there was ended."""
    patience = JobSettings.model_validate({"patience": "1s"})
    scheduler, leasing, _ = await lent({"a": 8, "b": 4}, patience, a="away")
    release, back = leasing.release, asyncio.Event()

    async def later(lease, reason):
        if lease.peer == "a" and not back.is_set():
            return
        await release(lease, reason)

    leasing.release = later
    (job,) = await scheduler.submit(spec())
    (ended,) = await scheduler.wait(job.id, 20)
    assert (ended.state, ended.site) == (JobState.COMPLETED, "b")
    back.set()
    await release(leasing.leases[f"l-{job.id}-1"], "given back at last")
    await told(store, job, "attempt 1 at a/lent came back and was ended")


async def test_a_recalled_job_goes_elsewhere_at_the_end(lent, store):
    """Its person hears of it at once; until then it runs on where it is."""
    scheduler, _, places = await lent({"a": 8, "b": 4}, a="slow")
    (job,) = await scheduler.submit(spec())
    while not places.ran:
        await asyncio.sleep(0.01)
    until = datetime.now(UTC) + timedelta(seconds=0.3)
    scheduler.recalled("no such lease", until, "nobody's")
    scheduler.recalled(f"l-{job.id}-1", until, "its own users need it")
    await told(store, job, "a recalls its machine: its own users need it.")
    (ended,) = await scheduler.wait(job.id, 10)
    assert (ended.state, ended.site) == (JobState.COMPLETED, "b")
    assert datetime.now(UTC) >= until
    await told(store, job, "recalled it: its own users need it.")


async def test_cancel_while_a_job_goes_back_in_line(lent, monkeypatch):
    """Whenever that comes it ends the job, and nothing runs afterwards."""
    for steps in range(12):
        scheduler, leasing, places = await lent({"a": 8, "b": 4}, a="gone", b="slow")
        (job,) = await scheduler.submit(spec())
        while not places.ran:
            await asyncio.sleep(0)
        for _ in range(steps * 3):
            await asyncio.sleep(0.0005)
        canceling = asyncio.create_task(scheduler.cancel(job.id))
        await asyncio.sleep(0.02)
        places.let_go.set()
        await canceling
        (ended,) = await scheduler.wait(job.id, 10)
        assert ended.state in (JobState.CANCELED, JobState.COMPLETED), ended
        assert ended.state is JobState.CANCELED or ("b", 2) in places.ran
        while leasing.live:
            await asyncio.sleep(0.01)


async def test_a_stale_attempt_cannot_write_into_the_store(store):
    """Saving and looking whose turn it is are one step: an old attempt's word has no effect."""
    now = datetime.now(UTC)
    first = Job(
        id="j", spec=spec(), state=JobState.ACTIVE, created_at=now, attempts=1, lease_id="l"
    )
    await store.add([first], "submitted")
    assert await store.holds(first)
    back = first.advanced(JobState.QUEUED, lease_id=None)
    assert await store.save(back, "lost", held_by=first)
    assert not await store.holds(first)
    assert not await store.save(first.advanced(JobState.STAGE_OUT), "late", held_by=first)
    second = back.model_copy(update={"attempts": 2, "lease_id": "m"})
    await store.save(second)
    assert not await store.save(first.advanced(JobState.FAILED), "late", held_by=first)
    assert await store.get("j") == second
    assert await store.save(second.advanced(JobState.FAILED), "end", held_by=second)
    assert not await store.holds(second)


# Choosing


async def test_settings_take_effect_at_the_next_look(lent):
    """Strategy and order are those of the moment, not of the start."""
    all_memory = Need(memory_bytes=64 * GIB)
    scheduler, _, _ = await lent({"wide": 8, "snug": 1})
    (first,) = await scheduler.submit(spec(need=all_memory))
    assert (await scheduler.wait(first.id, 10))[0].site == "wide"
    (second,) = await scheduler.submit(spec(need=all_memory, strategy=Strategy.BEST_FIT))
    assert (await scheduler.wait(second.id, 10))[0].site == "snug"
    best = JobSettings(strategy=Strategy.BEST_FIT)
    scheduler, _, _ = await lent({"wide": 8, "snug": 1}, best)
    (third,) = await scheduler.submit(spec(need=all_memory))
    assert (await scheduler.wait(third.id, 10))[0].site == "snug"


async def test_the_youngest_first_if_the_site_has_it_so(lent):
    """In order lifo what came last is placed first."""
    settings = JobSettings(order=Order.LIFO)
    scheduler, _, places = await lent({"a": 1}, settings, a="slow")
    await scheduler.submit(spec())
    while not places.ran:
        await asyncio.sleep(0.01)
    jobs = [(await scheduler.submit(spec()))[0] for _ in range(3)]
    places.let_go.set()
    ended = [(await scheduler.wait(job.id, 10))[0] for job in jobs]
    started = sorted(ended, key=lambda job: job.started_at)
    assert [job.id for job in started] == [job.id for job in reversed(jobs)]


async def test_unknown_names_are_refused_when_handed_in(lent):
    """The same for a job and for a look at the offers."""
    scheduler, _, _ = await lent({"a": 4})
    within = Constraints(within=("chemistry",))
    with pytest.raises(InvalidSpec, match="community called 'chemistry'"):
        await scheduler.submit(spec(constraints=within))
    with pytest.raises(InvalidSpec, match="community called 'chemistry'"):
        await scheduler.plan(Need(), constraints=within)
    with pytest.raises(InvalidSpec, match="is outside own"):
        await scheduler.submit(spec(constraints=Constraints(within=("own",))))
    judged = await scheduler.plan(Need(), constraints=Constraints(within=("physics",)))
    assert [o.site for o in judged.winners] == ["a"]


async def test_whoever_waits_for_own_capacity_is_made_known(world):
    """So that what was lent on recall can be called back for the first in line."""
    scheduler, _, _ = world
    asked = []
    scheduler.on_waiting = asked.append
    (holder,) = await scheduler.submit(spec(name="hold", need=Need(cpus=2)))
    (waiting,) = await scheduler.submit(spec(need=Need(cpus=2)))
    await scheduler.submit(spec())
    while not asked:
        await asyncio.sleep(0.01)
    assert set(asked) == {waiting.spec.need}
    await scheduler.cancel(holder.id)


async def test_inputs_are_measured_where_that_matters(store):
    """Each distinct set once, and only for the strategy that goes by it."""
    measured = []

    def measure(paths):
        measured.append(paths)
        return 7

    leasing = Leasing()
    scheduler = Scheduler(store, leasing, Places(), cancel_grace=1, measure=measure)
    await scheduler.submit(spec(inputs=("/x",)))
    near = {"inputs": ("/x",), "strategy": Strategy.NEAREST_DATA}
    jobs = await scheduler.submit(spec(tasks=(1, 2, 3), **near))
    assert measured == [("/x",)]
    assert {job.input_bytes for job in jobs} == {7}
