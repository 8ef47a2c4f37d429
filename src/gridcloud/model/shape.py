"""The sizes of machine that a cloud makes, and how much of its quota is left."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gridcloud.model.frozen import Frozen
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.quantities import format_bytes


class Shape(Frozen):
    """A size of machine: what it has, where it is made, and what it costs.

    ``name`` is the cloud's own (a flavor, an instance type, a shape). ``price`` is in the cloud's
    ``currency`` for an hour; None where the cloud does not say. ``disk_bytes`` is of its root disk,
    0 where the image decides. A *flexible* shape is made with any number of CPUs from 1 up to
    ``resources.cpus``, and of memory up to ``resources.memory_bytes``: see `fitted`.
    """

    name: Annotated[str, Field(min_length=1, max_length=128)]
    region: Annotated[str, Field(max_length=128)] = ""
    resources: Resources
    disk_bytes: Annotated[int, Field(ge=0)] = 0
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    currency: Annotated[str, Field(max_length=8)] = ""
    spot: bool = False
    architecture: Annotated[str, Field(max_length=32)] = "x86_64"
    flexible: bool = False
    memory_step_bytes: Annotated[int, Field(ge=1)] = GIB

    def fitted(self, need: Need) -> Resources | None:
        """Return what a machine of this shape made for ``need`` would have; None if too small.

        A fixed shape has what it has. A flexible one gets just what is needed, its memory rounded
        up to ``memory_step_bytes``.
        """
        if self.resources.lacking(need.resources):
            return None
        if not self.flexible:
            return self.resources
        steps = -(-need.memory_bytes // self.memory_step_bytes)
        memory = min(steps * self.memory_step_bytes, self.resources.memory_bytes)
        return Resources(cpus=need.cpus, memory_bytes=memory, gpus=self.resources.gpus)

    def __str__(self) -> str:
        has = self.resources
        gpus = f", {has.gpus} GPU{'s'[: has.gpus != 1]}" if has.gpus else ""
        return f"{self.name} ({has.cpus} CPUs, {format_bytes(has.memory_bytes)}{gpus})"


class Headroom(Frozen):
    """What a cloud lets its user have besides what there is already; None means no known bound."""

    cpus: Annotated[int, Field(ge=0)] | None = None
    memory_bytes: Annotated[int, Field(ge=0)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    machines: Annotated[int, Field(ge=0)] | None = None

    def lacking(self, wanted: Resources) -> list[str]:
        """Return why one more machine of this size would exceed the quota; else []."""
        reasons = []
        if self.machines is not None and self.machines < 1:
            reasons.append("its quota allows no more machines")
        if self.cpus is not None and wanted.cpus > self.cpus:
            reasons.append(f"its quota has {self.cpus} of {wanted.cpus} CPUs left")
        if self.memory_bytes is not None and wanted.memory_bytes > self.memory_bytes:
            left, want = format_bytes(self.memory_bytes), format_bytes(wanted.memory_bytes)
            reasons.append(f"its quota has {left} of {want} memory left")
        if self.gpus is not None and wanted.gpus > self.gpus:
            reasons.append(f"its quota has {self.gpus} of {wanted.gpus} GPUs left")
        return reasons
