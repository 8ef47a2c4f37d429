"""What to make of how a new machine looks from outside: through its cloud, and at its SSH port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re

from gridcloud.errors import Conflict, InvalidSpec, NoCapacity, Unavailable
from gridcloud.providers.cloud.clouds import Condition, Server

#: A cloud may show a machine late that it just made.
_SHOWN_WITHIN_SECONDS = 60.0
#: One that was shown and is not any more, or that is off, for so long is so for good.
_GONE_AFTER_SECONDS = 15.0
_OFF_AFTER_SECONDS = 30.0
_CONNECT_SECONDS, _BANNER_SECONDS = 3.0, 10.0
_LONGEST_BANNER = 8192
#: Nothing that a program could take for an option, or a shell for more than a word.
_ADDRESS = re.compile(r"[A-Za-z0-9:]([A-Za-z0-9.:%_-]{0,253}[A-Za-z0-9])?")
_STEERING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\t\n\x20-\x7e\xa0-\U0010ffff]")


def plain(text: str) -> str:
    """Return what a machine or a cloud says, without what could steer a terminal."""
    return _STEERING.sub("", text.replace("\r\n", "\n"))


class Watch:
    """Judges one machine by how its cloud shows it, time after time. Pure; instants are seconds
    of one clock."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._last: Server | None = None
        self._missing_since: float | None = None
        self._off_since: float | None = None

    def seen(self, server: Server | None, now: float) -> str:
        """Return the address at which it may answer by now; empty if it has none yet.

        Raises `NoCapacity` if the cloud could not build it, `Conflict` if somebody deleted it,
        `InvalidSpec` if it powered itself off, `Unavailable` if it never appeared.
        """
        if server is None:
            self._missing(now)
            return ""
        self._last, self._missing_since = server, None
        if server.condition is Condition.FAILED:
            why = plain(server.reason).rstrip(".") or "it does not say why"
            raise NoCapacity(f"The cloud could not build the machine: {why}.")
        if server.condition is Condition.STOPPED:
            self._off(now)
            return ""
        self._off_since = None
        if server.condition is not Condition.RUNNING:
            return ""
        if server.address and not _ADDRESS.fullmatch(server.address):
            raise InvalidSpec(
                f"The cloud tells an address that is none: {plain(server.address)[:100]!r}.",
                hint="Look at the machine in the cloud's own tools.",
            )
        return server.address

    def _missing(self, now: float) -> None:
        self._missing_since = now if self._missing_since is None else self._missing_since
        if self._last is None:
            if now - self._began > _SHOWN_WITHIN_SECONDS:
                raise Unavailable("The cloud took the order for a machine, and never showed it.")
        elif now - self._missing_since > _GONE_AFTER_SECONDS:
            raise Conflict(
                "The machine was deleted, or powered itself off, while it was made.",
                hint="Ask who else uses this account, and look at its user-data; then try again.",
            )

    def _off(self, now: float) -> None:
        self._off_since = now if self._off_since is None else self._off_since
        if now - self._off_since > _OFF_AFTER_SECONDS:
            raise InvalidSpec(
                "The machine powered itself off before it was ready.",
                hint="Look at its user-data and its image.",
            )


async def ssh_answers(host: str, port: int) -> None:
    """Return once an SSH server at ``host`` has said what it is; else raise `Unavailable` soon,
    with why in its message. What it says proves nothing: logging in verifies its key."""
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, limit=_LONGEST_BANNER)
    except TimeoutError as error:
        raise Unavailable("nothing answers there") from error
    except OSError as error:
        known = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise Unavailable((known or str(error)).lower()) from error
    try:
        async with asyncio.timeout(_BANNER_SECONDS):
            await reader.readuntil(b"SSH-")
    except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError) as error:
        raise Unavailable("something answers that is no SSH server") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
