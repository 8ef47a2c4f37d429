"""Routes about machines without a job, and about what own clouds hold and cost."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field

from gridcloud.model.accounts import CostReport, SweepReport
from gridcloud.model.fleet import (
    LaunchNews,
    MachineInfo,
    MachineLogin,
    MachinePlan,
    MachineRequest,
)
from gridcloud.model.frozen import Frozen
from gridcloud.site.routes_site import LONGEST_WAIT_SECONDS, TheSite

Wait = Annotated[float, Query(ge=0, le=LONGEST_WAIT_SECONDS)]
router = APIRouter()


class Extension(Frozen):
    """By how much longer a machine is to last."""

    by: Annotated[timedelta, Field(gt=timedelta(0), le=timedelta(days=365))]


class LoginRequest(Frozen):
    """The OpenSSH public key line of who wants to log in."""

    public_key: Annotated[str, Field(max_length=16 * 1024)]


class SweepRequest(Frozen):
    """What a sweep may do."""

    dry_run: bool = True
    all_sites: bool = False
    remove_others: bool = False


class ConsoleText(Frozen):
    """What a machine wrote to its console."""

    text: str


@router.post("/machines/plan")
async def plan(site: TheSite, request: MachineRequest) -> MachinePlan:
    """Judge where machines would be made; changes nothing."""
    return await site.machines.plan(request)


@router.post("/machines", status_code=201)
async def start(site: TheSite, request: MachineRequest) -> list[MachineInfo]:
    """Begin to make machines."""
    return await site.machines.start(request)


@router.get("/machines")
async def machines(site: TheSite, *, ended: bool = False) -> list[MachineInfo]:
    """Return the machines there are, without their user-data."""
    return await site.machines.machines(ended=ended)


@router.get("/machines/{name}")
async def machine(site: TheSite, name: str, wait: Wait = 0) -> MachineInfo:
    """Return a machine; wait up to ``wait`` seconds until it is ready or over."""
    return await site.machines.machine(name, wait)


@router.get("/machines/{name}/events")
async def events(site: TheSite, name: str, after: int = 0, wait: Wait = 0) -> list[LaunchNews]:
    """Return what was said while a machine was made; wait up to ``wait`` seconds for news."""
    return await site.machines.events(name, after, wait)


@router.get("/machines/{name}/boot-log")
async def boot_log(site: TheSite, name: str) -> ConsoleText:
    """Return the end of what a machine wrote to its console."""
    return ConsoleText(text=await site.machines.boot_log(name))


@router.post("/machines/{name}/stop")
async def stop(site: TheSite, name: str) -> MachineInfo:
    """Begin to give a machine back."""
    return await site.machines.stop(name)


@router.post("/machines/{name}/extend")
async def extend(site: TheSite, name: str, extension: Extension) -> MachineInfo:
    """Let a machine last longer."""
    return await site.machines.extend(name, extension.by)


@router.post("/machines/{name}/login")
async def login(site: TheSite, name: str, request: LoginRequest) -> MachineLogin:
    """Return a certificate for a key, and where to log in with it."""
    return await site.machines.login(name, request.public_key)


@router.post("/sweep")
async def sweep(site: TheSite, request: SweepRequest) -> SweepReport:
    """Find, and unless told not to remove, what no lease knows."""
    return await site.sweep(
        dry_run=request.dry_run,
        all_sites=request.all_sites,
        remove_others=request.remove_others,
    )


@router.get("/costs")
async def costs(site: TheSite, since: datetime | None = None) -> CostReport:
    """Return what own machines at clouds cost."""
    if since is not None and since.tzinfo is None:
        since = since.astimezone()
    return await site.costs(since)
