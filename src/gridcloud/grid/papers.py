"""Papers: what the signed documents of the grid say. `documents` signs and verifies them.

Each kind is one frozen value that knows its name on the wire (``kind``), who must have signed it
(``signer``) and when it holds. Two more kinds have their place here and come with the membership
protocol and the accounts: ``Revocation``, a member's removal, and ``Receipt``, a usage record
that both sides sign.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import AwareDatetime, Field, field_validator

from gridcloud.errors import InvalidSpec
from gridcloud.model.frozen import Frozen
from gridcloud.model.lease import Endpoint
from gridcloud.model.need import Need, Resources

_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
CommunityName = Annotated[str, Field(pattern=_NAME)]
SiteName = Annotated[str, Field(pattern=_NAME)]
#: ``NAME.FOUNDERKEY``: a community is its founder's key and a name; see `community_id`.
CommunityId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\.[0-9a-f]{64}$")]
Address = Annotated[str, Field(pattern=r"^([0-9.]{7,15}|\[[0-9a-f:.]{2,45}\]):[0-9]{1,5}$")]
Addresses = Annotated[tuple[Address, ...], Field(max_length=16)]
LeaseId = Annotated[str, Field(pattern=r"^[a-z0-9]{1,64}$")]
#: ``user@site``
Person = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}@[a-z0-9][a-z0-9-]{0,62}$")]
_Word = Annotated[str, Field(pattern=r"^[ -~]{1,128}$")]


class Role(StrEnum):
    """What a member may do: lend, borrow, and invite others."""

    PROVIDER = "provider"
    CONSUMER = "consumer"
    MANAGER = "manager"


Roles = Annotated[tuple[Role, ...], Field(min_length=1, max_length=len(Role))]


class Paper(Frozen):
    """What every paper can tell. Times are absolute and carry their zone."""

    kind: ClassVar[str]

    @property
    def signer(self) -> str:
        """The key whose signature makes this paper true."""
        raise NotImplementedError

    @property
    def begins_at(self) -> datetime:
        """Since when it holds."""
        raise NotImplementedError

    @property
    def lapses_at(self) -> datetime | None:
        """Until when it holds; None if it does until it is revoked."""
        return None


class CommunityPaper(Paper):
    """The founding of a community."""

    kind: ClassVar[str] = "gridcloud-community"
    name: CommunityName
    founder: Key
    created_at: AwareDatetime

    @property
    def signer(self) -> str:
        """The founder."""
        return self.founder

    @property
    def begins_at(self) -> datetime:
        """Its founding."""
        return self.created_at


class Invitation(Paper):
    """Admits one site to a community, once, until it expires. Whoever has it may use it."""

    kind: ClassVar[str] = "gridcloud-invitation"
    community: CommunityId
    inviter: Key
    addresses: Addresses
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    roles: Roles
    issued_at: AwareDatetime
    expires_at: AwareDatetime

    @property
    def signer(self) -> str:
        """The inviter."""
        return self.inviter

    @property
    def begins_at(self) -> datetime:
        """Its making out."""
        return self.issued_at

    @property
    def lapses_at(self) -> datetime:
        """Its expiry."""
        return self.expires_at


class Membership(Paper):
    """A site's place in a community: its name there and its roles.

    Signed by the founder, or by a manager whose own membership the founder signed.
    """

    kind: ClassVar[str] = "gridcloud-membership"
    community: CommunityId
    member: Key
    site_name: SiteName
    roles: Roles
    issued_at: AwareDatetime
    issuer: Key

    @property
    def signer(self) -> str:
        """Who admitted the member."""
        return self.issuer

    @property
    def begins_at(self) -> datetime:
        """The admission."""
        return self.issued_at


class Presence(Paper):
    """Where a site says it is to be reached. Of two, the one issued later counts."""

    kind: ClassVar[str] = "gridcloud-presence"
    site: Key
    addresses: Addresses
    issued_at: AwareDatetime

    @property
    def signer(self) -> str:
        """The site itself."""
        return self.site

    @property
    def begins_at(self) -> datetime:
        """When it was said."""
        return self.issued_at


class Offered(Frozen):
    """What an owner would give to one community now.

    ``max_time_seconds`` is its longest lease, ``isolation`` how guests are kept apart (such as
    ``bubblewrap``), ``network`` whether they have one, ``software`` names of what is installed.
    """

    capacity: Resources
    free: Resources
    max_time_seconds: Annotated[int, Field(gt=0, le=366 * 86400)]
    network: bool
    isolation: Annotated[str, Field(pattern=r"^[ -~]{0,64}$")] = ""
    software: Annotated[tuple[_Word, ...], Field(max_length=256)] = ()


class OfferDigest(Paper):
    """A site's offer to one community. ``version`` only grows, from one digest to the next."""

    kind: ClassVar[str] = "gridcloud-offer"
    site: Key
    site_name: SiteName
    community: CommunityId
    version: Annotated[int, Field(ge=0, lt=2**63)]
    offered: Offered
    issued_at: AwareDatetime
    expires_at: AwareDatetime

    @property
    def signer(self) -> str:
        """The site that offers."""
        return self.site

    @property
    def begins_at(self) -> datetime:
        """When it was made out."""
        return self.issued_at

    @property
    def lapses_at(self) -> datetime:
        """Its expiry."""
        return self.expires_at


class LeaseGrant(Paper):
    """A granted lease: capacity of ``lender`` for ``person`` of ``borrower`` until ``ends_at``.

    ``certificate`` is the OpenSSH certificate for the key in the request; ``folder`` is where job
    folders are made on the endpoint, absolute or relative to the login folder.
    """

    kind: ClassVar[str] = "gridcloud-lease"
    lease_id: LeaseId
    community: CommunityId
    lender: Key
    borrower: Key
    person: Person
    need: Need
    endpoint: Endpoint
    certificate: Annotated[str, Field(pattern=r"^[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [ -~]*)?$")]
    folder: Annotated[str, Field(min_length=1, max_length=4096)]
    starts_at: AwareDatetime
    ends_at: AwareDatetime

    @field_validator("folder")
    @classmethod
    def _printable(cls, folder: str) -> str:
        if not folder.isprintable():
            raise ValueError("may hold printable characters only")
        return folder

    @property
    def signer(self) -> str:
        """The lender."""
        return self.lender

    @property
    def begins_at(self) -> datetime:
        """Its start."""
        return self.starts_at

    @property
    def lapses_at(self) -> datetime:
        """Its end."""
        return self.ends_at


def community_id(name: str, founder: str) -> str:
    """Return the identity of the community ``name`` that the site with key ``founder`` founded."""
    return f"{name}.{founder}"


def split_community(community: str) -> tuple[str, str]:
    """Return name and founder's key of a community; raises `InvalidSpec` for another text."""
    name, _, founder = community.rpartition(".")
    if not name or len(founder) != 64:
        raise InvalidSpec(
            f"{community!r} is not the identity of a community.",
            hint="It is written NAME.KEY; see 'gridcloud community list'.",
        )
    return name, founder
