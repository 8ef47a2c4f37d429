"""Telling borrowers that a loan was recalled, until they heard or it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import structlog

from gridcloud.errors import GridcloudError, Unavailable
from gridcloud.grid.papers import LeaseGrant

log = structlog.get_logger()
_FIRST_RETRY, _LAST_RETRY = 1.0, 30.0


async def nobody_to_tell(grant: LeaseGrant, reason: str) -> None:
    """Stand in for the broker while there is none."""
    raise Unavailable(f"The borrower of {grant.lease_id} cannot be told: {reason}.")


class Recalls:
    """Keeps one task for each recall that its borrower was not told of yet. Whether it is ever
    told changes nothing about the end: the owner enforces that."""

    def __init__(self) -> None:
        #: Tells a borrower, once; raises what went wrong.
        self.tell: Callable[[LeaseGrant, str], Awaitable[None]] = nobody_to_tell
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, grant: LeaseGrant, reason: str) -> None:
        """Tell the borrower of a grant, made out anew, in the background. Idempotent."""
        if grant.lease_id in self._tasks:
            return
        task = asyncio.create_task(self._tell(grant, reason), name=f"recall {grant.lease_id}")
        self._tasks[grant.lease_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(grant.lease_id, None))

    def under_way(self, lease_id: str) -> bool:
        """Return whether a borrower was not told yet."""
        return lease_id in self._tasks

    def forget(self, lease_id: str) -> None:
        """Tell no more: the loan has ended. Idempotent."""
        if task := self._tasks.get(lease_id):
            task.cancel()

    async def close(self) -> None:
        """Stop telling; after a restart it is begun anew."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, grant: LeaseGrant, reason: str) -> None:
        pause = _FIRST_RETRY
        while datetime.now(UTC) < grant.ends_at:
            try:
                await self.tell(grant, reason)
                log.info("recall told", lease=grant.lease_id)
                return
            except GridcloudError as error:
                if not error.retryable:
                    log.info("recall refused", lease=grant.lease_id, cause=error.message)
                    return
                log.info("recall not told yet", lease=grant.lease_id, cause=error.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_RETRY)
