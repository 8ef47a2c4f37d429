"""What OpenStack's errors mean, said in the words of `gridcloud.errors`."""

from __future__ import annotations

import re

from keystoneauth1 import exceptions as theirs

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

_LOGIN_HINT = (
    "Get new credentials (an access token expires within hours, an application credential at its "
    "end), and put them where they are: clouds.yaml, the OS_* variables, or what token_command "
    "or token_file names."
)
_QUOTA = re.compile(r"quota|exceed|overlimit|over limit", re.IGNORECASE)
_FULL = re.compile(
    r"no valid host|not enough|no more (ip )?addresses|availability zone is not available"
    r"|no more free|insufficient|exhausted|out of capacity",
    re.IGNORECASE,
)
#: What a create needs and may have gone meanwhile: it is asked for again before the next attempt.
_NEEDED = re.compile(
    r"(network|port|security group|volume|subnet)\b.*(not be found|not found|does not exist)", re.I
)
_NEVER_SENT = re.compile(r"refused|NewConnectionError|NameResolution|unreachable", re.IGNORECASE)
_LONGEST = 500
_LONGEST_WAIT_SECONDS = 3600.0


def translated(error: Exception, doing: str) -> GridcloudError:
    """Return what an error of keystoneauth means; ``doing`` is what was asked for."""
    match error:
        case theirs.HttpError():
            return _answered(error, doing)
        case theirs.ConnectTimeout():
            return TimedOut(f"OpenStack did not answer in time: {doing}.", hint=_AGAIN)
        case theirs.ConnectFailure() | theirs.SSLError() | theirs.UnknownConnectionError():
            said = str(error)
            if _NEVER_SENT.search(said):
                return Unavailable(f"OpenStack cannot be reached: {_short(said)}.", hint=_AGAIN)
            return TimedOut(f"The connection to OpenStack broke: {doing}.", hint=_AGAIN)
        case theirs.EndpointNotFound() | theirs.EmptyCatalog():
            return InvalidSpec(
                f"The cloud offers no such service there: {_short(str(error))}.",
                hint="Look at `openstack catalog list`, and correct regions in the settings.",
            )
        case theirs.MissingRequiredOptions() | theirs.MissingAuthPlugin():
            return InvalidSpec(
                f"The credentials are not complete: {_short(str(error))}.",
                hint="Complete the cloud in clouds.yaml, or the OS_* variables.",
            )
        case theirs.AuthorizationFailure() | theirs.AuthPluginException():
            return Forbidden(
                f"OpenStack refuses to log in: {_short(str(error))}.", hint=_LOGIN_HINT
            )
        case _:
            return Unavailable(f"OpenStack failed: {_short(str(error))}.", hint=_AGAIN)


_AGAIN = "It is tried again; look at the status page of the cloud if it lasts."


def not_understood(doing: str) -> Unavailable:
    """Return the error for an answer that is not what the API promises."""
    return Unavailable(f"OpenStack answered something unexpected: {doing}.", hint=_AGAIN)


def as_needed(error: GridcloudError) -> GridcloudError:
    """Return the error of a create: what it needs and is gone is no reason to give up."""
    if isinstance(error, InvalidSpec | NotFound) and _NEEDED.search(error.message):
        return Unavailable(error.message, hint="It is prepared again.")
    return error


def build_failed(fault: str) -> str:
    """Return why a machine could not be built, for people."""
    return _short(fault) or "the cloud does not say why"


def _answered(error: theirs.HttpError, doing: str) -> GridcloudError:
    said = _short(_said(error))
    words = f"{said or error.http_status}"
    status = error.http_status
    after = _seconds(error)
    if status == 429 or (status in {413, 503} and after):
        return Throttled(
            f"OpenStack wants fewer requests: {words}.",
            hint="It is tried again later.",
            after_seconds=after,
        )
    if status in {403, 409, 413} and _QUOTA.search(said):
        return NoCapacity(f"A quota of the project is reached: {words}.", hint=_quota_hint(said))
    if status in {400, 409, 500, 503} and _FULL.search(said):
        return NoCapacity(f"The cloud has no room: {words}.", hint="Try another shape or zone.")
    if status in {403, 404} and "/auth/" in (error.url or ""):
        status = 401  # so keystone speaks of a token that it took back
    match status:
        case 401:
            return Forbidden(f"OpenStack does not accept the login: {words}.", hint=_LOGIN_HINT)
        case 403:
            return Forbidden(
                f"OpenStack does not permit this ({doing}): {words}.",
                hint="Ask the cloud's operators for a role that may; `member` usually can.",
            )
        case 404:
            return NotFound(f"OpenStack does not have it ({doing}): {words}.", hint=_NAMES)
        case 409:
            return Conflict(f"OpenStack refuses this now ({doing}): {words}.", hint=_AGAIN)
        case 408 | 504:
            return TimedOut(f"OpenStack did not finish in time ({doing}): {words}.", hint=_AGAIN)
        case _ if status >= 500:
            return Unavailable(f"OpenStack has an error of its own: {words}.", hint=_AGAIN)
        case _:
            return InvalidSpec(f"OpenStack does not take this ({doing}): {words}.", hint=_NAMES)


_NAMES = "Look at the names in the order and in the provider's settings."


def _quota_hint(said: str) -> str:
    found = re.search(r"(?:exceeded for|resources?:?)\s*\[?['\"]?([\w ,'-]+?)['\"]?[\]:.]", said)
    which = f" ({found[1].strip()})" if found else ""
    return f"End machines that are not needed, or ask the operators for a larger quota{which}."


def _said(error: theirs.HttpError) -> str:
    """Return what a service says. Each wraps that in a word of its own, as ``forbidden``,
    ``conflictingRequest`` or ``NeutronError``, which keystoneauth does not look into."""
    try:
        body = error.response.json() if error.response is not None else {}
    except ValueError:
        body = {}  # a page for people, as of a proxy
    for value in body.values() if isinstance(body, dict) else ():
        if isinstance(value, dict) and isinstance(value.get("message"), str):
            return str(value["message"])
        if isinstance(value, str) and value:
            return value
    return error.message or error.details or ""


def _seconds(error: theirs.HttpError) -> float:
    told = error.response.headers.get("Retry-After", "") if error.response is not None else ""
    try:
        return min(_LONGEST_WAIT_SECONDS, max(0.0, float(told)))
    except ValueError:
        return 0.0  # a date, or nothing


def _short(text: str) -> str:
    """Return a text of the cloud's as one line without its end, and not too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:_LONGEST].rstrip(". ")
