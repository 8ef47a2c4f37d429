"""What every provider promises, as tests. A plug-in's own tests inherit `ProviderContract`:

    class TestMyProvider(ProviderContract):
        bad_sections = [({"hots": "x"}, "hots"), ({"port": -1}, "port")]

        @pytest.fixture
        def make(self, context): ...     # section, if told -> provider, named "subject"

and may replace the other fixtures. Needs pytest, and pytest-asyncio in its auto mode, which
gridcloud itself does not. Each test is one promise of `gridcloud.providers.base`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest

from gridcloud.errors import GridcloudError, InvalidSpec
from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Endpoint, Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.need import Need
from gridcloud.providers.base import MachineFacts, Provider, ProviderContext
from gridcloud.settings import LendingSettings

NAME = "subject"


class MakeProvider(Protocol):
    """Makes the provider that is tested, from a section or, without one, from a good one."""

    def __call__(self, section: dict[str, Any] | None = None) -> Provider:
        """Return a new provider, over the same machines as those made before."""
        ...


class ProviderContract:
    """Inherit, give the fixture ``make`` and ``bad_sections``, and run.

    ``tags_what_it_makes`` is false for a provider that makes nothing, as for machines that are
    there anyway: then `made` is always empty.
    """

    tags_what_it_makes: ClassVar[bool] = True
    #: Sections that must be refused, each with the field to blame.
    bad_sections: ClassVar[list[tuple[dict[str, Any], str]]] = []
    role: ClassVar[LeaseRole] = LeaseRole.OWN

    @pytest.fixture
    def state_folder(self, tmp_path: Path) -> Path:
        """Return where the provider may keep things."""
        return tmp_path / "state"

    @pytest.fixture
    def probe(self) -> Callable[[Endpoint, Path | None], Awaitable[MachineFacts]]:
        """Return how an SSH machine is looked at: here, any is a small one that works."""

        async def probe(endpoint: Endpoint, identity: Path | None) -> MachineFacts:
            facts = {"python": "3.11.2", "cpus": 4, "memory_bytes": 2**33, "gpus": 0}
            return MachineFacts.model_validate(facts | {"hostname": endpoint.host})

        return probe

    @pytest.fixture
    def context(
        self,
        state_folder: Path,
        probe: Callable[[Endpoint, Path | None], Awaitable[MachineFacts]],
    ) -> ProviderContext:
        """Return what the site gives."""
        return ProviderContext(
            site_key="5e" * 32,
            state_folder=state_folder,
            lending=LendingSettings(enabled=True),
            probe=probe,
        )

    @pytest.fixture
    def make(self, context: ProviderContext) -> MakeProvider:
        """To be given by the inheriting class."""
        raise NotImplementedError

    @pytest.fixture
    def new_lease(self) -> Callable[[], Lease]:
        """Return a maker of leases for the smallest need, each with an id of its own."""

        def new() -> Lease:
            now = datetime.now(UTC)
            return Lease(
                id=new_id(16),
                role=self.role,
                state=LeaseState.INTENT,
                provider=NAME,
                need=Need(memory_bytes=2**28),
                created_at=now,
                ends_at=now + timedelta(minutes=10),
            )

        return new

    @pytest.fixture
    async def provider(self, make: MakeProvider) -> AsyncIterator[Provider]:
        """Give a working provider; whatever a test left there is removed."""
        provider = make()
        yield provider
        for lease_id in await provider.made():
            await provider.terminate(lease_id)
        await provider.close()

    async def check_works(self, machine: Machine) -> None:
        """Prove that a launched machine can be used; more than this if inherited."""
        assert machine.folder

    async def check_gone(self, machine: Machine) -> None:
        """Prove that nothing of a terminated machine is left; more than this if inherited."""

    async def test_capacity_is_sane(self, provider: Provider) -> None:
        """It has something, says no problem, and says the same when asked again."""
        capacity = await provider.capacity()
        assert capacity.problem == ""
        assert capacity.resources.cpus > 0
        assert capacity.resources.memory_bytes > 0
        assert (await provider.capacity()).resources == capacity.resources

    async def test_check_proves_that_it_works(self, provider: Provider) -> None:
        """A good section passes the owner's check."""
        assert (await provider.check()).problem == ""

    async def test_launch_gives_a_working_place(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """What is launched is tagged with its lease and its provider, and works at once."""
        lease = new_lease()
        machine = await provider.launch(lease)
        assert (machine.lease_id, machine.provider) == (lease.id, NAME)
        await self.check_works(machine)

    async def test_launch_is_idempotent(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """The same lease gets the same machine, however often it is asked for."""
        lease = new_lease()
        first = await provider.launch(lease)
        assert await provider.launch(lease) == first
        assert len(await provider.made()) <= 1

    async def test_leases_are_apart(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """Ending one lease leaves the other alone."""
        one, other = new_lease(), new_lease()
        await provider.launch(one)
        kept = await provider.launch(other)
        await provider.terminate(one.id)
        await self.check_works(kept)
        assert await provider.made() == [other.id] * self.tags_what_it_makes

    async def test_made_lists_what_was_launched(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """The list is complete and true, before and after."""
        assert await provider.made() == []
        leases = [new_lease(), new_lease()]
        for lease in leases:
            await provider.launch(lease)
        expected = {lease.id for lease in leases} if self.tags_what_it_makes else set()
        assert set(await provider.made()) == expected
        for lease in leases:
            await provider.terminate(lease.id)
        assert await provider.made() == []

    async def test_made_is_asked_anew(
        self, provider: Provider, make: MakeProvider, new_lease: Callable[[], Lease]
    ) -> None:
        """One that knows nothing, as after a lost store, finds and removes it all the same."""
        lease = new_lease()
        machine = await provider.launch(lease)
        fresh = make()
        assert await fresh.made() == [lease.id] * self.tags_what_it_makes
        await fresh.terminate(lease.id)
        await self.check_gone(machine)
        assert await fresh.made() == []
        await fresh.close()

    async def test_terminate_is_idempotent(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """Ending twice is no error, and it is complete when it returns."""
        lease = new_lease()
        machine = await provider.launch(lease)
        await provider.terminate(lease.id)
        await self.check_gone(machine)
        await provider.terminate(lease.id)

    async def test_an_unknown_lease_is_no_error(self, provider: Provider) -> None:
        """What is not there is as good as terminated."""
        await provider.terminate(new_id(16))
        assert await provider.made() == []

    async def test_a_lease_launches_again_after_its_end(
        self, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """A retry after a terminate works."""
        lease = new_lease()
        await provider.launch(lease)
        await provider.terminate(lease.id)
        await self.check_works(await provider.launch(lease))

    async def test_close_is_idempotent_and_ends_nothing(
        self, make: MakeProvider, provider: Provider, new_lease: Callable[[], Lease]
    ) -> None:
        """A site that stops leaves what it launched."""
        one = make()
        await one.capacity()
        lease = new_lease()
        machine = await one.launch(lease)
        await one.close()
        await one.close()
        await self.check_works(machine)
        assert await provider.made() == [lease.id] * self.tags_what_it_makes

    def test_bad_sections_are_refused(self, make: MakeProvider) -> None:
        """An unknown setting or a bad value names section and field, with a next step."""
        for section, field in [*self.bad_sections, ({"surely_no_setting": 1}, "surely_no_setting")]:
            with pytest.raises(InvalidSpec) as refused:
                make(section)
            assert f"[providers.{NAME}]" in refused.value.message
            assert field in refused.value.message
            assert_telling(refused.value)


def assert_telling(error: GridcloudError) -> None:
    """Fail unless an error says its cause in a sentence, and the next step."""
    assert error.message.endswith(".")
    assert error.hint.endswith(".")
