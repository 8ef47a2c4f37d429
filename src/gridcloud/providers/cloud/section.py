"""The settings that all clouds have in common, and how long each step of a launch may take."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import Field

from gridcloud.model.frozen import Frozen
from gridcloud.model.machine import LaunchStep
from gridcloud.model.written import Duration

_Limit = Annotated[Duration, Field(gt=timedelta(0), le=timedelta(days=1))]


class Patience(Frozen):
    """How long each step of a launch may take in all, repeats included; ``removal`` is how long
    it may take until nothing is left of a lease. What takes longer is given up."""

    image: _Limit = timedelta(seconds=60)
    shape: _Limit = timedelta(seconds=60)
    place: _Limit = timedelta(seconds=60)
    network: _Limit = timedelta(seconds=120)
    volumes: _Limit = timedelta(seconds=120)
    create: _Limit = timedelta(seconds=120)
    reachable: _Limit = timedelta(seconds=600)
    ready: _Limit = timedelta(seconds=900)
    setup: _Limit = timedelta(hours=1)
    removal: _Limit = timedelta(seconds=600)

    def limit(self, step: LaunchStep) -> timedelta:
        """Return how long a step may take."""
        limit: timedelta = getattr(self, step.value)
        return limit


class CloudSection(Frozen):
    """What every provider that makes machines can be told; a cloud's own section inherits it.

    ``image`` is the one to boot where an order names none. ``user`` is whom to log in as; empty
    means what the image says. ``calls_per_second`` bounds how often the API is called over a
    while (it is less while the cloud asks for that), ``at_once`` how many machines are being made
    at the same time.
    """

    image: Annotated[str, Field(max_length=512)] = ""
    user: Annotated[str, Field(pattern=r"^([a-z_][a-z0-9_-]{0,31})?$")] = ""
    calls_per_second: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] = 20.0
    at_once: Annotated[int, Field(ge=1, le=1000)] = 64
    patience: Patience = Patience()
