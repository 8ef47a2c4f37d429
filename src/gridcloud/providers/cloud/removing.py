"""Removing all that a lease has at a cloud, until nothing is left and that is believed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

from gridcloud.errors import Conflict, GridcloudError, TimedOut, Unavailable
from gridcloud.model.quantities import format_duration

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
_CLOCK_SECONDS = 0.001


async def remove_all(
    remove: Callable[[], Awaitable[bool]], within_seconds: float, settled_after_seconds: float
) -> None:
    """Call ``remove`` until it returned that nothing is left, and still does some time later:
    a cloud that shows late what it made may once show nothing though something is there.

    Raises `Unavailable` if it does not within the time, and at once what cannot pass.
    """
    now = asyncio.get_running_loop().time
    deadline, pause = now() + within_seconds, _FIRST_PAUSE_SECONDS
    gone_at: float | None = None
    last: GridcloudError | None = None
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                gone, last = await remove(), None
        except (Unavailable, TimedOut, Conflict) as error:
            gone, last = False, error
        except TimeoutError:
            gone, last = False, TimedOut("No answer came in time.")
        gone_at = (now() if gone_at is None else gone_at) if gone else None
        if gone_at is not None and now() - gone_at >= settled_after_seconds - _CLOCK_SECONDS:
            return
        if now() + pause >= deadline:
            raise _too_late(within_seconds, last)
        await asyncio.sleep(settled_after_seconds if gone else pause)
        pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.5)


def _too_late(within_seconds: float, last: GridcloudError | None) -> Unavailable:
    why = last.message if last else "The cloud still shows something of it."
    return Unavailable(
        f"Not all is removed after {format_duration(timedelta(seconds=within_seconds))}: {why}",
        hint=last.hint if last and last.hint else "It is tried again; look at the cloud as well.",
    )
