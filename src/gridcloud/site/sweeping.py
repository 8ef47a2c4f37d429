"""Looks at every provider for what carries this site's tag, and removes what no lease knows.

It needs nothing but the site's key and its providers' settings: with an empty store everything
there is a stray, so losing the store loses no machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gridcloud.errors import GridcloudError
from gridcloud.model.accounts import Fate, SweepReport, SweptThing
from gridcloud.model.things import KEPT, SHARED, Tags
from gridcloud.providers.base import MachineMaker, Provider
from gridcloud.store.leases import LeaseStore

#: How long one provider may take to tell what it has.
_PATIENCE_SECONDS = 120.0


async def sweep(
    providers: Mapping[str, Provider], leases: LeaseStore, *, dry_run: bool
) -> SweepReport:
    """Return what there is, and what became of it; with ``dry_run`` nothing is changed.

    Idempotent. What could not be removed is told, and found again by the next sweep.
    """
    found = await asyncio.gather(
        *(_sweep_one(provider, leases, dry_run=dry_run) for provider in providers.values()),
        return_exceptions=True,
    )
    things: list[SweptThing] = []
    problems: list[str] = []
    for name, each in zip(providers, found, strict=True):
        if isinstance(each, GridcloudError | TimeoutError):
            problems.append(f"{name}: {each or 'it did not answer in time'}")
        elif isinstance(each, BaseException):
            raise each
        else:
            things += each
    return SweepReport(things=tuple(things), problems=tuple(problems))


async def _sweep_one(provider: Provider, leases: LeaseStore, *, dry_run: bool) -> list[SweptThing]:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        things = await _things(provider)
    # Looked at after the provider: what is made from now on is not among the things.
    strays = {thing.lease_id for thing in things} - {KEPT}
    for each in sorted(strays):
        lease = await leases.find(each)
        if lease is not None and lease.live:
            strays.discard(each)
    if {thing.lease_id for thing in things} - {KEPT, SHARED} - strays:
        strays.discard(SHARED)  # what machines share goes with the last of them
    failed = {} if dry_run else await _remove(provider, strays)
    swept = []
    for thing in things:
        if thing.lease_id == KEPT:
            fate = Fate.KEPT
        elif thing.lease_id not in strays:
            fate = Fate.IN_USE
        elif thing.lease_id in failed:
            fate = Fate.NOT_REMOVED
        else:
            fate = Fate.STRAY if dry_run else Fate.REMOVED
        note = failed.get(thing.lease_id, "")
        swept.append(thing.model_copy(update={"fate": fate, "note": note}))
    return swept


async def _remove(provider: Provider, strays: set[str]) -> dict[str, str]:
    """Remove what was made for these leases; return why that failed, by lease."""

    async def remove(lease_id: str) -> tuple[str, str]:
        try:
            await provider.terminate(lease_id)
        except GridcloudError as error:
            return lease_id, str(error)
        return lease_id, ""

    results = await asyncio.gather(*map(remove, sorted(strays)))
    return {lease_id: why for lease_id, why in results if why}


async def _things(provider: Provider) -> list[SweptThing]:
    if isinstance(provider, MachineMaker):
        mine = Tags.of(provider.context.site_key, KEPT).site
        return [
            SweptThing(
                provider=provider.name,
                kind=thing.kind,
                id=thing.id,
                lease_id=thing.tags.lease,
                fate=Fate.IN_USE,
                ends_at=thing.tags.ends_at,
                costs=thing.costs,
            )
            for thing in await provider.things()
            if thing.tags.site == mine
        ]
    return [
        SweptThing(
            provider=provider.name,
            kind=provider.kind,
            id=lease_id,
            lease_id=lease_id,
            fate=Fate.IN_USE,
            costs=False,
        )
        for lease_id in await provider.made()
    ]
