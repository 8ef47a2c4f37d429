"""This very host: bare processes for its own user, sandboxes for guests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from gridcloud.errors import GridcloudError, NotFound
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Lease, LeaseRole, LoanTerms, Machine
from gridcloud.model.need import Resources
from gridcloud.model.written import Bytes
from gridcloud.providers.base import Capacity, Lender, Provider, ProviderContext, read_section
from gridcloud.providers.local import bubblewrap, sandbox
from gridcloud.providers.local.bubblewrap import GUEST_HOME
from gridcloud.providers.local.sandbox import SandboxSpec

SANDBOXES = "sandboxes"
JOBS = "jobs"


class LocalSection(Frozen):
    """``[providers.local]``: how much of this host is used; without limits, all of it."""

    cpus: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[Bytes, Field(ge=2**20)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None


class LocalProvider(Provider, Lender):
    """The site's own host. A lease of its owner is a share of it, used by plain processes; a
    lease of a peer is a sandbox in ``STATE/sandboxes/LEASE``."""

    kind: ClassVar[str] = "local"
    isolation: ClassVar[str] = "bubblewrap"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        super().__init__(name, section, context)
        self.section = read_section(LocalSection, name, section)
        self._resources = self._measure()
        self._lending_problem: str | None = None

    async def capacity(self) -> Capacity:
        """Return the size of this host, or of the part the settings give."""
        return Capacity(resources=self._resources, detail=os.uname().nodename)

    async def launch(self, lease: Lease) -> Machine:
        """Give a place: the site's job folder to its owner, a running sandbox to a guest."""
        if lease.role is not LeaseRole.LENT:
            folder = self.context.state_folder / JOBS
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return Machine(lease_id=lease.id, provider=self.name, folder=str(folder))
        lending = self.context.lending
        terms = lease.terms or LoanTerms(
            network=lending.network,
            software=lending.software,
            processes=lending.processes,
            disk_bytes=lending.disk,
        )
        await sandbox.launch(
            SandboxSpec(
                lease_id=lease.id,
                folder=self._folder(lease.id),
                cpus=lease.need.cpus,
                memory_bytes=lease.need.memory_bytes,
                processes=terms.processes,
                disk_bytes=terms.disk_bytes,
                ends_at=lease.ends_at,
                network=terms.network,
                software=terms.software,
                hostname="guest",
            )
        )
        return Machine(
            lease_id=lease.id, provider=self.name, folder=f"{GUEST_HOME}/{JOBS}", sandbox=True
        )

    async def terminate(self, lease_id: str) -> None:
        """End the lease's sandbox and remove it; plain jobs are ended by their executor."""
        await sandbox.terminate(self._folder(lease_id))

    async def made(self) -> list[str]:
        """Return the leases that have a sandbox here, running or not."""
        folder = self.context.state_folder / SANDBOXES
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    async def lending_problem(self) -> str:
        """Try a sandbox once and say what is missing, if anything."""
        if self._lending_problem is None:
            self._lending_problem = await asyncio.to_thread(bubblewrap.probe) or ""
        return self._lending_problem

    async def enter(
        self,
        lease_id: str,
        command: str,
        descriptors: tuple[int, int, int],
        env: Mapping[str, str],
    ) -> int:
        """Run a command line in the lease's sandbox on these descriptors; return its status.

        Raises `NotFound` with the reason once the sandbox has ended, for that is for good.
        """
        folder = self._folder(lease_id)
        try:
            return await sandbox.run(folder, command, *descriptors, env)
        except GridcloudError as error:
            state = await asyncio.to_thread(sandbox.state, folder)
            if state.phase == "running":
                raise
            raise NotFound(f"The sandbox has ended: {state.message}") from error

    async def ended(self, lease_id: str) -> str:
        """Return why a lease's sandbox is no more, empty while it runs."""
        state = await asyncio.to_thread(sandbox.state, self._folder(lease_id))
        return "" if state.phase == "running" else state.message or "Its sandbox is gone."

    def home(self, lease_id: str) -> Path:
        """Return where the guest's home lies on this host."""
        return self._folder(lease_id) / "home"

    def shown_as(self, lease_id: str) -> str:
        """Return where the guest's home is in its sandbox."""
        return GUEST_HOME

    async def extend(self, lease_id: str, ends_at: datetime) -> None:
        """Move the end of a sandbox."""
        await asyncio.to_thread(sandbox.extend, self._folder(lease_id), ends_at)

    def _folder(self, lease_id: str) -> Path:
        if "/" in lease_id or lease_id in ("", ".", ".."):
            raise NotFound(f"There is no lease {lease_id!r}.")
        return self.context.state_folder / SANDBOXES / lease_id

    def _measure(self) -> Resources:
        section = self.section
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gpus = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])
        return Resources(
            cpus=section.cpus or len(os.sched_getaffinity(0)),
            memory_bytes=section.memory or memory,
            gpus=section.gpus if section.gpus is not None else gpus,
        )
