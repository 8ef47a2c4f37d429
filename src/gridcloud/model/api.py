"""What a site's API says of itself and of its communities."""

from __future__ import annotations

from datetime import datetime

from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Need, Resources
from gridcloud.model.offer import Plan


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
    """One source of capacity; ``problem`` is empty when it works."""

    name: str
    kind: str
    capacity: Resources
    free: Resources
    problem: str = ""
    detail: str = ""


class HostKeys(Frozen):
    """The keys an SSH server shows, to be compared with what its administrator says."""

    host: str
    port: int
    keys: tuple[str, ...]
    fingerprints: tuple[str, ...]


class OffersRequest(Frozen):
    """A need to be planned for, with no effect."""

    need: Need = Need()
    site: str | None = None


class OffersReply(Frozen):
    """The plan for a need."""

    need: Need
    plan: Plan


class CommunityInfo(Frozen):
    """A community this site belongs to."""

    id: str
    name: str
    founder: str
    roles: tuple[str, ...]


class MemberInfo(Frozen):
    """A member of a community, as this site last saw it."""

    community: str
    site_name: str
    key: str
    roles: tuple[str, ...]
    addresses: tuple[str, ...]
    problem: str = ""
    myself: bool = False


class InvitationInfo(Frozen):
    """A join code: a secret that admits one site until it expires."""

    code: str
    community: str
    expires_at: datetime
    addresses: tuple[str, ...]
    warning: str = ""


class Problem(Frozen):
    """An error as the API tells it (RFC 9457 with our code and hint)."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    hint: str = ""
