"""What a piece of work requires."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from gridcloud.model.frozen import Frozen
from gridcloud.model.quantities import format_bytes, format_duration

GIB = 1024**3


class Resources(Frozen):
    """An amount of computer: CPUs, bytes of memory, GPUs. Never negative."""

    cpus: Annotated[int, Field(ge=0, le=2**20)] = 0
    memory_bytes: Annotated[int, Field(ge=0, le=2**60)] = 0
    gpus: Annotated[int, Field(ge=0, le=2**16)] = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            cpus=self.cpus + other.cpus,
            memory_bytes=self.memory_bytes + other.memory_bytes,
            gpus=self.gpus + other.gpus,
        )

    def minus(self, other: Resources) -> Resources:
        """Return what is left after ``other`` is taken, never below nothing."""
        return Resources(
            cpus=max(0, self.cpus - other.cpus),
            memory_bytes=max(0, self.memory_bytes - other.memory_bytes),
            gpus=max(0, self.gpus - other.gpus),
        )

    def within(self, limit: Resources) -> Resources:
        """Return what of this there is, at most ``limit``."""
        return Resources(
            cpus=min(self.cpus, limit.cpus),
            memory_bytes=min(self.memory_bytes, limit.memory_bytes),
            gpus=min(self.gpus, limit.gpus),
        )

    def lacking(self, need: Resources) -> list[str]:
        """Return, for each resource of which ``need`` wants more than this holds, why; else []."""
        reasons = []
        if need.cpus > self.cpus:
            reasons.append(f"has {self.cpus} of {need.cpus} CPUs")
        if need.memory_bytes > self.memory_bytes:
            have, want = format_bytes(self.memory_bytes), format_bytes(need.memory_bytes)
            reasons.append(f"has {have} of {want} memory")
        if need.gpus > self.gpus:
            reasons.append(f"has {self.gpus} of {need.gpus} GPUs")
        return reasons


class Need(Frozen):
    """What one job requires, and for how long at most.

    ``time`` of None means no limit of the user's own: the job may run until its lease ends, which
    on the user's own machines is never and at a peer is that owner's longest lease.
    """

    cpus: Annotated[int, Field(ge=1, le=2**20)] = 1
    memory_bytes: Annotated[int, Field(ge=2**20, le=2**60)] = GIB
    gpus: Annotated[int, Field(ge=0, le=2**16)] = 0
    time: Annotated[timedelta, Field(gt=timedelta(0), le=timedelta(days=365))] | None = None

    @property
    def resources(self) -> Resources:
        """What it takes up while it runs."""
        return Resources(cpus=self.cpus, memory_bytes=self.memory_bytes, gpus=self.gpus)

    def __str__(self) -> str:
        parts = [f"{self.cpus} CPU{'s'[: self.cpus != 1]}", format_bytes(self.memory_bytes)]
        if self.gpus:
            parts.append(f"{self.gpus} GPU{'s'[: self.gpus != 1]}")
        if self.time:
            parts.append(format_duration(self.time))
        return ", ".join(parts)
