"""A light site: the real broker and the real lending over a memory that survives crashes, and a
simple borrower in place of jobs, scheduler and database. Thousands of them fit in one process.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from gridcloud.errors import Conflict, GridcloudError, NotFound
from gridcloud.grid.broker import Broker
from gridcloud.grid.community_store import MemoryCommunityStore
from gridcloud.grid.offers import PeerOffer
from gridcloud.grid.papers import LeaseGrant
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, Machine
from gridcloud.model.need import Resources
from gridcloud.model.offer import Offer
from gridcloud.orchestration.lender import LENT_FROM
from gridcloud.orchestration.line import place as place_in_line
from gridcloud.orchestration.market import Market
from gridcloud.orchestration.reconciler import reconcile
from gridcloud.site.confining import Confining
from gridcloud.site.lending import Lending
from gridcloud.site.live_settings import LiveSettings
from simulation import seams
from simulation.hosts import HostProvider
from simulation.virtual_time import now

_KEEP_HOUSE_EVERY = 15.0
_LOOK_EVERY = 5.0
_REFUSED_FOR = 5.0
_KNOCK_EVERY = 15.0
_PATIENCE = 15.0
_WRITING_TAKES = 0.003
_TIMEOUT = 10.0


class LightPapers(MemoryCommunityStore):
    """What a site keeps of communities and grants."""

    def __init__(self) -> None:
        super().__init__()
        self._grants: dict[str, str] = {}

    async def save_grant(
        self, community: str, lease_id: str, grant: str, ends_at: datetime
    ) -> None:
        """See `PaperStore`."""
        await asyncio.sleep(_WRITING_TAKES)
        self._grants[lease_id] = grant

    async def forget_grants(self, before: datetime, keep: Iterable[str]) -> None:
        """See `PaperStore`; a run is shorter than grants are kept."""

    async def grant(self, lease_id: str) -> str | None:
        """See `PaperStore`."""
        return self._grants.get(lease_id)


class LightLeases:
    """What a site keeps of leases; see `LeaseStore`. A write that a crash cuts off is not there,
    or is there and its writer does not know."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._live: dict[str, Lease] = {}

    async def save(self, lease: Lease) -> None:
        """See `LeaseStore`."""
        await asyncio.sleep(_WRITING_TAKES)
        self._leases[lease.id] = lease
        if lease.live:
            self._live[lease.id] = lease
        else:
            self._live.pop(lease.id, None)
        await asyncio.sleep(_WRITING_TAKES)

    async def find(self, lease_id: str) -> Lease | None:
        """See `LeaseStore`."""
        return self._leases.get(lease_id)

    async def live(self) -> list[Lease]:
        """See `LeaseStore`."""
        return list(self._live.values())

    async def ended_since(self, role: LeaseRole, since: datetime) -> list[Lease]:
        """See `LeaseStore`."""
        return [
            lease
            for lease in self._leases.values()
            if lease.role is role and lease.ended_at is not None and lease.ended_at > since
        ]


@dataclass
class Errand:
    """A job as its light site keeps it: which attempt is under way, and on what loan."""

    job: Job
    grant: LeaseGrant | None = None
    offer: Offer | None = None


@dataclass
class Disk:
    """What outlives the process of a light site."""

    papers: LightPapers = field(default_factory=LightPapers)
    leases: LightLeases = field(default_factory=LightLeases)
    errands: dict[str, Errand] = field(default_factory=dict)
    submitted: int = 0


class LightSite:
    """One run of a light site. ``works`` says whether it borrows."""

    def __init__(self, scene: Any, place: Any) -> None:
        self._scene = scene
        self._place = place
        self._disk: Disk = place.disk
        self.live = LiveSettings(place.state / "settings.toml", place.settings)
        self._provider = HostProvider.of(place.host)
        keyring: Any = seams.SimulatedKeyring.of(place.identity)
        leases: Any = self._disk.leases
        papers: Any = self._disk.papers
        self.lending = Lending(
            self.live,
            keyring,
            leases,
            papers,
            seams.SimulatedPorts(),
            Confining({LENT_FROM: self._provider}, self.live),
        )
        self.broker = Broker(
            place.identity,
            scene.attach(place.identity),
            papers,
            self.lending,
            self,
            seams.wall_clock,
            random.Random(scene.chance.getrandbits(64)),
        )
        self.lending.recalls.tell = self.broker.recall_lease
        self.lending.still_member = self.broker.is_member
        self.lending.on_change = self.broker.offer_changed
        self._market = Market()
        self._shunned: dict[str, float] = {}
        self._knock_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin, and go on with what the last run left."""
        await self.lending.start()
        await self.broker.start()
        await self._mend(starting=True)
        self.lending.open = True
        for errand in self._disk.errands.values():
            if errand.job.state is JobState.ACTIVE:
                self._begin(self._attend(errand))
        self._begin(self._keep_house())
        self._begin(self._look_for_places())

    async def stop(self) -> None:
        """End in good order."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.broker.close()
        await self.lending.stop()

    async def leave(self) -> None:
        """Leave all communities, as a whole site does: refused while something is borrowed."""
        if any(errand.grant for errand in self._disk.errands.values()):
            raise Conflict("A job runs on what was borrowed.")
        for community in await self.broker.communities():
            await self.lending.end_all_of(community.id, "the lender leaves the community")
            await self.broker.leave(community.id)

    # The lender's housekeeping

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_HOUSE_EVERY)
            await self._mend(starting=False)

    async def _mend(self, *, starting: bool) -> None:
        made = {LENT_FROM: await self._provider.made()}
        live = await self._disk.leases.live()
        mending = reconcile(live, {}, made, seams.wall_clock(), starting=starting)
        for lease, reason in mending.release:
            await self.lending.end(lease, reason)
        await self.lending.keep_house()
        for _, lease_id in mending.terminate:
            known = await self._disk.leases.find(lease_id)
            if known is None or not known.live:
                await self._provider.terminate(lease_id)

    # The borrower

    async def submit(self, spec: JobSpec) -> list[Job]:
        """Take in a job."""
        self._disk.submitted += 1
        name = f"{self._place.name}-{self._disk.submitted}"
        job = Job(id=name, spec=spec, state=JobState.QUEUED, created_at=seams.wall_clock())
        await asyncio.sleep(_WRITING_TAKES)
        self._disk.errands[name] = Errand(job)
        return [job]

    async def recalled(self, grant: LeaseGrant, reason: str) -> None:
        """See `Tenant`."""
        for errand in self._disk.errands.values():
            if errand.grant is not None and errand.grant.lease_id == grant.lease_id:
                errand.grant = grant
                return
        raise NotFound(f"Nothing is borrowed here as {grant.lease_id}.")

    async def countersign(self, lender: str, document: str) -> tuple[str, str]:
        """See `Tenant`."""
        raise NotFound("This site keeps no receipts.")

    async def _look_for_places(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY * self._scene.chance.uniform(0.6, 1.4))
            queued = [
                errand.job
                for errand in self._disk.errands.values()
                if errand.job.state is JobState.QUEUED
            ]
            if not queued:
                continue
            offers = await self._offers()
            self._market = self._market.refreshed(offers)
            placing = place_in_line(queued, self._market, now=seams.wall_clock())
            chosen = [*placing.placed, *self._knock(placing.waiting, offers)]
            for job, offer in chosen:
                errand = self._disk.errands[job.id]
                errand.job = job.model_copy(
                    update={"state": JobState.ACTIVE, "attempts": job.attempts + 1}
                )
                errand.grant, errand.offer = None, offer
                self._begin(self._attend(errand))

    def _knock(self, waiting: list[Job], offers: list[Offer]) -> list[tuple[Job, Offer]]:
        """Return whom the job that waits longest asks though there is no room now: only who
        asks has a place in a lender's line."""
        for job in waiting[:1]:
            need = job.spec.need.resources
            able = [o for o in offers if not o.problem and not o.capacity.lacking(need)]
            if able and now() >= self._knock_at:
                self._knock_at = now() + _KNOCK_EVERY
                return [(job, self._scene.chance.choice(able))]
        return []

    async def _offers(self) -> list[Offer]:
        held = [_lease(each) for each in self._disk.errands.values() if each.grant]
        offers = []
        for known in await self.broker.offers():
            offer = _offer(known, held)
            shunned = self._shunned.get(offer.source, 0.0) > now()
            offers.append(offer.model_copy(update={"problem": "refused"}) if shunned else offer)
        return offers

    async def _attend(self, errand: Errand) -> None:
        """Carry one attempt through: borrow, run, bring the results, give back."""
        job, offer = errand.job, errand.offer
        assert offer and offer.peer and offer.community
        lease_id = self.broker.lease_id(job.folder_name)
        try:
            if errand.grant is None:
                grant = await self.broker.request_lease(
                    offer.peer,
                    offer.community,
                    job.folder_name,
                    need=job.spec.need,
                    user="ada",
                    ssh_public_key=seams.PUBLIC_KEY,
                    timeout=_TIMEOUT,
                )
                await asyncio.sleep(_WRITING_TAKES)
                errand.grant = grant
            await self._run(errand)
        except GridcloudError as error:
            self._shunned[offer.source] = now() + _REFUSED_FOR
            self._scene.ledger.note("refused", job.folder_name, error.code)
            errand.job = errand.job.model_copy(update={"state": JobState.QUEUED})
        ends_at = errand.grant.ends_at if errand.grant else None
        errand.grant = None
        await self._give_back(offer, lease_id, ends_at)

    async def _run(self, errand: Errand) -> None:
        job, assured = errand.job, now()
        seconds = float(job.spec.command[1])
        while True:
            assert errand.grant
            try:
                host = self._scene.way(self._place.name, _lease(errand))
                assured = now()
                run = host.start(job, _lease(errand), now(), seconds)
                if outcome := host.settle(run, now()):
                    break
                await self._renew_if_due(errand)
            except GridcloudError as error:
                if not error.retryable or now() - assured > _PATIENCE:
                    raise
            await asyncio.sleep(1.0)
        if not outcome.succeeded:
            raise NotFound(outcome.message)
        await asyncio.sleep(_WRITING_TAKES)
        self._scene.took(self._place.name, job)
        errand.job = job.model_copy(update={"state": JobState.COMPLETED, "outcome": outcome})

    async def _renew_if_due(self, errand: Errand) -> None:
        grant, offer = errand.grant, errand.offer
        assert grant and offer and offer.peer and offer.community
        if errand.job.spec.name != "long" or grant.ends_at - seams.wall_clock() > _SOON:
            return
        until = grant.ends_at + _SOON
        try:
            renewed = await self.broker.renew_lease(
                offer.peer, offer.community, grant.lease_id, until, _TIMEOUT
            )
        except GridcloudError as error:
            self._scene.ledger.note("not renewed", errand.job.folder_name, error.code)
            return
        if errand.grant is not None and renewed.revision > errand.grant.revision:
            errand.grant = renewed

    async def _give_back(self, offer: Offer, lease_id: str, ends_at: datetime | None) -> None:
        assert offer.peer and offer.community
        until = now() + 120.0
        while now() < until:
            try:
                await self.broker.release_lease(offer.peer, offer.community, lease_id)
                return
            except GridcloudError as error:
                if not error.retryable or (ends_at and seams.wall_clock() > ends_at):
                    return
            await asyncio.sleep(3.0)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._scene.fault(repr(error))


_SOON = timedelta(seconds=10)
#: Peers' capacity stands under this name.
_LENT = "lent"


def _offer(peer: PeerOffer, held: list[Lease]) -> Offer:
    """Return what a peer said it offers, less what was borrowed there since."""
    digest = peer.digest
    offered = digest.offered if digest else None
    free = offered.free if offered else Resources()
    for lease in held:
        if digest and lease.peer == digest.site and lease.created_at > digest.issued_at:
            free = free.minus(lease.need.resources)
    return Offer(
        site=peer.site_name,
        provider=_LENT,
        peer=peer.address.key,
        community=peer.community,
        capacity=offered.capacity if offered else Resources(),
        free=free,
        known=offered is not None,
        max_time=timedelta(seconds=offered.max_time_seconds) if offered else None,
        problem=peer.problem,
    )


def _lease(errand: Errand) -> Lease:
    grant = errand.grant
    assert grant
    return Lease(
        id=grant.lease_id,
        role=LeaseRole.BORROWED,
        state=LeaseState.ACTIVE,
        provider=_LENT,
        need=grant.need,
        created_at=grant.starts_at,
        ends_at=grant.ends_at,
        community=grant.community,
        peer=grant.lender,
        machine=Machine(
            lease_id=grant.lease_id, provider=_LENT, folder=grant.folder, endpoint=grant.endpoint
        ),
    )
