"""Ends what may be left of an attempt whose place was lost, whenever that can be reached again."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime

from gridcloud.errors import GridcloudError
from gridcloud.orchestration.driver import JobDriver
from gridcloud.orchestration.ports import JobKeeper, Leasing

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 15.0


async def see_off(driver: JobDriver, leasing: Leasing, jobs: JobKeeper) -> None:
    """Remove the attempt's folder, give its lease back, and tell the job's owner when it is done.

    Tries until the lease has ended; may be cancelled, the reconciler then sees to the rest.
    """
    job, lease = driver.left, driver.lease
    assert job
    try:
        pause = _FIRST_PAUSE
        while not lease.expired(datetime.now(UTC)):
            try:
                await driver.place.remove(job)
                break
            except GridcloudError:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
    finally:
        await driver.place.close()
    with contextlib.suppress(GridcloudError):  # the reconciler gives it back then
        await leasing.release(lease, f"attempt {job.attempts} was lost")
    pause = _FIRST_PAUSE
    while (kept := await _known(leasing, lease.id)) and not lease.expired(datetime.now(UTC)):
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)
    where = f"attempt {job.attempts} at {job.site}/{job.provider}"
    if kept:
        event = f"the lease of {where} has ended" + (", out of reach" if driver.silent else "")
    elif driver.silent:
        event = f"{where} came back and was ended"
    else:
        event = f"the lease of {where} was given back"
    with contextlib.suppress(GridcloudError):  # a remark is not worth more
        await jobs.note(job, "fenced", event)


async def _known(leasing: Leasing, lease_id: str) -> bool:
    """Whether a lease still counts; one that cannot be looked up is taken to."""
    try:
        lease = await leasing.find(lease_id)
    except GridcloudError:
        return True
    return lease is not None and lease.live
