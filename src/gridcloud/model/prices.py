"""What capacity costs, in credits of a community."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from gridcloud.model.frozen import Frozen
from gridcloud.model.need import GIB, Resources

Credits = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Prices(Frozen):
    """What an hour of one CPU, one GiB of memory and one GPU costs, in credits."""

    cpu_hour: Credits = 0.0
    memory_gib_hour: Credits = 0.0
    gpu_hour: Credits = 0.0

    def at_most(self, other: Prices) -> bool:
        """Whether nothing costs more than by ``other``."""
        return (
            self.cpu_hour <= other.cpu_hour
            and self.memory_gib_hour <= other.memory_gib_hour
            and self.gpu_hour <= other.gpu_hour
        )

    def cost(self, resources: Resources, time: timedelta) -> float:
        """Return what these resources cost for that time, in credits."""
        an_hour = (
            self.cpu_hour * resources.cpus
            + self.memory_gib_hour * resources.memory_bytes / GIB
            + self.gpu_hour * resources.gpus
        )
        return an_hour * (time / timedelta(hours=1))
