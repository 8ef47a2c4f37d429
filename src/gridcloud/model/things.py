"""What there is at a cloud that gridcloud made, and the tags by which it is known."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from ipaddress import IPv4Network
from typing import Self

from gridcloud.model.frozen import Frozen

#: The keys of tags; within what every cloud allows (lowercase letters, digits, hyphens).
SITE_TAG, LEASE_TAG, ENDS_TAG = "gridcloud-site", "gridcloud-lease", "gridcloud-ends"
#: The lease in the tags of what outlives machines, and of what several of them share.
KEPT, SHARED = "kept", "shared"
#: The lease in the tags of networks that were asked for by name, and the key of that name's tag.
NETWORK, NAME_TAG = "network", "gridcloud-name"
MACHINE = "machine"
_TIME = "%Y%m%dt%H%M%Sz"
_SITE_DIGITS = 32


class Tags(Frozen):
    """Whose a thing is, for which lease it was made, and when that ends (None: when told).

    ``site`` is the beginning of the site's key. A volume that is kept has the lease ``kept``, a
    network (or another thing) that several machines use ``shared``.
    """

    site: str
    lease: str
    ends_at: datetime | None = None

    @classmethod
    def of(cls, site_key: str, lease: str, ends_at: datetime | None = None) -> Self:
        """Return the tags of what this site makes for a lease."""
        return cls(site=site_key[:_SITE_DIGITS], lease=lease, ends_at=ends_at)

    def written(self) -> dict[str, str]:
        """Return them as a cloud keeps them: lowercase texts of at most 63 characters."""
        ends = self.ends_at.astimezone(UTC).strftime(_TIME) if self.ends_at else "never"
        return {SITE_TAG: self.site, LEASE_TAG: self.lease, ENDS_TAG: ends}

    @classmethod
    def read(cls, written: Mapping[str, str]) -> Self | None:
        """Return the tags of a thing that a gridcloud site made; None for any other thing."""
        if SITE_TAG not in written or LEASE_TAG not in written:
            return None
        try:
            ends = datetime.strptime(written.get(ENDS_TAG, ""), _TIME).replace(tzinfo=UTC)
        except ValueError:
            ends = None
        return cls(site=written[SITE_TAG], lease=written[LEASE_TAG], ends_at=ends)


class Thing(Frozen):
    """Something at a cloud that carries a gridcloud tag.

    ``kind`` is for people, as ``network``; that of a machine is always `MACHINE`. ``name`` is of
    what belongs to a `Network`.
    """

    kind: str
    id: str
    tags: Tags
    costs: bool = True
    name: str = ""


class Network(Frozen):
    """A network that was asked for by name, for machines that are to reach one another in it.

    It is there until it is removed. ``cidr`` is its range of addresses; it is in one ``region``,
    which is empty where there are none.
    """

    id: str
    name: str
    cidr: str
    region: str = ""


class Volume(Frozen):
    """A disk that outlives machines. ``attached_to`` is the lease of the machine it is at."""

    id: str
    name: str
    size_bytes: int
    created_at: datetime | None = None
    attached_to: str = ""
    place: str = ""


def private_range(text: str) -> str:
    """Return a range of addresses that a network may have, as it is written; raises `ValueError`
    unless it is one of private IPv4, from its first address on."""
    network = IPv4Network(text)
    if not network.is_private or network.is_loopback or network.is_link_local:
        raise ValueError(f"{text} is not a private range, as 10.20.0.0/24 is")
    return str(network)
