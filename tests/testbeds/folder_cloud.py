"""A cloud for tests whose machines are files in a folder, so that it outlives killed sites.

A site finds its provider, kind ``folder``, by an entry point in a folder on its path: see
`started_with`. All machines are the same sshd, if the section names one. Files steer it:

- ``down``: every call fails, as if its API were away;
- ``slow``: launches wait until it is removed;
- ``unlisted``: it does not tell which machines it made, so that no site keeps house there;
- ``calls``: what was asked of it, line by line.
"""

from __future__ import annotations

import asyncio
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from gridcloud.errors import NoCapacity, Unavailable
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Endpoint, Lease, Machine
from gridcloud.model.machine import LaunchStep
from gridcloud.model.need import GIB, Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import KEPT, Tags, Thing, Volume
from gridcloud.providers.base import (
    Capacity,
    MachineMaker,
    Provider,
    ProviderContext,
    read_section,
)


class FolderSection(Frozen):
    """``[providers.NAME]`` with ``kind = "folder"``; ``endpoint`` is JSON of an `Endpoint`, whose
    sshd reads the names of who may log in from the file ``principals``."""

    folder: Path
    machines: int = Field(default=100, ge=0)
    price: float | None = 0.25
    endpoint: str = ""
    principals: Path | None = None


class FolderProvider(Provider, MachineMaker):
    """Makes files called after their lease."""

    kind: ClassVar[str] = "folder"

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        super().__init__(name, section, context)
        self.section = read_section(FolderSection, name, section)
        self._folder = self.section.folder

    async def capacity(self) -> Capacity:
        """Return two shapes, as long as there is room."""
        down = "its API does not answer" if (self._folder / "down").exists() else ""
        shapes = tuple(
            Shape(
                name=name,
                region="here",
                resources=Resources(cpus=cpus, memory_bytes=cpus * 2 * GIB),
                price=self.section.price and self.section.price * cpus,
                currency="EUR" if self.section.price else "",
            )
            for name, cpus in (("small", 1), ("large", 4))
        )
        room = max(0, self.section.machines - len(list(self._machines())))
        return Capacity(
            resources=shapes[-1].resources,
            shapes=shapes,
            headroom={"here": Headroom(machines=room)},
            problem=down,
        )

    async def launch(self, lease: Lease) -> Machine:
        """Write the machine's file, step by step, idempotent by the lease."""
        self._called("launch", lease.id)
        await self._note(lease, LaunchStep.CREATE, f"creating {lease.shape}")
        file = self._folder / f"{lease.id}.machine"
        if not file.exists():
            if len(list(self._machines())) >= self.section.machines:
                raise NoCapacity("The quota of machines is reached.", hint="Stop one.")
            ends = lease.ends_at.isoformat() if lease.ends_at else ""
            file.write_text(json.dumps({"ends": ends, "shape": lease.shape}))
        while (self._folder / "slow").exists():
            await asyncio.sleep(0.02)
        if self.section.principals:
            with self.section.principals.open("a") as names:
                names.write(f"{lease.id}\n")
        await self._note(lease, LaunchStep.READY, "it answers")
        endpoint = self.section.endpoint
        return Machine(
            lease_id=lease.id,
            provider=self.name,
            folder="jobs",
            endpoint=Endpoint.model_validate_json(endpoint) if endpoint else None,
            certified=True,
            id=f"id-{lease.id}",
            shape=lease.shape,
            region=lease.region,
        )

    async def terminate(self, lease_id: str) -> None:
        """Remove the machine's file."""
        self._called("terminate", lease_id)
        (self._folder / f"{lease_id}.machine").unlink(missing_ok=True)

    async def made(self) -> list[str]:
        """Return the machines there are."""
        self._called("made", "")
        if (self._folder / "unlisted").exists():
            raise Unavailable("The folder cloud tells no list.", hint="Wait for it.")
        return sorted(path.stem for path in self._machines())

    async def lengthen(self, lease: Lease) -> None:
        """Note the new end in the machine's file."""
        self._called("lengthen", lease.id)
        ends = lease.ends_at.isoformat() if lease.ends_at else ""
        (self._folder / f"{lease.id}.machine").write_text(json.dumps({"ends": ends}))

    async def things(self) -> list[Thing]:
        """Return the machines, and a volume that is kept if there is any."""
        self._called("things", "")
        found = [
            Thing(kind="machine", id=path.name, tags=self._tags(path.stem))
            for path in self._machines()
        ]
        kept = [
            Thing(kind="volume", id=path.name, tags=self._tags(KEPT))
            for path in self._folder.glob("*.volume")
        ]
        return found + kept

    async def boot_log(self, lease_id: str) -> str:
        """Return some text."""
        return f"booting {lease_id}\nlogin:\n"

    async def volumes(self) -> list[Volume]:
        """Return none."""
        return []

    async def remove_volume(self, name: str) -> None:
        """Remove a volume's file."""
        (self._folder / f"{name}.volume").unlink(missing_ok=True)

    def _machines(self):
        return sorted(self._folder.glob("*.machine"))

    def _tags(self, lease: str) -> Tags:
        file = self._folder / f"{lease}.machine"
        ends = json.loads(file.read_text())["ends"] if file.exists() else ""
        at = datetime.fromisoformat(ends) if ends else None
        return Tags.of(self.context.site_key, lease, at)

    def _called(self, what: str, lease_id: str) -> None:
        with (self._folder / "calls").open("a") as calls:
            calls.write(f"{what} {lease_id}\n")
        if (self._folder / "down").exists():
            raise Unavailable("The folder cloud's API does not answer.", hint="Wait for it.")

    async def _note(self, lease: Lease, step: LaunchStep, message: str) -> None:
        if self.context.making is not None:
            await self.context.making.note(lease.id, step, message)


def started_with(folder: Path) -> tuple[str, str]:
    """Return the words that begin the command line of a site which is to know this provider, after
    making what it finds it by in ``folder``."""
    plugin = folder / "plugin" / "folder_cloud-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: folder-cloud\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text(
        "[gridcloud.providers]\nfolder = testbeds.folder_cloud:FolderProvider\n"
    )
    before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    path = os.pathsep.join([*before, str(Path(__file__).parent.parent), str(plugin.parent)])
    return ("env", f"PYTHONPATH={path}")
