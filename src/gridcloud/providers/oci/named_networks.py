"""Networks by name in one region of Oracle Cloud: each a VCN, whose machines reach one another."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

from oci.core import models

from gridcloud.errors import InvalidSpec, NotFound
from gridcloud.model.things import NAME_TAG, NETWORK, Network, Tags
from gridcloud.providers.oci.asking import Region
from gridcloud.providers.oci.networks import Networks
from gridcloud.providers.oci.section import OCISection
from gridcloud.providers.oci.tagging import called, leaving, of_site

#: What OCI takes as the range of a VCN.
_LARGEST, _SMALLEST = 16, 30


class NamedNetwork(Networks):
    """One network by its name. Its security group also lets all in that comes from its range."""

    def __init__(self, region: Region, section: OCISection, site: str, name: str) -> None:
        # What the settings say of a subnet and of groups is for machines without a network.
        own = section.model_copy(update={"network": "", "security_groups": ()})
        super().__init__(region, own, site)
        self._tags = Tags(site=site, lease=NETWORK)
        self._called, self._name = name, f"gridcloud-{name}"

    async def make(self, cidr: str) -> None:
        """Make all of it. Idempotent."""
        prefix = IPv4Network(cidr).prefixlen
        if not _LARGEST <= prefix <= _SMALLEST:
            raise InvalidSpec(
                f"A network at OCI is a /{_LARGEST} to a /{_SMALLEST}, and {cidr} is not.",
                hint="Change its cidr.",
            )
        self._range = cidr
        await super().ready("")

    async def ready(self, lease_id: str) -> str:
        """See `Networks`. Raises `NotFound` if it was not made."""
        mine = await self._mine("vcn")
        if not mine:
            raise NotFound(
                f"There is no network {self._called!r} in {self._region.name}.",
                hint="Bring its stack up again.",
            )
        self._range = str(mine[0].cidr_blocks[0])
        return await super().ready(lease_id)

    async def remove(self) -> bool:
        """See `Cloud.remove_network`. OCI keeps a security group that a machine is in, which is the
        first to be removed."""
        return await self.tidy(machines=False, asked=True)

    def _let_in(self) -> list[models.AddSecurityRuleDetails]:
        inside = models.AddSecurityRuleDetails(
            direction="INGRESS", protocol="all", source=self._range, source_type="CIDR_BLOCK"
        )
        return [*super()._let_in(), inside]

    def _is_mine(self, one: Any) -> bool:
        return called(one) == self._called

    def _written(self) -> dict[str, str]:
        return super()._written() | {NAME_TAG: self._called}


async def networks(region: Region, site: str) -> list[Network]:
    """Return the networks of a site that were made by name."""
    found = await region.listed("network", "list_vcns", compartment_id=region.compartment)
    return [
        Network(
            id=f"{region.name}/{one.id}",
            name=called(one),
            cidr=str(one.cidr_blocks[0]),
            region=region.name,
        )
        for one, _ in of_site(found, site, NETWORK)
        if not leaving(one)
    ]
