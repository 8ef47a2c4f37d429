"""How machines are made, kept: what was asked for, and the events of each launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from sqlalchemy import Connection, Select, delete, insert, select, update

from gridcloud.model.fleet import LaunchNews, MachineStart
from gridcloud.model.machine import LaunchStep
from gridcloud.store.database import Database
from gridcloud.store.schema import launch_events, leases, machine_names, machine_starts

_MOST_TEXT = 65536
#: So many events of one launch are kept, the latest: a launch that goes wrong may go on for hours.
_MOST_EVENTS = 1000


class LaunchStore:
    """Starts of machines and what was said meanwhile. A write is on disk when it returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(self, lease_id: str, step: LaunchStep, message: str) -> int:
        """Keep an event of a lease's launch, cut to 64 KiB; return its number.

        What was said last of the same step is not said again: then that event's number is returned.
        """
        text = message[-_MOST_TEXT:]
        now = datetime.now(UTC).timestamp()
        c = launch_events.c

        def work(connection: Connection) -> int:
            mine = select(launch_events).where(c.lease_id == lease_id).order_by(c.number.desc())
            last = connection.execute(mine.limit(1)).first()
            if last is not None and (last.step, last.message) == (step.value, text):
                return int(last.number)
            row = {"lease_id": lease_id, "at": now, "step": step.value, "message": text}
            done = connection.execute(insert(launch_events).values(row))
            oldest = select(c.number).where(c.lease_id == lease_id).order_by(c.number.desc())
            kept = connection.execute(oldest.offset(_MOST_EVENTS).limit(1)).scalar()
            if kept is not None:
                connection.execute(
                    delete(launch_events).where(c.lease_id == lease_id, c.number <= kept)
                )
            (number,) = done.inserted_primary_key or (0,)
            return int(number)

        return await self._database.run(work)

    async def events(self, lease_ids: Sequence[str], after: int = 0) -> list[LaunchNews]:
        """Return the events of these leases' launches, oldest first, after number ``after``."""
        c = launch_events.c

        def work(connection: Connection) -> list[LaunchNews]:
            query = select(launch_events).where(c.lease_id.in_(lease_ids), c.number > after)
            return [
                LaunchNews(
                    number=row.number,
                    lease_id=row.lease_id,
                    at=datetime.fromtimestamp(row.at, UTC),
                    step=LaunchStep(row.step),
                    message=row.message,
                )
                for row in connection.execute(query.order_by(c.number))
            ]

        return await self._database.run(work)

    async def begin(self, start: MachineStart) -> None:
        """Keep a request that was just taken in."""
        row = {"id": start.id, "at": start.at.timestamp(), "pending": True}
        new = insert(machine_starts).values(row | {"value": start.model_dump_json()})
        names = [{"start_id": start.id, "name": name} for name in start.names]

        def work(connection: Connection) -> None:
            connection.execute(new)
            connection.execute(insert(machine_names), names)

        await self._database.run(work)

    async def change(
        self, start_id: str, change: Callable[[MachineStart], MachineStart]
    ) -> MachineStart | None:
        """Keep what ``change`` makes of a start as it is by then; return that. Atomic.

        None is returned of one that is not known.
        """
        c = machine_starts.c

        def work(connection: Connection) -> MachineStart | None:
            kept = connection.execute(select(c.value).where(c.id == start_id)).scalar()
            if kept is None:
                return None
            changed = change(MachineStart.model_validate_json(kept))
            row = update(machine_starts).where(c.id == start_id)
            connection.execute(row.values(value=changed.model_dump_json()))
            return changed

        return await self._database.run(work)

    async def settled(self, start_id: str) -> None:
        """Take note that all machines of a start are ready or given up. Idempotent."""
        done = update(machine_starts).where(machine_starts.c.id == start_id).values(pending=False)
        await self._database.run(lambda connection: connection.execute(done) and None)

    async def pending(self) -> list[MachineStart]:
        """Return the starts of which some machines are neither ready nor given up."""
        c = machine_starts.c
        return await self._starts(select(c.value).where(c.pending.is_(True)).order_by(c.at))

    async def start_of(self, name: str) -> MachineStart | None:
        """Return the latest start that has a machine of this name."""
        c = machine_starts.c
        query = select(c.value).join(machine_names, machine_names.c.start_id == c.id)
        query = query.where(machine_names.c.name == name).order_by(c.at.desc()).limit(1)
        return next(iter(await self._starts(query)), None)

    async def prune(self, before: datetime) -> None:
        """Forget what was said, and asked for, before then, unless it still matters."""
        c, oldest = launch_events.c, before.timestamp()

        def work(connection: Connection) -> None:
            live = select(leases.c.id).where(leases.c.state != "RELEASED")
            connection.execute(delete(launch_events).where(c.at < oldest, c.lease_id.not_in(live)))
            starts = machine_starts.c
            connection.execute(
                delete(machine_starts).where(starts.at < oldest, starts.pending.is_(False))
            )
            kept = select(starts.id)
            connection.execute(delete(machine_names).where(machine_names.c.start_id.not_in(kept)))

        await self._database.run(work)

    async def _starts(self, query: Select[tuple[str]]) -> list[MachineStart]:
        def work(connection: Connection) -> list[MachineStart]:
            found = connection.execute(query)
            return [MachineStart.model_validate_json(row.value) for row in found]

        return await self._database.run(work)
