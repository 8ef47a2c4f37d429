"""How this site has and gives capacity: its own providers, and peers through the broker.

Every lease is written down as an intent before anything is asked of a provider or a peer, and as
released only after it was given back; what a crash leaves in between, `Site` mends by the
reconciler.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import structlog

from gridcloud.errors import Conflict, GridcloudError, NoCapacity, NotFound
from gridcloud.model.identifiers import new_id
from gridcloud.model.job import Job, JobSpec
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import Need
from gridcloud.model.offer import Offer
from gridcloud.providers.base import Provider
from gridcloud.site.own_offers import OwnOffers
from gridcloud.site.peers import Peers
from gridcloud.store.leases import LeaseStore

log = structlog.get_logger()
#: For how long a machine is made for a job that may run for any time; it is lengthened in time.
_USUAL_TIME = timedelta(hours=1)
#: What making a machine, copying and cleaning up may take beside a job's own time limit.
_BESIDE = timedelta(hours=1)
#: What running playbooks on it may take besides, at most.
_SETTING_UP = timedelta(hours=1)


class SiteLeasing:
    """See `gridcloud.orchestration.ports.Leasing`."""

    def __init__(
        self,
        site_name: str,
        providers: Mapping[str, Provider],
        leases: LeaseStore,
        peers: Peers,
        country: Callable[[], str | None],
        deciding: asyncio.Lock,
    ) -> None:
        self._providers = providers
        self._leases = leases
        self._peers = peers
        self._own = OwnOffers(site_name, country)
        #: Held while this host's capacity is given away, so that it is not given twice.
        self._deciding = deciding
        self._giving_back: dict[str, asyncio.Task[None]] = {}

    async def offers(self) -> list[Offer]:
        """Return the site's own offers and, of peers, those known now."""
        live = await self._leases.live()
        own = await self._own.of(self._providers.values(), live)
        return own + await self._peers.offers(live)

    async def intend(self, job: Job, offer: Offer) -> Lease:
        """See `Leasing`. What is made at a cloud has an end, after which it ends itself."""
        borrowed, now = offer.peer is not None, datetime.now(UTC)
        lease = Lease(
            id=self._peers.lease_id(job.folder_name) if borrowed else new_id(16),
            role=LeaseRole.BORROWED if borrowed else LeaseRole.OWN,
            state=LeaseState.INTENT,
            provider=offer.provider,
            need=job.spec.need,
            created_at=now,
            ends_at=now + _lasting(job.spec) if offer.shape else None,
            job_id=job.id,
            request_id=job.folder_name,
            community=offer.community,
            peer=offer.peer,
            shape=offer.shape,
            region=offer.region,
            cost=offer.hourly(job.spec.need.resources),
            currency=offer.currency,
            order=MachineOrder() if borrowed else job.spec.machine,
        )
        if borrowed:
            await self._leases.save(lease)
            return lease
        async with self._deciding:  # what was free when the job was matched may be lent by now
            live = await self._leases.live()
            offers = await self._own.of([self.provider(lease.provider)], live)
            lacking = _lacking_by_now(offer, offers, lease.need)
            if lacking:
                raise NoCapacity(
                    f"{offer.label} {', '.join(lacking)} by now.", hint="It is tried again."
                )
            await self._leases.save(lease)
        return lease

    async def fulfil(self, lease: Lease, offer: Offer) -> Lease:
        """See `Leasing`."""
        if lease.role is LeaseRole.BORROWED:
            active = await self._peers.borrow(lease, offer)
        else:
            machine = await self.provider(lease.provider).launch(lease)
            active = lease.model_copy(update={"machine": machine, "state": LeaseState.ACTIVE})

        def granted(kept: Lease) -> Lease:
            if not kept.reason:
                return active
            recall = {"ends_at": kept.ends_at, "reason": kept.reason}  # it came first
            return active.model_copy(update=recall)

        return await self._leases.change(lease.id, granted) or active

    async def find(self, lease_id: str) -> Lease | None:
        """See `Leasing`."""
        return await self._leases.find(lease_id)

    async def renew(self, lease: Lease, until: datetime) -> Lease:
        """See `Leasing`."""
        if lease.role is LeaseRole.OWN:
            return await self._lengthened(lease, until)
        renewed = await self._peers.renew(lease, until)

        def later(kept: Lease) -> Lease:
            recalled = bool(kept.reason)  # meanwhile: that stands
            return kept if recalled else kept.model_copy(update={"ends_at": renewed.ends_at})

        return await self._leases.change(lease.id, later) or renewed

    async def release(self, lease: Lease, reason: str) -> None:
        """See `Leasing`. A loan, and what was made at a cloud, is given back beside this, which may
        take long, and counts as leased until then."""
        if lease.role is not LeaseRole.BORROWED and not lease.shape:
            with contextlib.suppress(NotFound):  # a provider taken out of the settings
                await self.provider(lease.provider).terminate(lease.id)
            await self._released(lease, reason)
        elif lease.id not in self._giving_back:
            task = asyncio.create_task(self._give_back(lease, reason))
            self._giving_back[lease.id] = task
            task.add_done_callback(lambda _: self._giving_back.pop(lease.id))

    async def finish(self) -> None:
        """Wait a little for loans that are being given back; the next start sees to the rest."""
        await self._own.close()
        if tasks := list(self._giving_back.values()):
            _, late = await asyncio.wait(tasks, timeout=5)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def providers(self) -> list[Provider]:
        """Return the providers of this site."""
        return list(self._providers.values())

    def provider(self, name: str) -> Provider:
        """Return a provider by its name; raises `NotFound`."""
        if name not in self._providers:
            raise NotFound(f"There is no provider {name!r}.", hint="See 'gridcloud provider list'.")
        return self._providers[name]

    async def _give_back(self, lease: Lease, reason: str) -> None:
        if lease.role is LeaseRole.BORROWED:
            await self._peers.give_back(lease)
        else:
            try:
                await self.provider(lease.provider).terminate(lease.id)
            except GridcloudError as error:  # it stays on the books, and is tried again
                log.info("not given back yet", lease=lease.id, cause=error.message)
                return
        await self._released(lease, reason)

    async def _released(self, lease: Lease, reason: str) -> None:
        now = datetime.now(UTC)
        await self._leases.change(lease.id, lambda kept: kept.released(reason, now))

    async def _lengthened(self, lease: Lease, until: datetime) -> Lease:
        """Move the end of what was made at a cloud: there first, since one that lasts longer than
        its lease is given back in time, while one that ends before it loses its job."""
        known = await self._leases.find(lease.id)
        if known is None or not known.live or known.reason:
            raise Conflict(f"The lease {lease.id} is over.", hint="Ask for a new one.")
        await self.provider(lease.provider).lengthen(_later(lease, until))
        return await self._leases.change(lease.id, lambda kept: _later(kept, until)) or known


def _later(lease: Lease, until: datetime) -> Lease:
    """Return a lease with a later end; one that has that already, or is being given back, as is."""
    if lease.reason or lease.ends_at is None or lease.ends_at >= until:
        return lease
    return lease.model_copy(update={"ends_at": until, "revision": lease.revision + 1})


def _lasting(spec: JobSpec) -> timedelta:
    """Return for how long from now on a machine is to be there for a job."""
    time = spec.need.time + _BESIDE if spec.need.time else _USUAL_TIME
    return time + _SETTING_UP if spec.machine.playbooks else time


def _lacking_by_now(offer: Offer, offers: Sequence[Offer], need: Need) -> list[str]:
    """Return why an offer of a moment ago has no room any more, as its provider's offers tell."""
    now = next((each for each in offers if each.key == offer.key), None)
    if now is None:
        return ["is offered no more"]
    if now.shape and now.problem:
        return [now.problem]
    return now.free.lacking(need.resources) if now.known else []
