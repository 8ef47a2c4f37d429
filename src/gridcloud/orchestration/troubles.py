"""Providers that cannot be asked at the moment: since when, why, and when to try again. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=15), timedelta(minutes=5)
#: A trouble that is over within this is not worth telling.
_TOLD_AFTER = timedelta(seconds=20)


@dataclass(frozen=True)
class _Trouble:
    since: datetime
    why: str
    times: int
    again_at: datetime


class Troubles:
    """Remembers what fails, by name. Pauses between tries double from 15 s up to 5 minutes."""

    def __init__(self) -> None:
        self._known: dict[str, _Trouble] = {}

    def due(self, name: str, now: datetime) -> bool:
        """Whether to try (again)."""
        return name not in self._known or now >= self._known[name].again_at

    def failed(self, name: str, why: str, now: datetime) -> None:
        """Take note of a failure."""
        before = self._known.get(name)
        times = before.times + 1 if before else 1
        pause = min(_FIRST_PAUSE * 2 ** min(times - 1, 10), _LONGEST_PAUSE)
        since = before.since if before else now
        self._known[name] = _Trouble(since, why, times, now + pause)

    def worked(self, name: str) -> None:
        """Take note that it works (again)."""
        self._known.pop(name, None)

    def told(self, now: datetime) -> list[str]:
        """Return a sentence for each trouble that lasts."""
        return [
            f"{name} since {trouble.since:%Y-%m-%d %H:%M} UTC: {trouble.why}"
            for name, trouble in sorted(self._known.items())
            if trouble.times > 1 or now - trouble.since >= _TOLD_AFTER
        ]
