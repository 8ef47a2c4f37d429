"""Deciding on members over a network, in virtual time: what reaches whom, when some are away."""

import asyncio
import random
from datetime import timedelta

import pytest

from gridcloud.errors import Conflict, Forbidden, NotFound
from gridcloud.grid.broker import Broker
from gridcloud.grid.community_store import MemoryCommunityStore
from gridcloud.grid.identity import Identity
from gridcloud.grid.memory_transport import Link, MemoryNetwork
from simulation.virtual_time import run

DAY = timedelta(days=1)
ROLES = ("provider", "consumer")


class Nothing:
    """An owner that lends nothing."""

    async def digest(self, community):
        return None


class Site:
    """A broker that can stop and start again with what it kept."""

    def __init__(self, network, name, seed):
        self.network, self.name, self.seed = network, name, seed
        self.identity = Identity.generate()
        self.store = MemoryCommunityStore()

    @property
    def key(self):
        return self.identity.key

    async def start(self):
        self.broker = Broker(
            self.identity,
            self.network.node(self.key),
            self.store,
            Nothing(),
            None,
            clock=asyncio.get_running_loop().clock(),
            chance=random.Random(self.seed),
        )
        await self.broker.start()
        return self

    async def stop(self):
        await self.broker.close()

    async def names(self):
        return {info.site_name for info in await self.broker.members("foam")}

    async def join(self, inviter, **more):
        code = (await inviter.broker.invite("foam", ROLES, DAY, **more)).code
        return await self.broker.join(code, self.name)


async def world(*names):
    """Return started sites; the first founded ``foam``, which the others joined."""
    network = MemoryNetwork(1)
    network.set_link(Link(delay_min=0.005, delay_max=0.03))
    sites = [await Site(network, name, number).start() for number, name in enumerate(names)]
    await sites[0].broker.create_community("foam", names[0])
    for site in sites[1:]:
        await site.join(sites[0])
    await asyncio.sleep(10)
    return sites


def over_time(test):
    """Run a test in virtual time."""

    def runs():
        run(test)

    runs.__name__, runs.__doc__ = test.__name__, test.__doc__
    return runs


@over_time
async def test_a_removal_reaches_everyone_and_the_removed():
    """A member away at the time learns it when it is back; the removed is refused by all."""
    founder, lab, away, gone = await world("university", "lab", "away", "gone")
    await away.stop()
    await founder.broker.remove("foam", "gone", "moved away")
    await asyncio.sleep(10)
    assert await lab.names() == {"university", "lab", "away"}
    (listed,) = await gone.broker.communities()
    assert listed.roles == ()
    assert "removed from foam" in listed.problem
    assert "by university: moved away" in listed.problem
    await away.start()
    await asyncio.sleep(20)
    assert await away.names() == {"university", "lab", "away"}
    for each in (founder, lab, away, gone):
        await each.stop()


@over_time
async def test_a_removed_site_that_never_heard_of_it_is_refused_and_learns_it():
    """It was away; nobody takes it back in, whatever it still believes."""
    founder, lab, gone = await world("university", "lab", "gone")
    await gone.stop()
    await founder.broker.remove("foam", "gone")
    await asyncio.sleep(10)
    await gone.start()
    await asyncio.sleep(30)
    assert await lab.names() == {"university", "lab"}
    (listed,) = await gone.broker.communities()
    assert "removed from foam" in listed.problem
    for each in (founder, lab, gone):
        await each.stop()


@over_time
async def test_who_leaves_is_gone_though_the_founder_is_away():
    """One member that hears of it is enough; the founder hears of it later."""
    founder, lab, gone = await world("university", "lab", "gone")
    await founder.stop()
    left = await gone.broker.leave("foam")
    assert (left.told, left.warning) == (1, "")
    assert await gone.broker.communities() == []
    with pytest.raises(NotFound):
        await gone.broker.leave("foam")
    await founder.start()
    await asyncio.sleep(20)
    for each in (founder, lab):
        assert await each.names() == {"university", "lab"}
    for each in (founder, lab, gone):
        await each.stop()


@over_time
async def test_leaving_unheard_is_said():
    """It works, and the leaver is told that the others do not know."""
    founder, lab = await world("university", "lab")
    await founder.stop()
    left = await lab.broker.leave("foam", timeout=0.5)
    assert left.told == 0
    assert "Nobody could be told" in left.warning
    assert await lab.broker.communities() == []
    await lab.stop()


@over_time
async def test_waiting_for_approval_survives_restarts_of_both():
    """The site asks on until it is approved; then it is a member like any other."""
    founder, lab = await world("university", "lab")
    new = await Site(founder.network, "new", 9).start()
    joined = await new.join(founder, approve=True)
    assert joined.waiting == f"waits for approval by university ({founder.key[:8]})"
    await new.stop()
    await founder.stop()
    await new.start()
    assert await new.broker.ask_again(timeout=0.5) == []  # the founder is away
    await founder.start()
    assert await new.broker.ask_again() == []
    assert await new.broker.waits()
    (request,) = await founder.broker.requests("foam")
    assert (request.site_name, request.key) == ("new", new.key)
    with pytest.raises(Forbidden, match="no manager"):
        await lab.broker.requests("foam")
    admitted = await founder.broker.approve("foam", "new")
    assert (admitted.site_name, admitted.by) == ("new", "university")
    assert await new.broker.ask_again() == [joined.id]
    assert not await new.broker.waits()
    await asyncio.sleep(10)
    for each in (founder, lab, new):
        assert await each.names() == {"university", "lab", "new"}
        await each.stop()


@over_time
async def test_a_refusal_ends_the_waiting():
    """It is shown until the site lets go of it, and is asked no more."""
    (founder,) = await world("university")
    new = await Site(founder.network, "new", 9).start()
    await new.join(founder, approve=True)
    await founder.broker.refuse("foam", "new")
    assert await new.broker.ask_again() == []
    assert not await new.broker.waits()
    (shown,) = await new.broker.communities()
    assert "refused to admit new" in shown.problem
    await new.broker.leave("foam")
    assert await new.broker.communities() == []
    for each in (founder, new):
        await each.stop()


@over_time
async def test_a_promotion_reaches_its_member_by_gossip():
    """A manager made by the founder invites by its own newer credential."""
    founder, lab, third = await world("university", "lab", "third")
    changed = await founder.broker.change_roles("foam", "lab", add=["manager"])
    assert "manager" in changed.roles
    await asyncio.sleep(10)
    new = await Site(founder.network, "new", 9).start()
    await new.join(lab)
    await asyncio.sleep(10)
    assert await third.names() == {"university", "lab", "third", "new"}
    (by,) = {info.by for info in await third.broker.members("foam") if info.site_name == "new"}
    assert by == "lab"
    for each in (founder, lab, third, new):
        await each.stop()


@over_time
async def test_two_of_one_name_are_told_apart_by_everyone_alike():
    """Admitted by two managers that had not heard of one another's: the earlier has the name."""
    founder, lab = await world("university", "lab")
    await founder.broker.change_roles("foam", "lab", add=["manager"])
    await asyncio.sleep(10)
    one, two = [await Site(founder.network, "twin", n).start() for n in (8, 9)]
    founder.network.partition({founder.key, one.key}, {lab.key, two.key})
    await one.join(founder)
    await asyncio.sleep(2)
    await two.join(lab)
    founder.network.heal()
    await asyncio.sleep(60)
    for each in (founder, lab, one, two):
        assert await each.names() == {"university", "lab", "twin", f"twin~{two.key[:4]}"}
        await each.stop()


@over_time
async def test_a_member_does_not_join_again():
    """One that was removed may, by a new invitation."""
    founder, lab = await world("university", "lab")
    with pytest.raises(Conflict, match="already"):
        await lab.join(founder)
    await founder.broker.remove("foam", "lab")
    await asyncio.sleep(5)
    await lab.join(founder)
    await asyncio.sleep(5)
    assert await founder.names() == await lab.names() == {"university", "lab"}
    for each in (founder, lab):
        await each.stop()
