"""The network of this site's machines in one region of EC2: found, or made for all of them and
removed with the last.

A VPC with an internet gateway, a route in the table that comes with it, a subnet for each zone in
use, and a security group that lets SSH in. They carry the lease `SHARED`. Ranges of subnets, names
of groups and destinations of routes are unique in a VPC, so that these are never made twice; of
VPCs that were made at once the first is used, and all of them go in the end.
"""

from __future__ import annotations

import asyncio
import contextlib
from ipaddress import IPv4Network, ip_network

from gridcloud.errors import Conflict, InvalidSpec, NotFound, Unavailable
from gridcloud.model.things import NAME_TAG, SHARED, Tags, Thing
from gridcloud.providers.libcloud.asking import Json, Region, filters, items
from gridcloud.providers.libcloud.errors import code_of, not_understood
from gridcloud.providers.libcloud.section import EC2Section
from gridcloud.providers.libcloud.tagging import carrying, of, specified, words

_NEW_BITS = 4
_FRESH_SECONDS = 20.0
_EVERYWHERE = "0.0.0.0/0"
#: What is shared, in the order in which it can be removed: kind, call, list, id.
_KINDS = {
    "security-group": ("DescribeSecurityGroups", "securityGroupInfo", "groupId"),
    "subnet": ("DescribeSubnets", "subnetSet", "subnetId"),
    "internet-gateway": ("DescribeInternetGateways", "internetGatewaySet", "internetGatewayId"),
    "vpc": ("DescribeVpcs", "vpcSet", "vpcId"),
}


class Networks:
    """See the module. What changes the shared network is done by one task at a time."""

    def __init__(self, region: Region, section: EC2Section, site: str) -> None:
        self._region, self._section = region, section
        self._tags = Tags(site=site, lease=SHARED)
        self._name = f"gridcloud-{site}"
        self._range = section.subnet
        self._lock = asyncio.Lock()
        #: Leases for which the network was asked for, and that were not removed yet.
        self._users: set[str] = set()
        #: What was found complete in a zone, and when; launches that come together ask once.
        self._seen: dict[str, tuple[float, str]] = {}

    async def ready(self, lease_id: str, zone: str) -> str:
        """Return ``SUBNET/GROUP`` for a zone; made if they are not there. Idempotent."""
        self._users.add(lease_id)
        now = asyncio.get_running_loop().time
        async with self._lock:
            at, found = self._seen.get(zone, (float("-inf"), ""))
            if now() - at < _FRESH_SECONDS:
                return found
            try:
                found = await self._complete(zone)
            except (Conflict, NotFound) as error:
                if isinstance(error, NotFound) and not code_of(error):
                    raise  # what the settings name
                # It was made a moment ago, here or by somebody else, and is not shown everywhere.
                raise Unavailable(error.message, hint=error.hint) from error
            self._seen[zone] = now(), found
            return found

    def outdated(self) -> None:
        """Have it looked at again before it is used the next time."""
        self._seen.clear()

    def not_used_by(self, lease_id: str) -> None:
        """Learn that a lease does not need the network any more."""
        self._users.discard(lease_id)

    async def tidy(self, machines: bool, *, asked: bool) -> bool:
        """Remove what is shared, if no lease of this process needs it and there are no machines;
        return whether nothing is left to be removed now. ``asked`` is for a removal by name."""
        async with self._lock:
            if asked:
                self._users.clear()
            if self._users or machines:
                return True
            self._seen.clear()
            found = {kind: await self._mine(kind) for kind in _KINDS}
            try:
                for kind, ids in found.items():
                    for one in ids:
                        await self._remove(kind, one)
            except Conflict:
                return False  # an interface of a machine is on its way out
            return not any(found.values())

    async def things(self) -> list[Thing]:
        """Return everything here that carries this site's tag. None of it costs."""
        listed = await asyncio.gather(*(self._listed(kind) for kind in _KINDS))
        return [
            Thing(
                kind=kind.replace("-", " "),
                id=str(one[_KINDS[kind][2]]),
                tags=tags,
                costs=False,
                name=words(one).get(NAME_TAG, ""),
            )
            for kind, found in zip(_KINDS, listed, strict=True)
            for one in found
            if (tags := of(one)) and tags.site == self._tags.site
        ]

    async def _complete(self, zone: str) -> str:
        wanted = self._section.network
        if not wanted:
            vpc = await self._vpc()
            await self._lead_out(vpc)
            subnet = await self._subnet(vpc, zone)
        else:
            vpc, subnet = await self._own(wanted, zone)
        if groups := self._section.security_groups:
            return f"{subnet}/{','.join(groups)}"
        return f"{subnet}/{await self._group(vpc)}"

    async def _own(self, wanted: str, zone: str) -> tuple[str, str]:
        """Return the VPC and the subnet in a zone that the settings mean."""
        there: dict[str, str | list[str]] = {"availability-zone": zone}
        if wanted.startswith("subnet-"):
            there["subnet-id"] = wanted
        elif wanted.startswith("vpc-"):
            there["vpc-id"] = wanted
        else:
            there["default-for-az"] = "true"
        found = await self._region.listed("DescribeSubnets", "subnetSet", Filter=filters(there))
        if not found:
            raise NotFound(
                f"The network {wanted} has no subnet in {zone}.",
                hint="Correct network and zones in the settings, or leave network out to have one "
                "made.",
            )
        roomy = max(
            found, key=lambda one: (_whole(one.get("availableIpAddressCount")), one["subnetId"])
        )
        return str(roomy["vpcId"]), str(roomy["subnetId"])

    async def _vpc(self) -> str:
        if found := await self._mine("vpc"):
            return found[0]
        answer = await self._region.ask(
            "CreateVpc",
            CidrBlock=self._range,
            TagSpecification=self._specified("vpc"),
        )
        made = _id(answer.get("vpc"), "vpcId")
        return min([made, *await self._mine("vpc")])

    async def _lead_out(self, vpc: str) -> None:
        """Have a gateway at a VPC, and the route to it."""
        gateways = [
            one
            for one in await self._listed("internet-gateway")
            if self._is_mine(one)
            and {str(a.get("vpcId")) for a in items(one, "attachmentSet")} <= {vpc}
        ]
        gateways.sort(key=lambda one: (not one.get("attachmentSet"), one["internetGatewayId"]))
        if gateways:
            gateway, attached = str(gateways[0]["internetGatewayId"]), gateways[0]["attachmentSet"]
        else:
            answer = await self._region.ask(
                "CreateInternetGateway",
                TagSpecification=self._specified("internet-gateway"),
            )
            gateway, attached = _id(answer.get("internetGateway"), "internetGatewayId"), []
        if not attached:
            try:
                await self._region.ask(
                    "AttachInternetGateway", InternetGatewayId=gateway, VpcId=vpc
                )
            except InvalidSpec as error:
                # A VPC has one; another was attached that is not shown as such yet.
                raise Unavailable(error.message, hint=error.hint) from error
        main = filters({"vpc-id": vpc, "association.main": "true"})
        tables = await self._region.listed("DescribeRouteTables", "routeTableSet", Filter=main)
        if not tables:
            raise Unavailable(f"The VPC {vpc} has no table of routes yet.")
        routes = items(tables[0], "routeSet")
        if not any(one.get("gatewayId") == gateway for one in routes):
            with contextlib.suppress(Conflict):  # it is there already
                await self._region.ask(
                    "CreateRoute",
                    RouteTableId=str(tables[0]["routeTableId"]),
                    DestinationCidrBlock=_EVERYWHERE,
                    GatewayId=gateway,
                )

    async def _subnet(self, vpc: str, zone: str) -> str:
        """Return the subnet of a zone; its range is the first that is free."""
        there = await self._region.listed(
            "DescribeSubnets", "subnetSet", Filter=filters({"vpc-id": vpc})
        )
        own = [one for one in there if one.get("availabilityZone") == zone]
        if own:
            return min(str(one["subnetId"]) for one in own)
        taken = {str(one.get("cidrBlock")) for one in there}
        ranges = IPv4Network(self._range).subnets(_NEW_BITS)
        free = next((str(one) for one in ranges if str(one) not in taken), "")
        if not free:
            raise InvalidSpec(
                f"The network has no room for the zone {zone}.", hint="Name fewer zones."
            )
        answer = await self._region.ask(
            "CreateSubnet",
            VpcId=vpc,
            CidrBlock=free,
            AvailabilityZone=zone,
            TagSpecification=self._specified("subnet"),
        )
        return _id(answer.get("subnet"), "subnetId")

    async def _group(self, vpc: str) -> str:
        """Return the security group of a VPC, with rules that let SSH in and nothing else."""
        wanted = filters({"vpc-id": vpc, "group-name": self._name})
        found = await self._region.listed(
            "DescribeSecurityGroups", "securityGroupInfo", Filter=wanted
        )
        found = [one for one in found if self._is_mine(one)]
        known: set[str] = set()
        if found:
            group = str(found[0]["groupId"])
            for rule in items(found[0], "ipPermissions"):
                known |= {str(one.get("cidrIp")) for one in items(rule, "ipRanges")}
                known |= {str(one.get("cidrIpv6")) for one in items(rule, "ipv6Ranges")}
        else:
            answer = await self._region.ask(
                "CreateSecurityGroup",
                VpcId=vpc,
                GroupName=self._name,
                GroupDescription="gridcloud: SSH to its machines",
                TagSpecification=self._specified("security-group"),
            )
            group = _id(answer, "groupId")
        for source in self._section.ssh_from:
            if source in known:
                continue
            rule = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22} | _range(source)
            with contextlib.suppress(Conflict):  # it is there already
                await self._region.ask(
                    "AuthorizeSecurityGroupIngress", GroupId=group, IpPermissions=[rule]
                )
        return group

    def _is_mine(self, one: Json) -> bool:
        """Whether a thing of this site's is part of this network."""
        return of(one) == self._tags

    def _specified(self, kind: str) -> list[Json]:
        return specified(self._tags, self._name, kind)

    async def _mine(self, kind: str) -> list[str]:
        """Return the ids of what is shared of a kind, in an order that is always the same."""
        found = await self._listed(kind)
        return sorted(str(one[_KINDS[kind][2]]) for one in found if self._is_mine(one))

    async def _listed(self, kind: str) -> list[Json]:
        call, what, _ = _KINDS[kind]
        return await self._region.listed(call, what, Filter=carrying(self._tags.site))

    async def _remove(self, kind: str, one: str) -> None:
        delete = self._region.delete
        match kind:
            case "security-group":
                await delete("DeleteSecurityGroup", GroupId=one)
            case "subnet":
                await delete("DeleteSubnet", SubnetId=one)
            case "internet-gateway":
                for vpc in await self._mine("vpc"):
                    with contextlib.suppress(InvalidSpec, Conflict):  # it is not at this one
                        await delete("DetachInternetGateway", InternetGatewayId=one, VpcId=vpc)
                await delete("DeleteInternetGateway", InternetGatewayId=one)
            case "vpc":
                await delete("DeleteVpc", VpcId=one)


def _range(source: str) -> Json:
    if ip_network(source).version == 6:
        return {"Ipv6Ranges": [{"CidrIpv6": source}]}
    return {"IpRanges": [{"CidrIp": source}]}


def _id(found: object, name: str) -> str:
    one = found.get(name) if isinstance(found, dict) else None
    if not isinstance(one, str) or not one:
        raise not_understood(f"something made without its {name}")
    return one


def _whole(text: object) -> int:
    return int(str(text)) if str(text).isdigit() else 0
