"""Routes about jobs, offers, providers and the site itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from gridcloud.model.api import (
    HostKeys,
    OffersReply,
    OffersRequest,
    ProviderInfo,
    SiteInfo,
    SiteStatus,
)
from gridcloud.model.asking import ProviderKind
from gridcloud.model.frozen import Frozen
from gridcloud.model.job import Event, Job, JobSpec, JobState
from gridcloud.site.site import Site

LONGEST_WAIT_SECONDS = 60.0


class NumberedEvent(Event):
    """An event with its place in the order of all events of the site."""

    number: int


class NewProvider(Frozen):
    """A provider section to be added to the settings."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]
    section: dict[str, Any]


class HostKeysRequest(Frozen):
    """The SSH server whose keys are asked for."""

    host: str
    port: Annotated[int, Field(ge=1, le=65535)] = 22


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


TheSite = Annotated[Site, Depends(_site)]
router = APIRouter()


@router.post("/jobs", status_code=201)
async def submit(site: TheSite, spec: JobSpec) -> list[Job]:
    """Take in a job, or an array of them."""
    return await site.submit(spec)


@router.get("/jobs")
async def jobs(
    site: TheSite,
    latest: Annotated[int, Query(ge=1, le=100_000)] = 50,
    state: Annotated[list[JobState] | None, Query()] = None,
) -> list[Job]:
    """Return the latest jobs, oldest first."""
    return await site.jobs.listed(state, latest=latest)


@router.get("/jobs/{job_id}")
async def job(
    site: TheSite,
    job_id: str,
    wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT_SECONDS)] = 0,
) -> list[Job]:
    """Return a job, or all tasks of an array; wait up to ``wait`` seconds until they ended."""
    return await site.scheduler.wait(job_id, wait)


@router.post("/jobs/{job_id}/cancel")
async def cancel(site: TheSite, job_id: str) -> list[Job]:
    """End a job, or all tasks of an array."""
    return await site.scheduler.cancel(job_id)


@router.get("/jobs/{job_id}/events")
async def events(site: TheSite, job_id: str, after: int = 0) -> list[NumberedEvent]:
    """Return what happened to a job, or to all tasks of an array, oldest first."""
    found = [job.id for job in await site.jobs.resolve(job_id)]
    return [
        NumberedEvent(number=number, **event.model_dump())
        for number, event in await site.jobs.events(found, after)
    ]


@router.get("/jobs/{job_id}/log", response_class=StreamingResponse)
async def log(
    site: TheSite,
    job_id: str,
    stream: Annotated[str, Query(pattern="^(stdout|stderr)$")] = "stdout",
    offset: Annotated[int, Query(ge=0)] = 0,
    *,
    follow: bool = False,
) -> StreamingResponse:
    """Return the raw bytes of one stream from ``offset`` on; with ``follow`` until the job ends."""
    chunks: AsyncIterator[bytes] = await site.log(job_id, stream, offset, follow=follow)
    return StreamingResponse(chunks, media_type="application/octet-stream")


@router.post("/offers")
async def offers(site: TheSite, request: OffersRequest) -> OffersReply:
    """Judge all offers for a need; changes nothing."""
    return OffersReply(need=request.need, plan=await site.plan(request))


@router.get("/status")
async def status(site: TheSite) -> SiteStatus:
    """Return how the site fares."""
    return await site.status()


@router.get("/site")
async def info(site: TheSite) -> SiteInfo:
    """Return the site's identity."""
    return await site.info()


@router.post("/stop", status_code=202)
async def stop(request: Request) -> None:
    """Stop the site's daemon. Jobs go on and are found again at the next start."""
    request.app.state.stop()


@router.get("/providers")
async def providers(site: TheSite) -> list[ProviderInfo]:
    """Return the sources of capacity."""
    return await site.provider_infos()


@router.get("/provider-kinds/{kind}")
async def provider_kind(site: TheSite, kind: str) -> ProviderKind:
    """Return what to ask who adds a provider of a kind."""
    return await site.provider_kind(kind)


@router.post("/providers", status_code=201)
async def add_provider(site: TheSite, new: NewProvider) -> ProviderInfo:
    """Check a provider, then keep it in the settings file."""
    return await site.add_provider(new.name, new.section)


@router.post("/providers/{name}/check")
async def check_provider(site: TheSite, name: str) -> ProviderInfo:
    """Prove that a provider works."""
    return await site.check_provider(name)


@router.delete("/providers/{name}", status_code=204)
async def remove_provider(site: TheSite, name: str) -> None:
    """Take a provider out of the settings file."""
    await site.remove_provider(name)


@router.post("/host-keys")
async def host_keys(site: TheSite, request: HostKeysRequest) -> HostKeys:
    """Return the keys an SSH server shows, for a person to compare."""
    return await site.host_keys(request.host, request.port)
