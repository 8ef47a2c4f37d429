"""What is found at providers by its tags, and what a site's own cloud machines cost."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from gridcloud.model.frozen import Frozen
from gridcloud.model.things import Network, Volume


class Fate(StrEnum):
    """What a sweep did, or would do, with a thing."""

    IN_USE = "in use"
    KEPT = "kept"
    STRAY = "stray"
    REMOVED = "removed"
    NOT_REMOVED = "not removed"
    ANOTHERS = "another's"


class SweptThing(Frozen):
    """Something at a provider with a site's tag: a machine, a network, a volume.

    ``lease_id`` is what it was made for, ``ends_at`` when that was to end, ``note`` says what went
    wrong, ``name`` to which network by name it belongs. ``site`` is whose it is, as in `Tags.site`,
    if it is another site's; what that site knows of it nobody can tell here.
    """

    provider: str
    kind: str
    id: str
    lease_id: str
    fate: Fate
    ends_at: datetime | None = None
    costs: bool = True
    note: str = ""
    site: str = ""
    name: str = ""


class SweepReport(Frozen):
    """What a sweep found. ``problems`` are of providers that could not be asked."""

    things: tuple[SweptThing, ...]
    problems: tuple[str, ...] = ()


class VolumeInfo(Volume):
    """A volume of this site at one of its providers.

    ``unused_since`` is the earliest it can have been forgotten: set for one that is at no machine,
    if its provider tells how old it is.
    """

    provider: str
    unused_since: datetime | None = None


class VolumeReport(Frozen):
    """Volumes by provider and name. ``problems`` are of providers that could not be asked."""

    volumes: tuple[VolumeInfo, ...]
    problems: tuple[str, ...] = ()


class NetworkInfo(Network):
    """A network that this site made by name at one of its providers."""

    provider: str


class NetworkReport(Frozen):
    """Networks by provider and name. ``makers`` are the providers that can make them, ``problems``
    are of providers that could not be asked."""

    networks: tuple[NetworkInfo, ...]
    makers: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class CostRow(Frozen):
    """What machines of one shape cost in one month (of UTC, as ``2026-05``).

    ``cost`` is ``hours`` times what an hour cost when each was asked for; ``unpriced_hours`` of
    them had no price that was known, and are not in it. ``running`` of the machines still are.
    """

    month: str
    provider: str
    shape: str
    currency: str
    machines: int
    running: int
    hours: float
    unpriced_hours: float
    cost: float


class CostReport(Frozen):
    """Costs, the oldest month first, since when they are counted."""

    rows: tuple[CostRow, ...]
    since: datetime | None = None
