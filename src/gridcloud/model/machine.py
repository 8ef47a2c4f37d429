"""What a person asks of a machine besides its size, and how making it goes on."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field, field_validator

from gridcloud.model.frozen import Frozen

_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
#: The name of a machine or a volume: safe as a tag, a host name and a file name.
Name = Annotated[str, Field(pattern=rf"^{_NAME}$")]


class VolumeMount(Frozen):
    """A volume to be attached and mounted: made with ``size_bytes`` if there is none of that name.

    It outlives the machine. ``path`` is absolute on the machine. A ``size_bytes`` of 0 means that
    it must be there already.
    """

    name: Name
    size_bytes: Annotated[int, Field(ge=0, le=2**60)] = 0
    path: Annotated[str, Field(pattern=r"^/[^\x00\n]*[^\x00\n/]$", max_length=4096)]


class Playbook(Frozen):
    """An Ansible playbook to be run once the machine is ready: a file's absolute path on the
    site's host, and variables for it."""

    path: Annotated[str, Field(pattern=r"^/[^\x00\n]+$", max_length=4096)]
    variables: dict[str, str] = {}


class MachineOrder(Frozen):
    """What is asked of a machine besides resources; the default asks nothing.

    ``stack`` is the one it belongs to, if any. ``image`` is a name, an id, or ``OWNER/NAME`` with
    ``*`` for any text; empty means what the provider's settings say. ``user_data`` is cloud-init's,
    of any of its kinds, as text; binary (gzip) is base64 behind ``base64:``. ``spot`` asks for
    capacity that the cloud may take back. ``network`` is one that was made by that name; empty
    means what the provider's settings say.
    """

    name: Annotated[str, Field(pattern=rf"^({_NAME})?$")] = ""
    stack: Annotated[str, Field(pattern=rf"^({_NAME})?$")] = ""
    image: Annotated[str, Field(max_length=512)] = ""
    user_data: Annotated[str, Field(max_length=2**20)] = ""
    playbooks: Annotated[tuple[Playbook, ...], Field(max_length=32)] = ()
    volumes: Annotated[tuple[VolumeMount, ...], Field(max_length=16)] = ()
    spot: bool = False
    network: Annotated[str, Field(pattern=rf"^({_NAME})?$")] = ""

    @field_validator("volumes")
    @classmethod
    def _distinct(cls, volumes: tuple[VolumeMount, ...]) -> tuple[VolumeMount, ...]:
        for what in ("name", "path"):
            values = [getattr(volume, what) for volume in volumes]
            if len(set(values)) != len(values):
                raise ValueError(f"two volumes have the same {what}")
        return volumes


class LaunchStep(StrEnum):
    """The steps by which a machine is made, in this order; each is idempotent by the lease."""

    IMAGE = "image"
    SHAPE = "shape"
    PLACE = "place"
    NETWORK = "network"
    VOLUMES = "volumes"
    CREATE = "create"
    REACHABLE = "reachable"
    READY = "ready"
    SETUP = "setup"


class LaunchEvent(Frozen):
    """Something that happened while a machine was made; ``message`` is for people."""

    at: datetime
    step: LaunchStep
    message: Annotated[str, Field(max_length=65536)]
