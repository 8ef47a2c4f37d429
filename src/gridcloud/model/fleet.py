"""Machines without a job: what is asked of a site, and what its API tells of them."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field

from gridcloud.model.choice import Strategy
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Endpoint, Lease, LeaseState
from gridcloud.model.machine import LaunchEvent, MachineOrder
from gridcloud.model.need import Need
from gridcloud.model.offer import Plan

#: Why a machine ends that somebody does not want any more, be it ready or not.
STOPPED = "stopped by its user"
#: How long a machine lasts unless told.
USUAL_TIME = timedelta(hours=1)


class MachineRequest(Frozen):
    """Machines that are asked for, all alike.

    ``need.time`` is how long each lasts, counted from when it is asked for; an hour unless told.
    With a ``count`` above 1 each is named by the order's name and a number. ``all_or_nothing``: if
    one of them cannot be had, none is kept. Only at ``provider`` and in ``region``, if told. A
    ``check`` is given back as soon as it is ready.
    """

    need: Need = Need()
    order: MachineOrder = MachineOrder()
    count: Annotated[int, Field(ge=1, le=500)] = 1
    all_or_nothing: bool = False
    provider: Annotated[str, Field(max_length=64)] = ""
    region: Annotated[str, Field(max_length=128)] = ""
    strategy: Strategy | None = None
    check: bool = False

    @property
    def time(self) -> timedelta:
        """How long each lasts."""
        return self.need.time or USUAL_TIME


class MachinePlan(Frozen):
    """Where the first machine of a request would be made, and until when it would last; the best
    offers first. ``total`` is what all of them cost for all their time; None if that is unknown."""

    request: MachineRequest
    plan: Plan
    ends_at: datetime
    total: float | None = None
    currency: str = ""


class MachineStart(Frozen):
    """A request that a site has taken in: kept until each of ``names`` is ready or given up, so
    that a site which is killed goes on with it. ``given_up`` says why."""

    id: str
    at: datetime
    request: MachineRequest
    names: tuple[str, ...]
    given_up: dict[str, str] = {}

    @property
    def ends_at(self) -> datetime:
        """The end of its machines, as long as nobody moves it."""
        return self.at + self.request.time

    def without(self, name: str, why: str) -> MachineStart:
        """Return it with one of its machines given up; the first reason stands."""
        if name in self.given_up:
            return self
        return self.model_copy(update={"given_up": self.given_up | {name: why}})

    def order(self, name: str) -> MachineOrder:
        """Return what is asked of one of its machines."""
        return self.request.order.model_copy(update={"name": name})


class MachineState(StrEnum):
    """How a machine is."""

    LAUNCHING = "launching"
    READY = "ready"
    ENDING = "ending"
    ENDED = "ended"
    FAILED = "failed"

    @property
    def settled(self) -> bool:
        """Whether it stays so until somebody does something, or its end comes."""
        return self not in (MachineState.LAUNCHING, MachineState.ENDING)


class MachineInfo(Frozen):
    """A machine without a job.

    ``lease_id`` is what its certificates and its tags at the provider name, ``id`` what the cloud
    calls it. ``reason`` says why it ends, ended or failed. ``cost`` is of an hour as known when it
    was asked for, ``spent`` of all the time it was there until now; None where no price is known.
    """

    name: str
    state: MachineState
    lease_id: str = ""
    id: str = ""
    provider: str = ""
    shape: str = ""
    region: str = ""
    need: Need
    order: MachineOrder
    endpoint: Endpoint | None = None
    created_at: datetime
    ends_at: datetime | None = None
    ended_at: datetime | None = None
    cost: float | None = None
    currency: str = ""
    spent: float | None = None
    reason: str = ""

    @classmethod
    def of(cls, lease: Lease, now: datetime) -> Self:
        """Return what a lease tells of its machine."""
        machine = lease.machine
        return cls(
            name=lease.order.name,
            state=_state(lease),
            lease_id=lease.id,
            id=machine.id if machine else "",
            provider=lease.provider,
            shape=machine.shape if machine and machine.shape else lease.shape,
            region=machine.region if machine and machine.region else lease.region,
            need=lease.need,
            order=lease.order,
            endpoint=machine.endpoint if machine else None,
            created_at=lease.created_at,
            ends_at=lease.ends_at,
            ended_at=lease.ended_at,
            cost=lease.cost,
            currency=lease.currency,
            spent=spent(lease, now),
            reason=lease.reason,
        )

    @classmethod
    def to_be(cls, start: MachineStart, name: str) -> Self:
        """Return one for which no place is chosen (yet)."""
        why = start.given_up.get(name, "")
        return cls(
            name=name,
            state=MachineState.LAUNCHING if not why else _without_any(why),
            need=start.request.need,
            order=start.order(name),
            created_at=start.at,
            ends_at=start.ends_at,
            reason=why,
        )


class LaunchNews(LaunchEvent):
    """An event of a launch with its place in the order of all such events of the site."""

    number: int
    lease_id: str


class MachineLogin(Frozen):
    """How to log in to a machine: where, as whom, and a certificate, good for some minutes, for the
    key that was sent."""

    endpoint: Endpoint
    certificate: str


def spent(lease: Lease, now: datetime) -> float | None:
    """Return what a lease's machine cost until ``now``; None if no price is known."""
    if lease.cost is None:
        return None
    begun, ended = times_paid(lease, now)
    return lease.cost * ((ended - begun) / timedelta(hours=1))


def times_paid(lease: Lease, now: datetime) -> tuple[datetime, datetime]:
    """Return from when to when a lease's machine is taken to be paid for: from its beginning, since
    a cloud counts from when it was asked for it. One that was never had costs nothing."""
    ended = now if lease.live else lease.ended_at or lease.created_at
    return lease.created_at, max(ended, lease.created_at)


def _without_any(why: str) -> MachineState:
    return MachineState.ENDED if why == STOPPED else MachineState.FAILED


def _state(lease: Lease) -> MachineState:
    match lease.state:
        case LeaseState.INTENT:
            return MachineState.ENDING if lease.reason else MachineState.LAUNCHING
        case LeaseState.ACTIVE:
            return MachineState.ENDING if lease.reason else MachineState.READY
        case LeaseState.RELEASED:
            over = lease.ended_at is not None or lease.reason == STOPPED
            return MachineState.ENDED if over else MachineState.FAILED
