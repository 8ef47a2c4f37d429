"""The networks by name of this site at its providers: what there is, making and removing them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gridcloud.errors import Conflict, InvalidSpec, NotFound
from gridcloud.model.accounts import NetworkInfo, NetworkReport
from gridcloud.providers.base import NetworkKeeper, Provider
from gridcloud.site.answers import put_together
from gridcloud.store.leases import LeaseStore

#: How long one provider may take to tell what it has.
_PATIENCE_SECONDS = 60.0


class NetworkDesk:
    """Asks the providers anew each time; nothing is kept here. A name is used at one provider
    only, so that a machine in a network is told by that name where it has to be."""

    def __init__(self, providers: Mapping[str, Provider], leases: LeaseStore) -> None:
        self._providers, self._leases = providers, leases

    async def networks(self) -> NetworkReport:
        """Return all networks; a provider that does not answer is a problem, not an error."""
        keepers = self._keepers()
        found = await asyncio.gather(
            *(self._of(name, keeper) for name, keeper in keepers.items()), return_exceptions=True
        )
        networks, problems = put_together(keepers, found)
        return NetworkReport(
            networks=tuple(networks), makers=tuple(keepers), problems=tuple(problems)
        )

    async def make(self, name: str, cidr: str, provider: str, region: str) -> NetworkInfo:
        """Make a network at a provider. Idempotent.

        Raises `Conflict` if there is another one of that name, `InvalidSpec` and `NotFound` where
        there can be none.
        """
        keeper = self._keeper(provider)
        for there in (await self.networks()).networks:
            if there.name == name and there.provider != provider:
                raise Conflict(
                    f"There is a network {name!r} at {there.provider} already.",
                    hint="Bring its stack down first, or choose another name.",
                )
        await keeper.make_network(name, cidr, region)
        return NetworkInfo(id="", name=name, cidr=cidr, region=region, provider=provider)

    async def remove(self, name: str, provider: str) -> None:
        """Remove a network. Idempotent; raises `Conflict` while a machine of this site is in it."""
        keeper = self._keeper(provider)
        for lease in await self._leases.live():
            if lease.order.network == name and lease.provider == provider:
                raise Conflict(
                    f"The machine {lease.order.name or lease.id} is in the network {name}.",
                    hint="Stop it first: 'gridcloud machine list'.",
                )
        await keeper.remove_network(name)

    async def _of(self, name: str, keeper: NetworkKeeper) -> list[NetworkInfo]:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            found = await keeper.networks()
        return [
            NetworkInfo(**network.model_dump(), provider=name)
            for network in sorted(found, key=lambda network: network.name)
        ]

    def _keepers(self) -> dict[str, NetworkKeeper]:
        return {
            name: provider
            for name, provider in sorted(self._providers.items())
            if isinstance(provider, NetworkKeeper) and provider.names_networks
        }

    def _keeper(self, provider: str) -> NetworkKeeper:
        if provider not in self._providers:
            raise NotFound(
                f"There is no provider {provider!r}.", hint="See 'gridcloud provider list'."
            )
        keepers = self._keepers()
        if provider not in keepers:
            raise InvalidSpec(
                f"The provider {provider!r} makes no networks by name.",
                hint=f"These do: {', '.join(keepers) or 'none here'}.",
            )
        return keepers[provider]
