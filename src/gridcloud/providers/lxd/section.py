"""``[providers.NAME]`` with ``kind = "lxd"``: which LXD, and what its machines are made of."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from gridcloud.model.frozen import Frozen
from gridcloud.model.written import Bytes
from gridcloud.providers.cloud.section import CloudSection, Patience

#: The name of something in LXD, as it may stand in the path of a URL.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")]
_OURS = ("user.", "limits.", "cloud-init.", "volatile.", "boot.", "image.")


class InstanceType(StrEnum):
    """What a machine is."""

    CONTAINER = "container"
    VIRTUAL_MACHINE = "virtual-machine"


class LXDShape(Frozen):
    """A size of machine, since LXD knows none of its own.

    ``disk`` is the most its root disk holds; 0 sets no bound. ``devices`` are LXD's, added as they
    stand, as a GPU is: then ``gpus`` says how many a machine has with them.
    """

    cpus: Annotated[int, Field(ge=1, le=4096)]
    memory: Annotated[Bytes, Field(ge=2**26)]
    disk: Annotated[Bytes, Field(ge=0)] = 0
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    devices: dict[Name, dict[str, str]] = {}
    price: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    currency: Annotated[str, Field(max_length=8)] = ""


class LXDSection(CloudSection):
    """What can be told of an LXD besides what all clouds can be told.

    ``remote`` is a name that ``lxc remote list`` shows; without one and without a ``socket`` it is
    this host's own LXD. ``profiles`` are applied to each machine; ``network`` replaces theirs.
    ``pool`` is where volumes are, and root disks of a bounded size. ``targets`` are the members of
    a cluster to use, in this order; all of them if none is named. Without ``shapes`` there are
    three, taken from the host's size. ``config`` is added to that of each machine.
    """

    remote: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")] = ""
    socket: Path | None = None
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")] = ""
    type: InstanceType = InstanceType.CONTAINER
    profiles: tuple[Name, ...] = ("default",)
    network: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,63}$")] = ""
    pool: Name = "default"
    targets: tuple[Name, ...] = ()
    shapes: dict[Name, LXDShape] = {}
    config: dict[str, str] = {}
    # An image that is not there yet is fetched from its server while the machine is created.
    patience: Patience = Patience(create=timedelta(minutes=15))

    @field_validator("config")
    @classmethod
    def _not_ours(cls, config: dict[str, str]) -> dict[str, str]:
        for key in config:
            if key.startswith(_OURS):
                raise ValueError(f"{key} is set by gridcloud itself")
        return config
