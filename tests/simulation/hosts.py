"""Simulated hosts: what stands below a site. Sandboxes with an end, commands that take their time.

A host outlives the process of its site, as a real one does; only a power cut ends what runs there.
It keeps its own books of what is placed on it, so that a site which lends twice what it has is
found out by the hardware, not by its own accounts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gridcloud.errors import Unavailable
from gridcloud.model.job import Job, Outcome
from gridcloud.model.lease import Lease, LeaseRole, Machine
from gridcloud.model.need import GIB, Resources
from gridcloud.providers.base import Capacity, ProviderContext
from gridcloud.providers.local import LocalProvider

#: The hosts of the running simulation, by the name of the state folder of their site.
HOSTS: dict[str, Host] = {}


@dataclass
class Placed:
    """Capacity that is taken on a host under one lease."""

    lease_id: str
    lent: bool
    cpus: int
    ends_at: datetime | None
    ended: str = ""


@dataclass
class Run:
    """A command of one attempt of one job."""

    job_id: str
    attempt: int
    lease_id: str
    ends: float
    outcome: Outcome | None = None


@dataclass
class Host:
    """The hardware of one site. ``clock`` is that host's own."""

    name: str
    cpus: int
    clock: Callable[[], datetime]
    tell: Callable[[str, dict[str, Any]], None]
    placed: dict[str, Placed] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def place(self, lease: Lease) -> None:
        """Take capacity for a lease; a second time it is the same."""
        if lease.id in self.placed:
            return
        lent = lease.role is LeaseRole.LENT
        self.placed[lease.id] = Placed(lease.id, lent, lease.need.cpus, lease.ends_at)
        self.tell("placed", {"lease": lease.id, "again": lease.id in self.gone, "lent": lent})

    def remove(self, lease_id: str) -> None:
        """Free what a lease took, and end what runs there."""
        if self.placed.pop(lease_id, None) is None:
            return
        self.gone.add(lease_id)
        self._end_runs(lease_id)
        self.tell("removed", {"lease": lease_id})

    def taken(self) -> int:
        """Return how many CPUs are placed."""
        return sum(each.cpus for each in self.placed.values())

    def tick(self) -> None:
        """Do what the keepers of the sandboxes do: end those whose time is over."""
        now = self.clock()
        for each in self.placed.values():
            if each.lent and not each.ended and each.ends_at is not None and now >= each.ends_at:
                each.ended = "Its lease has ended."
                self._end_runs(each.lease_id)

    def cut_power(self) -> None:
        """End everything that runs; folders stay."""
        for each in self.placed.values():
            if each.lent:
                each.ended = "Its keeper is gone."
        for run in self.runs.values():
            if run.outcome is None:
                run.outcome = Outcome(reason="lost", message="the host went down")

    def start(self, job: Job, lease: Lease, now: float, seconds: float) -> Run:
        """Start a job's command unless it was started before."""
        known = self.runs.get(job.folder_name)
        if known is None:
            known = Run(job.id, job.attempts, lease.id, now + seconds)
            self.runs[job.folder_name] = known
            self.tell("started", {"job": job.id, "attempt": job.attempts, "lease": lease.id})
        return known

    def settle(self, run: Run, now: float) -> Outcome | None:
        """Return how a command ended, once it has."""
        if run.outcome is None and now >= run.ends:
            run.outcome = Outcome(exit_code=0)
        return run.outcome

    def _end_runs(self, lease_id: str) -> None:
        for run in self.runs.values():
            if run.lease_id == lease_id and run.outcome is None:
                run.outcome = Outcome(reason="lease-end", message="its place is gone")


class HostProvider(LocalProvider):
    """The local provider of a site whose host is simulated."""

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        self.name, self.context = name, context
        self.host: Host = HOSTS[context.state_folder.name]

    @classmethod
    def of(cls, host: Host) -> HostProvider:
        """Return the provider of a host."""
        provider = cls.__new__(cls)
        provider.name, provider.host = "local", host
        return provider

    async def capacity(self) -> Capacity:
        """Return the size of the host."""
        return Capacity(resources=Resources(cpus=self.host.cpus, memory_bytes=64 * GIB))

    async def launch(self, lease: Lease) -> Machine:
        """Take the capacity; a sandbox needs a moment to start."""
        lent = lease.role is LeaseRole.LENT
        if lent:
            await asyncio.sleep(0.2)
        if lease.id in self.host.placed and self.host.placed[lease.id].ended:
            raise Unavailable("The sandbox has ended.")
        self.host.place(lease)
        return Machine(lease_id=lease.id, provider=self.name, folder="/jobs", sandbox=lent)

    async def terminate(self, lease_id: str) -> None:
        """Free it."""
        await asyncio.sleep(0.05)
        self.host.remove(lease_id)

    async def made(self) -> list[str]:
        """Return the sandboxes, running or not."""
        await asyncio.sleep(0.01)
        return sorted(each.lease_id for each in self.host.placed.values() if each.lent)

    async def lending_problem(self) -> str:
        """Nothing hinders."""
        return ""

    async def ended(self, lease_id: str) -> str:
        """Return why a sandbox is no more."""
        placed = self.host.placed.get(lease_id)
        return placed.ended if placed else "Its sandbox is gone."

    async def extend(self, lease_id: str, ends_at: datetime) -> None:
        """Move a sandbox's end."""
        if lease_id in self.host.placed:
            self.host.placed[lease_id].ends_at = ends_at

    def home(self, lease_id: str) -> Path:
        """Return a name; there is no such folder."""
        return Path("/nowhere") / lease_id
