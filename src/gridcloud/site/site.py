"""The composition root: one organisation's site, its rooms wired together. It decides nothing.

Over 400 lines, since each verb of the API has its few lines here and nothing else to belong to.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from gridcloud import __version__
from gridcloud.access.connect import fetch_host_keys
from gridcloud.access.keys import fingerprint
from gridcloud.data.staging import check_inputs, check_into, total_bytes
from gridcloud.errors import Conflict, GridcloudError, InvalidSpec
from gridcloud.grid.identity import Identity
from gridcloud.grid.membership import pick
from gridcloud.model.accounts import CostReport, SweepReport
from gridcloud.model.api import (
    HostKeys,
    LeftInfo,
    OffersRequest,
    ProviderInfo,
    SiteInfo,
    SiteStatus,
)
from gridcloud.model.asking import ProviderKind
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.lease import Lease, LeaseRole, taken
from gridcloud.model.loan import LoanInfo
from gridcloud.model.machine import LaunchStep
from gridcloud.model.need import Resources
from gridcloud.model.offer import Plan
from gridcloud.orchestration.costing import costs
from gridcloud.orchestration.scheduler import Scheduler
from gridcloud.providers import registry
from gridcloud.providers.base import MachineMaker, Provider, ProviderContext
from gridcloud.settings import SiteSettings
from gridcloud.site import settings_edit
from gridcloud.site.accounting import Accounting, Names
from gridcloud.site.booting import Booting
from gridcloud.site.confining import Confining
from gridcloud.site.keyring import Keyring
from gridcloud.site.leasing import SiteLeasing
from gridcloud.site.lending import Lending
from gridcloud.site.live_settings import LiveSettings
from gridcloud.site.logs import Logs
from gridcloud.site.machines import MachineDesk
from gridcloud.site.mending import Mending
from gridcloud.site.networks import NetworkDesk
from gridcloud.site.peers import Peers
from gridcloud.site.places import Places
from gridcloud.site.ports import Ports
from gridcloud.site.reaching import Reaching
from gridcloud.site.sweeping import sweep, sweep_others
from gridcloud.site.tenancy import Tenancy
from gridcloud.site.volumes import VolumeDesk
from gridcloud.store.database import Database
from gridcloud.store.jobs import JobStore
from gridcloud.store.launches import LaunchStore
from gridcloud.store.leases import LeaseStore
from gridcloud.store.papers import PaperStore
from gridcloud.store.receipts import ReceiptStore
from gridcloud.store.usage import UsageStore

log = structlog.get_logger()
#: So many characters of an event of a launch, the last, are among those of a job.
_SHORT = 3000
_NOT_ENDED = tuple(state for state in JobState if not state.final)


class Site:
    """Everything a site does, for the API to call. `start` it, and `stop` it in the end."""

    def __init__(self, settings: SiteSettings, settings_file: Path, state: Path) -> None:
        self._live = LiveSettings(settings_file, settings)
        self._settings_file = settings_file
        self._state = state
        self._started_at = datetime.now(UTC)
        self._database = Database(state / "site.db")
        self.jobs = JobStore(self._database)
        self._leases = LeaseStore(self._database)
        self._keyring = Keyring(state / "keys")
        self._problems: dict[str, str] = {}
        self._providers: dict[str, Provider] = {}
        self._logs = Logs(state / "logs", state / "jobs")
        papers = PaperStore(self._database)
        ports = Ports(state / "ports.json")
        self._lending = Lending(
            self._live,
            self._keyring,
            self._leases,
            papers,
            ports,
            Confining(self._providers, self._live),
        )
        receipts, usage = ReceiptStore(self._database), UsageStore(self._database)
        names = Names(receipts, papers)
        self.accounting = Accounting(self._identity, receipts, usage, names)
        self._tenancy = Tenancy(self._identity, self._leases, receipts, usage, names)
        self.peers = Peers(self._live, self._keyring, papers, self._lending, self._tenancy, ports)
        self._reaching = Reaching(self._keyring, self._providers, self.peers)
        self._leasing = SiteLeasing(
            settings.name,
            self._providers,
            self._leases,
            self.peers,
            lambda: self.settings.lending.country,
            self._lending.deciding,
        )
        self._places = Places(self._logs, self._reaching.session, self._providers)
        self.scheduler = Scheduler(
            self.jobs,
            self._leasing,
            self._places,
            cancel_grace=settings.cancel_grace.total_seconds(),
            settings=lambda: self._live.current.jobs,
            measure=total_bytes,
        )
        self.machines = MachineDesk(
            self._leases,
            LaunchStore(self._database),
            self._leasing,
            self._keyring.machine_certificate,
            lambda: self.settings.jobs.strategy,
            self._lending.deciding,
        )
        self.volumes = VolumeDesk(self._providers)
        self.networks = NetworkDesk(self._providers, self._leases)
        self._booting = Booting(
            state, self._keyring, self._reaching.machine_session, self._note_launch
        )
        self.machines.check = self._booting.check
        self._mending = Mending(
            self._providers,
            self._leases,
            self.jobs,
            self._leasing,
            self._lending,
            self.machines,
            self._places,
            self.scheduler,
            self._booting,
        )
        self.peers.on_change = self.scheduler.wake
        self._lending.on_change = self._lending_changed
        self.scheduler.on_waiting = self._lending.want_room
        self.scheduler.communities = self.peers.communities
        self._tenancy.on_recall = self._recalled
        self._lending.recalls.tell = self.peers.recall
        self._lending.still_member = self.peers.is_member
        self._lending.on_ended = self.accounting.loan_ended
        self._lending.desk.usage = self._lent_lately
        self.peers.borrowed_lately = self._tenancy.borrowed_lately
        self.accounting.show = self.peers.show_receipt

    @property
    def settings(self) -> SiteSettings:
        """What holds now: the file may change while the site runs."""
        return self._live.current

    async def start(self) -> None:
        """Open the store, mend what a crash left, and begin to work."""
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self._database.open()
        await self.accounting.start()
        await self._tenancy.start()
        self._load_providers()
        await self._lending.start()
        await self.peers.start()
        await self._mending.once(starting=True)
        self._lending.open = True
        await self.scheduler.start()
        self._live.start()
        self._mending.start()

    async def stop(self) -> None:
        """Let go of everything without ending it: jobs and loans go on."""
        await self._live.stop()
        await self._mending.stop()
        await self.scheduler.stop()
        await self.machines.close()
        await self._leasing.finish()
        await self._places.close()
        await self._reaching.close()
        await self.accounting.stop()
        await self.peers.stop()
        await self._lending.stop()
        for provider in self._providers.values():
            await provider.close()
        await self._database.close()

    async def drain(self) -> None:
        """Cancel all jobs and take back all that is lent; for a site that will not come back."""
        running = await self.jobs.listed(_NOT_ENDED)
        for job in running:
            await self.scheduler.cancel(job.id)
        await asyncio.gather(*(self.scheduler.wait(job.id, 30) for job in running))
        await self._lending.end_all("the site is going away")
        await self.machines.end_all("the site is going away", wait_seconds=60)

    async def submit(self, spec: JobSpec) -> list[Job]:
        """Check a spec against this host's files and the offers, and take it in."""
        specs = [spec.for_task(task) for task in spec.tasks] or [spec]
        inputs = {path for each in specs for path in each.inputs}
        await asyncio.to_thread(check_inputs, sorted(inputs))
        for into in sorted({each.into for each in specs if each.outputs}):
            await asyncio.to_thread(check_into, into)
        await self._booting.check(spec.machine)
        return await self.scheduler.submit(spec)

    async def log(
        self, job_id: str, stream: str, offset: int, *, follow: bool
    ) -> AsyncIterator[bytes]:
        """Return the bytes of one stream of a job; raises `NotFound` before any is given."""
        first, *_ = await self.jobs.resolve(job_id)
        if first.id != job_id:
            raise InvalidSpec(
                f"{job_id} is an array; each of its tasks has output of its own.",
                hint=f"Name one of them, such as {first.id}.",
            )

        async def ended() -> None:
            while follow and not (await self.scheduler.wait(job_id, 3600))[0].state.final:
                continue

        return self._logs.follow(lambda: self.jobs.get(job_id), stream, offset, ended())

    async def plan(self, request: OffersRequest) -> Plan:
        """Judge the offers for a need, peers asked anew."""
        await self.peers.refresh()
        return await self.scheduler.plan(
            request.need,
            request.site,
            request.constraints,
            request.strategy,
            most=request.most,
            spot=request.spot,
        )

    async def status(self) -> SiteStatus:
        """Return how the site fares."""
        live, now = await self._leases.live(), datetime.now(UTC)
        infos = await self.provider_infos()
        count = {role: sum(lease.role is role for lease in live) for role in LeaseRole}
        capacity = free = Resources()
        for info in infos:
            if not info.makes_machines:  # what is not made yet is nothing to be free
                capacity, free = capacity + info.capacity, free + info.free
        return SiteStatus(
            name=self.settings.name,
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            jobs=await self.jobs.count(),
            leases_own=count[LeaseRole.OWN],
            leases_lent=count[LeaseRole.LENT],
            leases_borrowed=count[LeaseRole.BORROWED],
            capacity=capacity,
            free=free,
            problems=(
                *(f"provider {i.name}: {i.problem}" for i in infos if i.problem),
                *self._mending.problems(now),
                *await self.machines.problems(now),
                *await self._lending.desk.problems(),
                *((f"settings: {self._live.problem}",) if self._live.problem else ()),
            ),
        )

    async def info(self) -> SiteInfo:
        """Return the site's identity."""
        return SiteInfo(
            name=self.settings.name,
            key=self._keyring.identity.key,
            version=__version__,
            user_ca=self._keyring.trusted_line(),
            state_folder=str(self._state),
            settings_file=str(self._settings_file),
            grid_addresses=self.peers.addresses(),
            gateway_address=self._lending.gateway_address,
            lending=await self._lending.desk.describe(),
            communities=tuple(community.id for community in await self.peers.communities()),
        )

    async def provider_infos(self) -> list[ProviderInfo]:
        """Return all providers, those that did not load among them."""
        live = await self._leases.live()
        found = [await self._describe(provider, live) for provider in self._providers.values()]
        nothing = Resources()
        for name, problem in self._problems.items():
            kind = str(self.settings.providers[name].get("kind", name))
            found.append(
                ProviderInfo(name=name, kind=kind, capacity=nothing, free=nothing, problem=problem)
            )
        return found

    async def provider_kind(self, kind: str) -> ProviderKind:
        """Return what to ask who adds a provider of a kind."""
        return await asyncio.to_thread(registry.about, kind)

    async def add_provider(self, name: str, section: dict[str, Any]) -> ProviderInfo:
        """Try a provider; if it works keep it in the settings file and use it from now on."""
        if name in self.settings.providers or name in self._providers:
            raise Conflict(
                f"There is a provider {name!r} already.", hint="Remove it first, or use --name."
            )
        provider = self._make(name, section)
        capacity = await provider.check()
        if capacity.problem:
            await provider.close()
            raise Conflict(f"{name} does not work, so it was not added: {capacity.problem}")
        await asyncio.to_thread(settings_edit.add_provider, self._settings_file, name, section)
        self._live.set_providers(self.settings.providers | {name: section})
        self._providers[name] = provider
        self.scheduler.wake()
        return await self._describe(provider, await self._leases.live())

    async def check_provider(self, name: str) -> ProviderInfo:
        """Prove that a provider works, now."""
        provider = self._leasing.provider(name)
        await provider.check()
        return await self._describe(provider, await self._leases.live())

    async def remove_provider(self, name: str) -> None:
        """Take a provider out of the settings; refused while it has leases."""
        if name == "local":
            raise Conflict(
                "This host is always there.", hint="Bound it by cpus under [providers.local]."
            )
        live = await self._leases.live()
        if any(_uses(lease, name) for lease in live):
            raise Conflict(
                f"{name} has live leases.", hint="Cancel its jobs and stop its machines first."
            )
        if name not in self._problems:
            self._leasing.provider(name)
        await asyncio.to_thread(settings_edit.remove_provider, self._settings_file, name)
        self._live.set_providers({k: v for k, v in self.settings.providers.items() if k != name})
        self._problems.pop(name, None)
        if provider := self._providers.pop(name, None):
            await provider.close()

    async def sweep(
        self, *, dry_run: bool, all_sites: bool = False, remove_others: bool = False
    ) -> SweepReport:
        """Remove what carries this site's tag and no lease knows; see `gridcloud.site.sweeping`.

        With ``all_sites`` what other sites have at the same accounts is told, too, and removed only
        with ``remove_others``, and not in a ``dry_run``.
        """
        own = await sweep(self._providers, self._leases, dry_run=dry_run)
        if not all_sites:
            return own
        kept = dry_run or not remove_others
        theirs = await sweep_others(self._providers, self._acting_for, dry_run=kept)
        problems = dict.fromkeys((*own.problems, *theirs.problems))
        return SweepReport(things=(*own.things, *theirs.things), problems=tuple(problems))

    async def costs(self, since: datetime | None) -> CostReport:
        """Return what own machines at clouds cost."""
        return costs(await self._leases.clouds(), datetime.now(UTC), since)

    async def loans(self) -> list[LoanInfo]:
        """Return what is lent."""
        return await self._lending.loans()

    async def end_loan(self, lease_id: str, *, now: bool) -> LoanInfo:
        """End a loan, after its notice or now."""
        return await self._lending.end_at_word(lease_id, now=now)

    async def host_keys(self, host: str, port: int) -> HostKeys:
        """Return the keys an SSH server shows."""
        keys = await fetch_host_keys(host, port)
        return HostKeys(
            host=host,
            port=port,
            keys=tuple(keys),
            fingerprints=tuple(fingerprint(key) for key in keys),
        )

    async def leave_community(self, name: str) -> LeftInfo:
        """Leave a community: what is lent there ends first; refused while something is borrowed."""
        community = pick(name, [info.id for info in await self.peers.communities()])
        jobs = {job.id for job in await self.jobs.listed(_NOT_ENDED)}
        for lease in await self._leases.live():
            # What is only being given back, to a site that is away say, keeps nobody in.
            borrowed = lease.role is LeaseRole.BORROWED and lease.job_id in jobs
            if borrowed and lease.community == community:
                raise Conflict(
                    f"A job runs on what was borrowed in {name}.",
                    hint="Wait for it, or cancel it first: see 'gridcloud jobs'.",
                )
        await self._lending.end_all_of(community, "the lender leaves the community")
        return await self.peers.leave(community)

    def _identity(self) -> Identity:
        return self._keyring.identity

    async def _note_launch(self, lease_id: str, step: LaunchStep, message: str) -> None:
        """Keep an event of a launch; its end among those of the job that it is for, too."""
        await self.machines.note(lease_id, step, message)
        lease = await self._leases.find(lease_id)
        if lease and lease.job_id:
            end = message.strip()[-_SHORT:]
            await self.jobs.note(await self.jobs.get(lease.job_id), step.value, end)

    def _recalled(self, lease: Lease, until: datetime, reason: str) -> None:
        self.scheduler.recalled(lease.id, until, reason)

    def _lent_lately(self, now: datetime) -> dict[str, float]:
        return self.accounting.usage(now, self.settings.lending.half_life)

    def _lending_changed(self) -> None:
        self.scheduler.wake()
        self.peers.offer_changed()

    def _load_providers(self) -> None:
        sections: dict[str, dict[str, Any]] = {"local": {}} | self.settings.providers
        for name, section in sections.items():
            try:
                self._providers[name] = self._make(name, section)
            except GridcloudError as error:
                if name == "local":
                    raise
                self._problems[name] = str(error)
                log.warning("provider left out", provider=name, error=str(error))

    def _make(self, name: str, section: dict[str, Any]) -> Provider:
        kind = "local" if name == "local" else str(section.get("kind", ""))
        return registry.make(name, kind, section, self._context)

    @property
    def _context(self) -> ProviderContext:
        return ProviderContext(
            site_key=self._keyring.identity.key,
            state_folder=self._state,
            lending=self.settings.lending,
            probe=self._reaching.probe,
            making=self._booting,
        )

    def _acting_for(self, name: str, site: str) -> Provider:
        """Return a provider that sees and removes what another site has; it makes nothing."""
        section = self.settings.providers[name]
        theirs = replace(
            self._context, site_key=site, state_folder=self._state / "others" / site, making=None
        )
        return registry.make(name, str(section.get("kind", "")), section, theirs)

    async def _describe(self, provider: Provider, live: list[Lease]) -> ProviderInfo:
        capacity = await provider.capacity()
        makes = isinstance(provider, MachineMaker)
        used = Resources() if makes else taken(live, provider.name)
        return ProviderInfo(
            name=provider.name,
            kind=provider.kind,
            capacity=capacity.resources,
            free=capacity.resources.minus(used),
            problem=capacity.problem,
            detail=capacity.detail,
            makes_machines=makes,
        )


def _uses(lease: Lease, provider: str) -> bool:
    """Whether what a lease of this site has is a provider's; a guest may be in its containers."""
    at = lease.machine.provider if lease.machine else lease.provider
    return lease.role is not LeaseRole.BORROWED and provider in (lease.provider, at)
