"""Networks by name in one region of OpenStack: each with a router and a security group."""

from __future__ import annotations

from ipaddress import IPv4Network

from gridcloud.errors import Conflict, InvalidSpec, NotFound, Unavailable
from gridcloud.model.things import NAME_TAG, NETWORK, Network, Tags
from gridcloud.providers.openstack import servers
from gridcloud.providers.openstack.networks import Networks
from gridcloud.providers.openstack.regions import Json, Region
from gridcloud.providers.openstack.section import OpenStackSection
from gridcloud.providers.openstack.tagging import of_network, words


class NamedNetwork(Networks):
    """One network by its name. Its security group also lets all in that comes from it."""

    def __init__(self, region: Region, section: OpenStackSection, site: str, name: str) -> None:
        super().__init__(region, section, site)
        self._shared = Tags(site=site, lease=NETWORK)
        self._called, self._name = name, f"gridcloud-{site}-{name}"
        self._told = {"name": name}

    async def make(self, cidr: str) -> None:
        """Make it with a way out. Idempotent."""
        if self._section.network or self._section.security_groups:
            raise InvalidSpec(
                "The settings name a network or security groups for all machines.",
                hint="Leave networks out of the stack, or network and security_groups out of the "
                "settings.",
            )
        if IPv4Network(cidr).prefixlen > 29:
            raise InvalidSpec(f"{cidr} has no room for machines.", hint="Give it /29 or more.")
        async with self._lock:
            self._section = self._section.model_copy(update={"subnet": cidr})
            try:
                if not await self._found():
                    await self._made()
            except Conflict as error:
                # Somebody else makes it too, or an old one is not quite gone.
                raise Unavailable(error.message, hint=error.hint) from error

    async def found(self) -> str:
        """Return it as `Networks.ready` does; raises `NotFound`."""
        if found := await self._found():
            return found
        raise NotFound(
            f"There is no network {self._called!r} in {self._region.name}.",
            hint="Bring its stack up again.",
        )

    async def remove_all(self) -> bool:
        """See `Cloud.remove_network`."""
        async with self._lock:
            if await servers.may_be_in(self._region, self._shared.site, self._name):
                return not await self._mine("networks")
            return bool(await self._take_down())

    def _rules(self, group: str) -> list[Json]:
        inside: Json = {"direction": "ingress", "ethertype": "IPv4", "remote_group_id": group}
        return [*super()._rules(group), inside]


async def named(region: Region, site: str) -> list[Network]:
    """Return the networks of a site that were made by name, in an order that is always the same."""
    found = await region.listed("network", "/networks", "networks")
    mine = [one for one in found if of_network(one) == Tags(site=site, lease=NETWORK)]
    ranges = {}
    if mine:
        subnets = await region.listed("network", "/subnets", "subnets")
        ranges = {one.get("network_id"): str(one.get("cidr") or "") for one in subnets}
    return [
        Network(
            id=f"{region.name}/{one['id']}",
            name=words(one).get(NAME_TAG, ""),
            cidr=ranges.get(one["id"], ""),
            region=region.name,
        )
        for one in sorted(mine, key=lambda one: str(one["id"]))
    ]
