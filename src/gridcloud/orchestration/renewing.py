"""Asks for a later end when a lease comes near its own while its job still runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gridcloud.errors import GridcloudError
from gridcloud.model.job import JobState
from gridcloud.orchestration.holding import Holding
from gridcloud.orchestration.ports import Recourse

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0


async def renew_in_time(
    holding: Holding,
    recourse: Recourse,
    note: Callable[[str, str], Awaitable[None]],
    sleep: Callable[[float], Awaitable[None]],
    moved: Callable[[], None],
) -> None:
    """Have the lease lengthened each time it nears its end, until its owner refuses.

    For a job without a time limit of its own; cancel it when the job ends. ``moved`` is called
    after each change of the end. A refusal is noted, once, and the job goes on to the end.
    """
    pause = _FIRST_PAUSE
    while due := holding.renewal():
        wait, until = due
        if wait > 0:
            await sleep(wait)
            continue
        try:
            lease = await recourse.renew(holding.lease, until)
        except GridcloudError as error:
            if error.retryable and not holding.over(JobState.ACTIVE):
                await sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            return await note("lease", f"the lease is not lengthened: {error}")
        if not holding.renewed(lease):
            return None
        moved()
        end = f"{until:%Y-%m-%d %H:%M} UTC"
        await note("lease", f"the lease was lengthened; it ends no earlier than {end}")
    return None
