"""Carries one job from its lease to its end, from whatever state it was left in.

Every step is idempotent and its state is saved before the next begins, so that a site that was
killed at any instant calls `JobDriver.drive` again and continues where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

from gridcloud.errors import Conflict, GridcloudError, TimedOut, Unavailable
from gridcloud.model.job import Ending, Job, JobState, Outcome
from gridcloud.model.lease import Lease
from gridcloud.orchestration.ports import JobKeeper, Workplace

T = TypeVar("T")
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0
#: How long after a lease's end its machine is still asked for the result.
_AFTER_THE_END = 30.0


class InterruptedByStore(Exception):
    """The store failed, which is no fault of the job: it is as the store last kept it."""


class JobDriver:
    """One attempt of one job at one place. `drive` returns the job in a final state."""

    def __init__(
        self,
        job: Job,
        lease: Lease,
        place: Workplace,
        jobs: JobKeeper,
        *,
        cancel_grace: float,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.job = job
        self._lease = lease
        self._place = place
        self._jobs = jobs
        self._grace = cancel_grace
        self._now = now
        self._sleep = sleep
        self._cancel = asyncio.Event()
        #: Whether nothing of the attempt is left where it ran.
        self.tidied = True
        if job.cancel_requested:
            self._cancel.set()

    def cancel(self) -> None:
        """Ask for the job to end; `drive` sees to it. Idempotent."""
        self._cancel.set()

    async def drive(self) -> Job:
        """Take the job to its end; return at once if it has ended.

        Raises `InterruptedByStore` alone; then it may be called again.
        """
        if self.job.state.final:
            return self.job
        canceller = asyncio.create_task(self._cancel_when_asked())
        try:
            if self.job.state in (JobState.QUEUED, JobState.STAGE_IN):
                await self._begin()
            if self.job.state is JobState.ACTIVE:
                await self._accompany()
            if self.job.state is JobState.STAGE_OUT:
                await self._collect()
        except GridcloudError as error:
            await self._fail(error)
        finally:
            canceller.cancel()
            await asyncio.gather(canceller, return_exceptions=True)
        await self._tidy()
        return self.job

    async def _begin(self) -> None:
        if self._cancel.is_set():
            return await self._finish(Outcome(reason="canceled"), "canceled before it began")
        if self.job.state is JobState.QUEUED:
            where = f"{self.job.site}/{self.job.provider}"
            await self._to(JobState.STAGE_IN, f"placed at {where}, lease {self._lease.id}")
            fresh = True
        else:
            # After a crash the command may run already: its inputs must not be written then.
            fresh = await self._persist(self._place.state) in (None, "prepared")
        if fresh:
            await self._persist(lambda: self._place.stage_in(self.job))
            if self._cancel.is_set():
                return await self._finish(Outcome(reason="canceled"), "canceled before it began")
        await self._to(JobState.ACTIVE, "inputs are in place; starting")
        return None

    async def _accompany(self) -> None:
        begun: list[datetime] = []

        async def run() -> Ending:
            return await self._place.run(self.job, self._lease, lambda: begun.append(self._now()))

        ending = await self._persist(run)
        started = self.job.started_at or (begun[0] if begun else self._now())
        outcome = ending.outcome
        self.job = self.job.model_copy(update={"started_at": started, "outcome": outcome})
        if outcome.reason == "canceled" or self._cancel.is_set():
            return await self._finish(outcome, "canceled")
        if outcome.reason == "lost":
            return await self._finish(outcome, outcome.message or "lost: its supervisor was killed")
        await self._to(JobState.STAGE_OUT, _describe(outcome))
        return await self._bring_back(ending)

    async def _collect(self) -> None:
        """Continue a stage-out that a crash interrupted."""
        await self._bring_back(await self._persist(lambda: self._place.watch(self.job)))

    async def _bring_back(self, ending: Ending) -> None:
        outcome = ending.outcome
        await self._persist(lambda: self._place.stage_out(self.job, ending))
        if ending.escaping:
            paths = ", ".join(ending.escaping[:3])
            outcome = _worse(outcome, "output-escapes", f"{paths} leads out of the job folder")
        elif ending.unmatched and outcome.succeeded:
            patterns = ", ".join(ending.unmatched[:3])
            outcome = _worse(outcome, "output-missing", f"no file matches {patterns}")
        count = len(ending.outputs)
        brought = f"{count} output file{'s'[: count != 1]} in {self.job.spec.into}" if count else ""
        await self._finish(outcome, brought or "ended")

    async def _finish(self, outcome: Outcome, message: str) -> None:
        self.job = self.job.model_copy(update={"outcome": outcome})
        await self._to(JobState.CLEANUP, message)

    async def _fail(self, error: GridcloudError) -> None:
        stage = self.job.state.value.lower().replace("_", "-")
        outcome = Outcome(reason=f"{stage}-failed", message=str(error))
        if self._lease.expired(self._now()):
            message = f"The lease ended before the job did. {error}"
            outcome = Outcome(reason="lease-end", message=message)
        if self._cancel.is_set():
            outcome = Outcome(reason="canceled")
        await self._finish(outcome, str(error))

    async def _tidy(self) -> None:
        outcome = self.job.outcome or Outcome(reason="lost", message="its end was never learned")
        keep = outcome.reason == "stage-out-failed"  # results are never thrown away unseen
        try:
            if not keep:
                await self._place.remove(self.job)
        except GridcloudError as error:
            # The machine is out of reach: its lease is kept until the folder could be removed.
            self.tidied = False
            await self._note("CLEANUP", f"left behind for now: {error}")
        await self._place.close()
        if outcome.reason == "canceled":
            state = JobState.CANCELED
        else:
            state = JobState.COMPLETED if outcome.succeeded else JobState.FAILED
        message = outcome.message or _describe(outcome)
        if keep:
            message += f" The results remain in job folder {self.job.folder_name}."
        await self._to(state, message, ended_at=self._now(), message=message)

    async def _cancel_when_asked(self) -> None:
        await self._cancel.wait()
        pause = _FIRST_PAUSE
        while not self.job.state.final:
            if self.job.state is JobState.ACTIVE:
                try:
                    return await self._place.cancel(self._grace)
                except GridcloudError as error:
                    await self._note("cancel", f"not yet: {error}")
            await self._sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
        return None

    async def _persist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do a step, again and again while its machine is out of reach and the lease lasts."""
        pause = _FIRST_PAUSE
        told = ""
        while True:
            try:
                return await self._in_time(step)
            except GridcloudError as error:
                if not error.retryable or self._over():
                    raise
                if self._cancel.is_set() and self.job.state is not JobState.ACTIVE:
                    raise
                if str(error) != told:
                    told = str(error)
                    await self._note("retry", f"trying again: {error}")
            if self._tries_exhausted(pause):
                raise Unavailable(f"Given up after several tries. {told}")
            await self._sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _in_time(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do a step, but do not wait for a machine that says nothing long after its lease."""
        end = self._lease.ends_at
        left = (end - self._now()).total_seconds() + _AFTER_THE_END if end else None
        try:
            async with asyncio.timeout(left):
                if self.job.state is JobState.ACTIVE:  # a cancel ends the command, not the wait
                    return await step()
                return await self._unless_canceled(step)
        except TimeoutError as error:
            raise TimedOut("The machine said nothing more until its lease had ended.") from error

    async def _unless_canceled(self, step: Callable[[], Awaitable[T]]) -> T:
        work = asyncio.ensure_future(step())
        wish = asyncio.create_task(self._cancel.wait())
        try:
            await asyncio.wait({work, wish}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise Conflict("canceled")
        finally:
            work.cancel()
            wish.cancel()
            await asyncio.gather(work, wish, return_exceptions=True)

    def _tries_exhausted(self, pause: float) -> bool:
        # A running command is waited for as long as its lease lasts; copying is not.
        return self.job.state is not JobState.ACTIVE and pause >= _LONGEST_PAUSE

    def _over(self) -> bool:
        end = self._lease.ends_at
        return end is not None and (self._now() - end).total_seconds() > _AFTER_THE_END

    async def _note(self, kind: str, message: str) -> None:
        with contextlib.suppress(GridcloudError):  # a remark is not worth a job
            await self._jobs.note(self.job, kind, message)

    async def _to(self, state: JobState, event: str, **changes: object) -> None:
        job = self.job.advanced(state, **changes)
        try:  # kept first: what the store does not know has not happened
            await self._jobs.save(job, event)
        except GridcloudError as error:
            raise InterruptedByStore(str(error)) from error
        asked = {"cancel_requested": self.job.cancel_requested}
        self.job = job.model_copy(update=asked)


def _worse(outcome: Outcome, reason: str, message: str) -> Outcome:
    return outcome.model_copy(update={"reason": reason, "message": message})


def _describe(outcome: Outcome) -> str:
    if outcome.message:
        return outcome.message
    if outcome.reason:
        return outcome.reason.replace("-", " ")
    if outcome.signal:
        return f"ended by signal {outcome.signal}"
    return f"exit status {outcome.exit_code}"
