"""The one tree of errors, and the one table that maps them to HTTP and exit statuses.

Every error says its cause and, in ``hint``, the next step. ``retryable`` tells a caller whether
the same request may succeed later unchanged. Rooms translate the errors of the libraries they use
at their edge (``raise ... from``), so that nothing above needs to know those libraries.
"""

from __future__ import annotations

from typing import ClassVar


class GridcloudError(Exception):
    """Base of all errors that a user may see.

    ``message`` is one sentence that names the cause; ``hint`` is what to do about it.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class InvalidSpec(GridcloudError):
    """What was asked for is malformed, impossible or contradicts itself."""

    code = "invalid-spec"


class NotFound(GridcloudError):
    """The thing named does not exist here."""

    code = "not-found"


class Conflict(GridcloudError):
    """The request contradicts the present state, such as a second daemon on one state folder."""

    code = "conflict"


class Forbidden(GridcloudError):
    """The asker is known and may not do this, or could not prove who they are."""

    code = "forbidden"


class NoCapacity(GridcloudError):
    """Nothing fits now; waiting or asking elsewhere may help."""

    code = "no-capacity"
    retryable = True


class Unavailable(GridcloudError):
    """A site, machine or service could not be reached or does not work at the moment."""

    code = "unavailable"
    retryable = True


class Throttled(Unavailable):
    """A service wants fewer requests; ``after_seconds`` is how long it wants to be left alone."""

    def __init__(self, message: str, *, hint: str = "", after_seconds: float = 0.0) -> None:
        super().__init__(message, hint=hint)
        self.after_seconds = after_seconds


class TimedOut(GridcloudError):
    """No answer came in time; whether the request was carried out is unknown."""

    code = "timed-out"
    retryable = True


ERRORS: dict[str, type[GridcloudError]] = {
    error.code: error
    for error in (
        GridcloudError,
        InvalidSpec,
        NotFound,
        Conflict,
        Forbidden,
        NoCapacity,
        Unavailable,
        TimedOut,
    )
}

#: code → (HTTP status, exit status of the command line). Exit statuses keep clear of those a
#: user's command commonly ends with; 64 and up follow ``sysexits.h`` where a meaning matches.
STATUSES: dict[str, tuple[int, int]] = {
    "internal": (500, 70),
    "invalid-spec": (422, 64),
    "not-found": (404, 66),
    "conflict": (409, 73),
    "forbidden": (403, 77),
    "no-capacity": (503, 75),
    "unavailable": (502, 69),
    "timed-out": (504, 75),
}


def from_code(code: str, message: str, hint: str = "") -> GridcloudError:
    """Return the error a site or peer reported, rebuilt from its wire form."""
    return ERRORS.get(code, GridcloudError)(message, hint=hint)
