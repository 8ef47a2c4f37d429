"""What every cloud promises, as tests. A cloud's own tests inherit `CloudContract`:

    class TestMyCloud(CloudContract):
        @pytest.fixture
        def make_cloud(self): ...        # site key -> Cloud, all over the same account

and those of its provider `MachineProviderContract`, with the fixture ``make`` as in
`gridcloud.providers.contract`; its fixture ``making`` may give a real one. Needs pytest, and
pytest-asyncio in its auto mode. Each test is one promise of `gridcloud.providers.cloud.clouds`;
over 400 lines, since there are many.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from gridcloud.errors import GridcloudError, InvalidSpec, NotFound
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Endpoint, Lease
from gridcloud.model.machine import LaunchStep, MachineOrder
from gridcloud.model.things import KEPT, NETWORK, Tags
from gridcloud.providers.base import (
    FirstBoot,
    MachineFacts,
    MachineMaker,
    Making,
    Provider,
    ProviderContext,
)
from gridcloud.providers.cloud.clouds import Build, Cloud, Thing
from gridcloud.providers.contract import MakeProvider, ProviderContract, assert_telling
from gridcloud.settings import LendingSettings

SITE, OTHER_SITE = "5e" * 32, "07" * 32
#: A public key whose private half nobody has.
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
MakeCloud = Callable[[str], Cloud]


class MakingForTests:
    """A `gridcloud.providers.base.Making` that does nothing to machines, and keeps what is noted.

    ``user_data`` is what machines get besides what their order says; ``await_ready`` and
    ``set_up`` may be replaced by what a test wants to happen.
    """

    def __init__(self, user_data: bytes = b"#!/bin/sh\ntrue\n") -> None:
        self.user_data = user_data
        self.notes: list[tuple[str, LaunchStep, str]] = []
        self.moved: list[tuple[str, datetime | None]] = []
        self.devices: dict[str, dict[str, str]] = {}

    async def first_boot(self, lease: Lease, user: str, limit: int) -> FirstBoot:
        """Return the order's user-data, or that of the tests."""
        data = lease.order.user_data.encode() or self.user_data
        if len(data) > limit:
            raise InvalidSpec(
                f"The user-data for {user} is over {limit} bytes.", hint="Shorten it."
            )
        return FirstBoot(user_data=data, host_keys=(HOST_KEY,))

    async def await_ready(self, lease: Lease, endpoint: Endpoint) -> MachineFacts:
        """Find every machine ready at once."""
        return MachineFacts(
            python="3.11.2", cpus=1, memory_bytes=2**30, gpus=0, hostname=endpoint.host
        )

    async def set_up(self, lease: Lease, endpoint: Endpoint, devices: Mapping[str, str]) -> None:
        """Keep what was attached."""
        self.devices[lease.id] = dict(devices)

    async def move_end(self, lease: Lease, endpoint: Endpoint) -> None:
        """Keep what was told."""
        self.moved.append((lease.id, lease.ends_at))

    async def note(self, lease_id: str, step: LaunchStep, message: str) -> None:
        """Keep a note."""
        self.notes.append((lease_id, step, message))


class CloudContract:
    """Inherit, give the fixture ``make_cloud``, and run. Nothing needs to boot, or be reached."""

    #: An image to boot from; empty for the settings' own.
    wanted_image: ClassVar[str] = ""
    #: For how long a cloud may take until something is shown or gone.
    patience_seconds: ClassVar[float] = 60.0
    has_volumes: ClassVar[bool] = True
    #: Whether the tags of things keep their end.
    keeps_ends: ClassVar[bool] = True
    volume_size_bytes: ClassVar[int] = 2**30

    @pytest.fixture
    def make_cloud(self) -> MakeCloud:
        """To be given by the inheriting class."""
        raise NotImplementedError

    @pytest.fixture
    async def cloud(self, make_cloud: MakeCloud) -> AsyncIterator[Cloud]:
        """Give a cloud in which nothing is; whatever a test left there is removed."""
        cloud = make_cloud(SITE)
        yield cloud
        for lease_id in {thing.tags.lease for thing in await cloud.things()} - {KEPT, NETWORK}:
            await self.removed(cloud, lease_id)
        for network in await cloud.networks():
            await self.eventually(partial(cloud.remove_network, network.name))
        if self.has_volumes:
            for volume in await cloud.volumes():
                await cloud.remove_volume(volume.id)
        await cloud.close()

    async def build(self, cloud: Cloud, lease_id: str, user_data: bytes = b"") -> Build:
        """Return all that the smallest machine needs; what that needs is made."""
        shapes = await cloud.shapes()
        shape = min(shapes, key=lambda one: (one.resources.cpus, one.resources.memory_bytes))
        place = (await cloud.places(shape))[0]
        ends_at = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=30)
        tags = Tags.of(SITE, lease_id, ends_at)
        return Build(
            tags=tags,
            name=f"contract-{lease_id}",
            token=f"{lease_id}-{hashlib.sha256(place.encode()).hexdigest()[:8]}",
            shape=shape,
            resources=shape.resources,
            place=place,
            image=await cloud.image(self.wanted_image, shape),
            network=await cloud.network(tags, place),
            user_data=user_data or b"#!/bin/sh\ntrue\n",
        )

    async def eventually(self, holds: Callable[[], Awaitable[bool]]) -> None:
        """Wait until ``holds`` does, and fail if it never does."""
        pause = 0.01
        async with asyncio.timeout(self.patience_seconds):
            while not await holds():
                await asyncio.sleep(pause)
                pause = min(0.5, pause * 1.5)

    async def removed(self, cloud: Cloud, lease_id: str) -> None:
        """Remove a lease's things, until nothing is left."""
        await self.eventually(lambda: cloud.remove(lease_id))

    async def of_lease(self, cloud: Cloud, lease_id: str) -> list[Thing]:
        """Return the things of a lease."""
        return [thing for thing in await cloud.things() if thing.tags.lease == lease_id]

    async def machines(self, cloud: Cloud, lease_id: str) -> int:
        """Return how many machines there are for a lease; things of the kind ``machine``."""
        things = await self.of_lease(cloud, lease_id)
        return sum(thing.kind == "machine" for thing in things)

    async def test_shapes_are_sane(self, cloud: Cloud) -> None:
        """Each has CPUs and memory, and its name is the only one in its region."""
        shapes = await cloud.shapes()
        assert shapes
        assert all(s.resources.cpus > 0 and s.resources.memory_bytes > 0 for s in shapes)
        names = [(shape.name, shape.region, shape.spot) for shape in shapes]
        assert len(set(names)) == len(names)

    async def test_every_shape_has_headroom_and_a_place(self, cloud: Cloud) -> None:
        """The quota of each region can be asked, and there is at least one place."""
        for shape in {shape.region: shape for shape in await cloud.shapes()}.values():
            await cloud.headroom(shape.region)
            assert await cloud.places(shape)

    async def test_an_unknown_image_is_not_found(self, cloud: Cloud) -> None:
        """The error says so, with a next step."""
        shape = (await cloud.shapes())[0]
        with pytest.raises(NotFound) as refused:
            await cloud.image("surely-no-such-image", shape)
        assert "surely-no-such-image" in refused.value.message
        assert_telling(refused.value)

    async def test_nothing_is_shown_of_an_unknown_lease(self, cloud: Cloud) -> None:
        """It has no machine and no log, and removing it is no error."""
        lease_id = new_id(16)
        assert await cloud.server(lease_id) is None
        assert await cloud.boot_log(lease_id) == ""
        await self.removed(cloud, lease_id)
        assert await cloud.things() == []

    async def test_create_is_idempotent(self, cloud: Cloud, make_cloud: MakeCloud) -> None:
        """Asked again, by the same object or a new one, it returns the machine there is."""
        lease_id = new_id(16)
        build = await self.build(cloud, lease_id)
        made = await cloud.create(build)
        await self.eventually(lambda: self.shown(cloud, lease_id))
        assert await cloud.create(build) == made
        fresh = make_cloud(SITE)
        assert await fresh.create(build) == made
        await fresh.close()
        assert await self.machines(cloud, lease_id) == 1

    async def test_two_creates_at_once_make_one(self, cloud: Cloud, make_cloud: MakeCloud) -> None:
        """Overlapping attempts end with one machine, found by both."""
        lease_id = new_id(16)
        build = await self.build(cloud, lease_id)
        other = make_cloud(SITE)
        await asyncio.gather(cloud.create(build), other.create(build), return_exceptions=True)
        await self.eventually(lambda: self.shown(cloud, lease_id))

        async def one() -> bool:
            return await self.machines(cloud, lease_id) == 1

        await self.eventually(one)
        first, second = await cloud.server(lease_id), await other.server(lease_id)
        assert first is not None
        assert second is not None
        assert first.id == second.id
        await other.close()

    async def shown(self, cloud: Cloud, lease_id: str) -> bool:
        """Return whether a lease's machine is shown."""
        return await cloud.server(lease_id) is not None

    async def test_things_carry_their_tags(self, cloud: Cloud) -> None:
        """Whatever was made for a lease is listed, and says for whom and until when."""
        lease_id = new_id(16)
        build = await self.build(cloud, lease_id)
        await cloud.create(build)
        await self.eventually(lambda: self.shown(cloud, lease_id))
        things = await self.of_lease(cloud, lease_id)
        assert [thing.kind for thing in things].count("machine") == 1
        for thing in things:
            assert thing.tags.site == build.tags.site
        machine = next(thing for thing in things if thing.kind == "machine")
        if self.keeps_ends:
            assert machine.tags == build.tags

    async def test_a_later_end_is_noted(self, cloud: Cloud) -> None:
        """Where tags keep the end, they keep a new one."""
        lease_id = new_id(16)
        build = await self.build(cloud, lease_id)
        await cloud.create(build)
        await self.eventually(lambda: self.shown(cloud, lease_id))
        later = build.tags.model_copy(update={"ends_at": datetime(2100, 1, 1, tzinfo=UTC)})
        await cloud.extended(later)

        async def noted() -> bool:
            things = await self.of_lease(cloud, lease_id)
            return any(thing.tags == later for thing in things if thing.kind == "machine")

        if self.keeps_ends:
            await self.eventually(noted)

    async def test_remove_leaves_nothing(self, cloud: Cloud) -> None:
        """Machine, network and address go, and a second time is no error."""
        lease_id = new_id(16)
        await cloud.create(await self.build(cloud, lease_id))
        await self.removed(cloud, lease_id)
        assert await cloud.server(lease_id) is None
        await self.removed(cloud, lease_id)

        async def empty() -> bool:
            return await cloud.things() == []

        await self.eventually(empty)

    async def test_a_network_without_a_machine_is_removed(
        self, cloud: Cloud, make_cloud: MakeCloud
    ) -> None:
        """What a launch left that was cut off before its machine is found by a new object."""
        lease_id = new_id(16)
        await self.build(cloud, lease_id)
        fresh = make_cloud(SITE)
        for tagged in {thing.tags.lease for thing in await fresh.things()}:
            await self.removed(fresh, tagged)
        assert await fresh.things() == []
        await fresh.close()

    async def test_leases_are_apart(self, cloud: Cloud) -> None:
        """Removing one leaves the machine of the other."""
        one, other = new_id(16), new_id(16)
        for lease_id in (one, other):
            await cloud.create(await self.build(cloud, lease_id))
            await self.eventually(lambda lease_id=lease_id: self.shown(cloud, lease_id))  # type: ignore[misc]
        await self.removed(cloud, one)
        assert await self.shown(cloud, other)
        assert not await self.shown(cloud, one)

    async def test_sites_are_apart(self, cloud: Cloud, make_cloud: MakeCloud) -> None:
        """Another site on the same account is told of this one, and sees and removes nothing of
        it."""
        lease_id = new_id(16)
        await cloud.create(await self.build(cloud, lease_id))
        await self.eventually(lambda: self.shown(cloud, lease_id))
        stranger = make_cloud(OTHER_SITE)
        assert await stranger.things() == []
        with contextlib.suppress(InvalidSpec):  # not every cloud can tell
            assert Tags.of(SITE, "").site in await stranger.sites()
        await self.removed(stranger, lease_id)
        await stranger.close()
        assert await self.shown(cloud, lease_id)

    async def test_networks_are_made_by_name(self, cloud: Cloud, make_cloud: MakeCloud) -> None:
        """Once each, found for machines, kept while one is in them, and then removed; or it is
        said that there are none."""
        name, tags = f"n-{new_id(8)}", Tags.of(SITE, NETWORK)
        if not cloud.names_networks:
            with pytest.raises(InvalidSpec) as refused:
                await cloud.make_network(tags, name, "10.77.0.0/24", "")
            assert_telling(refused.value)
            assert await cloud.networks() == []
            return
        lease_id = new_id(16)
        build = await self.build(cloud, lease_id)
        with pytest.raises(NotFound):
            await cloud.named_network(name, build.place)
        for _ in range(2):
            await cloud.make_network(tags, name, "10.77.0.0/24", "")
        (there,) = await cloud.networks()
        assert (there.name, there.cidr) == (name, "10.77.0.0/24")
        stranger = make_cloud(OTHER_SITE)
        assert await stranger.networks() == []
        assert await stranger.remove_network(name)
        await stranger.close()
        found = await cloud.named_network(name, build.place)
        assert await cloud.named_network(name, build.place) == found
        inside = build.model_copy(update={"network": found, "named_network": True})
        await cloud.create(inside)
        await self.eventually(lambda: self.shown(cloud, lease_id))
        assert not await cloud.remove_network(name)
        assert [one.name for one in await cloud.networks()] == [name]
        mine = [thing for thing in await cloud.things() if thing.name == name]
        assert mine
        assert {thing.tags.lease for thing in mine} == {NETWORK}
        await self.removed(cloud, lease_id)
        assert [one.name for one in await cloud.networks()] == [name]
        await self.eventually(partial(cloud.remove_network, name))
        assert await cloud.networks() == []

    async def test_user_data_up_to_the_limit_is_taken(self, cloud: Cloud) -> None:
        """The limit that it tells is one that holds."""
        lease_id = new_id(16)
        script = b"#!/bin/sh\ntrue\n#".ljust(cloud.user_data_limit, b"x")
        await cloud.create(await self.build(cloud, lease_id, script))
        await self.eventually(lambda: self.shown(cloud, lease_id))

    async def test_volumes_are_kept_and_removed(self, cloud: Cloud) -> None:
        """A volume is made once by its name, listed as kept, and gone when removed."""
        if not self.has_volumes:
            assert await cloud.volumes() == []
            return
        shape = (await cloud.shapes())[0]
        place = (await cloud.places(shape))[0]
        tags, name = Tags.of(SITE, KEPT), f"v-{new_id(8)}"
        with pytest.raises(NotFound):
            await cloud.volume(tags, name, 0, place)
        made = await cloud.volume(tags, name, self.volume_size_bytes, place)
        assert await cloud.volume(tags, name, self.volume_size_bytes, place) == made
        listed = [volume for volume in await cloud.volumes() if volume.name == name]
        assert [volume.id for volume in listed] == [made]
        assert listed[0].size_bytes >= self.volume_size_bytes
        assert {thing.tags.lease for thing in await cloud.things()} == {KEPT}
        await cloud.remove_volume(made)
        await cloud.remove_volume(made)

        async def gone() -> bool:
            return await cloud.volumes() == []

        await self.eventually(gone)

    async def test_a_volume_outlives_its_machine(self, cloud: Cloud) -> None:
        """Attached, it cannot be removed; once the machine is gone it is there, and free."""
        if not self.has_volumes:
            return
        lease_id, name = new_id(16), f"v-{new_id(8)}"
        build = await self.build(cloud, lease_id)
        tags = Tags.of(SITE, KEPT)
        volume = await cloud.volume(tags, name, self.volume_size_bytes, build.place)
        await cloud.create(build.model_copy(update={"volumes": (volume,)}))

        async def running() -> bool:
            server = await cloud.server(lease_id)
            return server is not None and server.condition == "running"

        await self.eventually(running)
        await cloud.attach(lease_id, volume)
        await cloud.attach(lease_id, volume)
        assert [one.attached_to for one in await cloud.volumes()] == [lease_id]
        with pytest.raises(GridcloudError):
            await cloud.remove_volume(volume)
        await self.removed(cloud, lease_id)

        async def free() -> bool:
            return [one.attached_to for one in await cloud.volumes()] == [""]

        await self.eventually(free)

    async def test_close_is_idempotent_and_ends_nothing(
        self, cloud: Cloud, make_cloud: MakeCloud
    ) -> None:
        """What was made stays when the connection goes."""
        lease_id = new_id(16)
        one = make_cloud(SITE)
        await one.create(await self.build(one, lease_id))
        await one.close()
        await one.close()
        await self.eventually(lambda: self.shown(cloud, lease_id))


class MachineProviderContract(ProviderContract):
    """What every provider of machines promises besides; inherit as `ProviderContract`."""

    @pytest.fixture
    def making(self) -> Making:
        """Return what prepares machines; here it does nothing to them."""
        return MakingForTests()

    @pytest.fixture
    def context(
        self,
        state_folder: Path,
        probe: Callable[[Endpoint, Path | None], Awaitable[MachineFacts]],
        making: Making,
    ) -> ProviderContext:
        """Return what the site gives."""
        return ProviderContext(
            site_key=SITE,
            state_folder=state_folder,
            lending=LendingSettings(),
            probe=probe,
            making=making,
        )

    async def test_capacity_has_shapes(self, provider: Provider) -> None:
        """What it has is told by shape, and the quota of each region is known."""
        capacity = await provider.capacity()
        assert capacity.shapes
        assert {shape.region for shape in capacity.shapes} == set(capacity.headroom)

    async def test_a_machine_can_be_logged_in_to(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """It says where, as whom, which host key to expect, and what it is."""
        machine = await provider.launch(new_lease())
        assert machine.certified
        assert machine.id
        assert machine.shape in {shape.name for shape in (await provider.capacity()).shapes}
        assert machine.endpoint is not None
        assert machine.endpoint.host
        assert machine.endpoint.user
        assert machine.endpoint.host_keys

    async def test_what_is_made_shows_its_lease(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """All things there carry this site's tag and the lease's."""
        assert isinstance(provider, MachineMaker)
        lease = new_lease()
        await provider.launch(lease)
        things = await provider.things()
        assert lease.id in {thing.tags.lease for thing in things}
        assert {thing.tags.site for thing in things} == {Tags.of(SITE, "").site}

    async def test_an_end_can_be_moved(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """A later end is no error, nor is being told twice."""
        lease = new_lease()
        machine = await provider.launch(lease)
        later = lease.model_copy(
            update={"machine": machine, "ends_at": datetime.now(UTC) + timedelta(hours=1)}
        )
        await provider.lengthen(later)
        await provider.lengthen(later)

    @pytest.mark.parametrize(
        "order",
        [MachineOrder(image="surely-no-such-image"), MachineOrder(user_data="x" * 2**20)],
        ids=["image", "user-data"],
    )
    async def test_an_order_that_cannot_be_met_makes_nothing(
        self, provider: Provider, new_lease: Callable[[], Lease], order: MachineOrder
    ) -> None:
        """An unknown image, or too much user-data, is found out before anything is made."""
        with pytest.raises((NotFound, InvalidSpec)) as refused:
            await provider.launch(new_lease().model_copy(update={"order": order}))
        assert_telling(refused.value)
        assert isinstance(provider, MachineMaker)
        assert await provider.things() == []

    async def test_a_new_object_goes_on_with_a_launch(
        self, make: MakeProvider, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """As after a crash: the machine that is there is the machine of the lease."""
        lease = new_lease()
        made = await provider.launch(lease)
        fresh = make()
        assert await fresh.launch(lease) == made
        await fresh.close()
