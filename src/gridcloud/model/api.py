"""What a site's API says of itself and of its communities."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from gridcloud.model.choice import Constraints, Strategy
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Need, Resources
from gridcloud.model.offer import Plan
from gridcloud.model.prices import Prices


class SiteInfo(Frozen):
    """A site's identity and where it can be reached.

    ``key`` is its Ed25519 public key in hex; ``user_ca`` the line that makes an SSH server trust
    its certificates. ``lending`` says whether it lends, and if not why.
    """

    name: str
    key: str
    version: str
    user_ca: str
    state_folder: str
    settings_file: str
    grid_addresses: tuple[str, ...]
    gateway_address: str
    lending: str
    communities: tuple[str, ...]


class SiteStatus(Frozen):
    """How a site fares: jobs by state, capacity and leases."""

    name: str
    version: str
    pid: int
    started_at: datetime
    jobs: dict[str, int]
    leases_own: int
    leases_lent: int
    leases_borrowed: int
    capacity: Resources
    free: Resources
    problems: tuple[str, ...]


class ProviderInfo(Frozen):
    """One source of capacity; ``problem`` is empty when it works. Of one that makes machines at a
    cloud, ``capacity`` is the most that one machine can have."""

    name: str
    kind: str
    capacity: Resources
    free: Resources
    problem: str = ""
    detail: str = ""
    makes_machines: bool = False


class HostKeys(Frozen):
    """The keys an SSH server shows, to be compared with what its administrator says."""

    host: str
    port: int
    keys: tuple[str, ...]
    fingerprints: tuple[str, ...]


class OffersRequest(Frozen):
    """A need to be planned for, with no effect; the ``most`` best offers are told.

    ``site``, ``constraints`` and ``strategy`` mean the same as in a `JobSpec`, ``spot`` as in a
    `MachineOrder`.
    """

    need: Need = Need()
    site: str | None = None
    constraints: Constraints = Constraints()
    strategy: Strategy | None = None
    most: Annotated[int, Field(ge=1, le=100_000)] = 200
    spot: bool = False


class OffersReply(Frozen):
    """The plan for a need."""

    need: Need
    plan: Plan


class CommunityInfo(Frozen):
    """A community this site belongs to, or asks to be admitted to.

    ``waiting`` says whose approval is waited for; ``problem`` why this site is no member (any
    more), or what was said when it last asked.
    """

    id: str
    name: str
    founder: str
    roles: tuple[str, ...] = ()
    waiting: str = ""
    problem: str = ""


class MemberInfo(Frozen):
    """A member of a community, as this site last saw it.

    ``site_name`` is unique: a later member of a name has ``~`` and the start of its key behind it.
    ``state`` is whether it is there (alive, suspect, dead or unknown), ``path`` how it is reached,
    ``version`` which gridcloud it says it runs, ``relays`` whether it passes on for others.
    ``since`` is when it was admitted, ``by`` who signed its membership.
    """

    community: str
    site_name: str
    key: str
    roles: tuple[str, ...]
    addresses: tuple[str, ...]
    problem: str = ""
    myself: bool = False
    state: str = ""
    last_seen_at: datetime | None = None
    latency_seconds: float | None = None
    path: str = ""
    version: str = ""
    relays: bool = False
    since: datetime | None = None
    by: str = ""


class GridSite(MemberInfo):
    """A member, and what it lends to that community in all and now, as last heard.

    ``capacity`` and ``free`` are None where it lends nothing; ``offer_problem`` says why.
    """

    capacity: Resources | None = None
    free: Resources | None = None
    prices: Prices = Prices()
    country: str = ""
    offer_problem: str = ""


class InvitationInfo(Frozen):
    """A join code: a secret that admits ``uses`` sites until it expires, each if approved where
    ``approve`` says so. ``id`` names it without giving it away."""

    code: str
    community: str
    expires_at: datetime
    addresses: tuple[str, ...]
    warning: str = ""
    id: str = ""
    approve: bool = False
    uses: int = 1


class RequestInfo(Frozen):
    """A site that asks to be admitted; ``invitation`` is the id of the one it used."""

    community: str
    site_name: str
    key: str
    since: datetime
    roles: tuple[str, ...]
    invitation: str
    expires_at: datetime


class LeftInfo(Frozen):
    """A community left: how many members heard of it, and what is to be known."""

    community: str
    told: int
    warning: str = ""


class Problem(Frozen):
    """An error as the API tells it (RFC 9457 with our code and hint)."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    hint: str = ""
