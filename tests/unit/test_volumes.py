"""The desk for volumes: over several providers, of which some do not answer."""

from datetime import UTC, datetime

import pytest

from gridcloud.errors import Conflict, InvalidSpec, NotFound, Unavailable
from gridcloud.model.things import Volume
from gridcloud.providers.base import MachineMaker
from gridcloud.site.volumes import VolumeDesk

AT = datetime(2026, 1, 1, tzinfo=UTC)


class Maker(MachineMaker):
    """A cloud that has volumes, or does not answer."""

    def __init__(self, *names, attached=(), down=False):
        self.down = down
        self.held = {
            name: Volume(
                id=f"id-{name}",
                name=name,
                size_bytes=2**30,
                created_at=AT,
                attached_to="lease" if name in attached else "",
            )
            for name in names
        }

    async def things(self):
        return []

    async def boot_log(self, lease_id):
        return ""

    async def volumes(self):
        if self.down:
            raise Unavailable("The cloud does not answer.", hint="Try again.")
        return list(self.held.values())

    async def make_volume(self, name, size_bytes):
        self.held[name] = Volume(id=name, name=name, size_bytes=size_bytes, created_at=AT)

    async def remove_volume(self, name):
        del self.held[name]


def desk(**makers):
    return VolumeDesk(makers | {"local": object()})


async def test_all_providers_are_listed_though_one_is_down():
    """What can be told is told; the one that is silent is a problem with its name."""
    report = await desk(b=Maker("x", attached=["x"]), a=Maker("y"), c=Maker(down=True)).volumes()
    assert [(each.provider, each.name) for each in report.volumes] == [("a", "y"), ("b", "x")]
    assert [each.unused_since for each in report.volumes] == [AT, None]
    assert report.problems == ("c: The cloud does not answer. Try again.",)


async def test_a_volume_is_made_where_there_is_no_choice():
    """With one provider that has volumes none needs to be named; with two it must be."""
    made = await desk(a=Maker()).make("data", 2**30, "")
    assert (made.provider, made.name, made.size_bytes) == ("a", "data", 2**30)
    with pytest.raises(InvalidSpec, match="at which provider"):
        await desk(a=Maker(), b=Maker()).make("data", 2**30, "")
    with pytest.raises(NotFound, match="No provider 'local'"):
        await desk(a=Maker()).make("data", 2**30, "local")


async def test_a_volume_in_use_is_not_removed():
    """It has to be free of machines first."""
    maker = Maker("data", attached=["data"])
    with pytest.raises(Conflict, match="at a machine"):
        await desk(a=maker).remove("data", "")
    assert "data" in maker.held


async def test_which_of_two_is_removed_must_be_said():
    """The same name at two providers is no answer."""
    one, two = Maker("data"), Maker("data")
    volumes = desk(a=one, b=two)
    with pytest.raises(Conflict, match="at each of a, b"):
        await volumes.remove("data", "")
    removed = await volumes.remove("data", "b")
    assert (removed.provider, list(one.held), list(two.held)) == ("b", ["data"], [])


async def test_a_volume_that_cannot_be_found_tells_who_was_silent():
    """It may be at the provider that does not answer."""
    with pytest.raises(NotFound, match="c: The cloud does not answer"):
        await desk(a=Maker(), c=Maker(down=True)).remove("data", "")
