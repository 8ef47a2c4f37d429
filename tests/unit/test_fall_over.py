"""A job whose machine cannot be had goes to the next shape, region or cloud, never in circles."""

import asyncio

import pytest

from gridcloud.errors import (
    Forbidden,
    InvalidSpec,
    NoCapacity,
    Throttled,
    TimedOut,
    Unavailable,
)
from gridcloud.model.job import Ending, JobSpec, JobState, Outcome
from gridcloud.model.lease import Endpoint, LeaseState, Machine
from gridcloud.model.need import GIB, Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.orchestration.choosing import Choosing
from gridcloud.orchestration.scheduler import Scheduler
from gridcloud.providers.base import Capacity
from gridcloud.settings import JobSettings
from gridcloud.site.leasing import SiteLeasing
from gridcloud.store.database import Database
from gridcloud.store.jobs import JobStore
from gridcloud.store.leases import LeaseStore


class Cloud:
    """Makes machines of shapes named ``REGION/NAME``, but those with an error."""

    kind = "memory"

    def __init__(self, name, *names, cost=1.0, headroom=None, **errors):
        self.name, self.errors, self.tried, self.there = name, errors, [], set()
        self.removal = asyncio.Event()
        self.removal.set()
        self.has = Capacity(
            resources=Resources(cpus=8),
            headroom=headroom or {},
            shapes=tuple(
                Shape(
                    name=each.split("/")[1],
                    region=each.split("/")[0],
                    resources=Resources(cpus=n, memory_bytes=8 * GIB),
                    price=cost,
                    currency="EUR",
                )
                for n, each in enumerate(names, start=1)
            ),
        )

    async def capacity(self):
        return self.has

    def room(self, machines):
        return self.has.model_copy(update={"headroom": {"eu": Headroom(machines=machines)}})

    async def launch(self, lease):
        self.tried.append(f"{lease.region}/{lease.shape}")
        if error := self.errors.get(lease.shape) or self.errors.get("all"):
            raise error
        self.there.add(lease.id)
        there = Endpoint(host="10.0.0.1", user="debian", host_keys=())
        return Machine(
            lease_id=lease.id, provider=self.name, folder="x", endpoint=there, certified=True
        )

    async def terminate(self, lease_id):
        await self.removal.wait()
        self.there.discard(lease_id)


class Place:
    """Where every command ends well, at once but for those that are ``held``."""

    def __init__(self):
        self.calls, self.held, self.running = [], 0, asyncio.Event()

    def open(self, job, lease):
        return self

    async def state(self):
        return None

    async def stage_in(self, job):
        pass

    async def run(self, job, lease, started):
        started()
        self.calls.append(lease.id)
        self.running.set()
        if len(self.calls) <= self.held:
            await asyncio.Event().wait()
        return Ending(outcome=Outcome(exit_code=0))

    async def stage_out(self, job, ending):
        pass

    async def remove(self, job):
        pass

    async def close(self):
        pass


class NoPeers:
    async def offers(self, live):
        return []


@pytest.fixture
async def start(tmp_path):
    """Return a function that starts a scheduler over clouds."""
    database = Database(tmp_path / "site.db")
    await database.open()
    running = []

    async def make(*clouds, held=0):
        jobs, leases = JobStore(database), LeaseStore(database)
        known = {cloud.name: cloud for cloud in clouds}
        leasing = SiteLeasing("home", known, leases, NoPeers(), lambda: None, asyncio.Lock())
        place = Place()
        place.held = held
        scheduler = Scheduler(jobs, leasing, place, cancel_grace=1)
        scheduler.place = place
        await scheduler.start()
        running.append(scheduler)
        return scheduler, jobs, leases

    yield make
    for scheduler in running:
        await scheduler.stop()
    await database.close()


async def ended(scheduler, **spec):
    jobs = await scheduler.submit(JobSpec(command=("true",), **spec))
    return (await scheduler.wait(jobs[0].array_id or jobs[0].id, 10))[0]


def no_room():
    return NoCapacity("The cloud has no such machine.")


@pytest.mark.parametrize("error", [no_room(), TimedOut("No answer.")])
async def test_the_next_shape_then_the_next_region(start, error):
    """At once, though the first is left alone for a minute."""
    cloud = Cloud("aws", "eu/a", "eu/b", "us/c", a=error, b=error)
    scheduler, jobs, _ = await start(cloud)
    job = await asyncio.wait_for(ended(scheduler), 5)
    assert job.state is JobState.COMPLETED
    assert cloud.tried == ["eu/a", "eu/b", "us/c"]
    told = [event.message for _, event in await jobs.events([job.id])]
    assert any(text.startswith("refused by home/aws a in eu: ") for text in told)


async def test_a_region_that_refuses_three_shapes_is_left(start):
    """It would refuse the other hundreds as well."""
    names = [f"eu/s{n:03}" for n in range(200)]
    cloud = Cloud("aws", *names, "us/z", **{f"s{n:03}": no_room() for n in range(200)})
    scheduler, *_ = await start(cloud)
    assert (await ended(scheduler)).state is JobState.COMPLETED
    assert cloud.tried == ["eu/s000", "eu/s001", "eu/s002", "us/z"]


@pytest.mark.parametrize(
    "error", [Forbidden("The token expired."), Unavailable("The API is down.")]
)
async def test_a_cloud_that_does_not_work_is_left_as_a_whole(start, error):
    """None of its regions is tried; the dearer cloud serves."""
    broken = Cloud("a", "eu/a", "eu/b", "us/c", all=error)
    works = Cloud("b", "eu/large", cost=9.0)
    scheduler, *_ = await start(broken, works)
    assert (await ended(scheduler)).state is JobState.COMPLETED
    assert len(broken.tried) == 1
    assert works.tried == ["eu/large"]


async def test_a_machine_that_cannot_be_as_ordered_is_not_made_again_and_again(start):
    """Each of them would cost as much as the first; the job fails with the reason."""
    cloud = Cloud("aws", "eu/a", "eu/b", all=InvalidSpec("The playbook failed.", hint="Mend it."))
    scheduler, _, leases = await start(cloud)
    job = await ended(scheduler)
    assert (job.state, job.outcome.reason) == (JobState.FAILED, "machine-failed")
    assert job.message == "The playbook failed. Mend it."
    assert cloud.tried == ["eu/a"]
    await until_gone(leases)


async def until_gone(leases):
    while await leases.live():
        await asyncio.sleep(0.01)


async def test_nobody_waits_for_a_machine_to_be_removed(start):
    """Neither the job that ended, nor one that was refused; what remains is given back beside."""
    first, second = Cloud("a", "eu/a", all=no_room()), Cloud("b", "eu/b", cost=9.0)
    first.removal.clear()
    second.removal.clear()
    scheduler, _, leases = await start(first, second)
    assert (await asyncio.wait_for(ended(scheduler), 5)).state is JobState.COMPLETED
    assert len(await leases.live()) == 2
    first.removal.set()
    second.removal.set()
    await until_gone(leases)
    assert not second.there


async def test_an_array_gets_as_many_machines_as_the_quota_allows(start):
    """One for each task, as they become free; all end, and none is left."""
    cloud = Cloud("aws", "eu/a", headroom={"eu": Headroom(machines=3)})
    scheduler, _, leases = await start(cloud)
    (first, *_) = await scheduler.submit(JobSpec(command=("true",), tasks=tuple(range(8))))
    found = await scheduler.wait(first.array_id, 10)
    assert {job.state for job in found} == {JobState.COMPLETED}
    assert len(cloud.tried) == 8
    await until_gone(leases)
    assert not cloud.there
    assert all(lease.state is LeaseState.RELEASED for lease in await leases.clouds())


@pytest.mark.parametrize("held", [1, 3])
async def test_a_machine_deleted_by_hand_is_made_again(start, held):
    """Of the only shape there is, though the quota has room for no second one at the moment; as
    often as the job may be started again, and then it fails with the reason."""
    cloud = Cloud("aws", "eu/a", headroom={"eu": Headroom(machines=0)})
    scheduler, jobs, leases = await start(cloud, held=held)
    cloud.has = cloud.room(1)
    (job,) = await scheduler.submit(JobSpec(command=("true",), resubmit=2))
    for _ in range(held):
        await asyncio.wait_for(scheduler.place.running.wait(), 10)
        scheduler.place.running.clear()
        cloud.has = cloud.room(0)  # as it is told until the cloud is asked again
        (lease,) = [each for each in await leases.live() if each.job_id == job.id]
        cloud.there.discard(lease.id)
        scheduler.lost(lease.id, "somebody else deleted its machine")
        await wait_until_gone(leases, lease.id)
        cloud.has = cloud.room(1)
        scheduler.wake()
    (job,) = await scheduler.wait(job.id, 10)
    told = [event.message for _, event in await jobs.events([job.id])]
    lost = [text for text in told if "was lost: somebody else deleted its machine" in text]
    assert len(lost) == min(held, 2)
    assert job.state is (JobState.COMPLETED if held == 1 else JobState.FAILED)
    assert cloud.tried == ["eu/a"] * (2 if held == 1 else 3)
    if held == 3:
        assert "somebody else deleted its machine" in job.message
        assert "that was done 2 times" in job.message
    await until_gone(leases)
    assert not cloud.there


async def wait_until_gone(leases, lease_id):
    while (await leases.find(lease_id)).live:
        await asyncio.sleep(0.01)


async def test_how_long_who_refused_is_left_alone():
    """As long as a cloud asks for, if it says so; a peer for a few seconds."""

    choosing = Choosing(None, JobSettings)
    cloud = Cloud("aws", "eu/a")
    leasing = SiteLeasing("home", {"aws": cloud}, None, NoPeers(), lambda: None, asyncio.Lock())
    (offer,) = await leasing._own.of([cloud], [])
    assert choosing.shun(offer, Throttled("Slowly.", after_seconds=300)) == 300
    assert choosing.shun(offer, no_room()) == 60
    there = offer.model_copy(update={"shape": "", "region": ""})
    assert choosing.shun(there, Unavailable("away")) == 5
