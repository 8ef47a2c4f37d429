"""Routes about networks by name."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field, field_validator

from gridcloud.model.accounts import NetworkInfo, NetworkReport
from gridcloud.model.frozen import Frozen
from gridcloud.model.machine import Name
from gridcloud.model.things import private_range
from gridcloud.site.routes_site import TheSite

router = APIRouter()


class NetworkRequest(Frozen):
    """A network to be made, in a region or, if none is named, where its provider makes it."""

    name: Name
    cidr: Annotated[str, Field(max_length=32)]
    provider: Annotated[str, Field(max_length=64)]
    region: Annotated[str, Field(max_length=128)] = ""

    _private = field_validator("cidr")(private_range)


@router.get("/networks")
async def networks(site: TheSite) -> NetworkReport:
    """Return the networks there are."""
    return await site.networks.networks()


@router.post("/networks", status_code=201)
async def make(site: TheSite, request: NetworkRequest) -> NetworkInfo:
    """Make a network."""
    return await site.networks.make(request.name, request.cidr, request.provider, request.region)


@router.delete("/networks/{name}", status_code=204)
async def remove(site: TheSite, name: str, provider: str) -> None:
    """Remove a network."""
    await site.networks.remove(name, provider)
