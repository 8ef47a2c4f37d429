"""The store keeps what it says it kept, and an ended job stays as it ended."""

import asyncio
from datetime import UTC, datetime

import pytest
from sqlalchemy import text

from gridcloud.errors import GridcloudError, Unavailable
from gridcloud.model.job import Job, JobSpec, JobState
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.store.database import Database
from gridcloud.store.jobs import JobStore
from gridcloud.store.leases import LeaseStore

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
async def database(tmp_path):
    made = Database(tmp_path / "site.db")
    await made.open()
    yield made
    await made.close()


def insert(key, size=1):
    row = {"k": key, "v": "x" * size}

    def work(connection):
        connection.execute(text("INSERT INTO papers VALUES ('t', '', :k, :v, '')"), row)

    return work


async def test_a_full_disk_in_a_batch_hurts_only_what_did_not_fit(database):
    """SQLite then rolls back all of a transaction; what reported success is there all the same."""
    await database.run(lambda c: c.execute(text("PRAGMA max_page_count=60")) and None)
    work = [insert("a"), insert("big", 3_000_000), insert("b")]
    results = await asyncio.gather(*map(database.run, work), return_exceptions=True)
    assert [type(r) for r in results] == [type(None), Unavailable, type(None)]

    def kept(connection):
        return [row.subject for row in connection.execute(text("SELECT * FROM papers"))]

    assert sorted(await database.run(kept)) == ["a", "b"]


async def test_an_error_in_one_piece_of_work_is_its_callers_alone(database):
    """Its neighbours in the same transaction succeed, and the store goes on."""

    def broken(connection):
        raise ValueError("mine")

    work = [insert("a"), broken, insert("b")]
    results = await asyncio.gather(*map(database.run, work), return_exceptions=True)
    assert [type(r) for r in results] == [type(None), ValueError, type(None)]


async def test_an_ended_job_never_changes(database):
    """A late write, such as one that races with its end, has no effect."""
    store = JobStore(database)
    job = Job(id="j", spec=JobSpec(command=("true",)), created_at=datetime.now(UTC))
    await store.add([job], "submitted")
    await store.save(job.advanced(JobState.CANCELED), "canceled")
    await store.save(job.advanced(JobState.QUEUED), "late")
    await store.request_cancel("j")
    assert (await store.get("j")).state is JobState.CANCELED
    assert not (await store.get("j")).cancel_requested
    assert [event.kind for _, event in await store.events(["j"])] == ["NEW", "CANCELED"]


async def test_two_openings_make_one_schema(tmp_path):
    """Opening a store again changes nothing."""
    for _ in range(2):
        database = Database(tmp_path / "site.db")
        await database.open()
        await database.close()
    with pytest.raises(GridcloudError):
        broken = Database(tmp_path / "absent" / "site.db")
        await broken.open()


async def test_a_cancel_is_never_written_over(database):
    """Whoever saves a job that it read before the cancel does not undo it."""
    jobs = JobStore(database)
    job = Job(id="j", spec=JobSpec(command=("true",)), state=JobState.QUEUED, created_at=NOW)
    await jobs.add([job], "submitted")
    await jobs.request_cancel("j")
    assert await jobs.save(job.advanced(JobState.STAGE_IN), "placed", held_by=job)
    kept = await jobs.get("j")
    assert (kept.state, kept.cancel_requested) == (JobState.STAGE_IN, True)


async def test_a_lease_that_is_over_never_comes_back(database):
    """A late write, in whatever order, brings no lease to life."""
    leases = LeaseStore(database)
    lease = Lease(
        id="l",
        role=LeaseRole.BORROWED,
        state=LeaseState.ACTIVE,
        provider="lent",
        need=Need(),
        created_at=NOW,
        ends_at=NOW,
    )
    assert await leases.change("l", lambda kept: kept) is None, "unknown"
    await leases.save(lease)
    changed = await leases.change("l", lambda kept: kept.model_copy(update={"reason": "own work"}))
    assert changed == await leases.find("l")
    await leases.save(lease.released("given back", NOW))
    await leases.save(lease)
    assert await leases.change("l", lambda kept: kept) is None
    assert await leases.live() == []
    assert (await leases.find("l")).reason == "given back"
