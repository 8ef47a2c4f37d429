"""What the errors of Oracle Cloud mean, as `gridcloud.errors`."""

from __future__ import annotations

import re

import oci
import requests

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

_AGAIN = "It is tried again; look at https://ocistatus.oraclecloud.com if it lasts."
_LOGIN = (
    "Look at the profile, its key and this host's clock; with a session, run `oci session refresh` "
    "or log in again. `oci iam region list` must work."
)
_POLICY = (
    "Look at compartment and names in the settings, and at the policies of this user: "
    "'allow group ... to manage instance-family in compartment ...', and as much for "
    "virtual-network-family and volume-family."
)
_FULL = re.compile(r"OutOfHostCapacity|OutOfCapacity", re.IGNORECASE)
_FULL_WORDS = re.compile(r"out of (host )?capacity", re.IGNORECASE)
_LIMIT = re.compile(r"LimitExceeded|QuotaExceeded")
_MISSING = "NotAuthorizedOrNotFound"
_NEVER_SENT = re.compile(r"refused|NewConnectionError|NameResolution|unreachable", re.IGNORECASE)
_LONGEST = 500


def translated(error: Exception, doing: str) -> GridcloudError:
    """Return what an error of the SDK or of the connection means; ``doing`` is what was asked."""
    match error:
        case oci.exceptions.ServiceError():
            return _of_service(error, doing)
        case oci.exceptions.ConnectTimeout():
            return Unavailable(f"OCI cannot be reached: {doing}.", hint=_AGAIN)
        case oci.exceptions.RequestException() | requests.exceptions.RequestException():
            return _of_connection(error, doing)
        case oci.exceptions.ClientError():
            return Unavailable(
                f"OCI's SDK cannot do this ({doing}): {type(error).__name__}.", hint=_AGAIN
            )
        case _:
            return not_understood(f"{doing}, {type(error).__name__}")


def code_of(error: GridcloudError) -> str:
    """Return OCI's own code of an error; empty for others."""
    cause = error.__cause__
    return str(cause.code or "") if isinstance(cause, oci.exceptions.ServiceError) else ""


def held(error: GridcloudError) -> bool:
    """Tell whether OCI refused because something still uses a thing, or is changing it."""
    cause = error.__cause__
    return isinstance(cause, oci.exceptions.ServiceError) and cause.status in {409, 412}


def not_understood(doing: str) -> Unavailable:
    """Return the error for an answer that is not what the API promises."""
    return Unavailable(f"OCI answered something unexpected: {doing}.", hint=_AGAIN)


def short(text: str) -> str:
    """Return a text of OCI's as one line without its end, and not too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:_LONGEST].rstrip(". ")


def _of_service(error: oci.exceptions.ServiceError, doing: str) -> GridcloudError:
    code, status = str(error.code or ""), int(error.status)
    words = f"{code or status}: {short(str(error.message or ''))}"
    if _FULL.search(code) or (status >= 500 and _FULL_WORDS.search(str(error.message))):
        return NoCapacity(
            f"OCI has no room: {words}.",
            hint="Try another shape, availability domain or region.",
        )
    if _LIMIT.search(code):
        return NoCapacity(
            f"A limit of the tenancy is reached: {words}.",
            hint="End machines that are not needed, or ask for a higher limit.",
        )
    if status == 429:
        return Throttled(
            f"OCI wants fewer requests: {words}.",
            hint="It is tried again later.",
            after_seconds=_after_seconds(error),
        )
    if status == 401:
        return Forbidden(f"OCI does not accept the login: {words}.", hint=_LOGIN)
    if status == 403:
        return Forbidden(f"OCI does not permit this ({doing}): {words}.", hint=_POLICY)
    if status == 404 or _MISSING in code:
        return NotFound(
            f"It is not there, or this user may not see it; OCI does not say which ({doing}): "
            f"{words}.",
            hint=_POLICY,
        )
    if status == 409 and code != "IncorrectState" and "RetryToken" not in code:
        return Conflict(f"OCI refuses this now ({doing}): {words}.", hint=_AGAIN)
    if status in {409, 412}:
        return Unavailable(f"OCI is changing this just now ({doing}): {words}.", hint=_AGAIN)
    if status in {408, 504}:
        return TimedOut(f"OCI did not finish in time ({doing}): {words}.", hint=_AGAIN)
    if status >= 500:
        return Unavailable(f"OCI has an error of its own: {words}.", hint=_AGAIN)
    return InvalidSpec(
        f"OCI does not take this ({doing}): {words}.",
        hint="Look at the order and at the provider's settings.",
    )


def _of_connection(error: Exception, doing: str) -> GridcloudError:
    chain: list[BaseException] = [error, *(one for one in error.args if isinstance(one, Exception))]
    if any(isinstance(one, requests.exceptions.Timeout) for one in chain):
        return TimedOut(f"OCI did not answer in time: {doing}.", hint=_AGAIN)
    said = str(error)
    if any(isinstance(one, requests.exceptions.SSLError) for one in chain):
        return Unavailable(f"OCI's certificate is not accepted: {doing}.", hint=_AGAIN)
    if _NEVER_SENT.search(said):
        return Unavailable(f"OCI cannot be reached: {doing}.", hint=_AGAIN)
    return TimedOut(f"The connection to OCI broke: {doing}.", hint=_AGAIN)


def _after_seconds(error: oci.exceptions.ServiceError) -> float:
    try:
        return max(0.0, float(error.headers.get("retry-after", 0)))
    except (ValueError, TypeError, AttributeError):
        return 0.0  # a date, or no headers at all
