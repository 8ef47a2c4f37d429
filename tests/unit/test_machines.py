"""Machines without a job: found a place, made, lengthened and given back, whatever happens."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.errors import (
    Conflict,
    Forbidden,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Unavailable,
)
from gridcloud.model.choice import Strategy
from gridcloud.model.fleet import MachineRequest, MachineState
from gridcloud.model.lease import Endpoint, LeaseState, Machine
from gridcloud.model.machine import LaunchStep, MachineOrder
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.providers.base import Capacity, MachineMaker
from gridcloud.site.machines import MachineDesk
from gridcloud.store.database import Database
from gridcloud.store.launches import LaunchStore
from gridcloud.store.leases import LeaseStore

NOW = datetime.now(UTC)
SOON = 5.0


class Cloud(MachineMaker):
    """A provider whose launches succeed, fail or wait as told; what it made outlives desks."""

    def __init__(self, name):
        self.name = name
        self.made = {}
        self.launched = []
        self.failures = []
        self.stuck = []
        self.go = asyncio.Event()
        self.go.set()
        self.lengthened = {}
        self.room = 100
        self.problem = ""

    async def launch(self, lease):
        self.launched.append((lease.id, lease.shape))
        if lease.id not in self.made and len(self.made) >= self.room:
            raise NoCapacity("the quota of machines is reached")
        self.made[lease.id] = lease
        await self.go.wait()
        if self.failures:
            raise self.failures.pop(0)
        endpoint = Endpoint(host="192.0.2.1", user="user", host_keys=("key",))
        return Machine(
            lease_id=lease.id, provider=self.name, folder="j", endpoint=endpoint, certified=True
        )

    async def terminate(self, lease_id):
        if self.stuck:
            raise self.stuck.pop(0)
        self.made.pop(lease_id, None)

    async def lengthen(self, lease):
        self.lengthened[lease.id] = lease.ends_at

    async def capacity(self):
        return Capacity(resources=Resources(), problem=self.problem)

    async def boot_log(self, lease_id):
        return f"boot of {lease_id}"

    async def things(self):
        return []

    async def volumes(self):
        return []

    async def remove_volume(self, name):
        raise NotFound(name)


class Source:
    """Offers of some clouds, as far as each has room."""

    def __init__(self, *clouds, shapes=(("small", 1, 0.5), ("large", 8, 4.0))):
        self.clouds = {cloud.name: cloud for cloud in clouds}
        self.shapes = shapes

    def providers(self):
        return list(self.clouds.values())

    async def offers(self):
        found = [
            Offer(site="me", provider="local", capacity=Resources(cpus=64, memory_bytes=2**40),
                  free=Resources(cpus=64, memory_bytes=2**40))
        ]  # fmt: skip
        for cloud in self.clouds.values():
            if cloud.problem:
                nothing = Resources()
                found.append(
                    Offer(
                        site="me",
                        provider=cloud.name,
                        capacity=nothing,
                        free=nothing,
                        known=False,
                        problem=cloud.problem,
                    )
                )
                continue
            for shape, cpus, cost in self.shapes:
                has = Resources(cpus=cpus, memory_bytes=cpus * 4 * GIB)
                full = len(cloud.made) >= cloud.room
                found.append(
                    Offer(
                        site="me",
                        provider=cloud.name,
                        capacity=has,
                        free=has,
                        shape=shape,
                        region="north",
                        cost=cost,
                        currency="EUR",
                        problem="its quota allows no more machines" if full else "",
                    )
                )
        return found

    def provider(self, name):
        if name not in self.clouds:
            raise NotFound(f"There is no provider {name!r}.")
        return self.clouds[name]


@pytest.fixture
async def database(tmp_path):
    made = Database(tmp_path / "site.db")
    await made.open()
    yield made
    await made.close()


class World:
    """A store, clouds, and the desk of the moment."""

    def __init__(self, database, source):
        self.leases, self.launches = LeaseStore(database), LaunchStore(database)
        self.source = source
        self.desk = self.new_desk()

    def new_desk(self):
        return MachineDesk(
            self.leases,
            self.launches,
            self.source,
            lambda lease_id, key: f"certificate of {lease_id} for {key}",
            lambda: Strategy.FIRST_FIT,
            asyncio.Lock(),
        )

    async def restart(self):
        """As after kill -9: the desk forgets all, the store and the clouds nothing."""
        await self.desk.close()
        self.desk = self.new_desk()
        await self.desk.resume()

    async def live(self):
        return await self.leases.machines(ended=False)

    async def all_gone(self):
        while await self.launches.pending() or await self.live():
            await asyncio.sleep(0.005)
        assert not any(cloud.made for cloud in self.source.clouds.values())


@pytest.fixture
def one(database):
    return World(database, Source(Cloud("a")))


@pytest.fixture
def two(database):
    return World(database, Source(Cloud("a"), Cloud("b")))


def request(name="web", **more):
    return MachineRequest(order=MachineOrder(name=name), **more)


async def test_a_machine_is_made_and_given_back(one):
    """It becomes ready, says where it is and what it costs, and is gone once stopped."""
    (begun,) = await one.desk.start(request())
    assert begun.state is MachineState.LAUNCHING
    ready = await one.desk.machine("web", SOON)
    assert ready.state is MachineState.READY
    assert (ready.provider, ready.shape, ready.region) == ("a", "small", "north")
    assert (ready.cost, ready.currency) == (0.5, "EUR")
    assert ready.ends_at - ready.created_at < timedelta(hours=1, seconds=1)
    stopping = await one.desk.stop("web")
    assert stopping.state in (MachineState.ENDING, MachineState.ENDED)
    ended = await one.desk.machine("web", SOON)
    assert (ended.state, ended.reason) == (MachineState.ENDED, "stopped by its user")
    await one.all_gone()
    assert await one.desk.machines() == []
    assert [info.name for info in await one.desk.machines(ended=True)] == ["web"]


async def test_events_are_told_to_who_waits(one):
    """What providers note comes to those who wait for it, in order, and once."""
    one.source.clouds["a"].go.clear()
    await one.desk.start(request())
    first = await one.desk.events("web", wait_seconds=SOON)
    assert "small" in first[0].message
    waiting = asyncio.create_task(one.desk.events("web", first[-1].number, SOON))
    await asyncio.sleep(0)
    lease = first[0].lease_id
    await one.desk.note(lease, LaunchStep.CREATE, "creating it")
    assert [event.message for event in await waiting] == ["creating it"]
    one.source.clouds["a"].go.set()
    await one.desk.machine("web", SOON)
    told = await one.desk.events("web")
    assert [event.number for event in told] == sorted({event.number for event in told})
    assert await one.desk.events("web", told[-1].number, SOON) == []  # nothing more will come


@pytest.mark.parametrize(
    ("error", "places"),
    [
        (NoCapacity("full"), [("a", "small"), ("a", "large")]),
        (Unavailable("down"), [("a", "small"), ("b", "small")]),
        (Forbidden("expired"), [("a", "small"), ("b", "small")]),
        (NotFound("no such image"), [("a", "small"), ("b", "small")]),
    ],
)
async def test_what_fails_in_one_place_is_tried_in_the_next(two, error, places):
    """No capacity moves on by one shape, what is wrong with an account by the whole provider."""
    cloud = two.source.clouds["a"]
    cloud.failures = [error]
    if places[1][0] == "a":
        two.source.clouds["b"].room = 0
    await two.desk.start(request())
    ready = await two.desk.machine("web", SOON)
    assert ready.state is MachineState.READY
    assert (ready.provider, ready.shape) == places[1]
    assert cloud.launched[0][1] == places[0][1]


async def test_a_wrong_order_is_not_tried_elsewhere(two):
    """Bad user-data is bad everywhere: the first word of it is final, and nothing is left."""
    two.source.clouds["a"].failures = [InvalidSpec("line 3: no such key")]
    await two.desk.start(request())
    failed = await two.desk.machine("web", SOON)
    assert failed.state is MachineState.FAILED
    assert "line 3" in failed.reason
    assert two.source.clouds["b"].launched == []
    await two.all_gone()


async def test_the_last_error_is_told_when_no_place_is_left(one):
    """Not that nothing is left, but why."""
    one.source.clouds["a"].failures = [NoCapacity("quota of cores"), NoCapacity("quota of cores")]
    await one.desk.start(request())
    failed = await one.desk.machine("web", SOON)
    assert (failed.state, "quota of cores" in failed.reason) == (MachineState.FAILED, True)
    await one.all_gone()


async def test_a_name_is_used_once_at_a_time(one):
    """A second machine of a name is refused while the first is there, and not after."""
    await one.desk.start(request())
    with pytest.raises(Conflict, match="web"):
        await one.desk.start(request())
    await one.desk.machine("web", SOON)
    await one.desk.stop("web")
    await one.all_gone()
    await one.desk.start(request())
    again = await one.desk.machine("web", SOON)
    assert again.state is MachineState.READY


async def test_a_machine_is_made_in_the_region_that_is_asked_for(one):
    """Or not at all; the others are told."""
    plan = await one.desk.plan(request(region="north"))
    assert plan.plan.winners[0].region == "north"
    with pytest.raises(InvalidSpec, match="region 'south'") as refused:
        await one.desk.start(request(region="south"))
    assert "north" in refused.value.hint
    assert await one.live() == []


async def test_several_are_numbered(one):
    """Their names sort as their numbers do."""
    infos = await one.desk.start(request(count=12))
    assert [infos[0].name, infos[-1].name] == ["web-01", "web-12"]
    found = [await one.desk.machine(info.name, SOON) for info in infos]
    assert {info.state for info in found} == {MachineState.READY}


async def test_a_quota_halfway_keeps_what_was_had(one):
    """Without --all-or-nothing, the others are there, and each that is missing says why."""
    one.source.clouds["a"].room = 2
    infos = await one.desk.start(request(count=4))
    found = [await one.desk.machine(info.name, SOON) for info in infos]
    states = sorted(info.state.value for info in found)
    assert states == ["failed", "failed", "ready", "ready"]
    assert all("quota" in info.reason for info in found if info.state is MachineState.FAILED)
    assert len(one.source.clouds["a"].made) == 2


async def test_all_or_nothing_keeps_nothing(one):
    """With --all-or-nothing those that were ready are given back too."""
    one.source.clouds["a"].room = 2
    infos = await one.desk.start(request(count=4, all_or_nothing=True))
    await one.all_gone()
    found = [await one.desk.machine(info.name, SOON) for info in infos]
    assert not {info.state for info in found} & {MachineState.READY, MachineState.LAUNCHING}
    assert any("all or none" in info.reason for info in found)
    assert await one.launches.pending() == []


async def test_a_check_is_given_back_at_once(one):
    """A machine that only proves that machines can be made does not stay."""
    await one.desk.start(request(check=True))
    await one.all_gone()
    assert (await one.desk.machine("web")).state is MachineState.ENDED


async def test_a_restart_goes_on_with_a_launch(one):
    """The same lease is launched again, so that the provider goes on where it was."""
    cloud = one.source.clouds["a"]
    cloud.go.clear()
    await one.desk.start(request())
    while not cloud.launched:
        await asyncio.sleep(0.005)
    await one.restart()
    cloud.go.set()
    ready = await one.desk.machine("web", SOON)
    assert ready.state is MachineState.READY
    assert len({lease for lease, _ in cloud.launched}) == 1
    assert await one.launches.pending() == []


async def test_a_restart_before_any_place_was_chosen(one):
    """A start that is in the store and no more than that is gone on with as well."""
    held = one.desk._starts.begin

    async def die(start):
        return None

    one.desk._starts.begin = die
    await one.desk.start(request())
    one.desk._starts.begin = held
    assert (await one.desk.machines())[0].state is MachineState.LAUNCHING
    await one.restart()
    assert (await one.desk.machine("web", SOON)).state is MachineState.READY


async def test_stopping_while_it_is_made(one):
    """The launch is cut off, and what it made is removed; a restart does not bring it back."""
    cloud = one.source.clouds["a"]
    cloud.go.clear()
    await one.desk.start(request())
    while not cloud.launched:
        await asyncio.sleep(0.005)
    await one.desk.stop("web")
    await one.restart()
    cloud.go.set()
    await one.all_gone()
    over = await one.desk.machine("web", SOON)
    assert (over.state, over.reason) == (MachineState.ENDED, "stopped by its user")


async def test_what_cannot_be_removed_is_not_forgotten(one):
    """A machine whose provider is down stays on the books until it is gone."""
    await one.desk.start(request())
    await one.desk.machine("web", SOON)
    one.source.clouds["a"].stuck = [Unavailable("the API is down")]
    await one.desk.stop("web")
    while "tried again" not in (await one.desk.events("web"))[-1].message:
        await asyncio.sleep(0.005)
    (lease,) = await one.live()
    assert lease.reason == "stopped by its user"
    assert lease.state is LeaseState.ACTIVE
    while one.desk._starts._ending:
        await asyncio.sleep(0.005)
    await one.desk.end(lease, lease.reason)
    await one.all_gone()


async def test_a_failed_attempt_that_stays_does_not_end_the_next(two):
    """While what one cloud cannot remove is tried again and again, another makes the machine."""
    first, second = two.source.clouds["a"], two.source.clouds["b"]
    first.failures = [Unavailable("down")]
    first.stuck = [Unavailable("down")] * 3
    second.go.clear()
    await two.desk.start(request())
    while not second.launched or two.desk._starts._ending:
        await asyncio.sleep(0.005)
    left = next(lease for lease in await two.live() if lease.reason)
    await two.desk.end(left, left.reason)
    assert (await two.desk.machine("web")).state is MachineState.LAUNCHING
    second.go.set()
    ready = await two.desk.machine("web", SOON)
    assert (ready.state, ready.provider) == (MachineState.READY, "b")


async def test_a_machine_is_lengthened_where_it_is_first(one):
    """Its own switch hears of the new end, and then the books."""
    await one.desk.start(request())
    ready = await one.desk.machine("web", SOON)
    longer = await one.desk.extend("web", timedelta(hours=2))
    assert longer.ends_at == ready.ends_at + timedelta(hours=2)
    assert one.source.clouds["a"].lengthened == {ready.lease_id: longer.ends_at}


async def test_one_that_is_not_ready_is_neither_lengthened_nor_entered(one):
    """It says how it is instead."""
    one.source.clouds["a"].go.clear()
    await one.desk.start(request())
    for ask in (one.desk.extend("web", timedelta(hours=1)), one.desk.login("web", "key")):
        with pytest.raises(Conflict, match="launching"):
            await ask


async def test_a_login_is_for_the_machine_asked_for(one):
    """The certificate names its lease, and the endpoint carries its host key."""
    await one.desk.start(request())
    ready = await one.desk.machine("web", SOON)
    login = await one.desk.login("web", "key")
    assert login.certificate == f"certificate of {ready.lease_id} for key"
    assert login.endpoint.host_keys


async def test_impossible_requests_are_refused_before_anything_is_written(one):
    """Too large, no such provider, no machines of that kind, a name too long."""
    with pytest.raises(InvalidSpec, match="ever makes"):
        await one.desk.start(request(need=Need(cpus=99)))
    with pytest.raises(NotFound, match="nowhere"):
        await one.desk.start(request(provider="nowhere"))
    spot = MachineRequest(order=MachineOrder(name="web", spot=True))
    with pytest.raises(InvalidSpec, match="spot"):
        await one.desk.start(spot)
    with pytest.raises(InvalidSpec, match="too long"):
        await one.desk.start(request("x" * 63, count=2))
    one.source.clouds["a"].room = 0
    with pytest.raises(NoCapacity, match="quota"):
        await one.desk.start(request())
    assert await one.launches.pending() == []


async def test_a_cloud_that_says_nothing_is_told_with_its_cause(one):
    """Not that there is none: what is wrong with it."""
    one.source.clouds["a"].problem = "the token has expired"
    with pytest.raises(Unavailable, match="a: the token has expired"):
        await one.desk.start(request())


async def test_the_boot_log_is_the_machines_own(one):
    """Of the lease that it is on; of one that is over there is none."""
    await one.desk.start(request())
    ready = await one.desk.machine("web", SOON)
    assert await one.desk.boot_log("web") == f"boot of {ready.lease_id}"
    await one.desk.stop("web")
    await one.all_gone()
    with pytest.raises(Conflict, match="no machine"):
        await one.desk.boot_log("web")


async def test_the_plan_tells_the_price_of_all(one):
    """All machines for all their time; nothing is changed by asking."""
    plan = await one.desk.plan(request(count=3, need=Need(cpus=2, time=timedelta(hours=2))))
    assert plan.plan.winners[0].shape == "large"
    assert (plan.total, plan.currency) == (24.0, "EUR")
    assert await one.desk.machines() == []


async def test_a_machine_near_its_end_is_a_problem_to_be_told(one):
    """With the command that lengthens it."""
    await one.desk.start(request())
    ready = await one.desk.machine("web", SOON)
    assert await one.desk.problems(ready.ends_at - timedelta(hours=1)) == []
    (told,) = await one.desk.problems(ready.ends_at - timedelta(minutes=9))
    assert "machine extend web" in told


async def test_a_machine_whose_provider_is_away_is_told(one):
    """Nobody can give it back until its section is in the settings again."""
    await one.desk.start(request())
    await one.desk.machine("web", SOON)
    cloud = one.source.clouds.pop("a")
    (told,) = await one.desk.problems(NOW)
    assert "web cannot be given back" in told
    await one.desk.stop("web")
    while one.desk._starts._ending:
        await asyncio.sleep(0.005)
    assert len(await one.live()) == 1
    one.source.clouds["a"] = cloud
    await one.desk.stop("web")
    await one.all_gone()


async def test_old_events_are_forgotten(one):
    """After thirty days, unless the machine is still there."""
    await one.desk.start(request("old"))
    await one.desk.start(request("kept"))
    for name in ("old", "kept"):
        await one.desk.machine(name, SOON)
    await one.desk.stop("old")
    while len(await one.live()) > 1:
        await asyncio.sleep(0.005)
    await one.desk.prune(datetime.now(UTC) + timedelta(days=29))
    assert await one.desk.events("old")
    await one.desk.prune(datetime.now(UTC) + timedelta(days=31))
    assert await one.desk.events("old") == []
    assert await one.desk.events("kept")


async def test_user_data_is_not_in_lists(one):
    """It may hold secrets: only who asks for that machine sees it."""
    order = MachineOrder(name="web", user_data="#!/bin/sh\n")
    await one.desk.start(MachineRequest(order=order))
    await one.desk.machine("web", SOON)
    assert (await one.desk.machines())[0].order.user_data == ""
    assert (await one.desk.machine("web")).order.user_data


@pytest.mark.parametrize("seed", range(12))
async def test_killed_at_any_moment_nothing_is_lost_or_left(two, seed):
    """Clouds that refuse, fail and cannot remove, users who stop, and a site that is killed again
    and again: each machine comes to be ready or says why not, and in the end nothing is there."""
    dice = random.Random(seed)
    errors = [NoCapacity("full"), Unavailable("down"), Forbidden("no"), InvalidSpec("line 1")]
    for cloud in two.source.clouds.values():
        cloud.failures = [dice.choice(errors) for _ in range(dice.randrange(4))]
        cloud.stuck = [Unavailable("down") for _ in range(dice.randrange(3))]
        cloud.room = dice.randrange(1, 5)
    names = [
        info.name
        for info in await two.desk.start(request(count=3, all_or_nothing=dice.random() < 0.5))
    ]
    for _ in range(dice.randrange(1, 5)):
        for _ in range(dice.randrange(8)):
            await asyncio.sleep(0)
        await asyncio.sleep(dice.choice([0, 0.001, 0.004]))
        if dice.random() < 0.3:
            await two.desk.stop(dice.choice(names))
        await two.restart()
        for cloud in two.source.clouds.values():
            cloud.go.set()
    async with asyncio.timeout(20):
        while await two.launches.pending():
            await two.desk.resume()  # as the house-keeping does, now and then
            for lease in await two.live():
                if lease.reason:
                    await two.desk.end(lease, lease.reason)
            await asyncio.sleep(0.005)
        held = {lease.id for lease in await two.live()}
        for cloud in two.source.clouds.values():
            assert set(cloud.made) <= held, "something is there that no lease knows"
        for name in names:
            info = await two.desk.machine(name)
            assert info.state is not MachineState.LAUNCHING
            assert info.reason or info.state is MachineState.READY
        while live := await two.live():
            for lease in live:
                await two.desk.end(lease, "the end of the test")
            await asyncio.sleep(0.005)
    assert not any(cloud.made for cloud in two.source.clouds.values())
