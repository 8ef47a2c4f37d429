"""A granted offer with an end, and the place it gives: an endpoint reached by SSH, or this host."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gridcloud.errors import Conflict
from gridcloud.model.frozen import Frozen
from gridcloud.model.machine import MachineOrder
from gridcloud.model.need import Need, Resources
from gridcloud.model.prices import Prices


class Endpoint(Frozen):
    """Where an SSH server answers, as whom to log in, and the host keys it may show.

    ``host_keys`` are OpenSSH public key lines; nothing else is ever accepted. ``gateway`` is
    the server to jump through when the endpoint cannot be reached directly. A lending site's
    gateway without a ``host`` has no address that others could use: it is reached over the
    overlay alone.
    """

    host: Annotated[str, Field(max_length=255)]
    port: Annotated[int, Field(ge=0, le=65535)] = 22
    user: str
    host_keys: tuple[str, ...]
    gateway: Endpoint | None = None


class Machine(Frozen):
    """A place where a lease's work runs.

    ``endpoint`` is None for this host under the site's own account. ``folder`` is where job
    folders are made: absolute, or relative to the login folder of an SSH endpoint. A ``sandbox``
    on this host is a guest's: only the gateway enters it. One with ``certified`` was made for the
    lease and lets in this site's certificates for it; its ``id`` is what its cloud calls it.
    """

    lease_id: str
    provider: str
    folder: str
    endpoint: Endpoint | None = None
    sandbox: bool = False
    certified: bool = False
    id: str = ""
    shape: str = ""
    region: str = ""


#: What a gateway's commands exit with once the place is gone for good; their stderr says why.
PLACE_GONE_STATUS = 254


class LeaseState(StrEnum):
    """The life of a lease; INTENT is written before a provider is asked for anything."""

    INTENT = "INTENT"
    ACTIVE = "ACTIVE"
    RELEASED = "RELEASED"


class LeaseRole(StrEnum):
    """Whose work runs on whose capacity, seen from this site."""

    OWN = "own"
    LENT = "lent"
    BORROWED = "borrowed"


class LoanTerms(Frozen):
    """What was agreed for one loan, kept with it so that a later change of policy leaves it alone.

    ``roles`` are those its borrower had. ``notice`` says how long ahead it may be recalled, None
    that it may not. ``processes`` and ``disk_bytes`` bound its sandbox; ``software`` are folders
    shown in it.
    """

    roles: tuple[str, ...] = ()
    prices: Prices = Prices()
    notice: timedelta | None = None
    network: bool = False
    software: tuple[Path, ...] = ()
    processes: int
    disk_bytes: int


class Recall(Frozen):
    """That the owner wants a loan back before its end, since when and why."""

    at: datetime
    reason: str


class Lease(Frozen):
    """A right to capacity until ``ends_at`` (None only on the site's own machines).

    ``peer`` is the key of the other site, ``request_id`` what a loan was asked for by. ``revision``
    counts how often the end was moved. Where a machine is made for it, that is of ``shape`` in
    ``region`` and as ``order`` says, and an hour of it ``cost`` so much in ``currency`` when it was
    asked for (None: not known). One without a job has its name in ``order``; where it has a
    ``reason`` it is being given back. A loan's life: INTENT, ACTIVE, RELEASED, never back; its
    end moves later by renewals, and by one recall, after which there are no renewals, earlier.
    """

    id: str
    role: LeaseRole
    state: LeaseState
    provider: str
    need: Need
    created_at: datetime
    ends_at: datetime | None = None
    job_id: str | None = None
    request_id: str = ""
    community: str | None = None
    peer: str | None = None
    person: str | None = None
    machine: Machine | None = None
    reason: str = ""
    terms: LoanTerms | None = None
    revision: int = 0
    recall: Recall | None = None
    ended_at: datetime | None = None
    shape: str = ""
    region: str = ""
    cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    currency: str = ""
    order: MachineOrder = MachineOrder()

    @property
    def live(self) -> bool:
        """Whether it holds capacity."""
        return self.state is not LeaseState.RELEASED

    @property
    def for_a_machine(self) -> bool:
        """Whether somebody asked for a machine itself, and not for a place for a job."""
        return self.role is LeaseRole.OWN and self.job_id is None

    @property
    def recallable(self) -> bool:
        """Whether its owner may recall it, and has not yet."""
        agreed = self.terms is not None and self.terms.notice is not None
        return agreed and self.state is LeaseState.ACTIVE and self.recall is None

    def expired(self, now: datetime) -> bool:
        """Whether its end has passed at ``now``."""
        return self.ends_at is not None and now >= self.ends_at

    def activated(self, machine: Machine) -> Lease:
        """Return it with what it gives; raises `Conflict` unless it is an intent."""
        if self.state is not LeaseState.INTENT:
            raise Conflict(f"The lease {self.id} is no intent any more.")
        return self.model_copy(update={"state": LeaseState.ACTIVE, "machine": machine})

    def renewed(self, until: datetime) -> Lease:
        """Return it with an end no earlier than ``until``: itself if it lasts so long already.

        Raises `Conflict` for one that is over, not granted yet, or recalled.
        """
        self._must_be_active()
        if self.ends_at is None or until <= self.ends_at:
            return self
        if self.recall is not None:
            raise Conflict(
                f"The lease {self.id} was recalled: {self.recall.reason}.",
                hint="Ask for another one, here or elsewhere.",
            )
        return self.model_copy(update={"ends_at": until, "revision": self.revision + 1})

    def recalled(self, reason: str, now: datetime) -> Lease:
        """Return it with an end after its notice, never later than before.

        One that was recalled before stays as it is. Raises `Conflict` for one that is over, not
        granted yet, or lent without a notice.
        """
        self._must_be_active()
        if self.recall is not None:
            return self
        if self.terms is None or self.terms.notice is None:
            raise Conflict(f"The lease {self.id} was lent without a notice, so it has its end.")
        until = now + self.terms.notice
        return self.model_copy(
            update={
                "ends_at": until if self.ends_at is None else min(self.ends_at, until),
                "revision": self.revision + 1,
                "recall": Recall(at=now, reason=reason),
            }
        )

    def released(self, reason: str, now: datetime) -> Lease:
        """Return it as over for good, ended at ``now`` or at its end if that was before.

        One that is over stays as it is; one that was never granted has not ended either.
        """
        if not self.live:
            return self
        ended = None
        if self.state is LeaseState.ACTIVE:
            ended = max(min(now, self.ends_at or now), self.created_at)
        return self.model_copy(
            update={"state": LeaseState.RELEASED, "reason": reason, "ended_at": ended}
        )

    def _must_be_active(self) -> None:
        if self.state is not LeaseState.ACTIVE:
            how = "is over" if not self.live else "was not granted yet"
            raise Conflict(f"The lease {self.id} {how}.", hint="Ask for a new one.")


def taken(live: Iterable[Lease], provider: str, role: LeaseRole | None = None) -> Resources:
    """Return what live leases take of a provider of this site, optionally of one role only."""
    total = Resources()
    for lease in live:
        here = lease.role is not LeaseRole.BORROWED and lease.provider == provider
        if here and (role is None or lease.role is role):
            total += lease.need.resources
    return total
