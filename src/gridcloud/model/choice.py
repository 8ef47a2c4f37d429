"""How a place is chosen for a job: what it must keep to, what is preferred, who comes first."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from gridcloud.model.countries import CountryCode
from gridcloud.model.frozen import Frozen
from gridcloud.model.prices import Credits

#: The word for the user's own site where a community's name could stand.
OWN = "own"
_ProviderKind = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
#: A community by its name, or by its whole id (``name.`` and its founder's key).
_Community = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}(\.[0-9a-f]{64})?$")]


class Strategy(StrEnum):
    """Which of the offers that can serve a job is the best; each has a function of its own in
    `gridcloud.orchestration.strategies`."""

    FIRST_FIT = "first-fit"
    BEST_FIT = "best-fit"
    FAIR_FIT = "fair-fit"
    CHEAPEST = "cheapest"
    NEAREST_DATA = "nearest-data"


class Order(StrEnum):
    """Who of those that wait comes first; see `gridcloud.orchestration.line`."""

    FIFO = "fifo"
    LIFO = "lifo"
    FAIR = "fair"


class Constraints(Frozen):
    """What a place must be to be considered at all; an empty field admits everything.

    ``countries`` and ``kinds`` (of provider) admit those named. ``within`` names communities, or
    ``own``, that the job never leaves; the user's own site is within each of them. ``max_price``
    is for the whole of the need, in credits.
    """

    countries: Annotated[tuple[CountryCode, ...], Field(max_length=249)] = ()
    kinds: Annotated[tuple[_ProviderKind, ...], Field(max_length=32)] = ()
    within: Annotated[tuple[_Community, ...], Field(max_length=64)] = ()
    max_price: Credits | None = None
