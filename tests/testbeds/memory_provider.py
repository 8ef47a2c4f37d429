"""A complete provider whose machines are entries in a dictionary; for tests of what uses one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from gridcloud.errors import NoCapacity
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Lease, Machine
from gridcloud.model.need import Resources
from gridcloud.providers.base import Capacity, Provider, ProviderContext, read_section


class MemorySection(Frozen):
    """``[providers.NAME]`` with ``kind = "memory"``."""

    cpus: Annotated[int, Field(ge=1)] = 4
    machines: Annotated[int, Field(ge=0)] = 100


class MemoryProvider(Provider):
    """Machines that exist in name only, in ``cloud``: the place shared by those who use it."""

    kind: ClassVar[str] = "memory"

    def __init__(
        self,
        name: str,
        section: dict[str, Any],
        context: ProviderContext,
        cloud: dict[str, Machine] | None = None,
    ) -> None:
        super().__init__(name, section, context)
        self.section = read_section(MemorySection, name, section)
        self.cloud = {} if cloud is None else cloud

    async def capacity(self) -> Capacity:
        """Return the size that the section gives."""
        return Capacity(resources=Resources(cpus=self.section.cpus, memory_bytes=2**33))

    async def launch(self, lease: Lease) -> Machine:
        """Enter a machine in the cloud, up to the number the section gives."""
        if lease.id not in self.cloud:
            if len(self.cloud) >= self.section.machines:
                raise NoCapacity("The cloud is full.", hint="End something there.")
            folder = str(Path("/") / lease.id)
            self.cloud[lease.id] = Machine(lease_id=lease.id, provider=self.name, folder=folder)
        return self.cloud[lease.id]

    async def terminate(self, lease_id: str) -> None:
        """Strike a machine out."""
        self.cloud.pop(lease_id, None)

    async def made(self) -> list[str]:
        """Return what is in the cloud."""
        return sorted(self.cloud)
