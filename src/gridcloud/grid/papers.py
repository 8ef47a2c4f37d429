"""Papers: what the signed documents of the grid say. `documents` signs and verifies them.

Each kind is one frozen value that knows its name on the wire (``kind``), who must have signed it
(``signer``) and when it holds. What both sides of a loan sign is in `receipts`.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, AwareDatetime, Field, field_validator, model_validator

from gridcloud.errors import InvalidSpec
from gridcloud.grid.addresses import parse_listen
from gridcloud.grid.identity import is_weak
from gridcloud.model.frozen import Frozen
from gridcloud.model.identifiers import RelayUrl
from gridcloud.model.lease import Endpoint
from gridcloud.model.need import Need, Resources
from gridcloud.model.prices import Prices

_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


@lru_cache(maxsize=16_384)  # the same few are read again and again
def _is_somebodys(key: str) -> str:
    if is_weak(key):
        raise ValueError("is no site's key: anybody can sign with it")
    return key


@lru_cache(maxsize=16_384)
def _is_address(text: str) -> str:
    try:
        parse_listen(text)
    except InvalidSpec as error:
        raise ValueError("is no IP:PORT") from error
    return text


Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), AfterValidator(_is_somebodys)]
CommunityName = Annotated[str, Field(pattern=_NAME)]
SiteName = Annotated[str, Field(pattern=_NAME)]
#: ``NAME.FOUNDERKEY``: a community is its founder's key and a name; see `community_id`.
CommunityId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\.[0-9a-f]{64}$")]
Address = Annotated[
    str,
    Field(pattern=r"^([0-9.]{7,15}|\[[0-9a-f:.]{2,45}\]):[0-9]{1,5}$"),
    AfterValidator(_is_address),
]
#: A time with its zone. Those near the ends of the calendar, where reckoning fails, are refused.
Moment = Annotated[AwareDatetime, Field(ge=_FIRST, le=_LAST)]
Addresses = Annotated[tuple[Address, ...], Field(max_length=16)]
RelayUrls = Annotated[tuple[RelayUrl, ...], Field(max_length=4)]
Version = Annotated[str, Field(pattern=r"^[0-9A-Za-z.+-]{0,64}$")]
LeaseId = Annotated[str, Field(pattern=r"^[a-z0-9]{1,64}$")]
#: ``user@site``
Person = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}@[a-z0-9][a-z0-9-]{0,62}$")]
Country = Annotated[str, Field(pattern=r"^([A-Z]{2})?$")]
Notice = Annotated[int, Field(ge=0, le=366 * 86400)]
_Word = Annotated[str, Field(pattern=r"^[ -~]{1,128}$")]

#: How many sites one invitation can admit at most.
MOST_USES = 100


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
    created_at: Moment

    @property
    def signer(self) -> str:
        """The founder."""
        return self.founder

    @property
    def begins_at(self) -> datetime:
        """Its founding."""
        return self.created_at


class Via(Frozen):
    """A member through which another is reached."""

    key: Key
    addresses: Addresses = ()
    tls: Addresses = ()


class Invitation(Paper):
    """Admits ``uses`` sites to a community until it expires. Whoever has it may use it.

    With ``approve`` its use only asks; the inviter decides on each. ``inviter_name`` is what the
    inviter calls itself, to be shown beside its key.
    Where the inviter is: its own ``addresses`` (UDP), ``tls`` (TCP) and ``relay_urls``, and members
    ``via`` which it is reached if none of these answers.
    """

    kind: ClassVar[str] = "gridcloud-invitation"
    community: CommunityId
    inviter: Key
    inviter_name: SiteName | Literal[""] = ""
    addresses: Addresses
    tls: Addresses = ()
    relay_urls: RelayUrls = ()
    via: Annotated[tuple[Via, ...], Field(max_length=4)] = ()
    secret: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    roles: Roles
    approve: bool = False
    uses: Annotated[int, Field(ge=1, le=MOST_USES)] = 1
    issued_at: Moment
    expires_at: Moment

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

    Signed by the founder, or by a manager whose own membership the founder signed. One made out
    anew, as with other roles, keeps in ``since`` when the site was first admitted.
    """

    kind: ClassVar[str] = "gridcloud-membership"
    community: CommunityId
    member: Key
    site_name: SiteName
    roles: Roles
    issued_at: Moment
    issuer: Key
    since: Moment | None = None

    @model_validator(mode="after")
    def _admitted_before(self) -> Self:
        if self.since is not None and self.since > self.issued_at:
            raise ValueError("since is later than issued_at")
        return self

    @property
    def admitted_at(self) -> datetime:
        """Since when the site is a member."""
        return self.since or self.issued_at

    @property
    def signer(self) -> str:
        """Who admitted the member."""
        return self.issuer

    @property
    def begins_at(self) -> datetime:
        """The admission."""
        return self.issued_at


class Revocation(Paper):
    """Ends a membership for good: every one of ``member`` issued up to ``revoked_at`` is void.

    Signed by the founder, by a manager (for members who are none), or by the member that leaves.
    Nobody but itself ends the founder's. What it voids, in detail: `gridcloud.grid.roster`.
    """

    kind: ClassVar[str] = "gridcloud-revocation"
    community: CommunityId
    member: Key
    issuer: Key
    revoked_at: Moment
    reason: Annotated[str, Field(pattern=r"^[ -~]{0,256}$")] = ""

    @property
    def signer(self) -> str:
        """Who removed the member."""
        return self.issuer

    @property
    def begins_at(self) -> datetime:
        """The removal."""
        return self.revoked_at


class Presence(Paper):
    """Where a site says it is to be reached, and what it is. Of two, the one issued later counts.

    ``addresses`` answer by UDP, ``tls`` by TLS over TCP; ``relay_urls`` are iroh relays it is
    connected to. ``relays`` tells whether it passes on what members cannot send one another
    directly, ``version`` which gridcloud it runs.
    """

    kind: ClassVar[str] = "gridcloud-presence"
    site: Key
    addresses: Addresses
    tls: Addresses = ()
    relay_urls: RelayUrls = ()
    relays: bool = False
    version: Version = ""
    issued_at: Moment

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
    ``country`` is where it is (ISO 3166, two letters), ``provider`` the kind of what is behind it.
    With a ``notice_seconds`` the owner may recall a lease, that long ahead. Until ``opens_at``
    nothing is lent, by the owner's hours; None while these hold.
    """

    capacity: Resources
    free: Resources
    max_time_seconds: Annotated[int, Field(gt=0, le=366 * 86400)]
    network: bool
    isolation: Annotated[str, Field(pattern=r"^[ -~]{0,64}$")] = ""
    software: Annotated[tuple[_Word, ...], Field(max_length=256)] = ()
    prices: Prices = Prices()
    country: Country = ""
    provider: Annotated[str, Field(pattern=r"^[a-z0-9-]{0,32}$")] = ""
    notice_seconds: Notice | None = None
    opens_at: Moment | None = None


class OfferDigest(Paper):
    """A site's offer to one community. ``version`` only grows, from one digest to the next."""

    kind: ClassVar[str] = "gridcloud-offer"
    site: Key
    site_name: SiteName
    community: CommunityId
    version: Annotated[int, Field(ge=0, lt=2**63)]
    offered: Offered
    issued_at: Moment
    expires_at: Moment

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

    Of several grants of one lease the one with the highest ``revision`` counts: a renewal ends
    later, a recall (which a lease with ``notice_seconds`` may meet) earlier.

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
    starts_at: Moment
    ends_at: Moment
    prices: Prices = Prices()
    notice_seconds: Notice | None = None
    revision: Annotated[int, Field(ge=0, lt=2**31)] = 0

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
