"""Looks at every provider for what carries this site's tag, and removes what no lease knows.

It needs nothing but the site's key and its providers' settings: with an empty store everything
there is a stray, so losing the store loses no machine. What other sites of the same account made is
looked at only if asked for, each with a provider that acts in that site's name.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping

from gridcloud.errors import GridcloudError
from gridcloud.model.accounts import Fate, SweepReport, SweptThing
from gridcloud.model.things import KEPT, NETWORK, SHARED, Tags
from gridcloud.providers.base import MachineMaker, Neighbourly, NetworkKeeper, Provider
from gridcloud.site.answers import put_together
from gridcloud.store.leases import LeaseStore

#: How long one provider may take to tell what it has.
_PATIENCE_SECONDS = 120.0
#: What a site is called in tags; whoever writes tags there may have written anything.
_SITE = re.compile(r"[0-9a-f]{32}")
#: Makes the provider of a name act for the site of a tag.
ActingFor = Callable[[str, str], Provider]


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
    return _report(providers, found)


async def sweep_others(
    providers: Mapping[str, Provider], acting_for: ActingFor, *, dry_run: bool
) -> SweepReport:
    """Return what other sites have at the same accounts; unless ``dry_run`` it is removed, whether
    they use it or not, but for volumes that are kept. Idempotent."""
    shared = {name: each for name, each in providers.items() if isinstance(each, Neighbourly)}
    found = await asyncio.gather(
        *(_of_others(name, each, acting_for, dry_run=dry_run) for name, each in shared.items()),
        return_exceptions=True,
    )
    return _report(shared, found)


async def _of_others(
    name: str, provider: Neighbourly, acting_for: ActingFor, *, dry_run: bool
) -> list[SweptThing]:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        sites = await provider.sites()
    assert isinstance(provider, Provider)
    mine = Tags.of(provider.context.site_key, KEPT).site
    things: list[SweptThing] = []
    for site in sorted(sites - {mine}):
        if not _SITE.fullmatch(site):
            continue
        theirs = acting_for(name, site)
        try:
            found = await _sweep_one(theirs, None, dry_run=dry_run)
        finally:
            await theirs.close()
        things += [
            thing.model_copy(
                update={
                    "site": site,
                    "fate": Fate.ANOTHERS if thing.fate is Fate.STRAY else thing.fate,
                }
            )
            for thing in found
        ]
    return things


def _report(
    names: Mapping[str, object], found: list[list[SweptThing] | BaseException]
) -> SweepReport:
    things, problems = put_together(names, found)
    return SweepReport(things=tuple(things), problems=tuple(problems))


async def _sweep_one(
    provider: Provider, leases: LeaseStore | None, *, dry_run: bool
) -> list[SweptThing]:
    """Sweep a provider; without the memory of its ``leases`` all there is unknown."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        things = await _things(provider)
    # Looked at after the provider: what is made from now on is not among the things.
    named = {thing.name for thing in things if thing.lease_id == NETWORK}
    used = {lease.order.network for lease in await leases.live()} if leases and named else set()
    strays = {thing.lease_id for thing in things} - {KEPT, NETWORK}
    for each in sorted(strays):
        lease = await leases.find(each) if leases else None
        if lease is not None and lease.live:
            strays.discard(each)
    if {thing.lease_id for thing in things} - {KEPT, SHARED} - strays:
        strays.discard(SHARED)  # what machines share goes with the last of them
    failed = {} if dry_run else await _remove(provider, strays)
    lost = {} if dry_run else await _remove_networks(provider, named - used)
    swept = []
    for thing in things:
        if thing.lease_id == KEPT:
            fate = Fate.KEPT
        elif thing.name in used if thing.lease_id == NETWORK else thing.lease_id not in strays:
            fate = Fate.IN_USE
        elif thing.lease_id in failed or thing.name in lost:
            fate = Fate.NOT_REMOVED
        else:
            fate = Fate.STRAY if dry_run else Fate.REMOVED
        note = failed.get(thing.lease_id, "") or lost.get(thing.name, "")
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


async def _remove_networks(provider: Provider, names: set[str]) -> dict[str, str]:
    """Remove networks that no machine is in, once machines are gone; return why that failed."""
    failed: dict[str, str] = {}
    for name in sorted(names):
        assert isinstance(provider, NetworkKeeper)
        try:
            await provider.remove_network(name)
        except GridcloudError as error:
            failed[name] = str(error)
    return failed


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
                name=thing.name,
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
