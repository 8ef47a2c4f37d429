"""A sweep removes what no lease knows, and nothing else."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from gridcloud.errors import Unavailable
from gridcloud.model.accounts import Fate
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need, Resources
from gridcloud.model.things import KEPT, SHARED, Tags, Thing
from gridcloud.providers.base import Capacity, MachineMaker, Provider
from gridcloud.site.sweeping import sweep

SITE, OTHER = "a" * 64, "b" * 64


class Plain(Provider):
    """A provider that lists leases and no more."""

    kind = "plain"

    def __init__(self, name, *leases):
        super().__init__(name, {}, SimpleNamespace(site_key=SITE))
        self.leases = list(leases)
        self.stuck = set()
        self.terminated = []

    async def capacity(self):
        return Capacity(resources=Resources())

    async def launch(self, lease):
        raise AssertionError("nothing is launched")

    async def terminate(self, lease_id):
        if lease_id in self.stuck:
            raise Unavailable("It is stuck.")
        self.terminated.append(lease_id)

    async def made(self):
        return self.leases


class Cloud(Plain, MachineMaker):
    """One that tells all its things."""

    def __init__(self, name, *things):
        super().__init__(name)
        self.found = [Thing(kind=k, id=i, tags=Tags.of(s, lease)) for k, i, lease, s in things]
        self.down = False

    async def things(self):
        if self.down:
            raise Unavailable("Its API is down.")
        return self.found

    async def boot_log(self, lease_id):
        return ""

    async def volumes(self):
        return []

    async def remove_volume(self, name):
        raise AssertionError("volumes are kept")


class Books:
    """The leases that a site knows."""

    def __init__(self, **states):
        self.states = states

    async def find(self, lease_id):
        if lease_id not in self.states:
            return None
        return Lease(
            id=lease_id,
            role=LeaseRole.LENT if lease_id == "lent" else LeaseRole.OWN,
            state=self.states[lease_id],
            provider="local",
            need=Need(),
            created_at=datetime.now(UTC),
        )


async def swept(provider, books=None, *, dry_run=False):
    report = await sweep({provider.name: provider}, books or Books(), dry_run=dry_run)
    return report, {thing.id: thing.fate for thing in report.things}


async def test_each_thing_has_its_fate():
    """In use, over, unknown, kept; a machine's network goes with it."""
    cloud = Cloud(
        "c",
        ("machine", "m1", "live", SITE),
        ("machine", "m2", "over", SITE),
        ("network", "n2", "over", SITE),
        ("machine", "m3", "unknown", SITE),
        ("volume", "v", KEPT, SITE),
    )
    books = Books(live=LeaseState.INTENT, over=LeaseState.RELEASED)
    _, fates = await swept(cloud, books, dry_run=True)
    stray = {"m2": Fate.STRAY, "n2": Fate.STRAY, "m3": Fate.STRAY}
    assert fates == stray | {"m1": Fate.IN_USE, "v": Fate.KEPT}
    assert cloud.terminated == []
    _, fates = await swept(cloud, books)
    assert fates == dict.fromkeys(stray, Fate.REMOVED) | {"m1": Fate.IN_USE, "v": Fate.KEPT}
    assert cloud.terminated == ["over", "unknown"]


async def test_what_others_made_is_left_alone():
    """Another site's machine in the same account is not even shown."""
    cloud = Cloud("c", ("machine", "m", "theirs", OTHER))
    report, _ = await swept(cloud)
    assert report.things == ()
    assert cloud.terminated == []


async def test_what_machines_share_goes_with_the_last():
    """A shared network is in use while any machine is."""
    things = (("machine", "m", "live", SITE), ("network", "n", SHARED, SITE))
    cloud = Cloud("c", *things)
    _, fates = await swept(cloud, Books(live=LeaseState.ACTIVE))
    assert fates == {"m": Fate.IN_USE, "n": Fate.IN_USE}
    _, fates = await swept(cloud)
    assert fates == {"m": Fate.REMOVED, "n": Fate.REMOVED}


async def test_a_guest_in_a_place_of_another_provider_stays():
    """A loan of this host may be in a container of a provider of another name."""
    plain = Plain("boxes", "lent")
    _, fates = await swept(plain, Books(lent=LeaseState.ACTIVE))
    assert fates == {"lent": Fate.IN_USE}


async def test_what_fails_is_told():
    """What cannot be removed, and who cannot be asked; the others are swept all the same."""
    cloud = Cloud("c", ("machine", "m1", "one", SITE), ("machine", "m2", "two", SITE))
    cloud.stuck = {"one"}
    report, fates = await swept(cloud)
    assert fates == {"m1": Fate.NOT_REMOVED, "m2": Fate.REMOVED}
    assert "stuck" in report.things[0].note
    down = Cloud("down")
    down.down = True
    report = await sweep({"down": down, "c": cloud}, Books(), dry_run=True)
    assert report.problems == ("down: Its API is down.",)
    assert len(report.things) == 2


@pytest.mark.parametrize("dry_run", [True, False])
async def test_nothing_is_nothing(dry_run):
    """A site without anything has nothing to be swept."""
    report, _ = await swept(Plain("p"), dry_run=dry_run)
    assert (report.things, report.problems) == ((), ())
