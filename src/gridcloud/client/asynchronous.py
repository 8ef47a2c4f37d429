"""The asynchronous client of a site: everything a site can be asked, typed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import aiohttp
from pydantic import TypeAdapter, ValidationError

from gridcloud.client import starting
from gridcloud.client.machines import MachineVerbs
from gridcloud.errors import GridcloudError, InvalidSpec, Unavailable, from_code
from gridcloud.model.api import (
    CommunityInfo,
    GridSite,
    HostKeys,
    InvitationInfo,
    LeftInfo,
    MemberInfo,
    OffersReply,
    OffersRequest,
    ProviderInfo,
    RequestInfo,
    SiteInfo,
    SiteStatus,
)
from gridcloud.model.choice import Constraints, Strategy
from gridcloud.model.job import Event, Job, JobSpec, JobState
from gridcloud.model.loan import LoanInfo
from gridcloud.model.need import Need
from gridcloud.model.usage import Grouping, KeptReceipt, ReceiptFilter, UsageReport
from gridcloud.settings import settings_file, state_folder

T = TypeVar("T")
_WAIT_SECONDS = 30.0
_CHUNK = 256 * 1024
#: For so long a connection is kept for the next question; a site closes it after five seconds.
_KEPT_IDLE_SECONDS = 3.0


class JobEvent(Event):
    """An event of a job; numbers grow with time."""

    number: int


class AsyncClient(MachineVerbs):
    """A connection to a site. Use it as ``async with AsyncClient() as client:``.

    Without arguments it speaks to the user's own site over its unix socket and starts that site
    when none runs. With ``url`` and ``token`` it speaks to a site's TCP address; paths in a
    `JobSpec` then mean files on that site's host. All methods raise
    `gridcloud.errors.GridcloudError`.
    """

    def __init__(
        self,
        *,
        state: Path | None = None,
        settings: Path | None = None,
        url: str | None = None,
        token: str | None = None,
        start: bool = True,
    ) -> None:
        self._state = (state or state_folder(os.environ)).absolute()
        self._settings = (settings or settings_file(os.environ)).absolute()
        self._url = url.rstrip("/") if url else None
        self._token = token
        self._start = start
        self._folder: int | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector: aiohttp.BaseConnector
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if self._url is None:
            if self._start:
                await asyncio.to_thread(starting.ensure, self._state, self._settings)
            elif not starting.answers(self._state):
                raise Unavailable(
                    f"No site runs on {self._state}.", hint="Start it with 'gridcloud serve'."
                )
            # By way of the folder's descriptor: a socket's path may have 107 bytes at most.
            self._folder = os.open(self._state, os.O_PATH | os.O_DIRECTORY)
            path = f"/proc/self/fd/{self._folder}/api.sock"
            connector = aiohttp.UnixConnector(path, keepalive_timeout=_KEPT_IDLE_SECONDS)
        else:
            connector = aiohttp.TCPConnector(keepalive_timeout=_KEPT_IDLE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session:
            await self._session.close()
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    async def submit(self, spec: JobSpec) -> list[Job]:
        """Hand in a job, or an array of them; return once the site has written them down."""
        return await self._call(list[Job], "POST", "/jobs", spec)

    async def jobs(
        self, *, latest: int = 50, states: Sequence[JobState] | None = None
    ) -> list[Job]:
        """Return the latest jobs, oldest first."""
        query = [("latest", str(latest)), *(("state", state.value) for state in states or ())]
        return await self._call(list[Job], "GET", "/jobs", query=query)

    async def job(self, job_id: str) -> list[Job]:
        """Return a job, or all tasks of an array."""
        return await self._call(list[Job], "GET", f"/jobs/{job_id}")

    async def wait(self, job_id: str, timeout: timedelta | None = None) -> list[Job]:
        """Return the job, or the array's tasks, once all have ended or the timeout is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout.total_seconds() if timeout is not None else None
        while True:
            left = _WAIT_SECONDS if deadline is None else max(0.0, deadline - loop.time())
            query = [("wait", str(min(left, _WAIT_SECONDS)))]
            jobs = await self._call(list[Job], "GET", f"/jobs/{job_id}", query=query)
            if all(job.state.final for job in jobs) or left == 0:
                return jobs

    async def cancel(self, job_id: str) -> list[Job]:
        """Ask for a job, or an array, to end; idempotent, does not wait for the end."""
        return await self._call(list[Job], "POST", f"/jobs/{job_id}/cancel")

    async def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """Return what happened to a job, oldest first; only events numbered above ``after``."""
        query = [("after", str(after))]
        return await self._call(list[JobEvent], "GET", f"/jobs/{job_id}/events", query=query)

    async def logs(
        self, job_id: str, *, stream: str = "stdout", offset: int = 0, follow: bool = False
    ) -> AsyncIterator[bytes]:
        """Yield the raw bytes a job printed; with ``follow``, as they come until it ends."""
        query = {"stream": stream, "offset": str(offset), "follow": str(follow).lower()}
        async with self._http().get(f"{self._base}/jobs/{job_id}/log", params=query) as reply:
            await _raise_for(reply)
            try:
                async for data in reply.content.iter_any():
                    yield data
            except aiohttp.ClientError as error:
                raise Unavailable(f"The site's answer broke off: {error}.") from error

    async def offers(
        self,
        need: Need | None = None,
        site: str | None = None,
        *,
        constraints: Constraints | None = None,
        strategy: Strategy | None = None,
        most: int = 200,
        spot: bool = False,
    ) -> OffersReply:
        """Return the ``most`` best offers judged for a need, the best first; changes nothing.

        ``site``, ``constraints`` and ``strategy`` mean the same as in a `JobSpec`, ``spot`` as in a
        `MachineOrder`.
        """
        try:
            request = OffersRequest(
                need=need or Need(),
                site=site,
                constraints=constraints or Constraints(),
                strategy=strategy,
                most=most,
                spot=spot,
            )
        except ValidationError as error:
            raise InvalidSpec(f"most: {error.errors(include_url=False)[0]['msg']}.") from error
        return await self._call(OffersReply, "POST", "/offers", request)

    async def status(self) -> SiteStatus:
        """Return how the site fares."""
        return await self._call(SiteStatus, "GET", "/status")

    async def site(self) -> SiteInfo:
        """Return the site's identity."""
        return await self._call(SiteInfo, "GET", "/site")

    async def stop(self) -> None:
        """Stop the site's daemon; jobs go on and are found again at its next start."""
        await self._do("POST", "/stop")

    async def providers(self) -> list[ProviderInfo]:
        """Return the site's sources of capacity."""
        return await self._call(list[ProviderInfo], "GET", "/providers")

    async def add_provider(self, name: str, section: dict[str, Any]) -> ProviderInfo:
        """Check a provider's section, then keep it in the settings file."""
        return await self._call(
            ProviderInfo, "POST", "/providers", {"name": name, "section": section}
        )

    async def check_provider(self, name: str) -> ProviderInfo:
        """Prove that a provider works; may take seconds."""
        return await self._call(ProviderInfo, "POST", f"/providers/{name}/check")

    async def remove_provider(self, name: str) -> None:
        """Take a provider out of the settings."""
        await self._do("DELETE", f"/providers/{name}")

    async def loans(self) -> list[LoanInfo]:
        """Return what the site lends, the oldest loan first."""
        return await self._call(list[LoanInfo], "GET", "/loans")

    async def end_loan(self, lease_id: str, *, now: bool = False) -> LoanInfo:
        """End a loan of the site: after its notice, or now. Idempotent."""
        return await self._call(LoanInfo, "POST", f"/loans/{lease_id}/end", {"now": now})

    async def host_keys(self, host: str, port: int = 22) -> HostKeys:
        """Return the keys an SSH server shows; compare them before trusting it."""
        return await self._call(HostKeys, "POST", "/host-keys", {"host": host, "port": port})

    async def communities(self) -> list[CommunityInfo]:
        """Return the communities the site belongs to."""
        return await self._call(list[CommunityInfo], "GET", "/communities")

    async def create_community(self, name: str) -> CommunityInfo:
        """Found a community; this site is its founder."""
        return await self._call(CommunityInfo, "POST", "/communities", {"name": name})

    async def invite(
        self,
        community: str,
        *,
        roles: Sequence[str] = ("provider", "consumer"),
        valid_for: timedelta = timedelta(days=1),
        approve: bool = False,
        uses: int = 1,
    ) -> InvitationInfo:
        """Make out a join code; hand it over in confidence. With ``approve`` its use only asks."""
        body = {
            "roles": list(roles),
            "valid_for": valid_for.total_seconds(),
            "approve": approve,
            "uses": uses,
        }
        return await self._call(
            InvitationInfo, "POST", f"/communities/{community}/invitations", body
        )

    async def join_community(self, code: str, site_name: str | None = None) -> CommunityInfo:
        """Join the community of a code; or ask to, if what is returned says ``waiting``."""
        body = {"code": code, "site_name": site_name}
        return await self._call(CommunityInfo, "POST", "/communities/join", body)

    async def members(self, community: str) -> list[MemberInfo]:
        """Return a community's members, as last seen."""
        return await self._call(list[MemberInfo], "GET", f"/communities/{community}/members")

    async def grid(self, community: str | None = None) -> list[GridSite]:
        """Return the sites of one community, or of all: reachability and what they lend."""
        query = [("community", community)] if community else []
        return await self._call(list[GridSite], "GET", "/grid", query=query)

    async def leave_community(self, community: str) -> LeftInfo:
        """Leave a community for good; its members are told. What is lent there ends first."""
        return await self._call(LeftInfo, "DELETE", f"/communities/{community}")

    async def requests(self, community: str) -> list[RequestInfo]:
        """Return who asks to be admitted to a community, by this site's invitations."""
        return await self._call(list[RequestInfo], "GET", f"/communities/{community}/requests")

    async def approve(self, community: str, site: str) -> MemberInfo:
        """Admit a site that asks, named as `requests` shows it or by its key."""
        path = f"/communities/{community}/requests/{quote(site, safe='')}/approve"
        return await self._call(MemberInfo, "POST", path)

    async def refuse(self, community: str, site: str) -> None:
        """Refuse a site that asks."""
        await self._do("POST", f"/communities/{community}/requests/{quote(site, safe='')}/refuse")

    async def change_roles(
        self, community: str, site: str, *, add: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> MemberInfo:
        """Give a member roles, or take some away; who is a manager, the founder decides."""
        path = f"/communities/{community}/members/{quote(site, safe='')}"
        body = {"add": list(add), "drop": list(drop)}
        return await self._call(MemberInfo, "PATCH", path, body)

    async def remove_member(self, community: str, site: str, reason: str = "") -> None:
        """Remove a member for good. It may come back by a new invitation only."""
        path = f"/communities/{community}/members/{quote(site, safe='')}"
        await self._do("DELETE", path, query=[("reason", reason)])

    async def usage(
        self, by: Grouping = Grouping.COMMUNITY, chosen: ReceiptFilter | None = None
    ) -> UsageReport:
        """Return what the site lent and borrowed, by the receipts that both sides signed."""
        query = [("by", by.value), *_query(chosen)]
        return await self._call(UsageReport, "GET", "/usage", query=query)

    async def receipts(
        self, chosen: ReceiptFilter | None = None, *, latest: int = 50
    ) -> list[KeptReceipt]:
        """Return the latest receipts without their texts, oldest first; loans whose receipt is
        missing are among them."""
        query = [("latest", str(latest)), *_query(chosen)]
        return await self._call(list[KeptReceipt], "GET", "/receipts", query=query)

    async def receipt(self, name: str) -> KeptReceipt:
        """Return one receipt with its signed texts, by the beginning of its id or by its lease."""
        return await self._call(KeptReceipt, "GET", f"/receipts/{quote(name, safe='')}")

    async def books(self, community: str | None = None) -> AsyncIterator[bytes]:
        """Return all receipts as the bytes of a file that proves itself, without this site."""
        query = [("community", community)] if community else []
        try:
            async with self._http().get(f"{self._base}/books", params=query) as reply:
                await _raise_for(reply)
                async for data in reply.content.iter_chunked(_CHUNK):
                    yield data
        except aiohttp.ClientError as error:
            raise Unavailable(f"The site's answer broke off: {error}.") from error

    @property
    def _base(self) -> str:
        return f"{self._url or 'http://site'}/v1"

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise Unavailable("The client is not open.", hint="Use it in an 'async with' block.")
        return self._session

    async def _do(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Sequence[tuple[str, str]] = (),
    ) -> bytes:
        payload = TypeAdapter(Any).dump_json(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if payload else {}
        try:
            async with self._http().request(
                method, self._base + path, params=list(query), data=payload, headers=headers
            ) as reply:
                await _raise_for(reply)
                return await reply.read()
        except aiohttp.ClientError as error:
            raise Unavailable(
                f"The site does not answer: {error}.", hint="See 'gridcloud status'."
            ) from error


def _query(chosen: ReceiptFilter | None) -> list[tuple[str, str]]:
    """Return a filter as the API takes it."""
    given = (chosen or ReceiptFilter()).model_dump(mode="json", exclude_none=True)
    states = given.pop("states")
    return [*given.items(), *(("states", state) for state in states)]


async def _raise_for(reply: aiohttp.ClientResponse) -> None:
    if reply.status < 400:
        return
    try:
        problem = await reply.json(content_type=None)
        error = from_code(problem["code"], problem["detail"], problem.get("hint", ""))
    except (ValueError, KeyError, TypeError) as failure:
        raise GridcloudError(f"The site answered {reply.status} {reply.reason}.") from failure
    raise error
