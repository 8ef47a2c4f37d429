"""The network of this site's machines in one region of Oracle Cloud: found, or made for all of
them and removed with the last.

A VCN with an internet gateway, a table with the route to it, a subnet over all availability
domains, and a network security group that lets SSH in; the VCN's own list of rules, which would let
in more, is emptied. They carry the lease `SHARED`. Of VCNs that were made at once the first is
used, and all of them go in the end.
"""

from __future__ import annotations

import asyncio
from typing import Any

from oci.core import models

from gridcloud.errors import Conflict, GridcloudError, NotFound, Unavailable
from gridcloud.model.identifiers import new_id
from gridcloud.model.things import SHARED, Tags, Thing
from gridcloud.providers.oci.asking import Region
from gridcloud.providers.oci.errors import code_of, held
from gridcloud.providers.oci.section import OCISection
from gridcloud.providers.oci.tagging import called, gone, leaving, of_site

_FRESH_SECONDS = 20.0
_EVERYWHERE, _TCP, _SSH = "0.0.0.0/0", "6", 22
#: What is shared, in the order in which OCI lets go of it: kind, and the names of its methods.
_KINDS = {
    "security group": "network_security_group",
    "subnet": "subnet",
    "route table": "route_table",
    "internet gateway": "internet_gateway",
    "VCN": "vcn",
}


class Networks:
    """See the module. What changes the shared network is done by one task at a time."""

    def __init__(self, region: Region, section: OCISection, site: str) -> None:
        self._region, self._section = region, section
        self._tags = Tags(site=site, lease=SHARED)
        self._name, self._range = f"gridcloud-{site}", section.subnet
        self._lock = asyncio.Lock()
        #: Part of the tokens of calls that make something: the same until the network is removed.
        self._era = new_id(16)
        #: Leases for which the network was asked for, and that were not removed yet.
        self._users: set[str] = set()
        #: What was found complete, and when; launches that come together ask once.
        self._seen = float("-inf"), ""

    async def ready(self, lease_id: str) -> str:
        """Return ``SUBNET/GROUP,GROUP``; made if they are not there. Idempotent."""
        self._users.add(lease_id)
        now = asyncio.get_running_loop().time
        async with self._lock:
            at, found = self._seen
            if now() - at < _FRESH_SECONDS:
                return found
            try:
                found = await self._complete()
            except GridcloudError as error:
                if code_of(error) == "InvalidatedRetryToken":
                    self._era = new_id(16)
                if self._section.network or not isinstance(error, Conflict | NotFound):
                    raise
                if not await self._mine("vcn"):
                    raise  # the compartment is wrong, or may not be used
                # It was made or removed a moment ago, here or by somebody else.
                raise Unavailable(error.message, hint=error.hint) from error
            self._seen = now(), found
            return found

    def outdated(self) -> None:
        """Have it looked at again before it is used the next time."""
        self._seen = float("-inf"), ""

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
            self.outdated()
            self._era = new_id(16)
            left = False
            for method in _KINDS.values():
                for one in await self._mine(method, leaving_too=True):
                    left = True
                    if leaving(one):
                        continue
                    try:
                        await self._region.delete("network", f"delete_{method}", one.id)
                    except GridcloudError as error:
                        if held(error):
                            return False  # something that uses it is on its way out
                        raise
            return not left

    async def things(self) -> list[Thing]:
        """Return everything here that carries this site's tag. None of it costs."""
        listed = await asyncio.gather(*(self._listed(method) for method in _KINDS.values()))
        return [
            Thing(kind=kind, id=str(one.id), tags=tags, costs=False, name=called(one))
            for kind, found in zip(_KINDS, listed, strict=True)
            for one, tags in of_site(found, self._tags.site)
            if not gone(one)
        ]

    async def _complete(self) -> str:
        if subnet := self._section.network:
            vcn = str((await self._region.ask("network", "get_subnet", subnet)).vcn_id)
        else:
            vcn = await self._vcn()
            gateway = await self._gateway(vcn)
            table = await self._table(vcn, gateway)
            subnet = await self._subnet(vcn, table)
        if groups := self._section.security_groups:
            return f"{subnet}/{','.join(groups)}"
        return f"{subnet}/{await self._group(vcn)}"

    async def _vcn(self) -> str:
        if found := await self._mine("vcn"):
            made = found[0]
        else:
            made = await self._made(
                "vcn",
                models.CreateVcnDetails(
                    cidr_blocks=[self._range],
                    compartment_id=self._region.compartment,
                    display_name=self._name,
                    freeform_tags=self._written(),
                ),
            )
            # Somebody else may have made one at the same time.
            made = next((one for one in await self._mine("vcn")), made)
        rules = await self._region.ask(
            "network", "get_security_list", made.default_security_list_id
        )
        if rules.ingress_security_rules or rules.egress_security_rules:
            await self._region.ask(
                "network",
                "update_security_list",
                rules.id,
                models.UpdateSecurityListDetails(
                    ingress_security_rules=[], egress_security_rules=[]
                ),
            )
        return str(made.id)

    async def _gateway(self, vcn: str) -> str:
        if found := await self._mine("internet_gateway", vcn):
            return str(found[0].id)
        made = await self._made(
            "internet_gateway",
            models.CreateInternetGatewayDetails(
                compartment_id=self._region.compartment,
                display_name=self._name,
                freeform_tags=self._written(),
                is_enabled=True,
                vcn_id=vcn,
            ),
        )
        return str(made.id)

    async def _table(self, vcn: str, gateway: str) -> str:
        if found := await self._mine("route_table", vcn):
            return str(found[0].id)
        route = models.RouteRule(
            destination=_EVERYWHERE, destination_type="CIDR_BLOCK", network_entity_id=gateway
        )
        made = await self._made(
            "route_table",
            models.CreateRouteTableDetails(
                compartment_id=self._region.compartment,
                display_name=self._name,
                freeform_tags=self._written(),
                route_rules=[route],
                vcn_id=vcn,
            ),
        )
        return str(made.id)

    async def _subnet(self, vcn: str, table: str) -> str:
        if found := await self._mine("subnet", vcn):
            return str(found[0].id)
        made = await self._made(
            "subnet",
            models.CreateSubnetDetails(
                cidr_block=self._range,
                compartment_id=self._region.compartment,
                display_name=self._name,
                freeform_tags=self._written(),
                prohibit_public_ip_on_vnic=self._section.address == "private",
                route_table_id=table,
                vcn_id=vcn,
            ),
        )
        return str(made.id)

    async def _group(self, vcn: str) -> str:
        """Return the security group of a VCN, with rules that let SSH in and everything out."""
        if found := await self._mine("network_security_group", vcn):
            group = str(found[0].id)
        else:
            made = await self._made(
                "network_security_group",
                models.CreateNetworkSecurityGroupDetails(
                    compartment_id=self._region.compartment,
                    display_name=self._name,
                    freeform_tags=self._written(),
                    vcn_id=vcn,
                ),
            )
            group = str(made.id)
        there = await self._region.listed(
            "network", "list_network_security_group_security_rules", group
        )
        known = {str(one.source) for one in there if one.direction == "INGRESS"}
        missing = [rule for rule in self._let_in() if rule.source not in known]
        if not any(one.direction == "EGRESS" for one in there):
            missing.append(
                models.AddSecurityRuleDetails(
                    direction="EGRESS",
                    protocol="all",
                    destination=_EVERYWHERE,
                    destination_type="CIDR_BLOCK",
                )
            )
        if missing:
            await self._region.ask(
                "network",
                "add_network_security_group_security_rules",
                group,
                models.AddNetworkSecurityGroupSecurityRulesDetails(security_rules=missing),
            )
        return group

    def _let_in(self) -> list[models.AddSecurityRuleDetails]:
        return [_in(source) for source in self._section.ssh_from]

    def _is_mine(self, one: Any) -> bool:
        """Whether a thing with this network's tags is part of it."""
        return True

    def _written(self) -> dict[str, str]:
        return self._tags.written()

    async def _made(self, kind: str, details: Any) -> Any:
        token = f"{kind}-{self._era}"
        made = await self._region.ask("network", f"create_{kind}", details, opc_retry_token=token)
        if leaving(made):
            self._era = new_id(16)
            raise Unavailable("OCI gives a network that has gone.", hint="It is made anew.")
        return made

    async def _mine(self, method: str, vcn: str = "", *, leaving_too: bool = False) -> list[Any]:
        """Return what is shared of a kind, in an order that is always the same."""
        return [
            one
            for one, _ in of_site(await self._listed(method), self._tags.site, self._tags.lease)
            if not gone(one)
            and self._is_mine(one)
            and (leaving_too or not leaving(one))
            and vcn in {"", getattr(one, "vcn_id", "")}
        ]

    async def _listed(self, method: str) -> list[Any]:
        return await self._region.listed(
            "network", f"list_{method}s", compartment_id=self._region.compartment
        )


def _in(source: str) -> models.AddSecurityRuleDetails:
    port = models.PortRange(min=_SSH, max=_SSH)
    return models.AddSecurityRuleDetails(
        direction="INGRESS",
        protocol=_TCP,
        source=source,
        source_type="CIDR_BLOCK",
        tcp_options=models.TcpOptions(destination_port_range=port),
    )
