"""What guests of this host are confined by: a sandbox of the host's own, or a container.

The settings say which (``[lending] isolation``). A loan stays where it was begun, whatever they say
later: its machine names the provider that gave it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from gridcloud.errors import NotFound
from gridcloud.model.lease import Lease, Machine
from gridcloud.orchestration.lender import LENT_FROM
from gridcloud.providers.base import Capacity, Lender, Provider
from gridcloud.settings import AUTO, CONTAINER, SANDBOX
from gridcloud.site.live_settings import LiveSettings


class Confining:
    """Chooses the provider that confines a new guest, and finds that of one who is here.

    ``providers`` are the site's, by name; the one called ``local`` is this host.
    """

    def __init__(self, providers: Mapping[str, Provider], settings: LiveSettings) -> None:
        self._providers = providers
        self._live = settings

    async def capacity(self) -> Capacity:
        """Return what this host has."""
        return await self._providers[LENT_FROM].capacity()

    async def problem(self) -> str:
        """Return why no guest can be confined, in words for the owner; empty when one can."""
        found = await self._choose()
        return found if isinstance(found, str) else ""

    async def isolation(self) -> str:
        """Return what confines the next guest, as offers tell it; empty while nothing can."""
        found = await self._choose()
        return "" if isinstance(found, str) else found[1].isolation

    async def describe(self) -> str:
        """Return in words for the owner what confines the next guest."""
        found = await self._choose()
        if isinstance(found, str):
            return "nothing"
        name, lender = found
        return lender.isolation if name == LENT_FROM else f"{lender.isolation} of {name}"

    async def launch(self, lease: Lease) -> Machine:
        """Give a guest its place. Raises `NotFound` while nobody can be confined."""
        found = await self._choose()
        if isinstance(found, str):
            raise NotFound(f"No guest can be confined here: {found}")
        return await self._providers[found[0]].launch(lease)

    def of(self, lease: Lease) -> Lender:
        """Return what confines a loan; raises `NotFound` if that is no longer in the settings."""
        name = lease.machine.provider if lease.machine else LENT_FROM
        provider = self._providers.get(name)
        if not isinstance(provider, Lender):
            raise NotFound(
                f"The provider {name!r} is no longer in the settings, or does not load.",
                hint="Put its section back to reach what runs there.",
            )
        return provider

    async def terminate(self, lease: Lease) -> None:
        """Remove what a loan was given, wherever that is. Idempotent."""
        if lease.machine is not None:
            with contextlib.suppress(NotFound):  # its provider was taken out of the settings
                self.of(lease)
                await self._providers[lease.machine.provider].terminate(lease.id)
            return
        for name, _ in self._lenders():  # it was cut off before it was known where
            await self._providers[name].terminate(lease.id)

    def _lenders(self) -> Iterator[tuple[str, Lender]]:
        """Yield those that can confine, the host's own sandbox first."""
        for name in sorted(self._providers, key=lambda name: name != LENT_FROM):
            provider = self._providers[name]
            if isinstance(provider, Lender):
                yield name, provider

    async def _choose(self) -> tuple[str, Lender] | str:
        """Return the first that is wanted and works, or why none does."""
        wanted = self._live.current.lending.isolation
        problems = []
        for name, lender in self._lenders():
            asked_for = {
                AUTO: True,
                SANDBOX: name == LENT_FROM,
                CONTAINER: name != LENT_FROM,
            }.get(wanted, name == wanted)
            if not asked_for:
                continue
            problem = await lender.lending_problem()
            if not problem:
                return name, lender
            problems.append(problem)
        if problems:
            return " ".join(problems)
        return (
            f"lending.isolation is {wanted!r}, and there is no such provider that can lend. Add a "
            'section with kind = "containers", or leave it out.'
        )
