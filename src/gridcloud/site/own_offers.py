"""What a site's own providers offer: one offer of what is there, or one of each shape of a cloud.

An offer that says the same as before is the same object, so that whoever looks through thousands of
them again and again looks at the changed ones anew only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gridcloud.errors import GridcloudError
from gridcloud.model.lease import Lease, LeaseState, taken
from gridcloud.model.need import Resources
from gridcloud.model.offer import Offer
from gridcloud.model.shape import Headroom, Shape
from gridcloud.orchestration.shapes import ONE_CPU, told, without
from gridcloud.providers.base import Capacity, Provider

#: How long a provider that is slow to say what it has may hold up everybody's plans.
_PATIENCE_SECONDS = 2.0
_SLOW = "has not said yet what it has"
_NOTHING = Resources()


@dataclass(frozen=True)
class _Told:
    """What one provider offered at the last look, and by what it was made out."""

    capacity: Capacity
    country: str
    quotas: Mapping[str, Headroom | None]
    offers: list[Offer]


class OwnOffers:
    """The offers of one site's providers. One that fails or is slow holds up none of the others."""

    def __init__(self, site: str, country: Callable[[], str | None]) -> None:
        self._site = site
        self._country = country
        self._told: dict[str, _Told] = {}
        self._asking: dict[str, asyncio.Task[Capacity]] = {}

    async def of(self, providers: Iterable[Provider], live: Sequence[Lease]) -> list[Offer]:
        """Return what these offer, less what ``live`` leases take."""
        providers = list(providers)
        found = await asyncio.gather(*(self._capacity(provider) for provider in providers))
        pairs = zip(providers, found, strict=True)
        return [offer for each, has in pairs for offer in self._offers(each, has, live)]

    async def close(self) -> None:
        """End questions that are under way. Idempotent."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _capacity(self, provider: Provider) -> Capacity:
        """Return what a provider has; as last told, if it does not answer in time."""
        name = provider.name
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.create_task(
                provider.capacity(), name=f"ask {name} what it has"
            )
        done, _ = await asyncio.wait([asking], timeout=_PATIENCE_SECONDS)
        before = self._told.get(name)
        if not done:
            return before.capacity if before else _unknown(_SLOW)
        if self._asking.get(name) is asking:
            del self._asking[name]
        try:
            return asking.result()
        except GridcloudError as error:
            return _unknown(str(error))

    def _offers(self, provider: Provider, has: Capacity, live: Sequence[Lease]) -> list[Offer]:
        country = self._country() or ""
        before = self._told.get(provider.name)
        quotas = _left(has, provider.name, live)
        if not has.shapes:
            offer = self._whole(provider, has, live, country)
            offers = before.offers if before and before.offers == [offer] else [offer]
        elif before and before.capacity == has and before.quotas == quotas:
            offers = before.offers
        else:
            offers = self._of_shapes(provider, has, quotas, before)
        self._told[provider.name] = _Told(has, country, quotas, offers)
        return offers

    def _whole(
        self, provider: Provider, has: Capacity, live: Iterable[Lease], country: str
    ) -> Offer:
        return Offer(
            site=self._site,
            provider=provider.name,
            capacity=has.resources,
            free=has.resources.minus(taken(live, provider.name)),
            known=has.known,
            isolation=has.isolation,
            problem=has.problem,
            country=country,
            kind=provider.kind,
        )

    def _of_shapes(
        self,
        provider: Provider,
        has: Capacity,
        quotas: Mapping[str, Headroom | None],
        before: _Told | None,
    ) -> list[Offer]:
        kept = {offer.key: offer for offer in before.offers} if before else {}
        offers = []
        for shape in has.shapes:
            quota = quotas[shape.region]
            offer = self._of_shape(provider, has, shape, quota)
            known = kept.get(offer.key)
            offers.append(known if known == offer else offer)
        return offers

    def _of_shape(
        self, provider: Provider, has: Capacity, shape: Shape, quota: Headroom | None
    ) -> Offer:
        """Where a cloud's machines stand is not told: its region may be in any country."""
        least = ONE_CPU if shape.flexible else shape.resources
        lacking = quota.lacking(least) if quota else []
        problem = has.problem or told(lacking)
        free = shape.resources
        if shape.flexible and quota is not None:
            free = Resources(
                cpus=_at_most(free.cpus, quota.cpus),
                memory_bytes=_at_most(free.memory_bytes, quota.memory_bytes),
                gpus=_at_most(free.gpus, quota.gpus),
            )
        return Offer(
            site=self._site,
            provider=provider.name,
            capacity=shape.resources,
            free=_NOTHING if lacking else free,
            isolation=has.isolation,
            problem=problem,
            kind=provider.kind,
            shape=shape.name,
            region=shape.region,
            cost=shape.price,
            currency=shape.currency,
            spot=shape.spot,
            flexible=shape.flexible,
            quota=quota,
        )


def _unknown(problem: str) -> Capacity:
    return Capacity(resources=_NOTHING, known=False, problem=problem)


def _left(has: Capacity, provider: str, live: Iterable[Lease]) -> dict[str, Headroom | None]:
    """Return what the quota leaves in each region, less what is just being made: of that a cloud
    does not know yet. What it counts already may be subtracted twice, until it is there."""
    quotas = {shape.region: has.headroom.get(shape.region) for shape in has.shapes}
    intended = [
        lease
        for lease in live
        if lease.provider == provider and lease.shape and lease.state is LeaseState.INTENT
    ]
    for lease in intended:
        quota = quotas.get(lease.region)
        if quota is not None:
            quotas[lease.region] = without(quota, _size(has, lease))
    return quotas


def _size(has: Capacity, lease: Lease) -> Resources:
    for shape in has.shapes:
        if (shape.name, shape.region) == (lease.shape, lease.region):
            return shape.fitted(lease.need) or shape.resources
    return lease.need.resources


def _at_most(amount: int, limit: int | None) -> int:
    return amount if limit is None else min(amount, limit)
