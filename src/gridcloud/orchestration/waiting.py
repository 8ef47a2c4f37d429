"""The front of the line, as it is read from the store: as far as it takes, not all of it."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from gridcloud.model.choice import Order
from gridcloud.model.job import Job, JobState
from gridcloud.orchestration.line import Placing
from gridcloud.orchestration.ports import JobKeeper

#: How far down the line is looked at first; the rest could hardly be placed before these.
FIRST_LOOK = 200
#: How far at most. That many are read in some tenths of a second.
LAST_LOOK = 12_800
_WAITING = (JobState.NEW, JobState.QUEUED)


class WaitingLine:
    """Reads who waits. Those in front may all wait for a site that is away while others could
    begin at once: so the next look goes further when one was in vain though there is room."""

    def __init__(self, jobs: JobKeeper) -> None:
        self._jobs = jobs
        self._far = FIRST_LOOK
        self._more = False

    async def read(self, order: Order, busy: AbstractSet[str]) -> list[Job]:
        """Return the first in line who are not ``busy``, oldest first."""
        most = self._far + len(busy)
        if order is Order.LIFO:
            line = await self._jobs.listed(_WAITING, latest=most)
        else:
            line = await self._jobs.listed(_WAITING, first=most)
        self._more = len(line) == most
        return [job for job in line if job.id not in busy]

    def further(self, placing: Placing) -> bool:
        """Take note of what a look came to; return whether to look again at once, further."""
        room = any(row.works and row.cpus > 0 and row.memory > 0 for row in placing.market.rows)
        if placing.placed or not room or not self._more:
            self._far = FIRST_LOOK
            return False
        if self._far >= LAST_LOOK:
            return False
        self._far = min(4 * self._far, LAST_LOOK)
        return True
