"""What brokers say to one another: the envelope, the bodies of each kind, and how clocks are held.

A request is ``{v, kind, id, sent_at, body}``, a reply ``{ok: true, now, body}`` or
``{ok: false, now, code, message, hint}``, both JSON in UTF-8. Who sent it is not in it: the
transport proves that. Both sides compare the other's clock with their own, since leases and
documents mean nothing between clocks that differ.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from pydantic import AwareDatetime, Field, JsonValue, TypeAdapter, ValidationError

from gridcloud.errors import Conflict, GridcloudError, InvalidSpec, from_code
from gridcloud.grid.documents import LEEWAY, MAX_DOCUMENT_BYTES, first_problem
from gridcloud.grid.papers import CommunityId, LeaseId, Moment, SiteName
from gridcloud.model.frozen import Frozen
from gridcloud.model.need import Need
from gridcloud.model.quantities import format_duration

PROTOCOL_VERSION = 2
#: Clocks that differ by more are refused, by either side.
MAX_CLOCK_DIFFERENCE = LEEWAY

#: A message with more values than that is refused unread: reading costs by values, not by bytes.
MAX_VALUES = 8192
#: How many bytes of text a value costs as much as, at most.
_VALUE_BYTES = 32

Document = Annotated[str, Field(max_length=MAX_DOCUMENT_BYTES)]
Credential = Annotated[str, Field(max_length=2 * MAX_DOCUMENT_BYTES + 1)]
UserName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
RequestId = Annotated[str, Field(pattern=r"^[ -~]{1,128}$")]
SshPublicKey = Annotated[
    str, Field(max_length=4096, pattern=r"^[a-z0-9@.-]+ [A-Za-z0-9+/=]+( [ -~]*)?$")
]
Body = TypeVar("Body", bound=Frozen)


class Kind(StrEnum):
    """What a request asks for. All are idempotent. Bodies of the overlay's are in `news`."""

    PING = "ping"
    JOIN = "join"
    LEAVE = "leave"
    PROBE = "probe"
    PROBE_FOR = "probe-for"
    VOUCH = "vouch"
    SYNC = "sync"
    OFFERS = "offers"
    LEASE = "lease"
    RENEW = "renew"
    RELEASE = "release"
    RECALL = "recall"
    RECEIPT = "receipt"


class Request(Frozen):
    """A request as it arrived."""

    v: int
    kind: Kind
    id: Annotated[str, Field(max_length=64)]
    sent_at: AwareDatetime
    body: dict[str, JsonValue]


class _Answer(Frozen):
    ok: Literal[True]
    now: AwareDatetime
    body: dict[str, JsonValue]


class _Refusal(Frozen):
    ok: Literal[False]
    now: AwareDatetime
    code: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=4096)]
    hint: Annotated[str, Field(max_length=4096)] = ""


_REPLY: TypeAdapter[_Answer | _Refusal] = TypeAdapter(
    Annotated[_Answer | _Refusal, Field(discriminator="ok")]
)


class Nothing(Frozen):
    """A body with nothing in it."""


class MemberRecord(Frozen):
    """What is known of one member; both parts prove themselves, so anyone may pass it on."""

    credential: Credential
    presence: Document


class RevocationRecord(Frozen):
    """A member's removal. ``proof`` is the credential of who signed it: a manager, or the member
    itself; it is empty where the founder did."""

    revocation: Document
    proof: Credential = ""


#: What is told of a community: each proves itself, so anyone may pass it on.
NewsItem = MemberRecord | RevocationRecord


class JoinBody(Frozen):
    """Use an invitation; answered by `JoinedBody`. Asking again does no harm.

    ``left`` is the asker's own word that it left that community before, if it did.
    """

    invitation: Document
    site_name: SiteName
    presence: Document
    left: RevocationRecord | None = None


class JoinedBody(Frozen):
    """The community's founding, the new member's credential, and some members to begin with.

    While the invitation's maker has not approved, ``waits`` is true and there is no credential.
    """

    community: Document
    credential: Credential = ""
    members: Annotated[tuple[MemberRecord, ...], Field(max_length=64)] = ()
    waits: bool = False


class Asking(Frozen):
    """What a member says in every request about a community: who it is there, and where."""

    community: CommunityId
    credential: Credential
    presence: Document


class DigestBody(Frozen):
    """A signed `OfferDigest`; answers a bare `Asking`."""

    digest: Document


class LeaseBody(Asking):
    """Ask for a lease; the same ``request_id`` always means the same lease. See `GrantBody`."""

    request_id: RequestId
    need: Need
    user: UserName
    ssh_public_key: SshPublicKey


class RenewBody(Asking):
    """Ask that a lease end no earlier than ``until``; answered by `GrantBody`."""

    lease_id: LeaseId
    until: Moment


class GrantBody(Frozen):
    """A signed `LeaseGrant`."""

    grant: Document


class ReleaseBody(Frozen):
    """Give a lease back. A borrower may do so even when no longer a member."""

    lease_id: LeaseId


class RecallBody(Asking):
    """A lender shortens a lease it may recall: ``grant`` ends earlier than the one before."""

    grant: Document
    reason: Annotated[str, Field(max_length=256)] = ""


class ReceiptBody(Asking):
    """A lender shows the receipt of a loan that has ended; answered by `ReceiptReply`."""

    receipt: Document


class ReceiptReply(Frozen):
    """The borrower's countersignature, or why it does not agree."""

    countersignature: Document = ""
    dispute: Annotated[str, Field(max_length=1024)] = ""


class LeaveBody(RevocationRecord):
    """Tell of a removal, such as one's own leaving. Whoever knows of it may tell."""

    community: CommunityId


def encode_request(kind: Kind, body: Frozen, now: datetime, number: int = 0) -> bytes:
    """Return a request's bytes; its ``number`` is for logs only."""
    request = Request(
        v=PROTOCOL_VERSION,
        kind=kind,
        id=str(number),
        sent_at=now,
        body=body.model_dump(mode="json"),
    )
    return request.model_dump_json().encode()


def reading_cost(message: bytes) -> int:
    """Return what it costs to read a message, in bytes of plain text."""
    return len(message) + _VALUE_BYTES * message.count(b",")


def decode_request(message: bytes, now: datetime) -> Request:
    """Return the request in ``message``.

    Raises `InvalidSpec` if it is none, or of another version, and `Conflict` if the sender's clock
    differs from ``now`` by more than `MAX_CLOCK_DIFFERENCE`.
    """
    _check_values(message)
    try:
        request = Request.model_validate_json(message)
    except ValidationError as error:
        raise InvalidSpec(
            f"The request cannot be read: {first_problem(error)}.",
            hint="Do both sites run the same version of gridcloud?",
        ) from error
    if request.v != PROTOCOL_VERSION:
        raise InvalidSpec(
            f"The request is in version {request.v} of the protocol; "
            f"this site speaks {PROTOCOL_VERSION}.",
            hint="Update the older of the two.",
        )
    check_clock(request.sent_at, now, "This site's clock", "the asking site's")
    return request


def decode_body(body: dict[str, JsonValue], expected: type[Body]) -> Body:
    """Return a body as the type expected; raises `InvalidSpec`."""
    try:
        return expected.model_validate(body)
    except ValidationError as error:
        raise InvalidSpec(
            f"The message cannot be understood: {first_problem(error)}.",
            hint="Do both sites run the same version of gridcloud?",
        ) from error


def encode_reply(body: Frozen, now: datetime) -> bytes:
    """Return the bytes of an answer."""
    answer = _Answer(ok=True, now=now, body=body.model_dump(mode="json"))
    return answer.model_dump_json().encode()


def encode_refusal(error: GridcloudError, now: datetime) -> bytes:
    """Return the bytes that tell an error."""
    refusal = _Refusal(
        ok=False, now=now, code=error.code, message=error.message[:4096], hint=error.hint[:4096]
    )
    return refusal.model_dump_json().encode()


def decode_reply(message: bytes, expected: type[Body], now: datetime) -> Body:
    """Return the answer in ``message``, or raise the error that it tells.

    Raises `InvalidSpec` if it is neither, `Conflict` if the peer's clock differs too much.
    """
    _check_values(message)
    try:
        reply = _REPLY.validate_json(message)
    except ValidationError as error:
        raise InvalidSpec(
            f"The peer's reply cannot be read: {first_problem(error)}.",
            hint="Do both sites run the same version of gridcloud?",
        ) from error
    check_clock(reply.now, now, "This site's clock", "the peer's")
    if isinstance(reply, _Refusal):
        raise from_code(reply.code, printable(reply.message), printable(reply.hint))
    return decode_body(reply.body, expected)


def _check_values(message: bytes) -> None:
    if message.count(b",") >= MAX_VALUES:
        raise InvalidSpec(f"A message of more than {MAX_VALUES} values is no broker's.")


def check_clock(theirs: datetime, now: datetime, ours_is: str, theirs_is: str) -> None:
    """Raise `Conflict` if two clocks differ by more than `MAX_CLOCK_DIFFERENCE`."""
    difference = now - theirs
    if abs(difference) > MAX_CLOCK_DIFFERENCE:
        way = "ahead of" if difference > timedelta(0) else "behind"
        raise Conflict(
            f"{ours_is} is {format_duration(abs(difference))} {way} {theirs_is}.",
            hint="Set the clock that is wrong, by NTP: timedatectl set-ntp true",
        )


def printable(text: str) -> str:
    """Return a peer's words without what could steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
