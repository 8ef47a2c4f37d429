"""What a site does for its containers while it lives: bounds the disk of guests, and moves the
end of those that have none of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from gridcloud.errors import GridcloudError, NotFound
from gridcloud.providers.containers.folders import Folder, folders

log = structlog.get_logger()
_LOOK_EVERY_SECONDS = 3.0
#: A walk through a large home rests so long between its steps.
_REST_SECONDS = 0.02
#: A home that is large to walk is measured for this part of the time at most.
_SHARE_OF_TIME = 0.05


class Keeping:
    """A task that lives while there are containers; `begin` it after each launch and at a start."""

    def __init__(
        self, root: Path, lingers: timedelta, end: Callable[[str], Awaitable[None]]
    ) -> None:
        self._root = root
        self._lingers = lingers
        self._end = end
        self._task: asyncio.Task[None] | None = None
        self._measure_after: dict[str, float] = {}

    def begin(self) -> None:
        """Start looking unless that goes on. Idempotent."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look_again(), name="containers")

    async def close(self) -> None:
        """Stop looking; what runs goes on. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def open_end(self, now: datetime) -> datetime:
        """Return the end, for now, of a container that has none of its own."""
        return now + self._lingers

    async def _look_again(self) -> None:
        while there := await asyncio.to_thread(lambda: list(folders(self._root))):
            for folder in there:
                try:
                    await self._look(folder)
                except (GridcloudError, OSError) as error:  # it may be removed meanwhile
                    log.warning("container not kept", lease=folder.lease_id, cause=str(error))
            await asyncio.sleep(min(_LOOK_EVERY_SECONDS, self._lingers.total_seconds() / 4))
        self._measure_after.clear()

    async def _look(self, folder: Folder) -> None:
        try:
            facts = await asyncio.to_thread(folder.facts)
        except NotFound:  # only just made, or gone
            return
        now = datetime.now(UTC)
        end = folder.end()
        if facts.open and (end is None or end < self.open_end(now) - self._lingers / 8):
            folder.move_end(self.open_end(now))
        if facts.disk_bytes and time.monotonic() >= self._measure_after.get(folder.lease_id, 0.0):
            began = time.monotonic()
            message = await asyncio.to_thread(folder.over_disk, _REST_SECONDS)
            took = time.monotonic() - began
            self._measure_after[folder.lease_id] = time.monotonic() + took / _SHARE_OF_TIME
            if message and not folder.ended():
                folder.write_ended(message)
                log.info("container ended", lease=folder.lease_id, reason=message)
                await self._end(folder.lease_id)
