"""Leases for the tests of clouds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from gridcloud.model.identifiers import new_id
from gridcloud.model.lease import Lease, LeaseRole, LeaseState
from gridcloud.model.need import Need
from gridcloud.providers.contract import NAME


def lease(**more: Any) -> Lease:
    """Return a lease for the smallest need, an hour long, that is asked of the provider `NAME`."""
    now = datetime.now(UTC).replace(microsecond=0)
    given: dict[str, Any] = {
        "id": new_id(16),
        "role": LeaseRole.OWN,
        "state": LeaseState.INTENT,
        "provider": NAME,
        "need": Need(),
        "created_at": now,
        "ends_at": now + timedelta(hours=1),
    }
    return Lease(**(given | more))
