"""Carries one job from its lease to its end, from whatever state it was left in.

Every step is idempotent and its state is saved before the next begins, so that a site that was
killed at any instant calls `JobDriver.drive` again and continues where it was.

It is over 400 lines, since every way an attempt may go is to be seen in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

from gridcloud.errors import Conflict, GridcloudError, NotFound, TimedOut, Unavailable
from gridcloud.model.job import Ending, Job, JobState, Outcome
from gridcloud.model.lease import Lease
from gridcloud.model.quantities import format_duration
from gridcloud.orchestration.holding import Holding
from gridcloud.orchestration.ports import JobKeeper, Recourse, Workplace
from gridcloud.orchestration.renewing import renew_in_time

T = TypeVar("T")
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0
#: The same while results wait to be brought back, which may be for hours.
_LONGEST_HELD = 60.0
#: What a person has to know of a command that runs again.
TWICE = "What its command did outside the job folder may happen twice."


class InterruptedByStore(Exception):
    """The store failed, which is no fault of the job: it is as the store last kept it."""


class _Superseded(Exception):
    """The store has another attempt of the job by now: this one has nothing more to say."""


class _PlaceLost(Exception):
    """The machine was out of reach for too long, and the job may go elsewhere."""


class JobDriver:
    """One attempt of one job at one place. `drive` returns the job in a final state, or, when its
    place was lost, back in line (`left`)."""

    def __init__(
        self,
        job: Job,
        lease: Lease,
        place: Workplace,
        jobs: JobKeeper,
        *,
        cancel_grace: float,
        recourse: Recourse,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.job = job
        self.place = place
        self._holding = Holding(lease, now)
        self._jobs = jobs
        self._grace = cancel_grace
        self._recourse = recourse
        self._now = now
        self._sleep = sleep
        self._cancel = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._refused_to_go = ""
        #: Whether nothing of the attempt is left where it ran.
        self.tidied = True
        #: The job as it was when its place was lost; it is back in line then, the place still open.
        self.left: Job | None = None
        #: Whether the place was lost by being out of reach, so that the command may still run.
        self.silent = False
        if job.cancel_requested:
            self._cancel.set()

    @property
    def lease(self) -> Lease:
        """The lease as it is by now."""
        return self._holding.lease

    @property
    def cancel_asked(self) -> bool:
        """Whether the job is to end."""
        return self._cancel.is_set()

    def cancel(self) -> None:
        """Ask for the job to end; `drive` sees to it. Idempotent."""
        self._cancel.set()

    def recall(self, until: datetime, reason: str) -> None:
        """Take note that the lease's owner ends it early. Idempotent.

        The job may end there until then; if it has not, it goes back in line.
        """
        self._holding.recall(until, reason)
        self._set_limit()

    def lose(self, reason: str) -> None:
        """Take note that the machine is there no more, and why. Idempotent."""
        self._holding.lose(reason)
        self._set_limit()

    async def drive(self) -> Job:
        """Take the job to its end, or back in line; return at once if it has ended.

        Raises `InterruptedByStore` alone; then it may be called again.
        """
        if self.job.state.final:
            return self.job
        try:
            await self._attempt()
            if self.left is None:
                await self._tidy()
        except _Superseded:
            await self._end_stale()
        return self.job

    async def _attempt(self) -> None:
        beside = [asyncio.create_task(self._cancel_when_asked())]
        if self.job.spec.need.time is None:
            renewing = renew_in_time(
                self._holding, self._recourse, self._note, self._sleep, self._set_limit
            )
            beside.append(asyncio.create_task(renewing))
        try:
            if self.job.state in (JobState.QUEUED, JobState.STAGE_IN):
                await self._begin()
            if self.job.state is JobState.ACTIVE:
                await self._accompany()
            if self.job.state is JobState.STAGE_OUT:
                await self._collect()
        except _PlaceLost as lost:
            self.silent = True
            if not await self._go_back(str(lost)):
                await self._fail(Unavailable(str(lost)))
        except GridcloudError as error:
            why = await self._lost_by(error)
            if not why or not await self._go_back(why):
                await self._fail(error)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _begin(self) -> None:
        if self._cancel.is_set():
            return await self._finish(Outcome(reason="canceled"), "canceled before it began")
        if self.job.state is JobState.QUEUED:
            where = f"{self.job.site}/{self.job.provider}"
            await self._to(JobState.STAGE_IN, f"placed at {where}, lease {self.lease.id}")
            fresh = True
        else:
            # After a crash the command may run already: its inputs must not be written then.
            fresh = await self._persist(self.place.state) in (None, "prepared")
        if fresh:
            await self._persist(lambda: self.place.stage_in(self.job))
            if self._cancel.is_set():
                return await self._finish(Outcome(reason="canceled"), "canceled before it began")
        await self._to(JobState.ACTIVE, "inputs are in place; starting")
        return None

    async def _accompany(self) -> None:
        begun: list[datetime] = []

        def started() -> None:
            begun.append(self._now())
            self._holding.in_touch()

        async def run() -> Ending:
            return await self.place.run(self.job, self.lease, started)

        ending = await self._persist(run)
        lost = self._holding.lost_by_outcome(ending.outcome)
        if lost and await self._go_back(lost):
            return None
        outcome = self._holding.as_recalled(ending.outcome, self._refused_to_go)
        began = self.job.started_at or (begun[0] if begun else self._now())
        self.job = self.job.model_copy(update={"started_at": began, "outcome": outcome})
        if outcome.reason == "canceled" or self._cancel.is_set():
            return await self._finish(outcome, "canceled")
        if ending.outcome.reason == "lost":
            return await self._finish(outcome, outcome.message or "lost: its supervisor was killed")
        await self._to(JobState.STAGE_OUT, _describe(outcome))
        return await self._bring_back(ending)

    async def _collect(self) -> None:
        """Continue a stage-out that a crash interrupted, unless another attempt came first."""
        if not await self._jobs.holds(self.job):
            raise _Superseded
        await self._bring_back(await self._persist(lambda: self.place.watch(self.job)))

    async def _bring_back(self, ending: Ending) -> None:
        outcome = self._holding.as_recalled(ending.outcome, self._refused_to_go)
        await self._persist(lambda: self.place.stage_out(self.job, ending))
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
        if self.lease.expired(self._now()):
            brought = self.job.state is JobState.STAGE_OUT
            what = "its results were brought back" if brought else "the job did"
            message = f"The lease ended before {what}. {error}"
            outcome = Outcome(reason="lease-end", message=message)
        outcome = self._holding.as_recalled(outcome, self._refused_to_go)
        if self._cancel.is_set():
            outcome = Outcome(reason="canceled")
        await self._finish(outcome, outcome.message or str(error))

    async def _lost_by(self, error: GridcloudError) -> str:
        """Return why the place is lost, as an error tells; empty if it is not."""
        if why := self._holding.lost_by(error, self.job.state):
            return why
        if self.job.state is JobState.STAGE_IN and isinstance(error, NotFound):
            try:  # what is not there: an input here, or the place?
                await self._in_time(self.place.state)
            except GridcloudError as word:
                return self._holding.lost_by(word, JobState.ACTIVE)
        return ""

    async def _go_back(self, why: str) -> bool:
        """Put the job back in line, since its place was lost; return False where it cannot."""
        if self._cancel.is_set() or await self._cannot_go(silent=self.silent):
            return False
        begun = self.job.state is JobState.ACTIVE
        where = f"attempt {self.job.attempts} at {self.job.site}/{self.job.provider}"
        left = self.job
        event = f"{where} was lost: {why} Back in line. {TWICE if begun else ''}".strip()
        await self._to(
            JobState.QUEUED,
            event,
            lease_id=None,
            site=None,
            provider=None,
            started_at=None,
            outcome=None,
            resubmitted=self.job.resubmitted + 1,
            lost_at=self._lost_at(silent=self.silent),
        )
        self.left = left
        return True

    async def _cannot_go(self, *, silent: bool) -> bool:
        """Return whether the job may not be placed anew, after telling why, once."""
        lost = self.job.model_copy(update={"lost_at": self._lost_at(silent=silent)})
        try:
            refusal = await self._recourse.refusal(lost)
        except GridcloudError as error:  # whoever would be asked does not answer either
            refusal = str(error)
        if refusal and refusal != self._refused_to_go:
            self._refused_to_go = refusal
            await self._note("resubmit", f"not placed anew: {refusal}")
        return bool(refusal)

    def _lost_at(self, *, silent: bool) -> tuple[str, ...]:
        return (*self.job.lost_at, *self._holding.bars(silent=silent))

    async def _end_stale(self) -> None:
        """Leave nothing of an attempt that is no longer the job's; it has written nothing."""
        where = f"{self.job.site}/{self.job.provider}"
        try:
            await self.place.remove(self.job)
        except GridcloudError:
            self.tidied = False  # the reconciler ends it with its lease
        await self.place.close()
        await self._note(
            "fenced", f"attempt {self.job.attempts} at {where} came back and was ended"
        )

    async def _tidy(self) -> None:
        outcome = self.job.outcome or Outcome(reason="lost", message="its end was never learned")
        # Results are never thrown away unseen; but nothing can be kept where all goes anyway.
        keep = outcome.reason == "stage-out-failed" and not self._holding.takes_results
        try:
            if not keep:
                await self.place.remove(self.job)
        except GridcloudError as error:
            # The machine is out of reach: its lease is kept until the folder could be removed.
            self.tidied = False
            await self._note("CLEANUP", f"left behind for now: {error}")
        await self.place.close()
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
                    return await self.place.cancel(self._grace)
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
                canceled = self._cancel.is_set() and self.job.state is not JobState.ACTIVE
                collecting = self.job.state is JobState.STAGE_OUT and not canceled
                held = collecting and self._holding.held_by(error)
                over = self._holding.over(self.job.state)
                if over and told and isinstance(error, TimedOut):
                    raise Unavailable(told) from error  # which says more
                if over or not (error.retryable or held):
                    raise
                await self._leave_if_silent(error)
                if canceled:
                    raise
                if str(error) != told:
                    told = str(error)
                    await self._tell_of_trouble(error, held=held)
            if not held and self._tries_exhausted(pause):
                raise Unavailable(f"Given up after several tries. {told}")
            await self._rest(pause, held=held)
            pause = min(pause * 2, _LONGEST_HELD if held else _LONGEST_PAUSE)

    async def _tell_of_trouble(self, error: GridcloudError, *, held: bool) -> None:
        if not held:
            return await self._note("retry", f"trying again: {error}")
        end = self.lease.ends_at
        until = f"{end:%Y-%m-%d %H:%M} UTC" if end else "the job is canceled"
        event = f"the results could not be brought back: {error} It is tried again, and they are"
        return await self._note("results", f"{event} kept where they are until {until}.")

    async def _rest(self, pause: float, *, held: bool) -> None:
        """Wait before the next try; a long wait ends when the job is canceled, or its lease."""
        if not held:
            return await self._sleep(pause)
        left = self._holding.seconds_left(self.job.state)
        pause = pause if left is None else max(0.0, min(pause, left))
        return await self._unless_canceled(lambda: self._sleep(pause))

    async def _in_time(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do a step, but do not wait for a machine that says nothing long after its lease."""
        try:
            async with asyncio.timeout(self._holding.seconds_left(self.job.state)) as self._limit:
                if self.job.state is JobState.ACTIVE:  # a cancel ends the command, not the wait
                    return await step()
                return await self._unless_canceled(step)
        except TimeoutError as error:
            raise TimedOut("The machine said nothing more until its lease had ended.") from error
        finally:
            self._limit = None

    def _set_limit(self) -> None:
        """Have the step under way end with the lease, whose end has moved."""
        left = self._holding.seconds_left(self.job.state)
        if self._limit and not self._limit.expired() and left is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + left)

    async def _leave_if_silent(self, error: GridcloudError) -> None:
        """Give up a machine that was out of reach for too long, if the job may go elsewhere."""
        if self.job.state is not JobState.ACTIVE or not self._holding.elsewhere:
            return
        silent, patience = self._holding.silent_for(), self._recourse.patience
        if silent < patience or self._cancel.is_set() or await self._cannot_go(silent=True):
            return
        raise _PlaceLost(f"out of reach for {format_duration(silent)}. {error}")

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

    async def _note(self, kind: str, message: str) -> None:
        with contextlib.suppress(GridcloudError):  # a remark is not worth a job
            await self._jobs.note(self.job, kind, message)

    async def _to(self, state: JobState, event: str, **changes: object) -> None:
        job = self.job.advanced(state, **changes)
        try:  # kept first: what the store does not know has not happened
            kept = await self._jobs.save(job, event, held_by=self.job)
        except GridcloudError as error:
            raise InterruptedByStore(str(error)) from error
        if not kept:
            raise _Superseded
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
