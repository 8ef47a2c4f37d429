"""Takes jobs in, places them, keeps one driver for each that is placed, mends after a restart."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime

import structlog

from gridcloud.errors import GridcloudError, InvalidSpec
from gridcloud.model.identifiers import new_id
from gridcloud.model.job import Job, JobSpec, JobState, Outcome
from gridcloud.model.lease import Lease, LeaseState
from gridcloud.model.offer import Offer
from gridcloud.orchestration.driver import InterruptedByStore, JobDriver
from gridcloud.orchestration.planner import place, plan
from gridcloud.orchestration.ports import JobKeeper, Leasing, Workplaces

log = structlog.get_logger()

_LOOK_AGAIN_AFTER = 5.0
_SHUN_A_REFUSER_FOR = 5.0
#: How far down the line is looked at a time; the rest could hardly be placed before these.
_LOOK_AT_ONCE = 200
_RUNNING = (JobState.STAGE_IN, JobState.ACTIVE, JobState.STAGE_OUT, JobState.CLEANUP)
_WAITING = (JobState.NEW, JobState.QUEUED)


class Scheduler:
    """All jobs of one site. Construct, `start`, and `stop` when the site goes down: jobs that
    run go on without it and are picked up by the next `start`."""

    def __init__(
        self, jobs: JobKeeper, leasing: Leasing, places: Workplaces, *, cancel_grace: float
    ) -> None:
        self._jobs = jobs
        self._leasing = leasing
        self._places = places
        self._grace = cancel_grace
        self._drivers: dict[str, JobDriver] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._placing: set[str] = set()
        self._canceled: set[str] = set()
        self._shunned: dict[tuple[str | None, str], float] = {}
        self._told_to_wait: set[str] = set()
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._listeners: set[asyncio.Queue[str]] = set()

    async def start(self) -> None:
        """Pick up every job the last run of the site left, then place what waits."""
        for job in await self._jobs.listed(_RUNNING):
            lease = await self._leasing.find(job.lease_id) if job.lease_id else None
            if lease and lease.state is LeaseState.ACTIVE and lease.machine:
                await self._jobs.note(job, "found", "found again after the site restarted")
                self._follow(self._driver(job, lease), lease)
            else:
                await self._requeue(job, "its lease was not complete when the site stopped")
        self._loop = asyncio.create_task(self._place_for_ever(), name="scheduler")
        self._wake.set()

    async def stop(self) -> None:
        """Let go of all jobs without ending them."""
        tasks = [*self._tasks.values(), *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """Look at the waiting jobs again: capacity came free, or offers changed."""
        self._wake.set()

    async def submit(self, spec: JobSpec) -> list[Job]:
        """Take in a job, or one for each task of an array; return them once they are kept.

        Raises `InvalidSpec` when no offer known now could ever serve the need.
        """
        offers = await self._leasing.offers()
        known = sorted({offer.site for offer in offers})
        if spec.site is not None and spec.site not in known:
            raise InvalidSpec(
                f"No site called {spec.site!r} is known here.", hint=f"Known: {', '.join(known)}."
            )
        judged = plan(spec.need, offers, spec.site)
        if not judged.winners and not judged.possible_later:
            raise InvalidSpec(
                f"Nothing here can ever serve {spec.need}: {judged.explain()}.",
                hint="Ask for less, add a machine, or join a community that has it.",
            )
        now = datetime.now(UTC)
        name = new_id()
        if spec.tasks:
            jobs = [
                Job(
                    id=f"{name}.{task}",
                    array_id=name,
                    task=task,
                    spec=spec.for_task(task),
                    state=JobState.QUEUED,
                    created_at=now,
                )
                for task in spec.tasks
            ]
        else:
            jobs = [Job(id=name, spec=spec, state=JobState.QUEUED, created_at=now)]
        await self._jobs.add(jobs, "submitted")
        self._wake.set()
        return jobs

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
                return self._canceled.add(job_id)
            job = await self._jobs.get(job_id)
            if job.state.final:
                return None
            if job_id in self._placing or job_id in self._drivers:
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
        line = await self._jobs.listed(_WAITING, first=_LOOK_AT_ONCE + len(busy))
        queued = [job for job in line if job.id not in busy]
        if not queued:
            return
        now = asyncio.get_running_loop().time()
        offers = [
            offer.model_copy(update={"problem": "refused a moment ago"})
            if self._shunned.get((offer.peer, offer.provider), 0.0) > now
            else offer
            for offer in await self._leasing.offers()
        ]
        matches, waiting = place(queued, offers)
        for job, offer in matches:
            try:
                await self._take(job, offer)
            except GridcloudError as error:
                log.error("job not placed; will try again", job=job.id, error=str(error))
        for job, judged in waiting:
            if job.id not in self._told_to_wait:
                self._told_to_wait.add(job.id)
                await self._jobs.note(job, "QUEUED", f"waiting: {judged.explain()}")

    async def _take(self, job: Job, offer: Offer) -> None:
        """Write the intent, which takes the capacity at once; the rest goes on beside us."""
        self._placing.add(job.id)
        self._told_to_wait.discard(job.id)
        try:
            job = await self._jobs.get(job.id)
            if job.state.final:  # canceled since the line was read
                self._placing.discard(job.id)
                return
            # The attempt is counted first: its number is part of what the lease is asked for by.
            where = {"attempts": job.attempts + 1, "site": offer.site, "provider": offer.provider}
            job = job.model_copy(update=where)
            await self._jobs.save(job)
            lease = await self._leasing.intend(job, offer)
            job = job.model_copy(update={"lease_id": lease.id})
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
        self._follow(driver, lease)

    async def _refused(self, job: Job, lease: Lease, offer: Offer, error: GridcloudError) -> None:
        loop = asyncio.get_running_loop()
        self._shunned[(offer.peer, offer.provider)] = loop.time() + _SHUN_A_REFUSER_FOR
        loop.call_later(_SHUN_A_REFUSER_FOR, self._wake.set)
        await self._leasing.release(lease, str(error))
        job = job.model_copy(update={"lease_id": None, "site": None, "provider": None})
        await self._jobs.save(job, f"refused by {offer.place}: {error}")
        if job.id in self._canceled:
            await self._end(job, Outcome(reason="canceled"), "canceled before it began")

    def _driver(self, job: Job, lease: Lease) -> JobDriver:
        place = self._places.open(job, lease)
        driver = JobDriver(job, lease, place, self._jobs, cancel_grace=self._grace)
        self._drivers[job.id] = driver
        return driver

    def _follow(self, driver: JobDriver, lease: Lease) -> None:
        job_id = driver.job.id
        self._tasks[job_id] = asyncio.create_task(self._run(driver, lease), name=f"job {job_id}")

    async def _run(self, driver: JobDriver, lease: Lease) -> None:
        job_id = driver.job.id
        while True:
            try:
                await driver.drive()
                if driver.tidied:  # else the reconciler gives it up, once that can be done
                    await self._leasing.release(lease, f"job {job_id} ended")
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
        else:
            await self._end(job, Outcome(reason="lost", message=why), why)

    async def _end(self, job: Job, outcome: Outcome, why: str) -> None:
        canceled = outcome.reason == "canceled"
        state = JobState.CANCELED if canceled else JobState.FAILED
        changes = {"outcome": outcome, "ended_at": datetime.now(UTC), "message": why}
        await self._jobs.save(job.advanced(state, **changes), why)
        self._tell_ended(job.id)
