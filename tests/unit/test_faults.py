"""Launches on a bad cloud, cancelled and killed at random instants: in the end nothing is left."""

import random
from datetime import timedelta

import pytest

from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.machine import MachineOrder, VolumeMount
from gridcloud.model.need import GIB, Need
from gridcloud.providers.base import ProviderContext
from gridcloud.providers.cloud.contract import SITE, MakingForTests
from gridcloud.providers.cloud.provider import CloudProvider
from gridcloud.providers.cloud.section import CloudSection
from gridcloud.settings import LendingSettings
from simulation.virtual_time import EPOCH, run
from testbeds.faults import Leaked, Subject, hurt, seeds
from testbeds.memory_cloud import BAD, LateMemoryCloud, World


class Provider(CloudProvider):
    """A provider over a world in memory; its machines answer at once."""

    kind = "memory-cloud"


def provider(world, tmp_path, cloud=LateMemoryCloud, making=None):
    """Return a provider that remembers nothing."""

    async def reach(host, port):
        pass

    async def probe(endpoint, identity):
        raise AssertionError

    context = ProviderContext(SITE, tmp_path, LendingSettings(), probe, making or MakingForTests())
    return Provider("cloud", CloudSection(), context, cloud(world, SITE), reach=reach)


def leases(seed):
    """Return a maker of leases whose ids follow from the seed; some want a volume."""
    chance = random.Random(seed)

    def new():
        mount = VolumeMount(name=chance.choice(("a", "b")), size_bytes=GIB, path="/data")
        return Lease(
            id="".join(chance.choices("bcdfghjk", k=16)),
            role=LeaseRole.OWN,
            state=LeaseState.INTENT,
            provider="cloud",
            need=Need(),
            created_at=EPOCH,
            ends_at=EPOCH + timedelta(hours=1),
            order=MachineOrder(volumes=(mount,) if chance.random() < 0.3 else ()),
        )

    return new


def subject(seed, world, tmp_path):
    """Return what is hurt: a provider over a world."""

    async def left():
        # A volume is kept, and known by its name; but it must be free again, and the only one.
        there = world.truly_there()
        names = [entry.name for entry in there if entry.kind == "volume"]
        assert len(set(names)) == len(names)
        return [entry.id for entry in there if entry.kind != "volume" or entry.attached_to]

    return Subject(
        make=lambda: provider(world, tmp_path),
        new_lease=leases(seed),
        left=left,
        kill=lambda provider: provider._cloud.kill(),
        calm=world.calm,
        settles_seconds=10.0,
    )


@pytest.mark.parametrize("part", range(4))
def test_faults_leave_nothing(part, tmp_path):
    """Whatever the cloud does, and whenever the site dies: an empty memory finds everything."""
    for seed in seeds(200)[part::4]:
        world = World(
            seed,
            BAD,
            knows_tokens=bool(seed & 1),
            shares_networks=bool(seed & 2),
            quota=2 if seed & 4 else 1000,
        )
        run(lambda seed=seed, world=world: hurt(seed, subject(seed, world, tmp_path)))


def test_a_run_can_be_run_again(tmp_path):
    """The same seed does the same at the same instants, and another one something else."""

    def story(seed):
        hurting = subject(seed, World(seed, BAD), tmp_path)
        run(lambda: hurt(seed, hurting))
        return hurting.story

    assert story(5) == story(5)
    assert story(5) != story(6)


def test_what_is_left_is_found_and_the_seed_told(tmp_path):
    """A provider that forgets to remove addresses does not pass."""

    class Forgetful(LateMemoryCloud):
        def _delete(self, entry):
            if entry.kind == "address":
                entry.hidden_at = 0.0
            else:
                super()._delete(entry)

    world = World(3, BAD)
    hurting = subject(3, world, tmp_path)
    hurting.make = lambda: provider(world, tmp_path, Forgetful)
    with pytest.raises(Leaked) as told:
        run(lambda: hurt(3, hurting))
    assert "SEED=3 runs it again" in str(told.value)
    assert "left behind: ['address-" in str(told.value)
