"""How machines are made at a cloud, in virtual time over a cloud in memory."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from gridcloud.errors import (
    Conflict,
    Forbidden,
    InvalidSpec,
    NoCapacity,
    NotFound,
    TimedOut,
    Unavailable,
)
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.machine import LaunchStep, MachineOrder, VolumeMount
from gridcloud.model.need import GIB, Need
from gridcloud.model.things import SHARED
from gridcloud.providers.base import ProviderContext
from gridcloud.providers.cloud.clouds import Condition, Image
from gridcloud.providers.cloud.contract import SITE, MakingForTests
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.cloud.removing import remove_all
from gridcloud.providers.cloud.section import CloudSection, Patience
from gridcloud.settings import LendingSettings
from simulation.virtual_time import EPOCH, now, run
from testbeds.memory_cloud import KIND, SHAPES, MemoryCloud, World

SLOW = replace(KIND, latency_seconds=(0.2, 0.2), boot_seconds=(20.0, 30.0))


class Provider(CloudProvider):
    """A provider over a world in memory."""

    kind = "memory-cloud"


async def answers(host, port):
    """Be an SSH server that answers at once."""


async def silent(host, port):
    """Be a machine without one."""
    raise Unavailable("connection refused")


def provider(world, *, making=None, reach=answers, cloud=MemoryCloud, **section):
    """Return a provider that remembers nothing."""

    async def probe(endpoint, identity):
        raise AssertionError

    context = ProviderContext(SITE, "/nowhere", LendingSettings(), probe, making)
    return Provider("cloud", CloudSection(**section), context, cloud(world, SITE), reach=reach)


def lease(number=1, **more):
    """Return a lease for the smallest need."""
    given = {
        "id": f"lease{number}",
        "role": LeaseRole.OWN,
        "state": LeaseState.INTENT,
        "provider": "cloud",
        "need": Need(),
        "created_at": EPOCH,
        "ends_at": EPOCH + timedelta(hours=1),
    }
    return Lease(**(given | more))


def calls(world, what):
    """Return how often something was asked of the cloud."""
    return sum(name == what for _, name in world.calls)


def left(world):
    """Return the kinds of what is truly there."""
    return sorted(entry.kind for entry in world.truly_there())


def test_a_launch_tells_its_steps_and_gives_a_machine():
    """The smallest shape that fits, in the first place, with words for people at each step."""

    async def main():
        world, making = World(badness=SLOW), MakingForTests()
        machine = await provider(world, making=making).launch(lease())
        assert (machine.shape, machine.region, machine.certified) == ("small", "here", True)
        assert machine.endpoint.user == "debian"
        assert machine.endpoint.host == "10.0.0.5"
        told = {step: message for _, step, message in making.notes}
        assert told[LaunchStep.SHAPE] == "small (2 CPUs, 4 GiB) for 1 CPU, 1 GiB"
        assert told[LaunchStep.CREATE] == "creating small in north from debian"
        assert told[LaunchStep.REACHABLE] == "an SSH server answers at 10.0.0.5"
        assert left(world) == ["address", "machine", "network"]

    run(main)


def test_fifty_machines_take_about_as_long_as_the_slowest():
    """They are made side by side; the network is made before, once for all."""

    async def main():
        world = World(badness=SLOW, shares_networks=True, knows_tokens=False)
        cloud = provider(world, making=MakingForTests())
        begin = now()
        await asyncio.gather(*(cloud.launch(lease(number)) for number in range(50)))
        assert now() - begin < 1.6 * 30
        assert left(world).count("network") == 1
        assert left(world).count("machine") == 50
        await asyncio.gather(*(cloud.terminate(f"lease{number}") for number in range(50)))
        assert left(world) == []
        await asyncio.gather(*(cloud.launch(lease(number)) for number in range(50, 60)))
        assert left(world).count("network") == 1

    run(main)


def test_a_rate_that_is_not_told_is_found():
    """A cloud that lets through far fewer calls than the settings: fifty machines are made all
    the same, and few calls are refused."""

    async def main():
        world = World(badness=SLOW, most_per_second=15)
        cloud = provider(world, making=MakingForTests(), calls_per_second=200.0)
        await asyncio.gather(*(cloud.launch(lease(number)) for number in range(50)))
        assert left(world).count("machine") == 50
        assert world.refused < len(world.calls) / 4
        assert now() < 240

    run(main)


def test_so_many_at_once_and_no_more():
    """``at_once`` bounds how many machines are being made."""

    async def main():
        world = World(badness=SLOW)
        cloud = provider(world, making=MakingForTests(), at_once=2)
        tasks = [asyncio.create_task(cloud.launch(lease(number))) for number in range(4)]
        await asyncio.sleep(15)
        assert left(world).count("machine") == 2
        await asyncio.gather(*tasks)

    run(main)


def test_a_full_place_is_left_for_the_next():
    """What was begun in the full one is removed; the machine is made in the other."""

    async def main():
        world = World(room=1)
        cloud = provider(world, making=MakingForTests())
        for number in (1, 2):
            await cloud.launch(lease(number))
        places = sorted(entry.place for entry in world.truly_there() if entry.kind == "machine")
        assert places == ["north", "south"]
        with pytest.raises(NoCapacity) as refused:
            await cloud.launch(lease(3))
        assert "north: There is no host with room in north." in refused.value.message
        assert "south: There is no host with room in south." in refused.value.message
        assert await cloud.made() == ["lease1", "lease2"]
        assert left(world).count("network") == 2

    run(main)


def test_a_quota_reached_halfway_leaves_what_was_made_and_nothing_more():
    """Of ten machines four fit: six say so, and leave neither network nor address."""

    async def main():
        world = World(quota=4, badness=SLOW)
        cloud = provider(world, making=MakingForTests())
        results = await asyncio.gather(
            *(cloud.launch(lease(number)) for number in range(10)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, NoCapacity)]
        assert len(refused) == 6
        assert all("quota" in str(one) for one in refused)
        assert [left(world).count(kind) for kind in ("machine", "network", "address")] == [4, 4, 4]

    run(main)


def test_an_image_without_sshd_is_found_out_and_removed():
    """After its time the error tells where nobody answers and what the console shows."""

    async def main():
        world, making = World(), MakingForTests()
        cloud = provider(world, making=making, reach=silent)
        with pytest.raises(TimedOut) as told:
            await cloud.launch(lease())
        assert 600 <= now() < 620
        assert "within 10m 00s: It is running, but no SSH server answers at 10.0.0.5" in str(
            told.value
        )
        assert "connection refused" in told.value.message
        assert told.value.hint.endswith("boot log:\nLinux booted\nno sshd here")
        assert left(world) == []

    run(main)


class Refusing(MakingForTests):
    """A site whose login fails, for so many times, or for ever."""

    def __init__(self, error, times=1_000_000):
        super().__init__()
        self.error, self.times = error, times

    async def await_ready(self, lease, endpoint):
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return await super().await_ready(lease, endpoint)


def test_a_login_that_is_refused_at_first_is_tried_again():
    """While a machine boots, nobody can log in yet; that costs no more than seconds."""

    async def main():
        world = World()
        making = Refusing(Unavailable("Permission denied."), 5)
        await provider(world, making=making).launch(lease())
        assert now() < 10

    run(main)


def test_user_data_that_fails_ends_the_launch_with_its_log():
    """What the order told it to do failed: the machine is removed, and nothing tried again."""

    async def main():
        world = World()
        making = Refusing(InvalidSpec("The script exited with 1.", hint="Its output: boom"))
        with pytest.raises(InvalidSpec) as told:
            await provider(world, making=making).launch(lease())
        assert "boom" in told.value.hint
        assert "Linux booted" in told.value.hint
        assert left(world) == []
        assert calls(world, "make machine") == 1

    run(main)


def test_nothing_is_made_of_what_cannot_work():
    """Image, user-data, shape and need are checked before the first thing is made."""

    class WrongImage(MemoryCloud):
        async def image(self, wanted, shape):
            given = Image(id="i", name="arm", user="u", architecture="aarch64")
            return (
                given
                if wanted == "arm"
                else Image(id="i", name="big", user="u", disk_bytes=500 * GIB)
            )

    async def main():
        world = World()
        cloud = provider(world, making=MakingForTests())
        odd = provider(world, making=MakingForTests(), cloud=WrongImage)
        for maker, given, kind, word in (
            (cloud, {"order": MachineOrder(image="nix")}, NotFound, "nix"),
            (cloud, {"order": MachineOrder(user_data="x" * 20000)}, InvalidSpec, "16384"),
            (cloud, {"shape": "smal", "region": "here"}, NotFound, "small"),
            (cloud, {"shape": "small", "region": "away"}, NotFound, "in away"),
            (cloud, {"need": Need(cpus=64)}, InvalidSpec, "64"),
            (
                cloud,
                {"shape": "small", "region": "here", "need": Need(cpus=4)},
                InvalidSpec,
                "2 of",
            ),
            (odd, {"order": MachineOrder(image="arm")}, InvalidSpec, "aarch64"),
            (odd, {"order": MachineOrder(image="big")}, InvalidSpec, "500 GiB"),
        ):
            with pytest.raises(kind) as refused:
                await maker.launch(lease(**given))
            assert word in str(refused.value)
        assert world.entries == []

    run(main)


def test_an_api_that_is_away_is_waited_for_and_then_given_up():
    """A launch that cannot begin fails within its time; nothing is forgotten when it is away
    while a machine is removed, and once it is back the removal succeeds."""

    async def main():
        world = World()
        cloud = provider(world, making=MakingForTests())
        await cloud.launch(lease(1))
        world.down = True
        begin = now()
        with pytest.raises(Unavailable) as told:
            await cloud.launch(lease(2))
        assert now() - begin <= 60
        assert "The API is away." in told.value.message
        with pytest.raises(Unavailable):
            await cloud.made()
        begin = now()
        with pytest.raises(Unavailable) as told:
            await cloud.terminate("lease1")
        assert 590 < now() - begin <= 600
        world.down = False
        assert await cloud.made() == ["lease1"]
        await cloud.terminate("lease1")
        assert left(world) == []

    run(main)


def test_an_api_that_fails_while_a_launch_is_cleared_away_is_told():
    """The first cause comes first; then that something may be there, which `made` then lists."""

    async def main():
        world = World()

        class Away(MakingForTests):
            async def await_ready(self, lease, endpoint):
                world.down = True
                raise InvalidSpec("Its script failed.", hint="Mend it.")

        cloud = provider(world, making=Away())
        with pytest.raises(InvalidSpec) as told:
            await cloud.launch(lease())
        assert told.value.message == "Its script failed."
        assert "Not all that was made is removed yet" in told.value.hint
        world.down = False
        assert await cloud.made() == ["lease1"]

    run(main)


@pytest.mark.parametrize("seconds", [0.1, 0.5, 0.7, 0.9, 1.1, 1.5, 5.0, 26.0])
def test_a_launch_goes_on_after_kill(seconds):
    """Cut off at any step, a new provider with an empty memory ends it with one machine."""

    async def main():
        world = World(badness=SLOW)
        first = provider(world, making=MakingForTests())
        task = asyncio.create_task(first.launch(lease()))
        await asyncio.sleep(seconds)
        first._cloud.kill()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        second = provider(world, making=MakingForTests())
        machine = await second.launch(lease())
        assert left(world) == ["address", "machine", "network"]
        assert await second.launch(lease()) == machine
        await second.terminate("lease1")
        assert left(world) == []

    run(main)


def test_a_machine_deleted_by_hand_while_it_boots():
    """It is not made again; the error says what happened, and the rest is removed."""

    async def main():
        world = World(badness=SLOW)
        cloud = provider(world, making=MakingForTests())
        task = asyncio.create_task(cloud.launch(lease()))
        await asyncio.sleep(10)
        world.delete(next(e for e in world.entries if e.kind == "machine"))
        with pytest.raises(Conflict) as told:
            await task
        assert "was deleted" in told.value.message
        assert left(world) == []

    run(main)


def test_a_machine_that_powers_itself_off_while_it_boots():
    """That is found out within a minute."""

    async def main():
        world = World()
        cloud = provider(world, making=MakingForTests(), reach=silent)
        task = asyncio.create_task(cloud.launch(lease()))
        await asyncio.sleep(10)
        next(e for e in world.entries if e.kind == "machine").off = True
        with pytest.raises(InvalidSpec) as told:
            await task
        assert "powered itself off" in told.value.message
        assert now() < 60
        assert left(world) == []

    run(main)


def test_giving_back_ends_a_launch_that_is_under_way():
    """Terminate does not wait for the machine to be ready, and leaves nothing."""

    async def main():
        world = World(badness=SLOW)
        cloud = provider(world, making=MakingForTests())
        task = asyncio.create_task(cloud.launch(lease()))
        await asyncio.sleep(1.3)
        await cloud.terminate("lease1")
        assert now() < 15
        with pytest.raises(Conflict):
            await task
        assert left(world) == []

    run(main)


@pytest.mark.parametrize("seed", range(8))
def test_what_is_on_its_way_is_waited_for(seed):
    """When a launch is ended in the middle of a request, what that makes is removed as well,
    however the cancelling would have gone: nothing appears after the lease is over."""

    async def main():
        world = World(seed, replace(KIND, latency_seconds=(4.0, 4.0)))
        cloud = provider(world, making=MakingForTests())
        task = asyncio.create_task(cloud.launch(lease()))
        await asyncio.sleep(4 * 4 + 2)  # while the network is being made
        world.badness = KIND
        await cloud.terminate("lease1")
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(60)
        assert calls(world, "make network") == 1
        assert left(world) == []

    run(main)


def test_a_caller_that_is_cancelled_while_the_lease_is_given_back():
    """Its cancelling is not swallowed, and nothing is left."""

    async def main():
        world = World(badness=SLOW)
        cloud = provider(world, making=MakingForTests())
        task = asyncio.create_task(cloud.launch(lease()))
        await asyncio.sleep(10)
        ending = asyncio.create_task(cloud.terminate("lease1"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        await ending
        assert left(world) == []

    run(main)


def test_two_launches_of_one_lease_are_one():
    """The second joins the first."""

    async def main():
        world = World(badness=SLOW)
        cloud = provider(world, making=MakingForTests())
        one, other = await asyncio.gather(cloud.launch(lease()), cloud.launch(lease()))
        assert one == other
        assert calls(world, "make machine") == 1

    run(main)


def test_capacity_is_known_without_waiting():
    """Only the first plan waits for the cloud; later ones are answered from what is known, and
    the quota is asked anew beside them."""

    async def main():
        world = World(badness=SLOW, quota=5)
        cloud = provider(world, making=MakingForTests())
        capacity = await cloud.capacity()
        assert now() > 0
        assert capacity.shapes == SHAPES
        assert capacity.resources.cpus == 8
        assert capacity.headroom["here"].machines == 5
        await cloud.launch(lease())
        begin = now()
        await cloud.capacity()
        assert now() == begin
        await asyncio.sleep(1)
        assert (await cloud.capacity()).headroom["here"].machines == 4
        await cloud.close()

    run(main)


def test_capacity_tells_why_there_is_none_and_keeps_what_was_known():
    """While the API is away the shapes are still shown, with the problem; then it is well."""

    async def main():
        world = World()
        cloud = provider(world, making=MakingForTests())
        world.down = True
        first = await cloud.capacity()
        assert (first.known, first.shapes) == (False, ())
        assert "The API is away." in first.problem
        world.down = False
        await asyncio.sleep(20)
        await cloud.capacity()
        await asyncio.sleep(1)
        assert (await cloud.capacity()).problem == ""
        world.down = True
        await asyncio.sleep(120)
        await cloud.capacity()
        await asyncio.sleep(1)
        later = await cloud.capacity()
        assert later.shapes == SHAPES
        assert "The API is away." in later.problem
        await cloud.close()

    run(main)


def test_a_cloud_that_never_answers_holds_up_no_plan_for_long():
    """The first plan waits some seconds, then goes on without it."""

    class Hanging(MemoryCloud):
        async def shapes(self):
            await asyncio.sleep(86400)

    async def main():
        cloud = provider(World(), making=MakingForTests(), cloud=Hanging)
        assert "not answered yet" in (await cloud.capacity()).problem
        assert now() <= 15
        await asyncio.sleep(120)
        assert (await cloud.capacity()).problem == "No answer came in time."
        await cloud.close()

    run(main)


@pytest.mark.parametrize("address", ["-oProxyCommand=sh", "a b", "10.0.0.1;sh", "x" * 300])
def test_an_address_that_is_none_is_refused(address):
    """What a cloud tells is looked at before anything is done with it."""

    class Odd(MemoryCloud):
        async def server(self, lease_id):
            shown = await super().server(lease_id)
            return shown and shown.model_copy(update={"address": address})

    async def main():
        world = World()
        with pytest.raises(InvalidSpec) as told:
            await provider(world, making=MakingForTests(), cloud=Odd).launch(lease())
        assert "address that is none" in told.value.message
        assert left(world) == []

    run(main)


def test_check_says_what_is_missing():
    """An image that is not there and a permission that lacks are both told."""

    class Poor(MemoryCloud):
        async def things(self):
            raise Forbidden("It may not list machines.", hint="Grant compute:list.")

    async def main():
        cloud = provider(World(), making=MakingForTests(), cloud=Poor, image="nix")
        problem = (await cloud.check()).problem
        assert "There is no image 'nix'." in problem
        assert "Grant compute:list." in problem

    run(main)


def test_a_later_end_is_told_to_the_machine_and_the_cloud():
    """Its own switch is moved, and its tags."""

    async def main():
        world, making = World(), MakingForTests()
        cloud = provider(world, making=making)
        machine = await cloud.launch(lease())
        later = EPOCH + timedelta(hours=2)
        await cloud.lengthen(lease(machine=machine, ends_at=later))
        assert making.moved == [("lease1", later)]
        assert {thing.tags.ends_at for thing in await cloud.things()} == {later}

    run(main)


ORDER = MachineOrder(volumes=(VolumeMount(name="data", size_bytes=GIB, path="/data"),))


def test_volumes_are_attached_and_outlive_the_machine():
    """Made when it is not there, mounted by its device, kept, and used again where it is."""

    async def main():
        world, making = World(room=1), MakingForTests()
        cloud = provider(world, making=making)
        await cloud.launch(lease(1))  # north is full now
        await cloud.launch(lease(2, order=ORDER))
        assert making.devices["lease2"] == {"data": "/dev/vdb"}
        with pytest.raises(Conflict):
            await cloud.launch(lease(3, order=ORDER))
        await cloud.terminate("lease1")
        await cloud.terminate("lease2")
        assert left(world) == ["volume"]
        assert await cloud.made() == []
        assert [(v.name, v.place, v.attached_to) for v in await cloud.volumes()] == [
            ("data", "south", "")
        ]
        await cloud.launch(lease(4, order=ORDER))
        assert next(e for e in world.truly_there() if e.kind == "machine").place == "south"
        with pytest.raises(Conflict):
            await cloud.remove_volume("data")
        await cloud.terminate("lease4")
        await cloud.remove_volume("data")
        with pytest.raises(NotFound):
            await cloud.remove_volume("data")
        assert left(world) == []

    run(main)


def test_a_volume_made_for_a_launch_that_fails_goes_with_it():
    """It is blank, so nobody misses it; one that was there before stays."""

    async def main():
        world = World(room=0)
        cloud = provider(world, making=MakingForTests())
        with pytest.raises(NoCapacity):
            await cloud.launch(lease(order=ORDER))
        assert left(world) == []
        world.room = 1
        await cloud.launch(lease(1, order=ORDER))
        await cloud.terminate("lease1")
        world.room = 0
        with pytest.raises(NoCapacity):
            await cloud.launch(lease(2, order=ORDER))
        assert left(world) == ["volume"]

    run(main)


@pytest.mark.parametrize(
    ("answers", "settled", "seconds"),
    [
        ([True, True], 2.0, (2.0, 2.1)),
        ([True, False, True, True], 2.0, (4.1, 5.0)),
        ([False, True], 0.0, (0.1, 0.2)),
        ([Unavailable("503."), Conflict("In use."), TimedOut("?"), True], 0.0, (0.3, 1.0)),
    ],
)
def test_gone_is_believed_when_it_was_seen_twice(answers, settled, seconds):
    """A cloud that shows late what it made is asked again after that time; what passes is tried
    again, and a cloud that shows all at once is asked no more than needed."""

    async def main():
        left = list(answers)

        async def remove():
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        await remove_all(remove, 60.0, settled)
        assert left == []
        assert seconds[0] <= now() <= seconds[1]

    run(main)


def test_what_cannot_pass_ends_a_removal_at_once():
    """A permission that lacks is told, not waited for."""

    async def main():
        async def remove():
            raise Forbidden("It may not delete machines.")

        with pytest.raises(Forbidden):
            await remove_all(remove, 60.0, 2.0)
        assert now() == 0.0

    run(main)


def test_a_volume_that_a_machine_has_seen_is_never_removed():
    """If setting it up fails, what may have been written stays; so it does after a restart."""

    class Failing(MakingForTests):
        async def set_up(self, lease, endpoint, devices):
            raise InvalidSpec("The playbook failed.")

    async def main():
        world = World()
        with pytest.raises(InvalidSpec):
            await provider(world, making=Failing()).launch(lease(order=ORDER))
        assert left(world) == ["volume"]
        making = MakingForTests()
        first = provider(world, making=Failing())
        first.context.making.set_up = lambda *_: asyncio.sleep(1000)
        task = asyncio.create_task(first.launch(lease(2, order=ORDER)))
        await asyncio.sleep(30)
        first._cloud.kill()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await provider(world, making=making).launch(lease(2, order=ORDER))
        assert making.devices["lease2"] == {"data": "/dev/vdb"}
        assert left(world).count("volume") == 1

    run(main)


def test_what_machines_shared_is_listed_once_it_is_left_behind():
    """A network that a killed launch left is no lease's; it is found and removed all the same."""

    async def main():
        world = World(shares_networks=True, badness=SLOW)
        first = provider(world, making=MakingForTests())
        task = asyncio.create_task(first.launch(lease()))
        await asyncio.sleep(1.1)
        first._cloud.kill()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        second = provider(world, making=MakingForTests())
        assert left(world) == ["network"]
        assert await second.made() == [SHARED]
        await second.terminate(SHARED)
        assert left(world) == []
        await second.launch(lease(2))
        assert await second.made() == ["lease2"]

    run(main)


def test_the_boot_log_cannot_steer_a_terminal():
    """What a machine writes to its console is shown without its control characters."""

    async def main():
        cloud = provider(World(), making=MakingForTests())
        await cloud.launch(lease())
        assert await cloud.boot_log("lease1") == "Linux booted\nno sshd here\n"

    run(main)


def test_a_machine_found_off_or_failed_from_before():
    """One that the cloud could not build in an earlier attempt is cleared away, and made anew."""

    async def main():
        world = World(badness=SLOW)
        first = provider(world, making=MakingForTests())
        task = asyncio.create_task(first.launch(lease()))
        await asyncio.sleep(2.5)
        first._cloud.kill()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        next(e for e in world.entries if e.kind == "machine").fails = True
        second = provider(world, making=MakingForTests())
        await second.launch(lease())
        assert (await second._cloud.server("lease1")).condition is Condition.RUNNING
        assert left(world).count("machine") == 1

    run(main)


def test_what_is_left_of_a_machine_deleted_by_hand_is_removed():
    """Its address and network are no use to anybody: a minute later they go, and the lease is
    listed no more, so that the site learns that its machine is gone."""

    async def main():
        world = World()
        cloud = provider(world, making=MakingForTests())
        await cloud.launch(lease(1))
        await cloud.launch(lease(2))
        world.delete(world.standing("lease1")[0])
        assert await cloud.made() == ["lease1", "lease2"]
        for _ in range(5):
            await asyncio.sleep(30)
            await cloud.made()
        assert await cloud.made() == ["lease2"]
        assert left(world) == ["address", "machine", "network"]

    run(main)


def test_a_launch_that_has_no_machine_yet_is_left_alone():
    """What it made so far stays, however long it takes."""

    async def main():
        world = World(badness=replace(KIND, latency_seconds=(100.0, 100.0)))
        steps = ("image", "place", "network", "create", "reachable")
        patience = Patience(**{step: timedelta(hours=1) for step in steps})
        cloud = provider(world, making=MakingForTests(), patience=patience)
        task = asyncio.create_task(cloud.launch(lease()))
        while not task.done():
            await asyncio.sleep(1)
            assert await cloud.made() in ([], ["lease1"])
        await task
        assert not any(what.startswith("delete") for _, what in world.calls)

    run(main)


def test_a_second_machine_that_came_late_is_removed():
    """A create that was carried out after its time-out made another: it is found by the next look
    at what is there, and the first stays."""

    async def main():
        world = World(knows_tokens=False)
        cloud = provider(world, making=MakingForTests())
        machine = await cloud.launch(lease())
        first = next(e for e in world.entries if e.kind == "machine")
        world.make_machine(first.build)
        assert left(world).count("machine") == 2
        assert await cloud.made() == ["lease1"]
        assert [e.id for e in world.truly_there() if e.kind == "machine"] == [machine.id]

    run(main)


def test_a_machine_is_made_in_the_network_that_it_names():
    """Which is made for nobody, is no stray of anybody's, and stays when its machines go."""

    async def main():
        world = World(shares_networks=True)
        cloud = provider(world, making=MakingForTests())
        inside = lease(order=MachineOrder(name="web", network="lab"))
        with pytest.raises(NotFound, match="no network 'lab'"):
            await cloud.launch(inside)
        assert left(world) == []
        await cloud.make_network("lab", "10.1.0.0/24", "")
        await cloud.launch(inside)
        assert left(world) == ["address", "machine", "network"]
        (machine,) = [entry for entry in world.truly_there() if entry.build]
        assert machine.build.named_network
        assert [one.id for one in await cloud.networks()] == [machine.build.network]
        assert await cloud.made() == ["lease1"]
        await cloud.terminate("lease1")
        assert left(world) == ["network"]
        for _ in range(5):
            await asyncio.sleep(60)
            assert await cloud.made() == []
        assert left(world) == ["network"]
        await cloud.remove_network("lab")
        assert left(world) == []

    run(main)


def test_a_network_of_another_range_is_not_taken_for_it():
    """Asked for again it is the same; with another range it is refused, and nothing is made."""

    async def main():
        world = World()
        cloud = provider(world, making=MakingForTests())
        for _ in range(2):
            await cloud.make_network("lab", "10.1.0.0/24", "")
        for cidr, region in (("10.2.0.0/24", ""), ("10.1.0.0/24", "there")):
            with pytest.raises(Conflict, match=r"'lab' already: 10\.1\.0\.0/24"):
                await cloud.make_network("lab", cidr, region)
        assert left(world) == ["network"]

    run(main)


def test_a_network_with_a_machine_in_it_is_not_removed():
    """It is waited for as long as for any removal, and then told."""

    async def main():
        world = World()
        cloud = provider(world, making=MakingForTests())
        await cloud.make_network("lab", "10.1.0.0/24", "")
        await cloud.launch(lease(order=MachineOrder(network="lab")))
        with pytest.raises(Unavailable, match="Not all is removed"):
            await cloud.remove_network("lab")
        assert left(world) == ["address", "machine", "network"]

    run(main)
