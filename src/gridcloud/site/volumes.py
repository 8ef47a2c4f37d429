"""The volumes of this site at its providers: what there is, making and removing them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gridcloud.errors import Conflict, InvalidSpec, NotFound
from gridcloud.model.accounts import VolumeInfo, VolumeReport
from gridcloud.providers.base import Provider, VolumeKeeper
from gridcloud.site.answers import put_together

#: How long one provider may take to tell what it has.
_PATIENCE_SECONDS = 60.0


class VolumeDesk:
    """Asks the providers anew each time; nothing is kept here."""

    def __init__(self, providers: Mapping[str, Provider]) -> None:
        self._providers = providers

    async def volumes(self) -> VolumeReport:
        """Return all volumes; a provider that does not answer is a problem, not an error."""
        keepers = self._keepers()
        found = await asyncio.gather(
            *(self._of(name, keeper) for name, keeper in keepers.items()), return_exceptions=True
        )
        volumes, problems = put_together(keepers, found)
        return VolumeReport(volumes=tuple(volumes), problems=tuple(problems))

    async def make(self, name: str, size_bytes: int, provider: str) -> VolumeInfo:
        """Make a volume at a provider, the only one if none is named.

        Raises `Conflict` if there is one of that name, `InvalidSpec` where there are no volumes.
        """
        chosen = self._chosen(provider)
        await self._keepers()[chosen].make_volume(name, size_bytes)
        return next(
            each for each in await self._of(chosen, self._keepers()[chosen]) if each.name == name
        )

    async def remove(self, name: str, provider: str) -> VolumeInfo:
        """Remove a volume and what is on it; ``provider`` may be empty if the name is in one only.

        Raises `NotFound`, and `Conflict` while it is at a machine or if it could be several.
        """
        report = await self.volumes()
        there = [v for v in report.volumes if v.name == name and provider in ("", v.provider)]
        if not there:
            told = f" ({'; '.join(report.problems)})" if report.problems else ""
            raise NotFound(
                f"There is no volume {name!r}{told}.", hint="See 'gridcloud volume list'."
            )
        if len(there) > 1:
            where = ", ".join(volume.provider for volume in there)
            raise Conflict(f"There is a volume {name!r} at each of {where}.", hint="Name one.")
        (volume,) = there
        if volume.attached_to:
            raise Conflict(
                f"The volume {name} is at a machine.",
                hint="Stop that first: 'gridcloud machine list'.",
            )
        await self._keepers()[volume.provider].remove_volume(name)
        return volume

    async def _of(self, name: str, keeper: VolumeKeeper) -> list[VolumeInfo]:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            found = await keeper.volumes()
        return [
            VolumeInfo(
                **volume.model_dump(),
                provider=name,
                unused_since=None if volume.attached_to else volume.created_at,
            )
            for volume in sorted(found, key=lambda volume: volume.name)
        ]

    def _keepers(self) -> dict[str, VolumeKeeper]:
        return {
            name: provider
            for name, provider in sorted(self._providers.items())
            if isinstance(provider, VolumeKeeper)
        }

    def _chosen(self, provider: str) -> str:
        keepers = self._keepers()
        known = ", ".join(keepers) or "none"
        if provider:
            if provider not in keepers:
                raise NotFound(
                    f"No provider {provider!r} here has volumes.", hint=f"There are: {known}."
                )
            return provider
        if len(keepers) != 1:
            raise InvalidSpec(
                "It must be said at which provider the volume is to be.",
                hint=f"Say --provider; there are: {known}.",
            )
        return next(iter(keepers))
