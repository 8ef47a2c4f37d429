"""Routes about volumes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from gridcloud.model.accounts import VolumeInfo, VolumeReport
from gridcloud.model.frozen import Frozen
from gridcloud.model.machine import Name
from gridcloud.site.routes_site import TheSite

router = APIRouter()


class VolumeRequest(Frozen):
    """A volume to be made; at the only provider that has some if none is named."""

    name: Name
    size_bytes: Annotated[int, Field(ge=2**20, le=2**60)]
    provider: Annotated[str, Field(max_length=64)] = ""


@router.get("/volumes")
async def volumes(site: TheSite) -> VolumeReport:
    """Return the volumes there are."""
    return await site.volumes.volumes()


@router.post("/volumes", status_code=201)
async def make(site: TheSite, request: VolumeRequest) -> VolumeInfo:
    """Make a volume."""
    return await site.volumes.make(request.name, request.size_bytes, request.provider)


@router.delete("/volumes/{name}")
async def remove(site: TheSite, name: str, provider: str = "") -> VolumeInfo:
    """Remove a volume and what is on it; return what it was."""
    return await site.volumes.remove(name, provider)
