"""Links: live connections to one proved peer each, over which either side opens streams.

Whoever dialled, a link serves requests both ways, so that a site nobody can dial is asked over the
link it made itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from gridcloud.errors import Unavailable
from gridcloud.grid.identity import short
from gridcloud.grid.transport import ByteStream, Path

#: How many links are kept, and how many of them strangers (not known to be members) may have.
MAX_LINKS = 256
MAX_LINKS_OF_STRANGERS = 48
MAX_LINKS_PER_PEER = 8
#: A link on which nothing was opened for so long is closed; who needs it makes a new one.
IDLE_SECONDS = 600.0
#: For so long a stranger's link is not dropped for another's while it is in use.
STRANGERS_STAY_SECONDS = 10.0
_ORDER = ("direct", "tls", "iroh-relay", "relayed")


class LinkDown(Exception):
    """The link is no good any more; what was under way on it may have arrived or not."""


class Link(Protocol):
    """A live connection to the peer whose key is proved."""

    key: str
    dialled: bool

    async def open(self) -> ByteStream:
        """Open a stream, waiting while too many are open; raises `LinkDown`."""
        ...

    async def accept(self) -> ByteStream:
        """Return the next stream that the peer opens; raises `LinkDown`."""
        ...

    @property
    def alive(self) -> bool:
        """False once it is known to be down."""
        ...

    def received(self) -> int:
        """Return a count that grows whenever anything arrives, an acknowledgement included."""
        ...

    def nudge(self) -> None:
        """Make the peer send a sign of life, if it does not by itself."""
        ...

    def meter(self, toll: Callable[[int], float]) -> None:
        """Have small frames that come counted: ``toll`` says for how many seconds to take none."""
        ...

    def path(self) -> Path:
        """Say how the peer is reached."""
        ...

    def observed(self) -> str:
        """Return the ``IP:PORT`` of UDP that the peer is seen at; empty if it is not over UDP."""
        ...

    def close(self) -> None:
        """Close it and break its streams. Idempotent."""
        ...


class _Kept:
    def __init__(self, link: Link, now: float) -> None:
        self.link = link
        self.made_at = now
        self.used_at = now
        self.uses = 0


class LinkTable:
    """The links kept. A member's link in use is never dropped for another; a stranger's is once
    it had its time, or a few who never end would keep out all newcomers."""

    def __init__(
        self,
        knows: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
        most: int = MAX_LINKS,
        most_of_strangers: int = MAX_LINKS_OF_STRANGERS,
    ) -> None:
        self._knows = knows
        self._clock = clock
        self._most = most
        self._most_of_strangers = most_of_strangers
        self._kept: dict[str, list[_Kept]] = {}
        self._awaited: dict[str, list[asyncio.Future[Link]]] = {}

    def add(self, link: Link) -> bool:
        """Keep a new link; when there are too many, one not in use goes. Say if it is kept.

        A link that is not kept must be closed by the caller.
        """
        theirs = self._kept.get(link.key, [])
        if len(theirs) >= MAX_LINKS_PER_PEER and not self._drop_one(theirs):
            return False
        stranger = not self._knows(link.key)
        everyone = [kept for kept_of_one in self._kept.values() for kept in kept_of_one]
        strangers = [kept for kept in everyone if not self._knows(kept.link.key)]
        if stranger and len(strangers) >= self._most_of_strangers:
            if not (self._drop_one(strangers) or self._drop_stale(strangers)):
                return False
        elif len(everyone) >= self._most and not (
            self._drop_one(strangers) or (not stranger and self._drop_one(everyone))
        ):
            return False
        kept = _Kept(link, self._clock())
        self._kept.setdefault(link.key, []).append(kept)
        for future in self._awaited.pop(link.key, []):
            if not future.done():
                future.set_result(link)
        return True

    def best(self, key: str) -> Link | None:
        """Return the best live link to a peer: straight before relayed, newer before older."""
        self._prune(key)
        found = self._kept.get(key, [])
        if len(found) < 2:
            return found[0].link if found else None
        return min(reversed(found), key=lambda kept: _ORDER.index(kept.link.path().how)).link

    def observed(self, key: str) -> str:
        """Return where the peer's UDP is seen; empty if it is not."""
        for kept in reversed(self._kept.get(key, [])):
            if kept.link.alive and (found := kept.link.observed()):
                return found
        return ""

    def drop(self, link: Link) -> None:
        """Close a link and forget it. Idempotent."""
        link.close()
        self._prune(link.key)

    @contextlib.contextmanager
    def using(self, link: Link) -> Iterator[None]:
        """Mark a link as in use for the while."""
        kept = next((kept for kept in self._kept.get(link.key, []) if kept.link is link), None)
        if kept is None:
            yield
            return
        kept.uses += 1
        try:
            yield
        finally:
            kept.uses -= 1
            kept.used_at = self._clock()

    async def arrival(self, key: str) -> Link:
        """Wait for the next link to a peer, whoever makes it."""
        future: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(key, []).append(future)
        try:
            return await future
        finally:
            waiting = self._awaited.get(key, [])
            if future in waiting:
                waiting.remove(future)
                if not waiting:
                    del self._awaited[key]

    def close_idle(self) -> None:
        """Close the links on which nothing went on for `IDLE_SECONDS`, and forget the dead."""
        for key in list(self._kept):
            for kept in self._kept[key]:
                if not kept.uses and self._clock() - kept.used_at > IDLE_SECONDS:
                    kept.link.close()
            self._prune(key)

    def keys(self) -> list[str]:
        """Return the peers there is a live link to."""
        return [key for key in list(self._kept) if self.best(key) is not None]

    def close(self) -> None:
        """Close all links."""
        for kept_of_one in list(self._kept.values()):
            for kept in kept_of_one:
                kept.link.close()
        self._kept.clear()

    def _prune(self, key: str) -> None:
        if key in self._kept:
            self._kept[key] = [kept for kept in self._kept[key] if kept.link.alive]
            if not self._kept[key]:
                del self._kept[key]

    def _drop_one(self, candidates: list[_Kept]) -> bool:
        """Close the one used least lately of those not in use; say if there was one."""
        idle = [kept for kept in candidates if not kept.uses or not kept.link.alive]
        if not idle:
            return False
        self.drop(min(idle, key=lambda kept: kept.used_at).link)
        return True

    def _drop_stale(self, strangers: list[_Kept]) -> bool:
        """Close the oldest one if it had its time; say if it had."""
        oldest = min(strangers, key=lambda kept: kept.made_at)
        if self._clock() - oldest.made_at < STRANGERS_STAY_SECONDS:
            return False
        self.drop(oldest.link)
        return True


def unreachable(key: str, where: str, cause: str) -> Unavailable:
    """Return the error for a peer that nobody answers for."""
    return Unavailable(
        f"{short(key)} cannot be reached at {where or 'nowhere'}: {cause.rstrip('.')}.",
        hint="Is that site up, and its port open to this one?",
    )


def broken(key: str, cause: str) -> Unavailable:
    """Return the error for a stream that broke."""
    return Unavailable(f"{short(key)} dropped the request: {cause.rstrip('.')}.", hint="Try again.")
