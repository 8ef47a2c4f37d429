"""A server that speaks the part of DigitalOcean's API (v2) that Libcloud's driver asks for.

    async with droplets.running() as cloud:
        cloud.url, droplets.TOKEN          # where it is, and the token that it takes
        cloud.machines                     # the droplets that are truly there

Requests are checked as the API's reference has them: fields, types, and that names of regions,
sizes and images are known. A droplet is ``new`` at first, then ``active``, and has its address at
once; it boots nothing. ``cloud.limit`` is how many the account may have.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

TOKEN = "dop_v1_not-a-secret"
_CREATED = "2025-01-01T00:00:00Z"
REGIONS = [
    {"slug": "ams3", "name": "Amsterdam 3", "available": True, "features": []},
    {"slug": "fra1", "name": "Frankfurt 1", "available": True, "features": []},
    {"slug": "nyc2", "name": "New York 2", "available": False, "features": []},
]
SIZES = [
    {
        "slug": slug,
        "memory": memory,
        "vcpus": cpus,
        "disk": disk,
        "transfer": 1.0,
        "price_monthly": price * 720,
        "price_hourly": price,
        "regions": regions,
        "available": True,
    }
    for slug, cpus, memory, disk, price, regions in (
        ("s-1vcpu-1gb", 1, 1024, 25, 0.009, ["ams3", "fra1"]),
        ("s-4vcpu-8gb", 4, 8192, 160, 0.071, ["fra1"]),
    )
]
IMAGES = [
    {
        "id": number,
        "name": name,
        "distribution": "Debian",
        "slug": slug,
        "public": True,
        "regions": ["ams3", "fra1"],
        "min_disk_size": 7,
        "created_at": created,
    }
    for number, name, slug, created in (
        (101, "12 x64", "debian-12-x64", _CREATED),
        (102, "13 x64", "debian-13-x64", "2025-09-01T00:00:00Z"),
    )
]
_FIELDS: dict[str, Any] = {
    "name": str,
    "size": str,
    "region": str,
    "image": (int, str),  # an id, which Libcloud has as a text, or a slug
    "user_data": str,
    "tags": list,
    "ssh_keys": list,
}
_NEEDED = {"name", "size", "region", "image"}
_PAGE = 2


@dataclass
class Account:
    """What there is. ``asked`` are the bodies of requests for droplets."""

    machines: dict[int, dict[str, Any]] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    limit: int = 100
    url: str = ""
    _ids: Any = field(default_factory=lambda: itertools.count(3164444))

    async def create(self, request: web.Request) -> web.Response:
        """POST /v2/droplets."""
        body = await request.json()
        if problem := _problem(body):
            return _error(422, "unprocessable_entity", problem)
        if len(self.machines) >= self.limit:
            return _error(422, "unprocessable_entity", "creating this will exceed your limit")
        self.asked.append(body)
        number = next(self._ids)
        public = {"ip_address": f"203.0.113.{number % 250 + 1}", "type": "public"}
        self.machines[number] = {
            "id": number,
            "name": body["name"],
            "memory": 1024,
            "vcpus": 1,
            "disk": 25,
            "locked": False,
            "status": "new",
            "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "features": [],
            "backup_ids": [],
            "snapshot_ids": [],
            "image": next(one for one in IMAGES if str(one["id"]) == str(body["image"])),
            "size": next(one for one in SIZES if one["slug"] == body["size"]),
            "size_slug": body["size"],
            "networks": {"v4": [public], "v6": []},
            "region": next(one for one in REGIONS if one["slug"] == body["region"]),
            "tags": body.get("tags", []),
        }
        return web.json_response({"droplet": self.machines[number]}, status=202)

    async def listed(self, request: web.Request) -> web.Response:
        """GET /v2/droplets."""
        found = [dict(one) for one in self.machines.values()]
        for one in self.machines.values():
            one["status"] = "active"
        return _page(request, "droplets", found)

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE /v2/droplets/ID."""
        if self.machines.pop(int(request.match_info["id"]), None) is None:
            return _error(404, "not_found", "The resource you were accessing could not be found.")
        return web.Response(status=204)


def _problem(body: dict[str, Any]) -> str:
    """Return what is wrong with a request for a droplet."""
    if missing := _NEEDED - set(body):
        return f"{', '.join(missing)} is missing"
    for name, value in body.items():
        if name not in _FIELDS or not isinstance(value, _FIELDS[name]):
            return f"{name} is not what it must be"
    for name, known in (
        ("region", {one["slug"] for one in REGIONS if one["available"]}),
        ("size", {one["slug"] for one in SIZES}),
        ("image", {str(one["id"]) for one in IMAGES}),
    ):
        if str(body[name]) not in known:
            return f"{name} is unknown"
    if len(body["user_data"]) > 64 * 1024:
        return "user_data is too long"
    return ""


def _page(request: web.Request, what: str, found: list[dict[str, Any]]) -> web.Response:
    """Answer a list a page at a time, as links lead on; pages are short, for that to happen."""
    page = int(request.query.get("page", "1"))
    told: dict[str, Any] = {what: found[(page - 1) * _PAGE : page * _PAGE], "links": {}}
    told["meta"] = {"total": len(found)}
    if page * _PAGE < len(found):
        last = -(-len(found) // _PAGE)
        there = f"{request.url.origin()}/v2/{what}?page="
        told["links"] = {"pages": {"next": f"{there}{page + 1}", "last": f"{there}{last}"}}
    return web.json_response(told)


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"id": code, "message": message}, status=status)


@web.middleware
async def _let_in(request: web.Request, handler: Any) -> web.StreamResponse:
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        return _error(401, "unauthorized", "Unable to authenticate you")
    answer: web.StreamResponse = await handler(request)
    return answer


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Account]:
    """Give an empty account."""
    account = Account()
    app = web.Application(middlewares=[_let_in])

    def listing(what: str, found: list[dict[str, Any]]) -> Any:
        async def listed(request: web.Request) -> web.Response:
            return _page(request, what, found)

        return web.get(f"/v2/{what}", listed)

    app.add_routes(
        [
            listing("regions", REGIONS),
            listing("sizes", SIZES),
            listing("images", IMAGES),
            web.get("/v2/droplets", account.listed),
            web.post("/v2/droplets", account.create),
            web.delete("/v2/droplets/{id}", account.delete),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        account.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield account
    finally:
        await runner.cleanup()
