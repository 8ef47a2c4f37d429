"""The synchronous face of the client: the same verbs for scripts, notebooks and the shell."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from gridcloud.client.asynchronous import AsyncClient, JobEvent
from gridcloud.model.api import (
    CommunityInfo,
    HostKeys,
    InvitationInfo,
    MemberInfo,
    OffersReply,
    ProviderInfo,
    SiteInfo,
    SiteStatus,
)
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.need import Need

T = TypeVar("T")


class Client:
    """As `AsyncClient`, but every method blocks until its answer is there.

    It may be used in ``with`` or be closed by `close`; it works where an event loop runs already
    (as in a notebook), since its own loop has a thread. Methods may be called from any thread.
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
        self._async = AsyncClient(state=state, settings=settings, url=url, token=token, start=start)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._run(self._async.__aenter__())
        except BaseException:
            self._end_thread()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        if not self._loop.is_closed():
            self._run(self._async.__aexit__(None, None, None))
            self._end_thread()

    def submit(self, spec: JobSpec) -> list[Job]:
        """As `AsyncClient.submit`."""
        return self._run(self._async.submit(spec))

    def jobs(self, *, latest: int = 50, states: Sequence[JobState] | None = None) -> list[Job]:
        """As `AsyncClient.jobs`."""
        return self._run(self._async.jobs(latest=latest, states=states))

    def job(self, job_id: str) -> list[Job]:
        """As `AsyncClient.job`."""
        return self._run(self._async.job(job_id))

    def wait(self, job_id: str, timeout: timedelta | None = None) -> list[Job]:
        """As `AsyncClient.wait`."""
        return self._run(self._async.wait(job_id, timeout))

    def cancel(self, job_id: str) -> list[Job]:
        """As `AsyncClient.cancel`."""
        return self._run(self._async.cancel(job_id))

    def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """As `AsyncClient.events`."""
        return self._run(self._async.events(job_id, after))

    def logs(
        self, job_id: str, *, stream: str = "stdout", offset: int = 0, follow: bool = False
    ) -> Iterator[bytes]:
        """As `AsyncClient.logs`."""
        source = self._async.logs(job_id, stream=stream, offset=offset, follow=follow)
        try:
            while (data := self._run(_next(source))) is not None:
                yield data
        finally:
            with contextlib.suppress(RuntimeError):  # a step cut short may still be ending
                self._run(_close(source))

    def offers(self, need: Need | None = None, site: str | None = None) -> OffersReply:
        """As `AsyncClient.offers`."""
        return self._run(self._async.offers(need, site))

    def status(self) -> SiteStatus:
        """As `AsyncClient.status`."""
        return self._run(self._async.status())

    def site(self) -> SiteInfo:
        """As `AsyncClient.site`."""
        return self._run(self._async.site())

    def stop(self) -> None:
        """As `AsyncClient.stop`."""
        self._run(self._async.stop())

    def providers(self) -> list[ProviderInfo]:
        """As `AsyncClient.providers`."""
        return self._run(self._async.providers())

    def add_provider(self, name: str, section: dict[str, Any]) -> ProviderInfo:
        """As `AsyncClient.add_provider`."""
        return self._run(self._async.add_provider(name, section))

    def check_provider(self, name: str) -> ProviderInfo:
        """As `AsyncClient.check_provider`."""
        return self._run(self._async.check_provider(name))

    def remove_provider(self, name: str) -> None:
        """As `AsyncClient.remove_provider`."""
        self._run(self._async.remove_provider(name))

    def host_keys(self, host: str, port: int = 22) -> HostKeys:
        """As `AsyncClient.host_keys`."""
        return self._run(self._async.host_keys(host, port))

    def communities(self) -> list[CommunityInfo]:
        """As `AsyncClient.communities`."""
        return self._run(self._async.communities())

    def create_community(self, name: str) -> CommunityInfo:
        """As `AsyncClient.create_community`."""
        return self._run(self._async.create_community(name))

    def invite(
        self,
        community: str,
        *,
        roles: Sequence[str] = ("provider", "consumer"),
        valid_for: timedelta = timedelta(days=1),
    ) -> InvitationInfo:
        """As `AsyncClient.invite`."""
        return self._run(self._async.invite(community, roles=roles, valid_for=valid_for))

    def join_community(self, code: str, site_name: str | None = None) -> CommunityInfo:
        """As `AsyncClient.join_community`."""
        return self._run(self._async.join_community(code, site_name))

    def members(self, community: str) -> list[MemberInfo]:
        """As `AsyncClient.members`."""
        return self._run(self._async.members(community))

    def leave_community(self, community: str) -> None:
        """As `AsyncClient.leave_community`."""
        self._run(self._async.leave_community(community))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupted caller (Ctrl-C) leaves nothing running behind it
            raise

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(source: AsyncIterator[bytes]) -> bytes | None:
    return await anext(source, None)


async def _close(source: AsyncIterator[bytes]) -> None:
    close = getattr(source, "aclose", None)
    if close:
        await close()
