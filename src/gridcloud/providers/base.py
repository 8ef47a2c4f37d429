"""What every provider is: a source of machines, asked by the site through six methods.

A provider is a folder in this room (or another package), one entry point in the group
``gridcloud.providers`` whose name is its ``kind``, and a test that inherits
`gridcloud.providers.contract.ProviderContract`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from gridcloud.errors import InvalidSpec
from gridcloud.model.asking import Question
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Endpoint, Lease, Machine
from gridcloud.model.machine import LaunchStep
from gridcloud.model.need import Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import Network, Thing, Volume
from gridcloud.settings import LendingSettings

S = TypeVar("S", bound=BaseModel)


class MachineFacts(Frozen):
    """What a look at a machine told: its Python, its size, its name."""

    python: str
    cpus: int
    memory_bytes: int
    gpus: int
    hostname: str


class Capacity(Frozen):
    """What a provider has in all. ``problem`` says why it cannot serve now, empty when it can.

    ``known`` is false, together with a problem, where the size was never learned. A provider that
    makes machines has ``shapes``; then ``headroom`` is what its quota leaves, by region (a region
    that is not there has no known bound), and ``resources`` the most one machine can have.
    """

    resources: Resources
    known: bool = True
    problem: str = ""
    detail: str = ""
    isolation: str = ""
    shapes: tuple[Shape, ...] = ()
    headroom: dict[str, Headroom] = {}


class FirstBoot(Frozen):
    """What a machine is told when it first boots, and the host keys that it will show."""

    user_data: bytes
    host_keys: tuple[str, ...]


class Making(Protocol):
    """What a site lends a provider that makes machines. All is idempotent by the lease."""

    async def first_boot(self, lease: Lease, user: str, limit: int) -> FirstBoot:
        """Return the user-data of a lease's machine: what the order says, joined with what makes it
        trust this site's certificates, show a host key known here, and power off at its end.

        Raises `InvalidSpec` for user-data that cloud-init would not understand, or that is more
        than ``limit`` bytes in all.
        """
        ...

    async def await_ready(self, lease: Lease, endpoint: Endpoint) -> MachineFacts:
        """Log in and wait until cloud-init is done; return what is there.

        Raises `Unavailable` while nobody can log in, and `InvalidSpec` with the end of its log if
        what the order told it to do failed.
        """
        ...

    async def set_up(self, lease: Lease, endpoint: Endpoint, devices: Mapping[str, str]) -> None:
        """Mount the order's volumes, each by the device that the cloud named, and run its
        playbooks. Raises `InvalidSpec` with the end of the output of what failed."""
        ...

    async def move_end(self, lease: Lease, endpoint: Endpoint) -> None:
        """Tell the machine's dead-man's switch that the lease ends at another time."""
        ...

    async def note(self, lease_id: str, step: LaunchStep, message: str) -> None:
        """Keep an event of the launch, for people to see while they wait."""
        ...


@dataclass(frozen=True)
class ProviderContext:
    """What a site gives its providers. ``probe`` logs in to an SSH endpoint with an identity
    file (or the user's agent) and looks what is there; it raises `GridcloudError`. ``making`` is
    None only where no machine is made."""

    site_key: str
    state_folder: Path
    lending: LendingSettings
    probe: Callable[[Endpoint, Path | None], Awaitable[MachineFacts]]
    making: Making | None = None


class Provider(ABC):
    """A source of machines.

    None of the methods blocks the event loop. All raise `gridcloud.errors.GridcloudError` only;
    where ``retryable`` is set the same call may succeed later.
    """

    #: The entry point's name, and the ``kind`` in the settings.
    kind: ClassVar[str]

    def __init__(self, name: str, section: dict[str, Any], context: ProviderContext) -> None:
        self.name = name
        self.context = context

    @abstractmethod
    async def capacity(self) -> Capacity:
        """Return all it has, leased or not. Cheap: called for every plan; may be cached."""

    @abstractmethod
    async def launch(self, lease: Lease) -> Machine:
        """Give the place where the lease's work runs; ready and reachable when it returns.

        Idempotent by ``lease.id``, with which everything made is tagged. On an error nothing
        stays behind that `made` would not list.
        """

    @abstractmethod
    async def terminate(self, lease_id: str) -> None:
        """Remove everything tagged with the lease. Idempotent; an unknown lease is no error."""

    @abstractmethod
    async def made(self) -> list[str]:
        """Return the lease ids of everything there that carries this site's tag, asked anew."""

    async def lengthen(self, lease: Lease) -> None:
        """Have what was launched last until the lease's new end. Idempotent."""
        return

    async def check(self) -> Capacity:
        """Prove that it works, for `gridcloud provider check`; may take seconds."""
        return await self.capacity()

    async def close(self) -> None:
        """Give up connections. What was launched stays. Idempotent."""
        return

    @classmethod
    def questions(cls) -> tuple[Question, ...]:
        """Return what to ask who adds one of these, with what is found on this host. Reads small
        files of the user's, as ``clouds.yaml``; raises `GridcloudError` if it cannot be used."""
        return ()


class Enterable(ABC):
    """Capability: gives places on the site's own host that are entered, a command at a time.

    A `Machine` of such a place is a ``sandbox``. All raise `GridcloudError` only.
    """

    @abstractmethod
    async def enter(
        self,
        lease_id: str,
        command: str,
        descriptors: tuple[int, int, int],
        env: Mapping[str, str],
    ) -> int:
        """Run a command line by ``/bin/sh -c`` there, on these descriptors; return its status.

        They are stdin, stdout and stderr, pipes mostly; the caller closes its own. One that was
        ended by signal n returns 128 + n. Raises `NotFound` with the reason once the place has
        ended, for that is for good.
        """

    @abstractmethod
    async def ended(self, lease_id: str) -> str:
        """Return why a place is no more; empty while it is there, or while nobody knows."""

    @abstractmethod
    def home(self, lease_id: str) -> Path:
        """Return where the place's home lies on this host. What is in it may be anybody's."""

    @abstractmethod
    def shown_as(self, lease_id: str) -> str:
        """Return the absolute path that the home has inside. Raises `NotFound`."""

    @abstractmethod
    async def extend(self, lease_id: str, ends_at: datetime) -> None:
        """Move the end of a place, to later or earlier. Idempotent; raises `NotFound`."""

    async def overrun(self, lease_id: str) -> str:
        """Return in a sentence which of its bounds something in the place was killed for; empty
        if none, or if that cannot be told."""
        return ""


class Lender(Enterable):
    """Capability: can give a guest a confined place on the site's own host."""

    #: What confines a guest, as offers tell it.
    isolation: ClassVar[str]

    @abstractmethod
    async def lending_problem(self) -> str:
        """Return why nothing can be lent here, in words for the owner; empty when it can."""


class Neighbourly(ABC):
    """Capability: what it makes carries this site's tag, in a place where other sites may have made
    things, too. As with `Provider`: nothing blocks, and all errors are `GridcloudError`."""

    @abstractmethod
    async def sites(self) -> set[str]:
        """Return the sites, as in `Tags.site`, of which anything is there; asked anew.

        Raises `InvalidSpec` where that cannot be told.
        """


class VolumeKeeper(ABC):
    """Capability: has volumes, which outlive what they are mounted on.

    As with `Provider`: nothing blocks the event loop, and all errors are `GridcloudError`.
    """

    @abstractmethod
    async def volumes(self) -> list[Volume]:
        """Return this site's volumes, asked anew."""

    async def make_volume(self, name: str, size_bytes: int) -> None:
        """Make a volume that is at no machine. Raises `Conflict` if there is one of that name, and
        `InvalidSpec` where there are no volumes."""
        raise InvalidSpec(
            "This provider makes no volumes ahead of machines.",
            hint="Name it in --volume of the machine that is to have it.",
        )

    @abstractmethod
    async def remove_volume(self, name: str) -> None:
        """Remove a volume and what is on it.

        Raises `NotFound` if there is none of that name, `Conflict` while it is in use.
        """


class NetworkKeeper(ABC):
    """Capability: may make networks that are asked for by name.

    As with `Provider`: nothing blocks the event loop, and all errors are `GridcloudError`.
    """

    @property
    @abstractmethod
    def names_networks(self) -> bool:
        """Whether it can."""

    @abstractmethod
    async def networks(self) -> list[Network]:
        """Return this site's networks that have names, asked anew."""

    @abstractmethod
    async def make_network(self, name: str, cidr: str, region: str) -> None:
        """Make a network of a range, in a region or, if that is empty, where it makes them first.

        Idempotent. Raises `Conflict` if there is another one of that name, `InvalidSpec` where it
        cannot be made.
        """

    @abstractmethod
    async def remove_network(self, name: str) -> None:
        """Remove a network; return when nothing is left of it. Idempotent.

        Raises `Unavailable` if that takes too long, as while a machine is in it.
        """


class MachineMaker(VolumeKeeper):
    """Capability: makes machines at a cloud, where things carry this site's tag."""

    @abstractmethod
    async def things(self) -> list[Thing]:
        """Return everything there with this site's tag, kept volumes too, asked anew."""

    @abstractmethod
    async def boot_log(self, lease_id: str) -> str:
        """Return the end of what a machine wrote to its console; empty where there is none."""


def read_section(model: type[S], name: str, section: dict[str, Any]) -> S:
    """Return a provider's own settings; raises `InvalidSpec` naming section, field, expectation."""
    try:
        return model.model_validate({k: v for k, v in section.items() if k != "kind"})
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A misspelt setting tells more than the one that is missing for it.
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        field = ".".join(str(part) for part in first["loc"])
        known = ", ".join(model.model_fields)
        raise InvalidSpec(
            f"[providers.{name}] {field}: {_expected(first)}.",
            hint=f"The settings of this kind are: {known}.",
        ) from error


def _expected(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "missing":
            return "is missing"
        case "extra_forbidden":
            return "there is no such setting"
    text = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"{text} (found {error['input']!r})"
