"""How this site has and gives capacity: its own providers, and peers through the broker.

Every lease is written down as an intent before anything is asked of a provider or a peer, and as
released only after it was given back; what a crash leaves in between, `Site` mends by the
reconciler.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime

import structlog

from gridcloud.errors import GridcloudError, NoCapacity, NotFound
from gridcloud.model.identifiers import new_id
from gridcloud.model.job import Job
from gridcloud.model.lease import Lease, LeaseRole, LeaseState, taken
from gridcloud.model.offer import Offer
from gridcloud.providers.base import Provider
from gridcloud.site.peers import Peers
from gridcloud.store.leases import LeaseStore

log = structlog.get_logger()


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
        self._site_name = site_name
        self._providers = providers
        self._leases = leases
        self._peers = peers
        self._country = country
        #: Held while this host's capacity is given away, so that it is not given twice.
        self._deciding = deciding
        self._giving_back: dict[str, asyncio.Task[None]] = {}

    async def offers(self) -> list[Offer]:
        """Return the site's own offers and, of peers, those known now."""
        live = await self._leases.live()
        own = [await self._own_offer(provider, live) for provider in self._providers.values()]
        return own + await self._peers.offers(live)

    async def intend(self, job: Job, offer: Offer) -> Lease:
        """See `Leasing`."""
        borrowed = offer.peer is not None
        lease = Lease(
            id=self._peers.lease_id(job.folder_name) if borrowed else new_id(16),
            role=LeaseRole.BORROWED if borrowed else LeaseRole.OWN,
            state=LeaseState.INTENT,
            provider=offer.provider,
            need=job.spec.need,
            created_at=datetime.now(UTC),
            job_id=job.id,
            request_id=job.folder_name,
            community=offer.community,
            peer=offer.peer,
        )
        if borrowed:
            await self._leases.save(lease)
            return lease
        async with self._deciding:  # what was free when the job was matched may be lent by now
            provider = self.provider(lease.provider)
            offer = await self._own_offer(provider, await self._leases.live())
            lacking = offer.known and offer.free.lacking(lease.need.resources)
            if lacking:
                raise NoCapacity(
                    f"{offer.place} {', '.join(lacking)} by now.", hint="It is tried again."
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
        renewed = await self._peers.renew(lease, until)

        def later(kept: Lease) -> Lease:
            recalled = bool(kept.reason)  # meanwhile: that stands
            return kept if recalled else kept.model_copy(update={"ends_at": renewed.ends_at})

        return await self._leases.change(lease.id, later) or renewed

    async def release(self, lease: Lease, reason: str) -> None:
        """See `Leasing`. A loan is given back beside this, and counts as borrowed until then."""
        if lease.role is not LeaseRole.BORROWED:
            with contextlib.suppress(NotFound):  # a provider taken out of the settings
                await self.provider(lease.provider).terminate(lease.id)
            await self._released(lease, reason)
        elif lease.id not in self._giving_back:
            task = asyncio.create_task(self._give_back(lease, reason))
            self._giving_back[lease.id] = task
            task.add_done_callback(lambda _: self._giving_back.pop(lease.id))

    async def made(self) -> dict[str, list[str]]:
        """Return what each provider has that is ours; one that cannot say is left out."""
        found = {}
        for name, provider in self._providers.items():
            try:
                found[name] = await provider.made()
            except GridcloudError as error:
                log.warning("provider cannot be asked", provider=name, error=str(error))
        return found

    async def finish(self) -> None:
        """Wait a little for loans that are being given back; the next start sees to the rest."""
        if tasks := list(self._giving_back.values()):
            _, late = await asyncio.wait(tasks, timeout=5)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def provider(self, name: str) -> Provider:
        """Return a provider by its name; raises `NotFound`."""
        if name not in self._providers:
            raise NotFound(f"There is no provider {name!r}.", hint="See 'gridcloud provider list'.")
        return self._providers[name]

    async def _give_back(self, lease: Lease, reason: str) -> None:
        await self._peers.give_back(lease)
        await self._released(lease, reason)

    async def _released(self, lease: Lease, reason: str) -> None:
        released = {"state": LeaseState.RELEASED, "reason": reason}
        await self._leases.save(lease.model_copy(update=released))

    async def _own_offer(self, provider: Provider, live: Iterable[Lease]) -> Offer:
        capacity = await provider.capacity()
        return Offer(
            site=self._site_name,
            provider=provider.name,
            capacity=capacity.resources,
            free=capacity.resources.minus(taken(live, provider.name)),
            known=capacity.known,
            isolation=capacity.isolation,
            problem=capacity.problem,
            country=self._country() or "",
            kind=provider.kind,
        )
