"""A cloud of several regions, each with an API of its own: how one goes over them."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from gridcloud.errors import NotFound, Unavailable
from gridcloud.model.shape import Shape
from gridcloud.model.things import Tags, Thing
from gridcloud.providers.cloud.clouds import Cloud


class Region(Protocol):
    """One region of an account."""

    @property
    def name(self) -> str:
        """Its name at the cloud."""
        ...


R = TypeVar("R", bound=Region)
T = TypeVar("T")


class Regions(Protocol[R]):
    """The regions of the settings."""

    async def all(self) -> list[R]:
        """Return them; raises `InvalidSpec` if there is none."""
        ...

    async def named(self, name: str) -> R:
        """Return one; raises `NotFound` if it is none of the settings'."""
        ...

    def close(self) -> None:
        """Give up connections. Idempotent."""
        ...


class RegionalCloud(Cloud, Generic[R]):
    """A place is ``REGION/ZONE``, and a volume's id ``REGION/ID``. A machine of a lease may be in
    any region, since a launch goes on elsewhere where the first had no room.

    What a cloud says of one region is in the methods ``_…_of``; a machine there is of any type.
    """

    def __init__(self, regions: Regions[R]) -> None:
        self._regions = regions

    async def shapes(self) -> tuple[Shape, ...]:
        """See `Cloud`. A region that is down is left out, if another one answers."""
        regions = await self._regions.all()
        answers = await asyncio.gather(*map(self._shapes_of, regions), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in failures:
            if not isinstance(failure, Unavailable) or len(failures) == len(answers):
                raise failure
        return tuple(
            shape for found in answers if not isinstance(found, BaseException) for shape in found
        )

    async def remove(self, lease_id: str) -> bool:
        """See `Cloud`."""
        gone = await self._of_each(lambda region: self._remove_of(region, lease_id))
        return all(left for _, left in gone)

    async def remove_others(self, lease_id: str) -> None:
        """See `Cloud`. A launch that was moved to another place may have left one there."""
        for region, machine in (await self._alive(lease_id))[1:]:
            await self._end_of(region, machine)

    async def things(self) -> list[Thing]:
        """See `Cloud`. All regions must answer: a list with a hole would hide what is in it."""
        return [thing for _, found in await self._of_each(self._things_of) for thing in found]

    async def sites(self) -> set[str]:
        """See `Cloud`. All regions must answer."""
        return {site for _, found in await self._of_each(self._sites_of) for site in found}

    async def extended(self, tags: Tags) -> None:
        """See `Cloud`."""
        for region, machine in await self._alive(tags.lease):
            await self._note_end_of(region, machine, tags)

    async def attach(self, lease_id: str, volume: str) -> str:
        """See `Cloud`."""
        for region, machine in await self._alive(lease_id):
            return await self._attach_of(region, machine, volume.rpartition("/")[2])
        raise NotFound("The machine is gone.", hint="Start it again with its volume.")

    async def remove_volume(self, volume: str) -> None:
        """See `Cloud`."""
        name, _, one = volume.rpartition("/")
        await self._remove_volume_of(await self._regions.named(name), one)

    async def close(self) -> None:
        """See `Cloud`."""
        self._regions.close()

    async def _at(self, place: str) -> tuple[R, str]:
        """Return the region of a place, and the zone."""
        name, _, zone = place.partition("/")
        return await self._regions.named(name), zone

    async def _of_each(self, ask: Callable[[R], Awaitable[T]]) -> list[tuple[R, T]]:
        """Ask all regions at once; return what each says. Raises what one of them does."""
        regions = await self._regions.all()
        return list(zip(regions, await asyncio.gather(*map(ask, regions)), strict=True))

    async def _alive(self, lease_id: str) -> list[tuple[R, Any]]:
        """Return the machines of a lease that have not ended, in an order that stays the same."""
        found = await self._of_each(lambda region: self._alive_of(region, lease_id))
        return [(region, machine) for region, machines in found for machine in machines]

    @abstractmethod
    async def _shapes_of(self, region: R) -> Sequence[Shape]: ...

    @abstractmethod
    async def _alive_of(self, region: R, lease_id: str) -> list[Any]: ...

    @abstractmethod
    async def _remove_of(self, region: R, lease_id: str) -> bool: ...

    @abstractmethod
    async def _end_of(self, region: R, machine: Any) -> None: ...

    @abstractmethod
    async def _things_of(self, region: R) -> list[Thing]: ...

    @abstractmethod
    async def _sites_of(self, region: R) -> set[str]: ...

    @abstractmethod
    async def _note_end_of(self, region: R, machine: Any, tags: Tags) -> None: ...

    @abstractmethod
    async def _attach_of(self, region: R, machine: Any, volume: str) -> str: ...

    @abstractmethod
    async def _remove_volume_of(self, region: R, volume: str) -> None: ...
