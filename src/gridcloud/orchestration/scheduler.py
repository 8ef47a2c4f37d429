"""Takes jobs in, places them, keeps one driver for each that is placed, mends after a restart.

It is over 400 lines, since every way a job may go is to be seen in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from gridcloud.errors import GridcloudError, InvalidSpec, TimedOut
from gridcloud.model.api import CommunityInfo
from gridcloud.model.choice import Constraints, Strategy
from gridcloud.model.identifiers import new_id
from gridcloud.model.job import Job, JobSpec, JobState, Outcome
from gridcloud.model.lease import Lease, LeaseState
from gridcloud.model.need import Need
from gridcloud.model.offer import Offer, Plan
from gridcloud.orchestration.choosing import Choosing
from gridcloud.orchestration.departure import see_off
from gridcloud.orchestration.driver import TWICE, InterruptedByStore, JobDriver
from gridcloud.orchestration.line import Placing
from gridcloud.orchestration.market import Wish, suitable
from gridcloud.orchestration.pauses import Pauses
from gridcloud.orchestration.ports import JobKeeper, Leasing, Workplaces
from gridcloud.orchestration.waiting import WaitingLine
from gridcloud.settings import JobSettings

log = structlog.get_logger()

_LOOK_AGAIN_AFTER = 5.0
#: So long a membership is over before jobs that need it end: when a manager is removed, the removal
#: may arrive before the memberships that are signed anew.
_HOPELESS_FOR = 15.0
_RUNNING = (JobState.STAGE_IN, JobState.ACTIVE, JobState.STAGE_OUT, JobState.CLEANUP)


class Scheduler:
    """All jobs of one site. Construct, `start`, and `stop` when the site goes down: jobs that
    run go on without it and are picked up by the next `start`.

    ``settings`` is asked each time they matter. ``measure`` returns the bytes of some inputs on
    this host (it may block); without it the nearness of data is judged by the distance alone.
    """

    def __init__(
        self,
        jobs: JobKeeper,
        leasing: Leasing,
        places: Workplaces,
        *,
        cancel_grace: float,
        settings: Callable[[], JobSettings] = JobSettings,
        measure: Callable[[Sequence[str]], int] | None = None,
    ) -> None:
        self._jobs = jobs
        self._leasing = leasing
        self._places = places
        self._grace = cancel_grace
        self._measure = measure
        self._choosing = Choosing(leasing, settings)
        self._waiting = WaitingLine(jobs)
        #: Called with the need of the first in line that this site's own capacity could serve once
        #: there is room: what is lent may be recalled for it.
        self.on_waiting: Callable[[Need], None] = lambda need: None
        #: Gives the communities that this site is in, was removed from, or asks to be admitted to;
        #: without it every job waits for those that it is bound to.
        self.communities: Callable[[], Awaitable[Sequence[CommunityInfo]]] | None = None
        self._drivers: dict[str, JobDriver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._placing: set[str] = set()
        self._canceled: set[str] = set()
        self._recalls: dict[str, tuple[datetime, str]] = {}
        self._beside: set[asyncio.Task[None]] = set()
        self._told_to_wait: set[str] = set()
        self._hopeless_since: dict[str, float] = {}
        self._pauses = Pauses()
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._listeners: set[asyncio.Queue[str]] = set()

    async def start(self) -> None:
        """Pick up every job the last run of the site left, then place what waits."""
        for job in await self._jobs.listed(_RUNNING):
            lease = await self._leasing.find(job.lease_id) if job.lease_id else None
            if lease and lease.state is LeaseState.ACTIVE and lease.machine:
                await self._jobs.note(job, "found", "found again after the site restarted")
                self._follow(self._driver(job, lease))
            else:
                await self._requeue(job, "its lease was not complete when the site stopped")
        self._loop = asyncio.create_task(self._place_for_ever(), name="scheduler")
        self._wake.set()

    async def stop(self) -> None:
        """Let go of all jobs without ending them."""
        tasks = [*self._tasks.values(), *self._beside, *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def attends(self, job_id: str) -> bool:
        """Return whether a job is being placed, or has a place."""
        return job_id in self._placing or job_id in self._drivers

    def wake(self) -> None:
        """Look at the waiting jobs again: capacity came free, or offers changed."""
        self._wake.set()

    async def submit(self, spec: JobSpec) -> list[Job]:
        """Take in a job, or one for each task of an array; return them once they are kept.

        Raises `InvalidSpec` when no offer known now could ever serve the need, and for a site or a
        community that is not known.
        """
        await self._choosing.check(spec)
        now = datetime.now(UTC)
        name = new_id()
        specs: list[tuple[str, int | None, JobSpec]] = [(name, None, spec)]
        if spec.tasks:
            specs = [(f"{name}.{task}", task, spec.for_task(task)) for task in spec.tasks]
        sizes = await self._sizes([each for _, _, each in specs])
        jobs = [
            Job(
                id=job_id,
                array_id=name if spec.tasks else None,
                task=task,
                spec=each,
                state=JobState.QUEUED,
                created_at=now,
                input_bytes=sizes.get(each.inputs, 0),
            )
            for job_id, task, each in specs
        ]
        await self._jobs.add(jobs, "submitted")
        self._wake.set()
        return jobs

    async def plan(
        self,
        need: Need,
        site: str | None = None,
        constraints: Constraints | None = None,
        strategy: Strategy | None = None,
        *,
        spot: bool = False,
        most: int | None = None,
    ) -> Plan:
        """Judge the offers known now as for a job; changes nothing.

        Raises `InvalidSpec` for a site or a community that is not known.
        """
        return await self._choosing.plan(need, site, constraints, strategy, spot=spot, most=most)

    def recalled(self, lease_id: str, until: datetime, reason: str) -> None:
        """Take note that an owner ends a lease early; its job goes back in line at that time,
        unless it has ended by then. Idempotent; a lease of no job here is passed over."""
        driver = next((d for d in self._drivers.values() if d.lease.id == lease_id), None)
        if driver is None:
            if self._placing:  # it may be the lease that one of these is just being granted
                self._recalls[lease_id] = (until, reason)
            return
        driver.recall(until, reason)
        job, end = driver.job, f"{until:%Y-%m-%d %H:%M:%S} UTC"
        event = f"{job.site} recalls its machine: {reason.rstrip('.')}. The job has until {end}."
        self._start_beside(self._note(job, "recall", event))

    def lost(self, lease_id: str, reason: str) -> None:
        """Take note that a lease's machine is there no more; its job goes back in line. Idempotent;
        a lease of no job that runs here is passed over."""
        for driver in self._drivers.values():
            if driver.lease.id == lease_id:
                driver.lose(reason)

    async def cancel(self, job_id: str) -> list[Job]:
        """Ask for a job, or all tasks of an array, to end. Idempotent; ended jobs stay."""
        for job in await self._jobs.resolve(job_id):
            await self._cancel_one(job.id)
        return await self._jobs.resolve(job_id)

    async def _cancel_one(self, job_id: str) -> None:
        while True:
            if driver := self._drivers.get(job_id):
                driver.cancel()
                return await self._jobs.request_cancel(job_id)
            if job_id in self._placing:
                self._canceled.add(job_id)
                return await self._jobs.request_cancel(job_id)
            job = await self._jobs.get(job_id)
            if job.state.final:
                return None
            if self.attends(job_id):
                continue  # it was taken up while we looked
            # Written before anyone else can: who takes the job up from now on finds it ended.
            return await self._end(job, Outcome(reason="canceled"), "canceled before it began")

    async def wait(self, job_id: str, seconds: float) -> list[Job]:
        """Return the job, or the array's tasks, once all have ended or the seconds are over."""
        ended: asyncio.Queue[str] = asyncio.Queue()
        self._listeners.add(ended)  # before looking, so that no end is missed
        try:
            jobs = await self._jobs.resolve(job_id)
            pending = {job.id for job in jobs if not job.state.final}
            if not pending:
                return jobs
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while pending:
                        pending.discard(await ended.get())
            return await self._jobs.resolve(job_id)
        finally:
            self._listeners.discard(ended)

    async def _place_for_ever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_AFTER):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._place_once()
            except GridcloudError as error:
                log.warning("placing failed; will try again", error=str(error))
            except Exception:  # a fault of ours must not end all placing
                log.exception("placing failed by a fault of gridcloud")
                await asyncio.sleep(_LOOK_AGAIN_AFTER)

    async def _place_once(self) -> None:
        busy = self._placing | self._drivers.keys()
        queued = await self._waiting.read(self._choosing.order, busy)
        for job in queued:
            if job.cancel_requested:  # before a restart, or while its place was lost
                await self._cancel_one(job.id)
        now = asyncio.get_running_loop().time()
        queued = [j for j in queued if not j.cancel_requested and self._pauses.over(j.id, now)]
        if not queued:
            return
        untold = {job.id for job in queued} - self._told_to_wait
        placing = await self._choosing.place(queued, untold)
        for job, offer in placing.placed:
            try:
                await self._take(job, offer)
            except GridcloudError as error:
                log.error("job not placed; will try again", job=job.id, error=str(error))
        await self._fail_the_hopeless(placing)
        for job in placing.waiting:
            if why := placing.reasons.get(job.id):
                self._told_to_wait.add(job.id)
                await self._jobs.note(job, "QUEUED", f"waiting: {why}")
        self._ask_for_room(placing)
        if self._waiting.further(placing):
            self._wake.set()

    async def _fail_the_hopeless(self, placing: Placing) -> None:
        """End those who wait for a community that this site is in no more."""
        if self.communities is None:
            return
        hopeless = await self._choosing.hopeless(placing, self.communities)
        now, before = asyncio.get_running_loop().time(), self._hopeless_since
        self._hopeless_since = {job.id: before.get(job.id, now) for job, _ in hopeless}
        ended = set()
        for job, why in hopeless:
            if now - self._hopeless_since[job.id] >= _HOPELESS_FOR:
                await self._end(job, Outcome(reason="no-membership", message=why), why)
                ended.add(job.id)
        placing.waiting = [job for job in placing.waiting if job.id not in ended]

    def _ask_for_room(self, placing: Placing) -> None:
        own = [row for row in placing.market.rows if not row.foreign and not row.shape]
        for job in placing.waiting:
            if suitable(own, Wish.of(job, placing.strategy)):
                self.on_waiting(job.spec.need)
                break

    async def _take(self, job: Job, offer: Offer) -> None:
        """Write the intent, which takes the capacity at once; the rest goes on beside us."""
        self._placing.add(job.id)
        try:
            job = await self._jobs.get(job.id)
            if job.cancel_requested and not job.state.final:
                await self._end(job, Outcome(reason="canceled"), "canceled before it began")
            if job.cancel_requested or job.state.final:  # canceled since the line was read
                self._placing.discard(job.id)
                return
            # The attempt is counted first: its number is part of what the lease is asked for by.
            job = job.model_copy(update={"attempts": job.attempts + 1})
            await self._jobs.save(job)
            lease = await self._leasing.intend(job, offer)
            where = {"lease_id": lease.id, "site": offer.site, "provider": offer.provider}
            job = job.model_copy(update=where)
            await self._jobs.save(job)
        except BaseException:
            self._placing.discard(job.id)
            raise
        self._tasks[job.id] = asyncio.create_task(
            self._fulfil(job, lease, offer), name=f"job {job.id}"
        )

    async def _fulfil(self, job: Job, lease: Lease, offer: Offer) -> None:
        """Have the lease granted and follow the job; a refusal puts it back in line."""
        try:
            try:
                lease = await self._leasing.fulfil(lease, offer)
            except GridcloudError as error:
                await self._refused(job, lease, offer, error)
                return
            canceled = {"cancel_requested": job.id in self._canceled}
            driver = self._driver(job.model_copy(update=canceled), lease)
        except GridcloudError as error:  # the store fails: the job is still in line there
            log.error("job not placed; will try again", job=job.id, error=str(error))
            return
        except Exception:  # a fault of ours: no job is left with nobody to look after it
            log.exception("job not placed by a fault of gridcloud", job=job.id)
            await self._fail_by_fault(job)
            return
        finally:
            self._placing.discard(job.id)
            self._tasks.pop(job.id, None)
            self._wake.set()
        if recall := self._recalls.pop(lease.id, None):
            self.recalled(lease.id, *recall)
        if not self._placing:
            self._recalls.clear()
        self._told_to_wait.discard(job.id)
        self._pauses.forget(job.id)
        self._follow(driver)

    async def _refused(self, job: Job, lease: Lease, offer: Offer, error: GridcloudError) -> None:
        loop = asyncio.get_running_loop()
        seconds = self._choosing.shun(offer, error)
        in_vain = bool(offer.shape) and isinstance(error, TimedOut)  # a machine was paid for
        if not error.retryable or in_vain:
            seconds = max(seconds, self._pauses.refused(job.id, loop.time()))
        loop.call_later(seconds, self._wake.set)
        await self._leasing.release(lease, str(error))
        job = job.model_copy(update={"lease_id": None, "site": None, "provider": None})
        told = f"refused by {offer.label}: {error}"
        await self._jobs.save(job, told if self._pauses.news(job.id, told) else "")
        if job.id in self._canceled:
            await self._end(job, Outcome(reason="canceled"), "canceled before it began")
        elif offer.shape and isinstance(error, InvalidSpec):
            # Another machine made to the same order would come to the same, and cost as much.
            await self._end(job, Outcome(reason="machine-failed", message=str(error)), str(error))

    def _driver(self, job: Job, lease: Lease) -> JobDriver:
        place = self._places.open(job, lease)
        driver = JobDriver(
            job, lease, place, self._jobs, cancel_grace=self._grace, recourse=self._choosing
        )
        self._drivers[job.id] = driver
        return driver

    def _follow(self, driver: JobDriver) -> None:
        job_id = driver.job.id
        self._tasks[job_id] = asyncio.create_task(self._run(driver), name=f"job {job_id}")

    async def _run(self, driver: JobDriver) -> None:
        job_id = driver.job.id
        while True:
            try:
                await driver.drive()
                if driver.left:
                    return await self._back_in_line(driver)
                if driver.tidied:  # else the reconciler gives it up, once that can be done
                    await self._leasing.release(driver.lease, f"job {job_id} ended")
                break
            except (InterruptedByStore, GridcloudError) as error:
                log.error("job interrupted; will try again", job=job_id, error=str(error))
                await asyncio.sleep(_LOOK_AGAIN_AFTER)
            except Exception:  # a fault of ours: no job is left with nobody to look after it
                log.exception("job failed by a fault of gridcloud", job=job_id)
                await self._fail_by_fault(driver.job)
                break
        self._drivers.pop(job_id, None)
        self._tasks.pop(job_id, None)
        self._canceled.discard(job_id)
        self._tell_ended(job_id)
        self._wake.set()
        return None

    async def _back_in_line(self, driver: JobDriver) -> None:
        """Let go of a job whose place was lost, and end what may be left there beside that."""
        job = driver.job
        # From here on whoever cancels finds no driver; who did so before is heard below.
        self._drivers.pop(job.id)
        self._tasks.pop(job.id, None)
        self._start_beside(see_off(driver, self._leasing, self._jobs))
        if driver.cancel_asked:
            self._placing.add(job.id)
            try:
                await self._end(job, Outcome(reason="canceled"), "canceled before it began again")
            finally:
                self._placing.discard(job.id)
        self._wake.set()

    def _start_beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _note(self, job: Job, kind: str, message: str) -> None:
        with contextlib.suppress(GridcloudError):  # a remark is not worth more
            await self._jobs.note(job, kind, message)

    async def _sizes(self, specs: Sequence[JobSpec]) -> dict[tuple[str, ...], int]:
        """Return the bytes of each distinct set of inputs, where these matter to the choice."""
        measure, strategy = self._measure, self._choosing.strategy(specs[0])
        if measure is None or strategy is not Strategy.NEAREST_DATA:
            return {}
        distinct = {spec.inputs for spec in specs if spec.inputs}
        return await asyncio.to_thread(lambda: {paths: measure(paths) for paths in distinct})

    async def _fail_by_fault(self, job: Job) -> None:
        if not job.state.final:
            why = "a fault in gridcloud; the site's log has the details"
            with contextlib.suppress(GridcloudError):
                await self._end(job, Outcome(reason="internal", message=why), why)

    def _tell_ended(self, job_id: str) -> None:
        for listener in self._listeners:
            listener.put_nowait(job_id)

    async def _requeue(self, job: Job, why: str) -> None:
        if job.lease_id and (lease := await self._leasing.find(job.lease_id)):
            await self._leasing.release(lease, why)
        if job.state is JobState.STAGE_IN:
            await self._jobs.save(job.advanced(JobState.QUEUED, lease_id=None), why)
        elif job.state is JobState.ACTIVE and not self._choosing.exhausted(job):
            event = f"{why}. Back in line. {TWICE}"
            again = {"lease_id": None, "started_at": None, "resubmitted": job.resubmitted + 1}
            await self._jobs.save(job.advanced(JobState.QUEUED, **again), event)
        else:
            await self._end(job, Outcome(reason="lost", message=why), why)

    async def _end(self, job: Job, outcome: Outcome, why: str) -> None:
        canceled = outcome.reason == "canceled"
        state = JobState.CANCELED if canceled else JobState.FAILED
        changes = {"outcome": outcome, "ended_at": datetime.now(UTC), "message": why}
        await self._jobs.save(job.advanced(state, **changes), why)
        self._told_to_wait.discard(job.id)
        self._pauses.forget(job.id)
        self._tell_ended(job.id)
