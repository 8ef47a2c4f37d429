"""The settings a running site goes by: the file is watched, and what is safe is taken over.

Whoever decides reads `LiveSettings.current` once and goes by that one value. Of a changed file
``[lending]``, ``[jobs]`` and what the site relays take effect at once; the rest holds from the next
start on, and until then is told as a problem. A file that cannot be read changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
from pydantic import BaseModel

from gridcloud.errors import InvalidSpec
from gridcloud.settings import SiteSettings, load

log = structlog.get_logger()
LOOK_EVERY_SECONDS = 2.0
#: A file that changes within this is still being written.
_SETTLED_SECONDS = 0.1
_LIVE = ("lending", "jobs")
_LIVE_IN_GRID = ("relay", "relay_rate")
#: Changed by the site itself, by way of `gridcloud.site.settings_edit`.
_OWN = "providers"


class LiveSettings:
    """Holds the settings of a running site; `start` it, and `stop` it in the end."""

    def __init__(self, file: Path, settings: SiteSettings) -> None:
        #: What holds now; never changed, only replaced.
        self.current = settings
        #: Why the file is not what holds, with file and line; empty when it is.
        self.problem = ""
        #: Called after `current` was replaced, with what held before.
        self.listeners: list[Callable[[SiteSettings], None]] = []
        #: Where they stand.
        self.file = file
        self._seen = _signature(file)
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch the file."""
        self._watching = asyncio.create_task(self._watch(), name="settings")

    async def stop(self) -> None:
        """Stop watching. Idempotent."""
        if self._watching:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def set_providers(self, providers: dict[str, dict[str, object]]) -> None:
        """Take over what the site itself wrote to the file; blocks as `take_over` does."""
        self.current = self.current.model_copy(update={_OWN: providers})
        self.take_over()

    def take_over(self) -> bool:
        """Read the file and let its live part hold from now on; return whether that changed it.

        Blocks for one small file.
        """
        try:
            found = load(self.file)
        except InvalidSpec as error:
            self._tell(f"{error} What held before still holds.")
            return False
        before = self.current
        after = before.model_copy(
            update={
                **{name: getattr(found, name) for name in _LIVE},
                "grid": before.grid.model_copy(
                    update={name: getattr(found.grid, name) for name in _LIVE_IN_GRID}
                ),
            }
        )
        waiting = ", ".join(_differences(after, found))
        self._tell(f"{self.file}: {waiting} will hold from the next start on." if waiting else "")
        if changed := list(_differences(before, after)):
            self.current = after
            log.info("settings changed", file=str(self.file), changed=changed)
            for listener in self.listeners:
                listener(before)
        return bool(changed)

    def _tell(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("settings not taken over", problem=problem)
        self.problem = problem

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_SECONDS)
            found = _signature(self.file)
            if found == self._seen:
                continue
            await asyncio.sleep(_SETTLED_SECONDS)
            if _signature(self.file) != found:
                continue
            self._seen = found
            try:
                self.take_over()
            except Exception:  # a fault of ours must not end the watch
                log.exception("settings not taken over by a fault of gridcloud")


def _signature(file: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file; None when there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _differences(old: BaseModel, new: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the names of the settings in which two trees differ, never their values."""
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}"
