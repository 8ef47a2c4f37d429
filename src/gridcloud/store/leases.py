"""Leases, kept: the memory behind "nothing leaks"."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert

from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.store.database import Database
from gridcloud.store.schema import leases


class LeaseStore:
    """All leases this site granted, holds or borrowed. A write is on disk when it returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, lease: Lease) -> None:
        """Keep the lease's newest value."""
        row = {
            "id": lease.id,
            "role": lease.role.value,
            "state": lease.state.value,
            "value": lease.model_dump_json(exclude_defaults=True),
        }

        def work(connection: Connection) -> None:
            statement = insert(leases).values(row)
            connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=row))

        await self._database.run(work)

    async def find(self, lease_id: str) -> Lease | None:
        """Return the lease of that id, or None."""

        def work(connection: Connection) -> Lease | None:
            value = connection.execute(
                select(leases.c.value).where(leases.c.id == lease_id)
            ).scalar()
            return Lease.model_validate_json(value) if value else None

        return await self._database.run(work)

    async def live(self) -> list[Lease]:
        """Return the leases that hold capacity."""

        def work(connection: Connection) -> list[Lease]:
            query = select(leases.c.value).where(leases.c.state != LeaseState.RELEASED.value)
            return [Lease.model_validate_json(row.value) for row in connection.execute(query)]

        return await self._database.run(work)

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
