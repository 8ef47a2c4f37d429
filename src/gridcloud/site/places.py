"""Where a job runs: an executor, a way to move files, and the logs, joined for one lease."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

from gridcloud.access.session import SSHSession
from gridcloud.data.confined import ConfinedFiles
from gridcloud.data.files import Files, LocalFiles, SFTPFiles
from gridcloud.data.staging import stage_in, stage_out
from gridcloud.errors import NotFound
from gridcloud.executors.executor import Executor, Launch
from gridcloud.executors.shells import EnteredShell, LocalShell, SSHShell
from gridcloud.model.job import Ending, Job
from gridcloud.model.lease import Endpoint, Lease, LeaseRole
from gridcloud.providers.base import Enterable, Provider
from gridcloud.site.logs import Logs

GRACE_AT_LIMITS = 5.0
#: What a shell says of a command that was killed.
_KILLED_STATUS = 128 + signal.SIGKILL


class Place:
    """One attempt's folder on one machine; see `gridcloud.orchestration.ports.Workplace`."""

    def __init__(
        self,
        job: Job,
        executor: Executor,
        files: Files,
        logs: Logs,
        *,
        here: bool,
        goes_with_lease: bool,
        close: Callable[[], Awaitable[None]],
        overrun: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        self._name = job.folder_name
        self._executor = executor
        self._files = files
        self._logs = logs
        self._here = here
        self._goes_with_lease = goes_with_lease
        self._close = close
        #: Says which bound of the place something in it was killed for.
        self._overrun = overrun
        self._over = False

    async def state(self) -> str | None:
        """See `Workplace`."""
        return (await self._executor.states()).get(self._name)

    async def stage_in(self, job: Job) -> None:
        """See `Workplace`. Without inputs there is nothing to do: running makes the folder."""
        if job.spec.inputs:
            work = await self._executor.prepare(self._name)
            await stage_in(self._files, job.spec.inputs, work)

    async def run(self, job: Job, lease: Lease, started: Callable[[], None]) -> Ending:
        """See `Workplace`."""
        spec = job.spec
        limit = spec.need.time.total_seconds() if spec.need.time else None
        launch = Launch(
            command=spec.command,
            env=(spec.shell_env | spec.env) if self._here else spec.env,
            inherit_env=True,
            time_limit_seconds=limit,
            grace_seconds=GRACE_AT_LIMITS,
            outputs=spec.outputs,
            # Without a limit of its own the lease may be lengthened; its owner ends it in the end.
            ends_at_epoch=lease.ends_at.timestamp() if lease.ends_at and limit else None,
        )
        ending = await self._executor.run(self._name, launch, self._logs.files(job), started)
        self._over = True
        return await self._explained(ending)

    async def watch(self, job: Job) -> Ending:
        """See `Workplace`."""
        ending = await self._executor.watch(self._name, self._logs.files(job))
        self._over = True
        return await self._explained(ending)

    async def stage_out(self, job: Job, ending: Ending) -> None:
        """See `Workplace`."""
        if ending.outputs:
            work = await self._executor.prepare(self._name)
            spec = job.spec
            await stage_out(self._files, work, ending.outputs, Path(spec.into), spec.outputs)

    async def cancel(self, grace_seconds: float) -> None:
        """See `Workplace`."""
        await self._executor.cancel(self._name, grace_seconds)

    async def remove(self, job: Job) -> None:
        """See `Workplace`. A borrowed place is torn down by its owner when the lease is given
        back, so nothing needs to be removed there."""
        self._logs.keep(job)
        if self._goes_with_lease:
            return
        folder = self._executor.folder(self._name)
        quickly = self._here and self._over  # nothing runs there any more: no process is needed
        if not (quickly and await asyncio.to_thread(_removed, folder)):
            await self._executor.remove(self._name)

    async def close(self) -> None:
        """See `Workplace`."""
        await self._close()

    async def _explained(self, ending: Ending) -> Ending:
        """Return an ending with the bound that a command was killed for, if that can be told."""
        outcome = ending.outcome
        killed = outcome.signal == signal.SIGKILL or outcome.exit_code == _KILLED_STATUS
        if outcome.reason or not killed or self._overrun is None:
            return ending
        why = await self._overrun()
        told = outcome.model_copy(update={"message": why or outcome.message})
        return ending.model_copy(update={"outcome": told})


class Places:
    """Opens places. All jobs on one of the site's own SSH machines share a session; a borrowed
    place, and one that was made for its lease, has its own, closed when the job ends. ``providers``
    are asked for those on this host that are entered."""

    def __init__(
        self,
        logs: Logs,
        dial: Callable[[Lease], SSHSession],
        providers: Mapping[str, Provider] | None = None,
    ) -> None:
        self._logs = logs
        self._dial = dial
        self._providers = {} if providers is None else providers
        self._sessions: dict[tuple[str, Endpoint], SSHSession] = {}

    def open(self, job: Job, lease: Lease) -> Place:
        """Return the job's place; nothing is contacted yet."""
        executor, files, close = self._reach(lease)
        assert lease.machine
        entered = lease.machine.sandbox
        return Place(
            job,
            executor,
            files,
            self._logs,
            here=lease.machine.endpoint is None and not entered,
            goes_with_lease=lease.role is LeaseRole.BORROWED or entered or lease.machine.certified,
            close=close,
            overrun=partial(self._entered(lease).overrun, lease.id) if entered else None,
        )

    def executor(self, lease: Lease) -> Executor:
        """Return the executor of a lease's machine, to look after what was left there."""
        return self._reach(lease)[0]

    async def close(self) -> None:
        """Close the shared connections."""
        for session in self._sessions.values():
            await session.close()

    def _reach(self, lease: Lease) -> tuple[Executor, Files, Callable[[], Awaitable[None]]]:
        machine = lease.machine
        assert machine
        if machine.sandbox and lease.role is LeaseRole.OWN:
            place = self._entered(lease)
            files = ConfinedFiles(place.home(lease.id), str(Path(machine.folder).parent))
            enter = partial(place.enter, lease.id)
            return Executor(EnteredShell(enter), machine.folder), files, _nothing
        if machine.endpoint is None:
            return Executor(LocalShell(), machine.folder), LocalFiles(), _nothing
        if lease.role is LeaseRole.BORROWED or machine.certified:
            session = self._dial(lease)
            close = session.close
        else:
            # By where it is as well: a name may be given to another machine.
            which = (lease.provider, machine.endpoint)
            if which not in self._sessions:
                self._sessions[which] = self._dial(lease)
            session = self._sessions[which]
            close = _nothing
        return Executor(SSHShell(session), machine.folder), SFTPFiles(session), close

    def _entered(self, lease: Lease) -> Enterable:
        provider = self._providers.get(lease.provider)
        if not isinstance(provider, Enterable):
            raise NotFound(
                f"The provider {lease.provider!r} is no longer in the settings, or does not load.",
                hint="Put its section back to reach what runs there.",
            )
        return provider


def _removed(folder: str) -> bool:
    """Remove a folder; return whether that went. A job can make folders that resist."""
    try:
        shutil.rmtree(folder)
    except OSError:
        return False
    return True


async def _nothing() -> None:
    return
