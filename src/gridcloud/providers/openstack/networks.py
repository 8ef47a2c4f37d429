"""The network of this site's machines in one region: found, or made for all of them and removed
with the last; and the floating addresses of single machines.

What is made for all is tagged with the lease `SHARED`. A network and a security group are marked
as ready by the last call that makes them, so that a half-made one is gone on with.
"""

from __future__ import annotations

import asyncio
import contextlib
from ipaddress import ip_network

from gridcloud.errors import Conflict, InvalidSpec, NotFound, Unavailable
from gridcloud.model.things import NAME_TAG, SHARED, Tags, Thing
from gridcloud.providers.openstack.errors import not_understood
from gridcloud.providers.openstack.regions import Json, Region
from gridcloud.providers.openstack.section import OpenStackSection
from gridcloud.providers.openstack.tagging import described, of_network, words

_READY = "ready"
_KINDS = {
    "ports": "port",
    "floatingips": "address",
    "routers": "router",
    "networks": "network",
    "security-groups": "security group",
}
_ANSWERS = {kind: kind.replace("-", "_") for kind in _KINDS}
#: Owners of ports that belong to a network itself.
_OWN_PORTS = "network:"


class Networks:
    """See the module. What changes the shared network is done by one task at a time."""

    def __init__(self, region: Region, section: OpenStackSection, site: str) -> None:
        self._region, self._section = region, section
        self._shared = Tags(site=site, lease=SHARED)
        self._name = f"gridcloud-{site}"
        #: What the descriptions of what is made here tell besides.
        self._told: dict[str, str] = {}
        self._lock = asyncio.Lock()
        #: Leases for which the network was asked for, and that were not removed yet.
        self._users: set[str] = set()

    async def ready(self, lease_id: str) -> str:
        """Return ``NETWORK/GROUP``, the ids of a network and of a security group (which is empty
        where the settings name some); made if they are not there. Idempotent."""
        self._users.add(lease_id)
        if not self._lock.locked() and (found := await self._found()):
            return found
        async with self._lock:
            try:
                return await self._found() or await self._made()
            except Conflict as error:
                # Somebody else makes it too, or an old one is not quite gone.
                raise Unavailable(error.message, hint=error.hint) from error

    def not_used_by(self, lease_id: str) -> None:
        """Learn that a lease does not need the network any more."""
        self._users.discard(lease_id)

    async def tidy(self, *, asked: bool) -> bool:
        """Remove what is shared, if no lease of this process needs it and no port is in it;
        return whether nothing is left to be removed now. ``asked`` is for a removal by name."""
        async with self._lock:
            if asked:
                self._users.clear()
            if self._users:
                return True
            left = await self._take_down()
            return left is None or left

    async def things(self, site: str) -> list[Thing]:
        """Return everything here that carries a site's tag; if none is named, that of any site."""
        listed = await asyncio.gather(*(self._listed(kind) for kind in _KINDS))
        return [
            Thing(
                kind=name,
                id=one["id"],
                tags=tags,
                costs=name in {"address", "router"},
                name=words(one).get(NAME_TAG, ""),
            )
            for name, found in zip(_KINDS.values(), listed, strict=True)
            for one in found
            if (tags := of_network(one)) and site in {"", tags.site}
        ]

    async def port(self, tags: Tags, name: str, network: str, group: str) -> str:
        """Return a lease's port with a floating address, made if it is not there. Idempotent."""
        ports = await self._of_lease("ports", tags.lease)
        if ports:
            port = str(ports[0]["id"])
        else:
            wanted: Json = {"network_id": network, "name": name, "description": described(tags)}
            groups = [group] if group else await self._own_groups()
            port = await self._post("ports", wanted | {"security_groups": groups})
        addresses = await self._of_lease("floatingips", tags.lease)
        if not addresses:
            outside = await self._outside()
            if not outside:
                raise InvalidSpec(
                    "The cloud has no network that floating addresses come from.",
                    hint='Set address = "fixed", or name external_network in the settings.',
                )
            wanted = {"floating_network_id": outside, "port_id": port}
            await self._post("floatingips", wanted | {"description": described(tags)})
        elif not any(one.get("port_id") == port for one in addresses):
            path = f"/floatingips/{addresses[0]['id']}"
            await self._region.ask("network", "PUT", path, {"floatingip": {"port_id": port}})
        return port

    async def remove(self, lease_id: str) -> bool:
        """Begin to remove a lease's own ports and addresses; return whether none was left."""
        found = False
        for kind in ("floatingips", "ports"):
            for one in await self._of_lease(kind, lease_id):
                found = True
                await self._region.delete("network", f"/{kind}/{one['id']}")
        return not found

    # --- finding

    async def _found(self) -> str:
        """Return what `ready` does if all of it is there and complete, else nothing."""
        if self._section.security_groups:
            network = await self._usable_network()
            return f"{network}/" if network else ""
        network, groups = await asyncio.gather(
            self._usable_network(), self._mine("security-groups")
        )
        group = _complete(groups)
        return f"{network}/{group}" if network and group else ""

    async def _usable_network(self) -> str:
        return await self._own_network() or _complete(await self._mine("networks"))

    async def _own_network(self) -> str:
        """Return the id of the settings' network, if they name one."""
        wanted = self._section.network
        if not wanted:
            return ""
        found = await self._named("networks", wanted)
        if not found:
            raise NotFound(
                f"There is no network {wanted!r} in {self._region.name}.",
                hint="Correct network in the settings, or leave it out to have one made.",
            )
        return found

    async def _own_groups(self) -> list[str]:
        found = []
        for name in self._section.security_groups:
            if not (one := await self._named("security-groups", name)):
                raise NotFound(
                    f"There is no security group {name!r} in {self._region.name}.",
                    hint="Correct security_groups in the settings.",
                )
            found.append(one)
        return found

    async def _outside(self) -> str:
        """Return the id of the network that leads out; empty if there is none."""
        found = await self._listed("networks", **{"router:external": "true"})
        wanted = self._section.external_network
        hits = [one for one in found if not wanted or wanted in {one["id"], one.get("name")}]
        if wanted and not hits:
            names = ", ".join(sorted(str(one.get("name")) for one in found)) or "none"
            raise NotFound(
                f"There is no external network {wanted!r} in {self._region.name}.",
                hint=f"There are: {names}.",
            )
        hits.sort(key=lambda one: (not one.get("is_default"), str(one.get("name")), one["id"]))
        return hits[0]["id"] if hits else ""

    async def _named(self, kind: str, wanted: str) -> str:
        found = await self._listed(kind, name=wanted) or await self._listed(kind, id=wanted)
        return min((one["id"] for one in found), default="")

    async def _mine(self, kind: str) -> list[Json]:
        """Return what is shared of a kind, in an order that is the same whoever looks."""
        found = await self._listed(kind, name=self._name)
        mine = [one for one in found if of_network(one) == self._shared]
        return sorted(mine, key=lambda one: str(one["id"]))

    async def _of_lease(self, kind: str, lease_id: str) -> list[Json]:
        found = [
            one
            for one in await self._listed(kind)
            if (tags := of_network(one))
            and (tags.site, tags.lease) == (self._shared.site, lease_id)
        ]
        return sorted(found, key=lambda one: str(one["id"]))

    async def _listed(self, kind: str, **query: str) -> list[Json]:
        return await self._region.listed("network", f"/{kind}", _ANSWERS[kind], **query)

    async def _in_use(self, network: str) -> bool:
        ports = await self._listed("ports", network_id=network)
        return any(not str(one.get("device_owner")).startswith(_OWN_PORTS) for one in ports)

    # --- making

    async def _made(self) -> str:
        group = "" if self._section.security_groups else await self._make_group()
        network = await self._own_network() or await self._make_network()
        return f"{network}/{group}"

    async def _make_group(self) -> str:
        found = await self._mine("security-groups")
        group = found[0]["id"] if found else await self._post("security-groups", self._labels())
        for rule in self._rules(group):
            body = {"security_group_rule": rule | {"security_group_id": group}}
            with contextlib.suppress(Conflict):  # it is there already
                await self._region.ask("network", "POST", "/security-group-rules", body)
        await self._mark("security-groups", group)
        return group

    def _rules(self, group: str) -> list[Json]:
        """Return what a security group lets in: SSH, from where the settings say."""
        del group
        return [
            {
                "direction": "ingress",
                "ethertype": f"IPv{ip_network(source).version}",
                "protocol": "tcp",
                "port_range_min": 22,
                "port_range_max": 22,
                "remote_ip_prefix": source,
            }
            for source in self._section.ssh_from
        ]

    async def _make_network(self) -> str:
        found = await self._mine("networks")
        network = found[0]["id"] if found else await self._post("networks", self._labels())
        subnets = await self._region.listed("network", "/subnets", "subnets", network_id=network)
        if subnets:
            subnet = str(min(one["id"] for one in subnets))
        else:
            wanted: Json = {"network_id": network, "ip_version": 4, "cidr": self._section.subnet}
            if self._section.name_servers:
                wanted["dns_nameservers"] = list(self._section.name_servers)
            try:
                subnet = await self._post("subnets", wanted | self._labels())
            except InvalidSpec as error:
                if "overlap" in error.message.lower():  # with its own, that was not shown yet
                    raise Unavailable(error.message, hint=error.hint) from error
                raise
        if outside := await self._outside():
            await self._make_router(outside, network, subnet)
        elif self._section.floating:
            raise InvalidSpec(
                "The cloud has no network that leads out.",
                hint="Name external_network or network in the settings.",
            )
        await self._mark("networks", network)
        return network

    async def _make_router(self, outside: str, network: str, subnet: str) -> None:
        routers = await self._mine("routers")
        if routers:
            router = routers[0]["id"]
        else:
            gateway = {"external_gateway_info": {"network_id": outside}}
            router = await self._post("routers", self._labels() | gateway)
        ports = await self._listed("ports", device_id=router, network_id=network)
        if not ports:
            path = f"/routers/{router}/add_router_interface"
            await self._region.ask("network", "PUT", path, {"subnet_id": subnet})

    async def _take_down(self) -> bool | None:
        """Remove router, network and group; return whether none was left, None if in use."""
        routers, networks, groups = await asyncio.gather(
            *(self._mine(kind) for kind in ("routers", "networks", "security-groups"))
        )
        for network in networks:
            if await self._in_use(network["id"]):
                return None
        for router in routers:
            await self._remove_router(router["id"])
        for network in networks:
            await self._region.delete("network", f"/networks/{network['id']}")
        for group in groups:
            await self._region.delete("network", f"/security-groups/{group['id']}")
        return not (routers or networks or groups)

    async def _remove_router(self, router: str) -> None:
        for port in await self._listed("ports", device_id=router):
            if port.get("device_owner") == "network:router_gateway":
                continue
            with contextlib.suppress(NotFound):
                path = f"/routers/{router}/remove_router_interface"
                await self._region.ask("network", "PUT", path, {"port_id": port["id"]})
        await self._region.delete("network", f"/routers/{router}")

    def _labels(self) -> Json:
        return {"name": self._name, "description": described(self._shared, **self._told)}

    async def _mark(self, kind: str, one: str) -> None:
        """Say that all of it is there."""
        told = described(self._shared, **self._told, **{_READY: "yes"})
        body = {_one(kind): {"description": told}}
        await self._region.ask("network", "PUT", f"/{kind}/{one}", body)

    async def _post(self, kind: str, wanted: Json) -> str:
        answer = await self._region.ask("network", "POST", f"/{kind}", {_one(kind): wanted})
        made = answer.get(_one(kind))
        if not isinstance(made, dict) or not isinstance(made.get("id"), str):
            raise not_understood(f"make one of {kind}")
        return str(made["id"])


def _one(kind: str) -> str:
    return kind.removesuffix("s").replace("-", "_")


def _complete(found: list[Json]) -> str:
    """Return the first that is marked as ready."""
    return next((one["id"] for one in found if f"gridcloud-{_READY}" in words(one)), "")
