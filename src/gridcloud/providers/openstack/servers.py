"""Machines in nova: made once for each lease, found by name and metadata, read, removed."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from gridcloud.errors import Conflict, GridcloudError, NotFound
from gridcloud.model.things import ENDS_TAG, MACHINE, Tags, Thing
from gridcloud.providers.cloud.clouds import Build, Condition, Server
from gridcloud.providers.openstack.errors import as_needed, build_failed, not_understood
from gridcloud.providers.openstack.regions import Json, Region
from gridcloud.providers.openstack.tagging import of_server

_CONDITIONS = {
    "ACTIVE": Condition.RUNNING,
    "REBOOT": Condition.RUNNING,
    "HARD_REBOOT": Condition.RUNNING,
    "PASSWORD": Condition.RUNNING,
    "ERROR": Condition.FAILED,
    "SHUTOFF": Condition.STOPPED,
    "PAUSED": Condition.STOPPED,
    "SUSPENDED": Condition.STOPPED,
    "SHELVED": Condition.STOPPED,
    "SHELVED_OFFLOADED": Condition.STOPPED,
}
_GONE = frozenset({"DELETED", "SOFT_DELETED"})
_BUILT_SECONDS, _LOOK_SECONDS = 40.0, 1.0
_LOG_LINES, _LOG_BYTES = 2000, 64 * 1024


async def of_lease(region: Region, site: str, lease_id: str) -> list[Json]:
    """Return the machines of a lease, in an order that is the same whoever looks: the first is
    the one that counts."""
    # Nova takes a name as a regular expression, and knows no search by metadata.
    query = {"name": f"{re.escape(lease_id)}$"}
    found = await region.listed("compute", "/servers/detail", "servers", **query)
    return sorted(
        (one for one in found if _is(one, site, lease_id)),
        key=lambda one: (one.get("status") == "ERROR", str(one.get("created")), one["id"]),
    )


async def of_site(region: Region, site: str) -> list[Thing]:
    """Return all machines of a site; if none is named, those of all sites."""
    return [
        Thing(kind=MACHINE, id=one["id"], tags=tags) for one, tags in await _tagged(region, site)
    ]


async def may_be_in(region: Region, site: str, network: str) -> bool:
    """Say whether a machine of a site is in a network, or may come to be: nova gives a machine
    its port only while it is built."""
    found = [one.get("addresses") for one, _ in await _tagged(region, site)]
    return any(not addresses or network in addresses for addresses in found)


async def _tagged(region: Region, site: str) -> list[tuple[Json, Tags]]:
    found = await region.listed("compute", "/servers/detail", "servers")
    return [
        (one, tags)
        for one in found
        if one.get("status") not in _GONE and (tags := of_server(one)) and site in {"", tags.site}
    ]


async def create(
    region: Region, build: Build, flavor: str, zone: str, attached: Json, groups: list[str]
) -> str:
    """Make a machine, unless the lease has one; return its id. ``attached`` is its network.

    Nova knows no tokens: of two that were made at once all but the first are removed.
    """
    site, lease_id = build.tags.site, build.tags.lease
    if there := await of_lease(region, site, lease_id):
        return str(there[0]["id"])
    wanted: Json = {
        "name": build.name,
        "imageRef": build.image.id,
        "flavorRef": flavor,
        "networks": [attached],
        "metadata": build.tags.written(),
        "config_drive": True,
        "user_data": base64.b64encode(build.user_data).decode(),
    }
    if zone:
        wanted["availability_zone"] = zone
    if "uuid" in attached and groups:
        wanted["security_groups"] = [{"name": group} for group in groups]
    try:
        answer = await region.ask("compute", "POST", "/servers", {"server": wanted})
    except GridcloudError as error:
        raise as_needed(error) from error
    made = answer.get("server")
    if not isinstance(made, dict) or not isinstance(made.get("id"), str):
        raise not_understood("make a machine")
    kept, *others = await of_lease(region, site, lease_id) or [made]
    for other in others:
        await region.delete("compute", f"/servers/{other['id']}")
    return str(kept["id"])


async def remove(region: Region, site: str, lease_id: str) -> bool:
    """Begin to remove the machines of a lease; return whether none was left."""
    found = await of_lease(region, site, lease_id)
    for one in found:
        if one.get("OS-EXT-STS:task_state") != "deleting":
            await region.delete("compute", f"/servers/{one['id']}")
    return not found


async def boot_log(region: Region, server: str) -> str:
    """Return the end of a machine's console; empty where there is none."""
    body = {"os-getConsoleOutput": {"length": _LOG_LINES}}
    try:
        answer = await region.ask("compute", "POST", f"/servers/{server}/action", body)
    except (NotFound, Conflict):
        return ""  # it is gone, or has no console yet
    output = answer.get("output")
    text = output if isinstance(output, str) else ""
    return text.encode(errors="replace")[-_LOG_BYTES:].decode(errors="ignore")


async def note_end(region: Region, server: str, tags: Tags) -> None:
    """Write a new end into the metadata of a machine; while it is built, nova wants to wait."""
    body = {"metadata": {ENDS_TAG: tags.written()[ENDS_TAG]}}
    until = asyncio.get_running_loop().time() + _BUILT_SECONDS
    while True:
        try:
            await region.ask("compute", "POST", f"/servers/{server}/metadata", body)
            return
        except Conflict:
            if asyncio.get_running_loop().time() > until:
                raise
            await asyncio.sleep(_LOOK_SECONDS)


def read(found: Mapping[str, Any], *, floating: bool) -> Server:
    """Return how nova shows a machine."""
    status = str(found.get("status"))
    condition = _CONDITIONS.get(status, Condition.BUILDING)
    fault = found.get("fault")
    reason = str(fault.get("message") or "") if isinstance(fault, dict) else ""
    return Server(
        id=str(found.get("id")),
        condition=condition,
        address=address(found, floating=floating),
        reason=build_failed(reason) if condition is Condition.FAILED else "",
    )


def address(found: Mapping[str, Any], *, floating: bool) -> str:
    """Return where this site reaches a machine; of several IPv4 first. Empty until it has one."""
    wanted, usable = "floating" if floating else "fixed", []
    networks = found.get("addresses")
    for addresses in networks.values() if isinstance(networks, dict) else ():
        for one in addresses if isinstance(addresses, list) else ():
            if isinstance(one, dict) and one.get("OS-EXT-IPS:type", "fixed") == wanted:
                try:
                    usable.append(ip_address(str(one.get("addr"))))
                except ValueError:
                    continue
    return min((str(one) for one in usable if one.version == 4), default="") or min(
        (str(one) for one in usable), default=""
    )


def _is(found: Json, site: str, lease_id: str) -> bool:
    tags = of_server(found)
    return (
        tags is not None
        and (tags.site, tags.lease) == (site, lease_id)
        and found.get("status") not in _GONE
    )
