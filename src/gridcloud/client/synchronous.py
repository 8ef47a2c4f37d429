"""The synchronous face of the client: the same verbs for scripts, notebooks and the shell."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from gridcloud.client.asynchronous import AsyncClient, JobEvent
from gridcloud.model.accounts import (
    CostReport,
    NetworkInfo,
    NetworkReport,
    SweepReport,
    VolumeInfo,
    VolumeReport,
)
from gridcloud.model.api import (
    CommunityInfo,
    GridSite,
    HostKeys,
    InvitationInfo,
    LeftInfo,
    MemberInfo,
    OffersReply,
    ProviderInfo,
    RequestInfo,
    SiteInfo,
    SiteStatus,
)
from gridcloud.model.asking import ProviderKind
from gridcloud.model.choice import Constraints, Strategy
from gridcloud.model.fleet import (
    LaunchNews,
    MachineInfo,
    MachineLogin,
    MachinePlan,
    MachineRequest,
)
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.loan import LoanInfo
from gridcloud.model.need import Need
from gridcloud.model.usage import Grouping, KeptReceipt, ReceiptFilter, UsageReport

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
        self._loop.call_soon_threadsafe(_outlive_closed_connections)

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
        return self._each(self._async.logs(job_id, stream=stream, offset=offset, follow=follow))

    def offers(
        self,
        need: Need | None = None,
        site: str | None = None,
        *,
        constraints: Constraints | None = None,
        strategy: Strategy | None = None,
        most: int = 200,
        spot: bool = False,
    ) -> OffersReply:
        """As `AsyncClient.offers`."""
        asking = self._async.offers(
            need, site, constraints=constraints, strategy=strategy, most=most, spot=spot
        )
        return self._run(asking)

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

    def plan_machine(self, request: MachineRequest) -> MachinePlan:
        """As `AsyncClient.plan_machine`."""
        return self._run(self._async.plan_machine(request))

    def start_machine(self, request: MachineRequest) -> list[MachineInfo]:
        """As `AsyncClient.start_machine`."""
        return self._run(self._async.start_machine(request))

    def machines(self, *, ended: bool = False) -> list[MachineInfo]:
        """As `AsyncClient.machines`."""
        return self._run(self._async.machines(ended=ended))

    def machine(self, name: str) -> MachineInfo:
        """As `AsyncClient.machine`."""
        return self._run(self._async.machine(name))

    def wait_machine(self, name: str, timeout: timedelta | None = None) -> MachineInfo:
        """As `AsyncClient.wait_machine`."""
        return self._run(self._async.wait_machine(name, timeout))

    def machine_events(
        self, name: str, after: int = 0, *, wait: timedelta | None = None
    ) -> list[LaunchNews]:
        """As `AsyncClient.machine_events`."""
        return self._run(self._async.machine_events(name, after, wait=wait))

    def boot_log(self, name: str) -> str:
        """As `AsyncClient.boot_log`."""
        return self._run(self._async.boot_log(name))

    def stop_machine(self, name: str) -> MachineInfo:
        """As `AsyncClient.stop_machine`."""
        return self._run(self._async.stop_machine(name))

    def extend_machine(self, name: str, by: timedelta) -> MachineInfo:
        """As `AsyncClient.extend_machine`."""
        return self._run(self._async.extend_machine(name, by))

    def login_machine(self, name: str, public_key: str) -> MachineLogin:
        """As `AsyncClient.login_machine`."""
        return self._run(self._async.login_machine(name, public_key))

    def provider_kind(self, kind: str) -> ProviderKind:
        """As `AsyncClient.provider_kind`."""
        return self._run(self._async.provider_kind(kind))

    def volumes(self) -> VolumeReport:
        """As `AsyncClient.volumes`."""
        return self._run(self._async.volumes())

    def make_volume(self, name: str, size_bytes: int, provider: str = "") -> VolumeInfo:
        """As `AsyncClient.make_volume`."""
        return self._run(self._async.make_volume(name, size_bytes, provider))

    def remove_volume(self, name: str, provider: str = "") -> VolumeInfo:
        """As `AsyncClient.remove_volume`."""
        return self._run(self._async.remove_volume(name, provider))

    def networks(self) -> NetworkReport:
        """As `AsyncClient.networks`."""
        return self._run(self._async.networks())

    def make_network(self, name: str, cidr: str, provider: str, region: str = "") -> NetworkInfo:
        """As `AsyncClient.make_network`."""
        return self._run(self._async.make_network(name, cidr, provider, region))

    def remove_network(self, name: str, provider: str) -> None:
        """As `AsyncClient.remove_network`."""
        self._run(self._async.remove_network(name, provider))

    def sweep(
        self, *, dry_run: bool = True, all_sites: bool = False, remove_others: bool = False
    ) -> SweepReport:
        """As `AsyncClient.sweep`."""
        return self._run(
            self._async.sweep(dry_run=dry_run, all_sites=all_sites, remove_others=remove_others)
        )

    def costs(self, since: datetime | None = None) -> CostReport:
        """As `AsyncClient.costs`."""
        return self._run(self._async.costs(since))

    def loans(self) -> list[LoanInfo]:
        """As `AsyncClient.loans`."""
        return self._run(self._async.loans())

    def end_loan(self, lease_id: str, *, now: bool = False) -> LoanInfo:
        """As `AsyncClient.end_loan`."""
        return self._run(self._async.end_loan(lease_id, now=now))

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
        approve: bool = False,
        uses: int = 1,
    ) -> InvitationInfo:
        """As `AsyncClient.invite`."""
        return self._run(
            self._async.invite(
                community, roles=roles, valid_for=valid_for, approve=approve, uses=uses
            )
        )

    def join_community(self, code: str, site_name: str | None = None) -> CommunityInfo:
        """As `AsyncClient.join_community`."""
        return self._run(self._async.join_community(code, site_name))

    def members(self, community: str) -> list[MemberInfo]:
        """As `AsyncClient.members`."""
        return self._run(self._async.members(community))

    def grid(self, community: str | None = None) -> list[GridSite]:
        """As `AsyncClient.grid`."""
        return self._run(self._async.grid(community))

    def leave_community(self, community: str) -> LeftInfo:
        """As `AsyncClient.leave_community`."""
        return self._run(self._async.leave_community(community))

    def requests(self, community: str) -> list[RequestInfo]:
        """As `AsyncClient.requests`."""
        return self._run(self._async.requests(community))

    def approve(self, community: str, site: str) -> MemberInfo:
        """As `AsyncClient.approve`."""
        return self._run(self._async.approve(community, site))

    def refuse(self, community: str, site: str) -> None:
        """As `AsyncClient.refuse`."""
        self._run(self._async.refuse(community, site))

    def change_roles(
        self, community: str, site: str, *, add: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> MemberInfo:
        """As `AsyncClient.change_roles`."""
        return self._run(self._async.change_roles(community, site, add=add, drop=drop))

    def remove_member(self, community: str, site: str, reason: str = "") -> None:
        """As `AsyncClient.remove_member`."""
        self._run(self._async.remove_member(community, site, reason))

    def usage(
        self, by: Grouping = Grouping.COMMUNITY, chosen: ReceiptFilter | None = None
    ) -> UsageReport:
        """As `AsyncClient.usage`."""
        return self._run(self._async.usage(by, chosen))

    def receipts(
        self, chosen: ReceiptFilter | None = None, *, latest: int = 50
    ) -> list[KeptReceipt]:
        """As `AsyncClient.receipts`."""
        return self._run(self._async.receipts(chosen, latest=latest))

    def receipt(self, name: str) -> KeptReceipt:
        """As `AsyncClient.receipt`."""
        return self._run(self._async.receipt(name))

    def books(self, community: str | None = None) -> Iterator[bytes]:
        """As `AsyncClient.books`."""
        return self._each(self._async.books(community))

    def _each(self, source: AsyncIterator[bytes]) -> Iterator[bytes]:
        try:
            while (data := self._run(_next(source))) is not None:
                yield data
        finally:
            with contextlib.suppress(RuntimeError):  # a step cut short may still be ending
                self._run(_close(source))

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


def _outlive_closed_connections() -> None:
    """Have this thread told of a closed connection by an error, where a signal ends the process:
    a command is to die of a closed pipe at its output alone.

    To be called once the site runs: what is started inherits what is blocked here.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
