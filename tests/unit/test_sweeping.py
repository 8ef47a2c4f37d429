"""A sweep removes what no lease knows, and nothing else."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from gridcloud.errors import InvalidSpec, Unavailable
from gridcloud.model.accounts import Fate
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import Need, Resources
from gridcloud.model.things import KEPT, NETWORK, SHARED, Tags, Thing
from gridcloud.providers.base import Capacity, MachineMaker, Neighbourly, NetworkKeeper, Provider
from gridcloud.site.sweeping import sweep, sweep_others

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


# What other sites have at the same account


class Common(Cloud, Neighbourly):
    """One account, seen by one site or another."""

    def __init__(self, name, *things, site=SITE):
        super().__init__(name, *things)
        self.context = SimpleNamespace(site_key=site)
        self.all = self.found

    async def things(self):
        return [thing for thing in self.all if thing.tags.site == self.context.site_key[:32]]

    async def sites(self):
        if self.down:
            raise InvalidSpec("This provider cannot tell what other sites made.")
        return {thing.tags.site for thing in self.all}

    async def close(self):
        self.terminated.append("closed")


def account():
    """Return a cloud, and what acts there for others: for each site what was removed."""
    cloud = Common(
        "c",
        ("machine", "ours", "live", SITE),
        ("machine", "theirs", "running", OTHER),
        ("network", "net", SHARED, OTHER),
        ("volume", "disk", KEPT, OTHER),
        ("machine", "odd", "x", "../../etc"),
    )
    acting = {}

    def acting_for(name, site):
        acting[site] = Common(name, site=site)
        acting[site].all = cloud.all
        return acting[site]

    return cloud, acting, acting_for


async def test_what_other_sites_have_is_told_apart_and_left_alone():
    """Whose it is, as far as tags tell; what is no site's is not even asked for."""
    cloud, acting, acting_for = account()
    report = await sweep_others({"c": cloud, "p": Plain("p")}, acting_for, dry_run=True)
    assert {thing.id: (thing.fate, thing.site) for thing in report.things} == {
        "theirs": (Fate.ANOTHERS, OTHER[:32]),
        "net": (Fate.ANOTHERS, OTHER[:32]),
        "disk": (Fate.KEPT, OTHER[:32]),
    }
    assert report.problems == ()
    assert {site: each.terminated for site, each in acting.items()} == {OTHER[:32]: ["closed"]}


async def test_what_other_sites_have_is_removed_when_that_is_said():
    """In their name, with what their machines shared; never volumes, nor what is this site's."""
    cloud, acting, acting_for = account()
    report = await sweep_others({"c": cloud}, acting_for, dry_run=False)
    fates = {thing.id: thing.fate for thing in report.things}
    assert fates == {"theirs": Fate.REMOVED, "net": Fate.REMOVED, "disk": Fate.KEPT}
    assert acting[OTHER[:32]].terminated == ["running", SHARED, "closed"]
    assert cloud.terminated == []


async def test_a_cloud_that_cannot_tell_other_sites_says_so():
    """Nobody takes an empty list for an answer."""
    cloud, _, acting_for = account()
    cloud.down = True
    report = await sweep_others({"c": cloud}, acting_for, dry_run=True)
    assert report.problems == ("c: This provider cannot tell what other sites made.",)


# Networks by name


class Networked(Cloud, NetworkKeeper):
    """One whose networks are called by their ids."""

    names_networks = True

    def __init__(self, name, *networks):
        super().__init__(name, ("machine", "m", "live", SITE))
        tags = Tags.of(SITE, NETWORK)
        self.found += [Thing(kind="vpc", id=f"v-{n}", tags=tags, name=n) for n in networks]
        self.removed = []

    async def networks(self):
        return []

    async def make_network(self, name, cidr, region):
        raise AssertionError("nothing is made")

    async def remove_network(self, name):
        if name in self.stuck:
            raise Unavailable("A machine is in it.")
        self.removed.append(name)


class Inside(Books):
    """A live lease whose machine is in a network."""

    async def find(self, lease_id):
        return None if (lease := await super().find(lease_id)) is None else within(lease)

    async def live(self):
        return [await self.find("live")]


def within(lease):
    return lease.model_copy(update={"order": MachineOrder(network="used")})


async def test_a_network_that_no_machine_is_in_is_swept():
    """One that a live lease names stays; what cannot be removed is told."""
    cloud = Networked("c", "used", "left", "stuck")
    cloud.stuck = {"stuck"}
    books = Inside(live=LeaseState.ACTIVE)
    _, fates = await swept(cloud, books, dry_run=True)
    kept = {"m": Fate.IN_USE, "v-used": Fate.IN_USE}
    assert fates == kept | {"v-left": Fate.STRAY, "v-stuck": Fate.STRAY}
    assert cloud.removed == []
    report, fates = await swept(cloud, books)
    assert fates == kept | {"v-left": Fate.REMOVED, "v-stuck": Fate.NOT_REMOVED}
    assert cloud.removed == ["left"]
    assert NETWORK not in cloud.terminated
    assert [thing.note for thing in report.things if thing.id == "v-stuck"] == [
        "A machine is in it."
    ]
