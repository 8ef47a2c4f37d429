"""Jobs and their events, kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from sqlalchemy import Connection, func, insert, or_, select, update

from gridcloud.errors import NotFound
from gridcloud.model.job import Event, Job, JobState
from gridcloud.store.database import Database
from gridcloud.store.schema import events, jobs


class JobStore:
    """Jobs in the order they were submitted. Every write is on disk when the call returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, new: Sequence[Job], message: str) -> None:
        """Keep new jobs, all or none, each with a first event."""

        def work(connection: Connection) -> None:
            first = (connection.execute(select(func.max(jobs.c.number))).scalar() or 0) + 1
            connection.execute(
                insert(jobs), [_row(job) | {"number": first + i} for i, job in enumerate(new)]
            )
            _note(connection, new, message)

        await self._database.run(work)

    async def save(self, job: Job, message: str = "", *, held_by: Job | None = None) -> bool:
        """Keep the job's new value; ``message`` becomes an event of its state.

        A job that has ended never changes: a late write to it has no effect. With ``held_by`` the
        same holds for a write in the name of an attempt that is no longer the current one.
        A cancel that was asked for meanwhile stays asked for. Return whether the value was kept.
        """

        def work(connection: Connection) -> bool:
            known = _find(connection, job.id)
            if known is None or known.state.final:
                return False
            if held_by is not None and not known.held_by(held_by):
                return False
            asked = {"cancel_requested": job.cancel_requested or known.cancel_requested}
            values = _row(job.model_copy(update=asked))
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(values))
            if message:
                _note(connection, [job], message)
            return True

        return await self._database.run(work)

    async def holds(self, job: Job) -> bool:
        """Return whether this is still the job's current attempt, and the job has not ended."""
        return await self._database.run(lambda connection: _holds(connection, job))

    async def request_cancel(self, job_id: str) -> None:
        """Remember that a job is to end, whatever its state is by now. Idempotent."""

        def work(connection: Connection) -> None:
            known = _find(connection, job_id)
            if known is None or known.state.final or known.cancel_requested:
                return
            job = known.model_copy(update={"cancel_requested": True})
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(_row(job)))
            _note(connection, [job], "cancel requested", "cancel")

        await self._database.run(work)

    async def note(self, job: Job, kind: str, message: str) -> None:
        """Add an event that changes nothing."""
        await self._database.run(lambda c: _note(c, [job], message, kind))

    async def get(self, job_id: str) -> Job:
        """Return one job; raises `NotFound`."""
        return (await self.resolve(job_id, expand=False))[0]

    async def resolve(self, job_id: str, *, expand: bool = True) -> list[Job]:
        """Return the job called ``job_id``, or all tasks of the array of that name."""

        def work(connection: Connection) -> list[Job]:
            wanted = [jobs.c.id == job_id] + ([jobs.c.array_id == job_id] if expand else [])
            rows = connection.execute(select(jobs.c.value).where(or_(*wanted)).order_by("number"))
            return [Job.model_validate_json(row.value) for row in rows]

        found = await self._database.run(work)
        if not found:
            raise NotFound(f"There is no job {job_id!r}.", hint="See 'gridcloud jobs --all'.")
        return found

    async def listed(
        self,
        states: Iterable[JobState] | None = None,
        *,
        first: int | None = None,
        latest: int | None = None,
    ) -> list[Job]:
        """Return jobs in one of ``states`` (all by default), oldest first.

        Of these the ``first`` so many, or the ``latest``; not both.
        """

        def work(connection: Connection) -> list[Job]:
            number = jobs.c.number if latest is None else jobs.c.number.desc()
            query = select(jobs.c.value).order_by(number).limit(first or latest)
            if states is not None:
                query = query.where(jobs.c.state.in_([state.value for state in states]))
            found = [Job.model_validate_json(row.value) for row in connection.execute(query)]
            return found if latest is None else found[::-1]

        return await self._database.run(work)

    async def count(self) -> dict[str, int]:
        """Return how many jobs are in each state that has any."""

        def work(connection: Connection) -> dict[str, int]:
            query = select(jobs.c.state, func.count().label("number")).group_by(jobs.c.state)
            return {row.state: row.number for row in connection.execute(query)}

        return await self._database.run(work)

    async def events(self, job_ids: Sequence[str], after: int = 0) -> list[tuple[int, Event]]:
        """Return numbered events of the jobs, oldest first, those after number ``after``."""

        def work(connection: Connection) -> list[tuple[int, Event]]:
            query = (
                select(events)
                .where(events.c.job_id.in_(job_ids), events.c.number > after)
                .order_by(events.c.number)
            )
            return [
                (
                    row.number,
                    Event(
                        job_id=row.job_id,
                        at=datetime.fromtimestamp(row.at, UTC),
                        kind=row.kind,
                        message=row.message,
                    ),
                )
                for row in connection.execute(query)
            ]

        return await self._database.run(work)


def _find(connection: Connection, job_id: str) -> Job | None:
    value = connection.execute(select(jobs.c.value).where(jobs.c.id == job_id)).scalar()
    return Job.model_validate_json(value) if value else None


def _holds(connection: Connection, job: Job) -> bool:
    known = _find(connection, job.id)
    return known is not None and known.held_by(job)


def _row(job: Job) -> dict[str, object]:
    return {
        "id": job.id,
        "array_id": job.array_id,
        "state": job.state.value,
        "value": job.model_dump_json(exclude_defaults=True),
    }


def _note(connection: Connection, about: Sequence[Job], message: str, kind: str = "") -> None:
    now = datetime.now(UTC).timestamp()
    connection.execute(
        insert(events),
        [
            {"job_id": job.id, "at": now, "kind": kind or job.state.value, "message": message}
            for job in about
        ],
    )
