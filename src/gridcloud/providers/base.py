"""What every provider is: a source of machines, asked by the site through six methods.

A provider is a folder in this room (or another package), one entry point in the group
``gridcloud.providers`` whose name is its ``kind``, and a test that inherits
`gridcloud.providers.contract.ProviderContract`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError

from gridcloud.errors import InvalidSpec
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Endpoint, Lease, Machine
from gridcloud.model.need import Resources
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

    ``known`` is false, together with a problem, where the size was never learned.
    """

    resources: Resources
    known: bool = True
    problem: str = ""
    detail: str = ""
    isolation: str = ""


@dataclass(frozen=True)
class ProviderContext:
    """What a site gives its providers. ``probe`` logs in to an SSH endpoint with an identity
    file (or the user's agent) and looks what is there; it raises `GridcloudError`."""

    site_key: str
    state_folder: Path
    lending: LendingSettings
    probe: Callable[[Endpoint, Path | None], Awaitable[MachineFacts]]


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

    async def check(self) -> Capacity:
        """Prove that it works, for `gridcloud provider check`; may take seconds."""
        return await self.capacity()

    async def close(self) -> None:
        """Give up connections. What was launched stays. Idempotent."""
        return


class Lender(ABC):
    """Capability: can give a guest a confined place on the site's own host."""

    @abstractmethod
    async def lending_problem(self) -> str:
        """Return why nothing can be lent here, in words for the owner; empty when it can."""


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
