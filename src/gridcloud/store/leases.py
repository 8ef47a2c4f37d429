"""Leases, kept: the memory behind "nothing leaks"."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime

from sqlalchemy import Connection, Select, select
from sqlalchemy.dialects.sqlite import insert

from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.store.database import Database
from gridcloud.store.schema import leases


class LeaseStore:
    """All leases this site granted, holds or borrowed. A write is on disk when it returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, lease: Lease) -> None:
        """Keep the lease's newest value. One that is over stays so: a late write has no effect."""
        await self._database.run(lambda connection: _put(connection, lease))

    async def change(self, lease_id: str, change: Callable[[Lease], Lease]) -> Lease | None:
        """Keep what ``change`` makes of a lease as it is by then; return that. Atomic.

        One that is unknown or over is left alone: then None is returned.
        """

        def work(connection: Connection) -> Lease | None:
            kept = _find(connection, lease_id)
            if kept is None or not kept.live:
                return None
            changed = change(kept)
            _put(connection, changed)
            return changed

        return await self._database.run(work)

    async def find(self, lease_id: str) -> Lease | None:
        """Return the lease of that id, or None."""
        return await self._database.run(lambda connection: _find(connection, lease_id))

    async def live(self) -> list[Lease]:
        """Return the leases that hold capacity."""

        def work(connection: Connection) -> list[Lease]:
            query = select(leases.c.value).where(leases.c.state != LeaseState.RELEASED.value)
            return [Lease.model_validate_json(row.value) for row in connection.execute(query)]

        return await self._database.run(work)

    async def machines(self, name: str | None = None, *, ended: bool = True) -> list[Lease]:
        """Return the leases of machines without a job, the oldest first: those of one name only,
        and unless ``ended`` only those that hold capacity."""

        def work(connection: Connection) -> list[Lease]:
            query = select(leases.c.value)
            query = query.where(leases.c.machine == name if name else leases.c.machine.is_not(None))
            if not ended:
                query = query.where(leases.c.state != LeaseState.RELEASED.value)
            return _in_order(connection, query)

        return await self._database.run(work)

    async def clouds(self) -> list[Lease]:
        """Return the leases for which a machine was made at a cloud, the oldest first."""
        query = select(leases.c.value).where(leases.c.shape.is_not(None))
        return await self._database.run(lambda connection: _in_order(connection, query))

    async def ended_since(self, role: LeaseRole, since: datetime) -> list[Lease]:
        """Return the leases of a role that were over at ``since`` or later."""
        first = since.astimezone(UTC)

        def work(connection: Connection) -> list[Lease]:
            query = select(leases.c.value).where(
                leases.c.role == role.value, leases.c.state == LeaseState.RELEASED.value
            )
            # Looked at as plain JSON first: most may be long over.
            return [
                Lease.model_validate_json(row.value)
                for row in connection.execute(query)
                if (ended := json.loads(row.value).get("ended_at"))
                and datetime.fromisoformat(ended) >= first
            ]

        return await self._database.run(work)


def _find(connection: Connection, lease_id: str) -> Lease | None:
    value = connection.execute(select(leases.c.value).where(leases.c.id == lease_id)).scalar()
    return Lease.model_validate_json(value) if value else None


def _in_order(connection: Connection, query: Select[tuple[str]]) -> list[Lease]:
    found = [Lease.model_validate_json(row.value) for row in connection.execute(query)]
    return sorted(found, key=lambda lease: (lease.created_at, lease.id))


def _put(connection: Connection, lease: Lease) -> None:
    row = {
        "id": lease.id,
        "role": lease.role.value,
        "state": lease.state.value,
        "value": lease.model_dump_json(exclude_defaults=True),
        "machine": (lease.order.name or None) if lease.for_a_machine else None,
        "shape": lease.shape or None,
    }
    still = leases.c.state != LeaseState.RELEASED.value
    new = insert(leases).values(row)
    connection.execute(new.on_conflict_do_update(index_elements=["id"], set_=row, where=still))
