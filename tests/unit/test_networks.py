"""The desk for networks by name: over several providers, of which some make none."""

import pytest

from gridcloud.errors import Conflict, InvalidSpec, NotFound, Unavailable
from gridcloud.model.machine import MachineOrder
from gridcloud.model.things import Network
from gridcloud.providers.base import NetworkKeeper
from gridcloud.site.networks import NetworkDesk
from testbeds.leases import lease


class Keeper(NetworkKeeper):
    """A cloud that has networks, makes none, or does not answer."""

    def __init__(self, *names, able=True, down=False):
        self.able, self.down = able, down
        self.held = {name: Network(id=name, name=name, cidr="10.1.0.0/24") for name in names}

    @property
    def names_networks(self):
        return self.able

    async def networks(self):
        if self.down:
            raise Unavailable("The cloud does not answer.", hint="Try again.")
        return list(self.held.values())

    async def make_network(self, name, cidr, region):
        self.held[name] = Network(id=name, name=name, cidr=cidr, region=region)

    async def remove_network(self, name):
        self.held.pop(name, None)


class Leases:
    """Live leases, each in a network at a provider."""

    def __init__(self, *inside):
        self.inside = inside

    async def live(self):
        return [
            lease(provider=provider, order=MachineOrder(name="web", network=network))
            for provider, network in self.inside
        ]


def desk(*inside, **keepers):
    return NetworkDesk(keepers | {"local": object()}, Leases(*inside))


async def test_what_there_is_and_who_makes_some_is_told():
    """Also while one of them is silent."""
    found = await desk(a=Keeper("x"), b=Keeper(able=False), c=Keeper(down=True)).networks()
    assert [(each.provider, each.name) for each in found.networks] == [("a", "x")]
    assert found.makers == ("a", "c")
    assert found.problems == ("c: The cloud does not answer. Try again.",)


async def test_a_name_is_used_at_one_provider():
    """Made again it is the same; at another provider it would be another network."""
    networks = desk(a=Keeper(), b=Keeper())
    for _ in range(2):
        assert (await networks.make("lab", "10.1.0.0/24", "a", "")).provider == "a"
    with pytest.raises(Conflict, match="at a already"):
        await networks.make("lab", "10.1.0.0/24", "b", "")


async def test_who_cannot_make_one_says_so():
    """And who can."""
    networks = desk(a=Keeper(), b=Keeper(able=False))
    for provider in ("b", "local"):
        with pytest.raises(InvalidSpec, match="makes no networks by name") as refused:
            await networks.make("lab", "10.1.0.0/24", provider, "")
        assert "These do: a" in refused.value.hint
    with pytest.raises(NotFound):
        await networks.make("lab", "10.1.0.0/24", "nosuch", "")


async def test_a_network_in_use_is_not_removed():
    """Of that name at that provider; and one that is not there is as good as removed."""
    keeper = Keeper("lab", "free")
    networks = desk(("a", "lab"), ("b", "free"), a=keeper)
    with pytest.raises(Conflict, match="The machine web is in the network lab"):
        await networks.remove("lab", "a")
    for _ in range(2):
        await networks.remove("free", "a")
    assert list(keeper.held) == ["lab"]
