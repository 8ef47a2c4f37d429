"""What a site's API says of what it lends."""

from __future__ import annotations

from datetime import datetime, timedelta

from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import LeaseState
from gridcloud.model.need import Need


class LoanInfo(Frozen):
    """A loan of this site: to a person of the site with the key ``borrower``, until ``ends_at``.

    ``notice`` is how long ahead it may be recalled, None if it may not. ``recalled`` says why it
    was, empty if it was not; ``told`` whether its borrower heard of that.
    """

    lease_id: str
    community: str
    borrower: str
    person: str
    need: Need
    state: LeaseState
    since: datetime
    ends_at: datetime | None
    notice: timedelta | None = None
    recalled: str = ""
    told: bool = False
