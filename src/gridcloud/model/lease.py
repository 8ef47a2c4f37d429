"""A granted offer with an end, and the place it gives: an endpoint reached by SSH, or this host."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum

from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Need, Resources


class Endpoint(Frozen):
    """Where an SSH server answers, as whom to log in, and the host keys it may show.

    ``host_keys`` are OpenSSH public key lines; nothing else is ever accepted. ``gateway`` is
    the server to jump through when the endpoint cannot be reached directly.
    """

    host: str
    port: int = 22
    user: str
    host_keys: tuple[str, ...]
    gateway: Endpoint | None = None


class Machine(Frozen):
    """A place where a lease's work runs.

    ``endpoint`` is None for this host under the site's own account. ``folder`` is where job
    folders are made: absolute, or relative to the login folder of an SSH endpoint. A ``sandbox``
    on this host is a guest's: only the gateway enters it.
    """

    lease_id: str
    provider: str
    folder: str
    endpoint: Endpoint | None = None
    sandbox: bool = False


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


class Lease(Frozen):
    """A right to capacity until ``ends_at`` (None only on the site's own machines).

    ``peer`` is the key of the other site, ``request_id`` what a loan was asked for by.
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

    @property
    def live(self) -> bool:
        """Whether it holds capacity."""
        return self.state is not LeaseState.RELEASED

    def expired(self, now: datetime) -> bool:
        """Whether its end has passed at ``now``."""
        return self.ends_at is not None and now >= self.ends_at


def taken(live: Iterable[Lease], provider: str, role: LeaseRole | None = None) -> Resources:
    """Return what live leases take of a provider of this site, optionally of one role only."""
    total = Resources()
    for lease in live:
        here = lease.role is not LeaseRole.BORROWED and lease.provider == provider
        if here and (role is None or lease.role is role):
            total += lease.need.resources
    return total
