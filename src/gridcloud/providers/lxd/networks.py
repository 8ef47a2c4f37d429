"""Networks by name at LXD: bridges with addresses and a way out, known by their tags."""

from __future__ import annotations

import hashlib
from ipaddress import IPv4Network
from typing import Any

from gridcloud.errors import Conflict, Forbidden, InvalidSpec, NotFound
from gridcloud.model.things import NAME_TAG, NETWORK, Network, Tags, Thing
from gridcloud.providers.lxd.api import API, segment
from gridcloud.providers.lxd.instances import tags_of, user_keys

#: What their names begin with. A bridge is an interface, whose name has 15 characters at most.
_PREFIX, _DIGITS = "gcn", 11
#: Projects may share networks: which one it was made for.
_PROJECT_TAG = "user.gridcloud-project"


class Networks:
    """The networks of a site in a project. Names at LXD are made of both, so sites do not meet."""

    def __init__(self, api: API, site: str) -> None:
        self._api, self._site = api, site

    async def listed(self) -> list[Network]:
        """Return them."""
        return [
            Network(
                id=one["name"],
                name=str(one["config"].get(f"user.{NAME_TAG}")),
                cidr=_range(str(one["config"].get("ipv4.address", ""))),
            )
            for one, _ in await self._mine()
        ]

    async def things(self) -> list[Thing]:
        """Return them as things. They cost nothing."""
        return [
            Thing(
                kind="network",
                id=one["name"],
                tags=tags,
                costs=False,
                name=str(one["config"].get(f"user.{NAME_TAG}")),
            )
            for one, tags in await self._mine()
        ]

    async def sites(self) -> set[str]:
        """Return the sites that have some here."""
        return {tags.site for _, tags in await self._tagged()}

    async def make(self, tags: Tags, name: str, cidr: str) -> None:
        """Make one: its first address is LXD's own. Idempotent."""
        server = await self._api.get("")
        if server["environment"].get("server_clustered"):
            raise InvalidSpec(
                "A cluster of LXD needs its networks described for each member.",
                hint="Make it by hand, and name it in the settings: `network`.",
            )
        if any(one.name == name for one in await self.listed()):
            return
        subnet = IPv4Network(cidr)
        if subnet.prefixlen > 29:
            raise InvalidSpec(f"{cidr} has no room for machines.", hint="Give it /29 or more.")
        body = {
            "name": self._called(name),
            "type": "bridge",
            "description": f"gridcloud: {name}",
            "config": {
                "ipv4.address": f"{subnet[1]}/{subnet.prefixlen}",
                "ipv4.nat": "true",
                "ipv6.address": "none",
                f"user.{NAME_TAG}": name,
                _PROJECT_TAG: self._api.project,
                **user_keys(tags),
            },
        }
        try:
            await self._api.ask("POST", "/networks", body)
        except Conflict:
            if not any(one.name == name for one in await self.listed()):
                raise  # another site's, or no site's

    async def ready(self, name: str) -> str:
        """Return what LXD calls one; raises `NotFound`."""
        called = self._called(name)
        if all(one["name"] != called for one, _ in await self._mine()):
            raise NotFound(f"There is no network {name!r} here.", hint="Bring its stack up again.")
        return called

    async def remove(self, name: str) -> bool:
        """Remove one; return whether it is gone, which it cannot be while a machine is in it."""
        called = self._called(name)
        there = {one["name"]: one for one, _ in await self._mine()}
        if called not in there:
            return True
        if there[called].get("used_by"):
            return False
        try:
            await self._api.ask("DELETE", f"/networks/{segment(called)}")
        except NotFound:
            return True
        except (Conflict, InvalidSpec):
            return False  # a machine came into it meanwhile
        return True

    def _called(self, name: str) -> str:
        whole = f"{self._site}/{self._api.project}/{name}"
        digest = hashlib.sha256(whole.encode()).hexdigest()
        return f"{_PREFIX}{digest[:_DIGITS]}"

    async def _mine(self) -> list[tuple[dict[str, Any], Tags]]:
        return [(one, tags) for one, tags in await self._tagged() if tags.site == self._site]

    async def _tagged(self) -> list[tuple[dict[str, Any], Tags]]:
        """Return the networks of all sites that were made for the project."""
        try:
            told = await self._api.get("/networks", recursion="1")
        except Forbidden:
            return []  # who may not see networks has made none
        here = [
            one
            for one in told or []
            if (one.get("config") or {}).get(_PROJECT_TAG) == self._api.project
        ]
        tagged = [(one, tags_of(one)) for one in here]
        return [(one, tags) for one, tags in tagged if tags and tags.lease == NETWORK]


def _range(address: str) -> str:
    return str(IPv4Network(address, strict=False)) if "/" in address else ""
