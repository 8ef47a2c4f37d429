"""What a cloud must be able to do so that machines can be made there, and what it says of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from typing import ClassVar

from gridcloud.errors import InvalidSpec, NotFound
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.model.things import (
    ENDS_TAG,
    KEPT,
    LEASE_TAG,
    MACHINE,
    NAME_TAG,
    NETWORK,
    SHARED,
    SITE_TAG,
    Network,
    Tags,
    Thing,
    Volume,
)

__all__ = [
    "ENDS_TAG",
    "KEPT",
    "LEASE_TAG",
    "MACHINE",
    "NAME_TAG",
    "NETWORK",
    "SHARED",
    "SITE_TAG",
    "Build",
    "Cloud",
    "Condition",
    "Image",
    "Network",
    "Server",
    "Tags",
    "Thing",
    "Volume",
]


class Image(Frozen):
    """An image to boot from. ``user`` is whom to log in as; 0 bytes mean that it says no least."""

    id: str
    name: str
    user: str
    disk_bytes: int = 0
    memory_bytes: int = 0
    architecture: str = "x86_64"


class Build(Frozen):
    """All that a machine is made of. ``place`` is one of `Cloud.places`, ``network`` and
    ``volumes`` are what the cloud called those when it made them, to be attached later.
    ``token`` is the same in every attempt of one launch in one place: a cloud that knows client
    tokens makes but one machine for it. At most 40 lowercase letters, digits and hyphens; as
    ``name``, which is at most 60 and holds the lease. ``network`` is of `Cloud.network`, or, if
    ``named_network``, of `Cloud.named_network`."""

    tags: Tags
    name: str
    token: str
    shape: Shape
    resources: Resources
    place: str
    image: Image
    network: str
    user_data: bytes
    volumes: tuple[str, ...] = ()
    spot: bool = False
    named_network: bool = False


class Condition(StrEnum):
    """How a machine is, as far as its cloud knows."""

    BUILDING = "building"
    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"


class Server(Frozen):
    """A machine as the cloud shows it. ``address`` is empty until it has one that this site can
    reach; ``reason`` says why it failed, in the cloud's words."""

    id: str
    condition: Condition
    address: str = ""
    reason: str = ""


class Cloud(ABC):
    """One account at one cloud. A thin shell around its SDK: no retries, no waiting, no deciding.

    Nothing here blocks the event loop. All errors are `GridcloudError`, translated from the SDK's
    at this edge, with the cloud's own words in them and no secret:

    - `NoCapacity`: the cloud has no such machine to give now, or its quota is reached
      (``hint`` says which);
    - `Forbidden`: credentials are wrong or expired, or lack a permission (``hint`` names it);
    - `InvalidSpec` and `NotFound`: no other attempt can succeed, as with an unknown image;
    - `Unavailable`: it may work later (its API is down, an error of its own);
    - `Throttled`, an `Unavailable`: it wants fewer calls, with how long to wait if it said so;
    - `TimedOut`: no answer came, so it is unknown whether it was done.

    Everything made is tagged in the call that makes it, or, where a cloud cannot do that, by a
    name that holds the tags; so that it is found again whatever happens after. Each method that
    makes something first looks for what an earlier attempt made for the same lease and returns
    that; but a cloud may not show yet what it made a moment ago, so ``token`` is used as well.

    A call that is cancelled may be carried out all the same. Where it runs in a thread, it has a
    time-out of its own, of a minute at most; so a machine cannot appear long after its lease ended.
    """

    #: The most user-data it takes, in bytes before base64.
    user_data_limit: ClassVar[int] = 16 * 1024
    #: Whether a machine that powers itself off is deleted by the cloud.
    deletes_what_is_off: ClassVar[bool] = False
    #: For how long it may not show what it made; 0 where that is shown at once.
    shows_late_seconds: ClassVar[float] = 2.0
    #: Whether it makes networks by name.
    names_networks: ClassVar[bool] = False
    #: Whether its machines run cloud-init.
    runs_cloud_init: ClassVar[bool] = True

    @abstractmethod
    async def shapes(self) -> tuple[Shape, ...]:
        """Return the sizes this account may make, of all regions in the settings. Asks anew."""

    @abstractmethod
    async def headroom(self, region: str) -> Headroom:
        """Return what its quota leaves in a region now."""

    @abstractmethod
    async def places(self, shape: Shape) -> tuple[str, ...]:
        """Return the zones where a shape can be made, the preferred first; at least one, which
        may be empty where there are no zones. Networks and volumes are asked for by place alone,
        so its name tells regions apart, as ``region/zone``."""

    @abstractmethod
    async def image(self, wanted: str, shape: Shape) -> Image:
        """Find an image by name, id, or ``OWNER/NAME`` with ``*``; the newest of several.

        Empty means the settings' own. Raises `NotFound`, naming near ones.
        """

    @abstractmethod
    async def network(self, tags: Tags, place: str) -> str:
        """Return the network to use: the settings' own, or one found by its tags or made, with
        what it needs to be reached by SSH alone. Idempotent.

        One that several machines share is tagged with the lease `SHARED`, and goes with the last
        of them; see `remove`.
        """

    @abstractmethod
    async def create(self, build: Build) -> str:
        """Begin to make a machine; return its id at once. Idempotent by the lease and token.

        Where the cloud knows no tokens, two attempts that overlap may make two: then it looks
        again afterwards and removes all but one, the same one whoever looks. If the network or a
        volume is gone, that is `Unavailable`: they are asked for again before the next attempt.
        It powers itself off at its end by what is in its user-data, and a cloud that can delete
        it then is told to here.
        """

    @abstractmethod
    async def server(self, lease_id: str) -> Server | None:
        """Return the machine of a lease; None if the cloud shows none (yet, or any more). Of
        several, always the same one: the oldest."""

    @abstractmethod
    async def boot_log(self, lease_id: str) -> str:
        """Return the end of a machine's console, at most 64 KiB; empty where there is none."""

    @abstractmethod
    async def remove(self, lease_id: str) -> bool:
        """Begin to remove everything made for a lease; return whether nothing is left.

        To be called again until that is so; kept volumes are detached, not removed. Once nothing
        is left of any lease, what they `SHARED` is removed too, at any call: a call for the lease
        `SHARED` asks for just that. Idempotent, and an unknown lease is no error.
        """

    async def remove_others(self, lease_id: str) -> None:
        """Remove all machines of a lease but the one that `server` returns.

        For clouds that know no tokens: there a create that was carried out after its time-out may
        make a second. Idempotent.
        """
        return

    @abstractmethod
    async def things(self) -> list[Thing]:
        """Return everything with this site's tag, of all kinds, asked anew."""

    async def sites(self) -> set[str]:
        """Return the sites, as in `Tags.site`, of which anything is at this account; asked anew.

        Raises `InvalidSpec` where that cannot be told.
        """
        raise InvalidSpec(
            "This provider cannot tell what other sites made.",
            hint="Look in the cloud's own tools.",
        )

    async def extended(self, tags: Tags) -> None:
        """Note a later end where the tags are kept. Idempotent; not every cloud can."""
        return

    async def volumes(self) -> list[Volume]:
        """Return this site's volumes; a cloud without volumes has none."""
        return []

    async def volume(self, tags: Tags, name: str, size_bytes: int, place: str) -> str:
        """Return the volume of a name, made if it is not there; ready to be attached.

        Raises `NotFound` if it is not there and ``size_bytes`` is 0, `Conflict` if it is in use
        or in another place.
        """
        raise InvalidSpec(
            "There are no volumes at this provider.", hint="Leave out --volume, or go elsewhere."
        )

    async def attach(self, lease_id: str, volume: str) -> str:
        """Attach a volume to a lease's machine; return the device it has there, which may be a
        guess (empty: unknown). Idempotent."""
        raise InvalidSpec(
            "There are no volumes at this provider.", hint="Leave out --volume, or go elsewhere."
        )

    async def remove_volume(self, volume: str) -> None:
        """Remove a volume and what is on it. Idempotent; raises `Conflict` while it is in use."""
        raise InvalidSpec("There are no volumes at this provider.", hint="Nothing to be done.")

    async def networks(self) -> list[Network]:
        """Return this site's networks that were made by name; asked anew."""
        return []

    async def make_network(self, tags: Tags, name: str, cidr: str, region: str) -> None:
        """Make a network by name, for machines that reach one another in it, and are reached by
        SSH. Idempotent by the name; an empty region is the first. It is tagged with the lease
        `NETWORK` and its name."""
        raise InvalidSpec(
            "This provider makes no networks by name.",
            hint="Leave the network out: its machines share one as its settings say.",
        )

    async def named_network(self, name: str, place: str) -> str:
        """Return a network that was made by name as `network` does, ready for a place.

        Raises `NotFound`.
        """
        raise NotFound(f"There is no network {name!r} here.", hint="Bring its stack up again.")

    async def remove_network(self, name: str) -> bool:
        """Begin to remove what was made for a network; return whether nothing is left.

        To be called again until that is so. While a machine is in it, nothing is removed, or what
        `named_network` makes again.
        """
        return True

    @abstractmethod
    async def close(self) -> None:
        """Give up connections. Idempotent."""
