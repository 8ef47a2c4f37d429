"""Where the output of jobs is kept, and how it is followed while it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import BinaryIO

from gridcloud.executors.executor import LogFiles
from gridcloud.model.job import Job

_CHUNK = 256 * 1024
_FIRST_POLL = 0.02
_SLOWEST_POLL = 0.25
STREAMS = ("stdout", "stderr")


class Logs:
    """Logs below ``folder``. While a job runs on this host its job folder (below ``job_folder``)
    holds them, written by the job itself; they move here when it ends."""

    def __init__(self, folder: Path, job_folder: Path) -> None:
        self._folder = folder
        self._job_folder = job_folder

    def files(self, job: Job) -> LogFiles:
        """Return where output that comes over a connection is appended; makes the folder."""
        folder = self._folder / job.folder_name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return LogFiles(stdout=folder / "stdout", stderr=folder / "stderr")

    def keep(self, job: Job) -> None:
        """Move the logs of a job folder on this host here. Idempotent; readers are not cut."""
        for stream in STREAMS:
            source = self._job_folder / job.folder_name / stream
            if source.exists():
                source.replace(getattr(self.files(job), stream))

    def path(self, job: Job, stream: str) -> Path | None:
        """Return where the stream's bytes are now; None while there are none."""
        running = self._job_folder / job.folder_name / stream
        kept = self._folder / job.folder_name / stream
        return next((path for path in (running, kept) if path.exists()), None)

    async def follow(
        self,
        current: Callable[[], Awaitable[Job]],
        stream: str,
        offset: int,
        ended: Awaitable[object],
    ) -> AsyncIterator[bytes]:
        """Yield the stream's bytes from ``offset`` on, until ``ended`` and all is read.

        ``current`` returns the job as it is at the time: each attempt has a folder of its own.
        """
        end = asyncio.ensure_future(ended)
        file: BinaryIO | None = None
        attempt = 0
        poll = _FIRST_POLL
        try:
            while True:
                over = end.done()
                if file is None and (path := self.path(job := await current(), stream)):
                    try:
                        file = path.open("rb")
                    except FileNotFoundError:  # it moved that moment: the job is ending
                        continue
                    file.seek(offset)
                    attempt = job.attempts
                data = await asyncio.to_thread(file.read, _CHUNK) if file else b""
                if data:
                    poll = _FIRST_POLL
                    yield data
                elif file and (await current()).attempts != attempt:
                    file.close()  # the place was lost: another attempt prints from the beginning
                    file, offset = None, 0
                elif over:
                    return
                else:
                    await asyncio.wait({end}, timeout=poll)
                    poll = min(poll * 1.5, _SLOWEST_POLL)
        finally:
            end.cancel()
            if file:
                file.close()
