"""What the errors of EC2 and of Libcloud's other drivers mean, as `gridcloud.errors`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree as ET

import requests
from libcloud.common.exceptions import BaseHTTPError
from libcloud.common.types import InvalidCredsError, LibcloudError

from gridcloud.errors import (
    Conflict,
    Forbidden,
    GridcloudError,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Throttled,
    TimedOut,
    Unavailable,
)

_AGAIN = "It is tried again; look at the status page of the cloud if it lasts."
_LOGIN = (
    "Get new credentials (those of single sign-on end within hours), and look at this host's "
    "clock: `aws sts get-caller-identity` must work."
)
_THROTTLED = re.compile(r"Throttl|RequestLimitExceeded|SlowDown|TooManyRequests|BandwidthLimit")
_LOGIN_CODES = re.compile(
    r"AuthFailure|InvalidClientTokenId|SignatureDoesNotMatch|ExpiredToken|RequestExpired"
    r"|MissingAuthenticationToken|IncompleteSignature|UnrecognizedClient|InvalidAccessKeyId"
)
_PERMISSION = re.compile(r"UnauthorizedOperation|AccessDenied|OptInRequired|Blocked|PendingVerific")
_QUOTA = re.compile(r"LimitExceeded$|CountExceeded$|MaxIOPSLimit|MaxSpot")
_FULL = re.compile(r"^Insufficient|^Unsupported$|SpotMaxPriceTooLow|ReservationCapacityExceeded")
_MISSING = re.compile(r"\.NotFound$|\.Malformed$|NotFoundException|InvalidAMIID|\.Unavailable$")
_CONFLICT = re.compile(
    r"DependencyViolation|IncorrectState|IncorrectInstanceState|InUse|\.Duplicate$|\.Conflict$"
    r"|AlreadyExists|AlreadyAssociated|ZoneMismatch|AttachmentLimit"
)
#: What a create needs and may have gone meanwhile: it is asked for again before the next attempt.
_NEEDED = re.compile(r"^Invalid(Subnet|SubnetID|Group|GroupId|SecurityGroupID|Volume|VpcID)\.")
_NEVER_SENT = re.compile(r"refused|NewConnectionError|NameResolution|unreachable", re.IGNORECASE)
_LONGEST = 500


class Refused(Exception):
    """EC2 answered with an error. ``code`` is EC2's own, empty where it said none."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"{code or status}: {message}")
        self.status, self.code, self.message = status, code, message
        try:
            self.after_seconds = max(0.0, float(headers.get("retry-after", 0)))
        except ValueError:
            self.after_seconds = 0.0  # a date

    @classmethod
    def read(cls, status: int, body: str, headers: Mapping[str, str]) -> Refused:
        """Return what the body of an answer tells, be it XML or not."""
        try:
            error = ET.fromstring(body).find(".//{*}Error")  # noqa: S314 - expat bounds entities
        except ET.ParseError:
            error = None
        if error is None:
            return cls(status, "", short(body), headers)
        message = error.findtext("{*}Message") or ""
        # An encoded message is pages long, and for those who may decode it alone.
        message = message.partition("Encoded authorization failure")[0]
        return cls(status, error.findtext("{*}Code") or "", short(message), headers)


def translated(error: Exception, doing: str) -> GridcloudError:
    """Return what an error of EC2, of Libcloud or of the connection means; ``doing`` is what was
    asked for, at EC2 the name of the permission as well."""
    match error:
        case Refused():
            return _of_ec2(error, doing)
        case requests.exceptions.Timeout():
            return TimedOut(f"The cloud did not answer in time: {doing}.", hint=_AGAIN)
        case requests.exceptions.RequestException():
            said = str(error)
            if isinstance(error, requests.exceptions.SSLError) or _NEVER_SENT.search(said):
                return Unavailable(f"The cloud cannot be reached: {short(said)}.", hint=_AGAIN)
            return TimedOut(f"The connection to the cloud broke: {doing}.", hint=_AGAIN)
        case InvalidCredsError():
            return Forbidden(
                f"The cloud does not accept the login: {short(str(error))}.",
                hint="Look at the secrets in the provider's settings.",
            )
        case BaseHTTPError():
            return _of_http(error, doing)
        case LibcloudError():
            return Unavailable(f"The cloud failed ({doing}): {short(str(error))}.", hint=_AGAIN)
        case _:
            return Unavailable(
                f"The cloud answered something unexpected ({doing}): {type(error).__name__}.",
                hint=_AGAIN,
            )


def as_needed(error: GridcloudError) -> GridcloudError:
    """Return the error of a create: what it needs and is gone is no reason to give up."""
    cause = error.__cause__
    if isinstance(cause, Refused) and _NEEDED.search(cause.code):
        return Unavailable(error.message, hint="It is prepared again.")
    return error


def code_of(error: GridcloudError) -> str:
    """Return EC2's own code of an error; empty for others."""
    return error.__cause__.code if isinstance(error.__cause__, Refused) else ""


def not_understood(doing: str) -> Unavailable:
    """Return the error for an answer that is not what the API promises."""
    return Unavailable(f"The cloud answered something unexpected: {doing}.", hint=_AGAIN)


def short(text: str) -> str:
    """Return a text of a cloud's as one line without its end, and not too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:_LONGEST].rstrip(". ")


def _of_ec2(error: Refused, doing: str) -> GridcloudError:
    code, words = error.code, str(error)
    if error.status == 429 or _THROTTLED.search(code):
        return Throttled(
            f"EC2 wants fewer requests: {words}.",
            hint="It is tried again later.",
            after_seconds=error.after_seconds,
        )
    if _LOGIN_CODES.search(code) or error.status == 401:
        return Forbidden(f"EC2 does not accept the login: {words}.", hint=_LOGIN)
    if _PERMISSION.search(code) or error.status == 403:
        return Forbidden(
            f"EC2 does not permit this: {words}.",
            hint=f"Have the permission ec2:{doing} added to the policy of this user.",
        )
    if _QUOTA.search(code):
        return NoCapacity(
            f"A quota of the account is reached: {words}.",
            hint="End machines that are not needed, or ask for more in Service Quotas.",
        )
    if _FULL.search(code):
        return NoCapacity(f"EC2 has no room: {words}.", hint="Try another type, zone or region.")
    if error.status >= 500 or code in {"InternalError", "InternalFailure", "Unavailable"}:
        return Unavailable(f"EC2 has an error of its own: {words}.", hint=_AGAIN)
    if _MISSING.search(code) or error.status == 404:
        return NotFound(
            f"EC2 does not have it ({doing}): {words}.",
            hint="Look at the names in the order and in the provider's settings.",
        )
    if _CONFLICT.search(code) or error.status == 409:
        return Conflict(f"EC2 refuses this now ({doing}): {words}.", hint=_AGAIN)
    return InvalidSpec(
        f"EC2 does not take this ({doing}): {words}.",
        hint="Look at the order and at the provider's settings.",
    )


def _of_http(error: BaseHTTPError, doing: str) -> GridcloudError:
    words, status = short(str(error.message)) or str(error.code), error.code
    lowered = words.lower()
    if status == 429:
        return Throttled(
            f"The cloud wants fewer requests: {words}.",
            hint="It is tried again later.",
            after_seconds=float(getattr(error, "retry_after", 0) or 0),
        )
    if status in {400, 402, 403, 409, 412, 422, 503} and re.search(
        r"quota|limit|exceed|capacity|sold out|out of stock|insufficient|not available", lowered
    ):
        return NoCapacity(
            f"The cloud gives no more: {words}.", hint="Try another size or location."
        )
    match status:
        case 401:
            return Forbidden(f"The cloud does not accept the login: {words}.", hint=_SECRETS)
        case 403:
            return Forbidden(f"The cloud does not permit this ({doing}): {words}.", hint=_SECRETS)
        case 404:
            return NotFound(f"The cloud does not have it ({doing}): {words}.", hint="Look there.")
        case 409 | 423:
            return Conflict(f"The cloud refuses this now ({doing}): {words}.", hint=_AGAIN)
        case 408 | 504:
            return TimedOut(f"The cloud did not finish in time ({doing}).", hint=_AGAIN)
        case _ if isinstance(status, int) and status < 500:
            return InvalidSpec(
                f"The cloud does not take this ({doing}): {words}.",
                hint="Look at the order and at the provider's settings.",
            )
        case _:
            return Unavailable(f"The cloud has an error of its own: {words}.", hint=_AGAIN)


_SECRETS = "Look at the secrets in the provider's settings, and at what they may do."
