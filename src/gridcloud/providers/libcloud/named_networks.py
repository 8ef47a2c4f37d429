"""Networks by name in one region of EC2: each a VPC, whose machines reach one another."""

from __future__ import annotations

import contextlib
from ipaddress import IPv4Network

from gridcloud.errors import Conflict, InvalidSpec, NotFound
from gridcloud.model.things import NAME_TAG, NETWORK, Network, Tags
from gridcloud.providers.libcloud import servers
from gridcloud.providers.libcloud.asking import Json, Region, items
from gridcloud.providers.libcloud.networks import Networks
from gridcloud.providers.libcloud.section import EC2Section
from gridcloud.providers.libcloud.tagging import carrying, of, specified, words

#: How large a VPC may be so that it has room for a subnet in each of 16 zones.
_LARGEST, _SMALLEST = 16, 24


class NamedNetwork(Networks):
    """One network by its name. Its security group also lets all in that comes from it."""

    def __init__(self, region: Region, section: EC2Section, site: str, name: str) -> None:
        super().__init__(region, section, site)
        self._tags = Tags(site=site, lease=NETWORK)
        self._called, self._name = name, f"gridcloud-{site}-{name}"

    async def make(self, cidr: str) -> None:
        """Make its VPC with a way out; subnets come with the machines. Idempotent."""
        prefix = IPv4Network(cidr).prefixlen
        if not _LARGEST <= prefix <= _SMALLEST:
            raise InvalidSpec(
                f"A network at EC2 is a /{_LARGEST} to a /{_SMALLEST}, and {cidr} is not.",
                hint="Change its cidr.",
            )
        self._range = cidr
        async with self._lock:
            await self._lead_out(await self._vpc())

    async def remove(self) -> bool:
        """See `Cloud.remove_network`."""
        mine = set(await self._mine("vpc"))
        machines = await servers.of_site(self._region, self._tags.site) if mine else []
        if any(one.get("vpcId") in mine for one, _ in machines):
            return False
        return await self.tidy(machines=False, asked=True)

    async def _complete(self, zone: str) -> str:
        found = await vpcs(self._region, self._tags.site)
        mine = [one for one in found if words(one).get(NAME_TAG) == self._called]
        if not mine:
            raise NotFound(
                f"There is no network {self._called!r} in {self._region.name}.",
                hint="Bring its stack up again.",
            )
        vpc, self._range = str(mine[0]["vpcId"]), str(mine[0]["cidrBlock"])
        await self._lead_out(vpc)
        return f"{await self._subnet(vpc, zone)}/{await self._group(vpc)}"

    async def _group(self, vpc: str) -> str:
        group = await super()._group(vpc)
        listed = await self._listed("security-group")
        mine = [one for one in listed if one.get("groupId") == group]
        rules = [rule for one in mine for rule in items(one, "ipPermissions")]
        if not any(items(rule, "groups") for rule in rules):
            inside = {"IpProtocol": "-1", "Groups": [{"GroupId": group}]}
            with contextlib.suppress(Conflict):  # it is there already
                await self._region.ask(
                    "AuthorizeSecurityGroupIngress", GroupId=group, IpPermissions=[inside]
                )
        return group

    def _is_mine(self, one: Json) -> bool:
        return super()._is_mine(one) and words(one).get(NAME_TAG) == self._called

    def _specified(self, kind: str) -> list[Json]:
        return specified(self._tags, self._name, kind, called=self._called)


async def vpcs(region: Region, site: str) -> list[Json]:
    """Return the VPCs of a site that were made by name, in an order that is always the same."""
    found = await region.listed("DescribeVpcs", "vpcSet", Filter=carrying(site, NETWORK))
    mine = [one for one in found if (tags := of(one)) and tags.lease == NETWORK]
    return sorted(mine, key=lambda one: str(one["vpcId"]))


def read(found: Json, region: str) -> Network:
    """Return a VPC as a network."""
    return Network(
        id=f"{region}/{found['vpcId']}",
        name=words(found).get(NAME_TAG, ""),
        cidr=str(found.get("cidrBlock") or ""),
        region=region,
    )
