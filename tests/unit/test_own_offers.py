"""What own providers offer by shape, and what is written down before a machine is made."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import Conflict, NoCapacity, Unavailable
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.lease import Machine
from gridcloud.model.machine import MachineOrder, Playbook
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.providers.base import Capacity
from gridcloud.site import own_offers
from gridcloud.site.leasing import SiteLeasing
from gridcloud.site.own_offers import OwnOffers
from gridcloud.store.database import Database
from gridcloud.store.leases import LeaseStore

HOUR = timedelta(hours=1)
SMALL, LARGE = (Resources(cpus=n, memory_bytes=n * 4 * GIB) for n in (2, 8))


def shape(name, resources, region="eu", **more):
    return Shape(name=name, region=region, resources=resources, price=0.1, currency="EUR", **more)


class Cloud:
    """A provider whose answers are set from outside."""

    kind = "memory"

    def __init__(self, name="cloud", *shapes, headroom=None):
        self.name = name
        self.has = Capacity(
            resources=LARGE,
            shapes=shapes or (shape("small", SMALL), shape("large", LARGE)),
            headroom=headroom or {},
        )
        self.launched, self.lengthened, self.terminated = [], [], []
        self.error, self.slow = None, None

    async def capacity(self):
        if self.slow:
            await self.slow.wait()
        if self.error:
            raise self.error
        # As a provider does that keeps what it was told: an equal value, made anew.
        return self.has.model_copy()

    async def launch(self, lease):
        self.launched.append(lease)
        return Machine(lease_id=lease.id, provider=self.name, folder="x", certified=True)

    async def lengthen(self, lease):
        if self.error:
            raise self.error
        self.lengthened.append(lease.ends_at)

    async def terminate(self, lease_id):
        self.terminated.append(lease_id)


class NoPeers:
    async def offers(self, live):
        return []


@pytest.fixture
async def leases(tmp_path):
    database = Database(tmp_path / "site.db")
    await database.open()
    yield LeaseStore(database)
    await database.close()


def site(leases, *providers):
    known = {provider.name: provider for provider in providers}
    return SiteLeasing("home", known, leases, NoPeers(), lambda: "DK", asyncio.Lock())


def job(number=1, *, machine=None, **need):
    return Job(
        id=f"j{number}",
        spec=JobSpec(command=("true",), need=Need(**need), machine=machine or MachineOrder()),
        state=JobState.QUEUED,
        created_at=datetime.now(UTC),
    )


async def test_each_shape_is_an_offer_of_its_own(leases):
    """With its region, its price and what the quota there leaves; in no country that is known."""
    quota = Headroom(cpus=4)
    cloud = Cloud(headroom={"eu": quota})
    small, large = await site(leases, cloud).offers()
    assert (small.shape, small.region, small.cost, small.currency) == ("small", "eu", 0.1, "EUR")
    assert small.capacity == small.free == SMALL
    assert small.country == ""
    assert small.quota == quota
    assert large.problem == "its quota has 4 of 8 CPUs left"
    assert large.free == Resources()


async def test_what_says_the_same_is_the_same(leases):
    """Whoever keeps what it learned of an offer finds it again by its identity."""
    cloud = Cloud(headroom={"eu": Headroom(cpus=16), "us": Headroom(cpus=16)})
    shapes = (*cloud.has.shapes, shape("small", SMALL, "us"))
    cloud.has = cloud.has.model_copy(update={"shapes": shapes})
    leasing = site(leases, cloud)
    before = await leasing.offers()
    assert [a is b for a, b in zip(before, await leasing.offers(), strict=True)] == [True] * 3
    left = {"eu": Headroom(cpus=9), "us": Headroom(cpus=16)}
    cloud.has = cloud.has.model_copy(update={"headroom": left})
    after = await leasing.offers()
    assert [a is b for a, b in zip(before, after, strict=True)] == [False, False, True]


async def test_what_is_being_made_counts_before_the_cloud_knows(leases):
    """Else two jobs would be promised the last of a quota; one that is there the cloud counts."""
    cloud = Cloud(headroom={"eu": Headroom(cpus=9, machines=2)})
    leasing = site(leases, cloud)
    small, large = await leasing.offers()
    lease = await leasing.intend(job(1), small)
    small, large = await leasing.offers()
    assert small.quota == Headroom(cpus=7, machines=1)
    assert large.problem == "its quota has 7 of 8 CPUs left"
    await leasing.intend(job(2), small)
    with pytest.raises(NoCapacity, match="its quota allows no more machines by now"):
        await leasing.intend(job(3), small)
    await leasing.fulfil(lease, small)
    small, _ = await leasing.offers()
    assert small.quota == Headroom(cpus=7, machines=1)


async def test_a_flexible_shape_is_as_large_as_the_quota_lets_it(leases):
    """And takes of it what is made, not all that it could be."""
    most = Resources(cpus=64, memory_bytes=512 * GIB)
    cloud = Cloud("cloud", shape("flex", most, flexible=True), headroom={"eu": Headroom(cpus=6)})
    leasing = site(leases, cloud)
    (flex,) = await leasing.offers()
    assert flex.free == Resources(cpus=6, memory_bytes=512 * GIB)
    assert flex.capacity == most
    lease = await leasing.intend(job(1, cpus=4), flex)
    assert lease.cost == pytest.approx(0.1 * 4 / 64)
    (flex,) = await leasing.offers()
    assert flex.free.cpus == 2
    with pytest.raises(NoCapacity, match="has 2 of 4 CPUs"):
        await leasing.intend(job(2, cpus=4), flex)


async def test_an_intent_says_what_is_to_be_made_and_until_when(leases):
    """A job with a limit gets that and some time beside; one without an hour, to be lengthened."""
    leasing = site(leases, Cloud())
    small, _ = await leasing.offers()
    order = MachineOrder(image="debian-12")
    lease = await leasing.intend(job(1, machine=order, time=3 * HOUR), small)
    assert (lease.shape, lease.region, lease.order) == ("small", "eu", order)
    assert (lease.cost, lease.currency) == (0.1, "EUR")
    assert lease.ends_at - lease.created_at == 4 * HOUR
    order = MachineOrder(playbooks=(Playbook(path="/site.yml"),))
    lease = await leasing.intend(job(2, machine=order), small)
    assert lease.ends_at - lease.created_at == 2 * HOUR, "playbooks may take their time"
    lease = await leasing.intend(job(3), small)
    assert lease.ends_at - lease.created_at == HOUR
    kept = {each.id: each for each in await leases.live()}
    assert kept[lease.id] == lease


async def test_a_shape_that_is_gone_is_not_promised(leases):
    """An offer is of a moment ago."""
    cloud = Cloud()
    leasing = site(leases, cloud)
    small, _ = await leasing.offers()
    cloud.has = cloud.has.model_copy(update={"shapes": (shape("large", LARGE),)})
    with pytest.raises(NoCapacity, match="is offered no more"):
        await leasing.intend(job(), small)
    assert not await leases.live()


async def test_an_own_machine_is_lengthened_at_its_cloud_first(leases):
    """What the machine was not told does not count; what it was told is kept."""
    cloud = Cloud()
    leasing = site(leases, cloud)
    small, _ = await leasing.offers()
    lease = await leasing.fulfil(await leasing.intend(job(), small), small)
    until = lease.ends_at + HOUR
    cloud.error = Unavailable("The machine is out of reach.")
    with pytest.raises(Unavailable):
        await leasing.renew(lease, until)
    assert (await leases.find(lease.id)).ends_at == lease.ends_at
    cloud.error = None
    renewed = await leasing.renew(lease, until)
    assert (renewed.ends_at, renewed.revision) == (until, 1)
    assert cloud.lengthened == [until]
    assert await leases.find(lease.id) == renewed
    await leasing.release(renewed, "done")
    await leasing.finish()
    with pytest.raises(Conflict, match="is over"):
        await leasing.renew(renewed, until + HOUR)
    assert cloud.lengthened == [until], "nobody is asked for what is over"
    assert cloud.terminated == [lease.id]


async def test_a_provider_that_fails_hides_no_other(leases):
    """It is worth waiting for, since its size is not known."""
    broken, works = Cloud("broken"), Cloud("works")
    broken.error = Unavailable("Its API is down.")
    found = await site(leases, broken, works).offers()
    assert [(o.provider, o.problem, o.known) for o in found] == [
        ("broken", "Its API is down.", False),
        ("works", "", True),
        ("works", "", True),
    ]


async def test_a_provider_that_is_slow_holds_up_no_plan(monkeypatch):
    """What it said last counts until it answers; the question goes on meanwhile."""
    monkeypatch.setattr(own_offers, "_PATIENCE_SECONDS", 0.01)
    slow, quick = Cloud("slow"), Cloud("quick")
    slow.slow = asyncio.Event()
    offers = OwnOffers("home", lambda: None)
    found = await offers.of([slow, quick], [])
    assert [(o.provider, o.shape, o.problem) for o in found] == [
        ("slow", "", "has not said yet what it has"),
        ("quick", "small", ""),
        ("quick", "large", ""),
    ]
    slow.slow.set()
    while len(found) < 4:
        found = await offers.of([slow, quick], [])
    slow.slow.clear()
    again = await offers.of([slow], [])
    assert [a is b for a, b in zip(found, again, strict=False)] == [True, True]
    await offers.close()
