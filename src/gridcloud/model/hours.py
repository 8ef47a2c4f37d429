"""Hours of the week, as people write them: ``18:00-08:00``, ``mon-fri 12:00-13:30``, ``sat-sun``.

Times are of the wall clock where the site is, so a window keeps its hours when clocks change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Annotated

from pydantic import Field

from gridcloud.errors import InvalidSpec
from gridcloud.model.frozen import Frozen

_NAMES = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_DAYS = tuple(name[:3] for name in _NAMES)
_DAY = 24 * 60
_WEEK = 7 * _DAY
_HOURS = re.compile(
    r"(?P<days>[a-z][a-z, -]*?)?\s*"
    r"(?:(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2}))?"
)
_HINT = 'Write "18:00-08:00", "mon-fri 12:00-13:30" or "sat-sun".'


class Hours(Frozen):
    """A window that opens on each of ``days`` (0 is Monday).

    ``begin`` and ``end`` are minutes after that day's midnight; an end beyond 24 hours is on the
    day after.
    """

    days: Annotated[tuple[Annotated[int, Field(ge=0, le=6)], ...], Field(min_length=1)]
    begin: Annotated[int, Field(ge=0, lt=_DAY)]
    end: Annotated[int, Field(gt=0, lt=2 * _DAY)]

    def __str__(self) -> str:
        days = "" if len(self.days) == len(_DAYS) else ",".join(_DAYS[day] for day in self.days)
        if (self.begin, self.end) == (0, _DAY):
            return days or "all week"
        return f"{days} {_clock(self.begin)}-{_clock(self.end)}".strip()


class Window(Frozen):
    """Whether some hours hold now, and when that changes; None if it never does."""

    open: bool
    changes_at: datetime | None = None


def parse_hours(text: str) -> Hours:
    """Return the hours that ``text`` says; an end before the begin is on the next day.

    Raises `InvalidSpec` for anything else, a window that is empty among it.
    """
    match = _HOURS.fullmatch(text.strip().lower()) if text.strip() and len(text) < 100 else None
    if not match:
        raise InvalidSpec(f"{text!r} are no hours of the week.", hint=_HINT)
    days, *times = match.groups()
    begin, end = 0, _DAY
    if times[0]:
        begin, end = (_minutes(text, *times[at : at + 2]) for at in (0, 2))
    if begin in (end, _DAY):
        raise InvalidSpec(
            f"{text!r} is an empty window.",
            hint="Give two different times; a whole day is 00:00-24:00.",
        )
    return Hours(
        days=_days(text, days) if days else tuple(range(7)),
        begin=begin,
        end=end if end > begin else end + _DAY,
    )


def window(hours: Sequence[Hours], now: datetime, zone: tzinfo | None = None) -> Window:
    """Return whether any of ``hours`` holds at ``now``. No hours at all hold always.

    ``zone`` is where the wall clock hangs; None is this computer's own. Windows that touch are one.
    """
    if not hours:
        return Window(open=True)
    local = now.astimezone(zone)
    midnight = local.replace(tzinfo=None, hour=0, minute=0, second=0, microsecond=0)
    monday = midnight - timedelta(days=local.weekday())
    since = (local.replace(tzinfo=None) - monday) / timedelta(minutes=1)
    for begin, end in _merged(hours):
        if end - begin >= _WEEK:
            return Window(open=True)
        if begin <= since < end:
            return Window(open=True, changes_at=_absolute(monday, end, now, zone))
        if begin > since:
            return Window(open=False, changes_at=_absolute(monday, begin, now, zone))
    raise AssertionError("weeks before and after are among the windows")


def _merged(hours: Sequence[Hours]) -> list[tuple[int, int]]:
    """Return the windows of this week and its neighbours in minutes, sorted; none touch."""
    found = sorted(
        (day * _DAY + each.begin + week, day * _DAY + each.end + week)
        for each in hours
        for day in each.days
        for week in (-_WEEK, 0, _WEEK)
    )
    merged = [found[0]]
    for begin, end in found[1:]:
        if begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _absolute(monday: datetime, minutes: int, now: datetime, zone: tzinfo | None) -> datetime:
    naive = monday + timedelta(minutes=minutes)
    for fold in (0, 1):  # an hour that clocks show twice: the one that is still to come
        local = naive.replace(fold=fold)
        moment = (local.replace(tzinfo=zone) if zone else local.astimezone()).astimezone(UTC)
        if moment > now:
            return moment
    return now + timedelta(minutes=1)


def _days(text: str, words: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in words.split(","):
        ends = part.partition("-")
        first, last = _day(ends[0]), _day(ends[2])
        if not first or (ends[1] and not last):
            raise InvalidSpec(f"{text!r} names a day there is not: {part.strip()!r}.", hint=_HINT)
        begin = _DAYS.index(first)
        length = (_DAYS.index(last) - begin) % 7 if last else 0
        found.update((begin + offset) % 7 for offset in range(length + 1))
    return tuple(sorted(found))


def _day(word: str) -> str:
    """Return the short name of a day, empty for anything else."""
    word = word.strip()
    return word[:3] if word in (*_NAMES, *_DAYS) else ""


def _minutes(text: str, hour: str, minute: str) -> int:
    minutes = int(hour) * 60 + int(minute)
    if int(minute) > 59 or minutes > _DAY:
        raise InvalidSpec(f"{text!r}: {hour}:{minute} is no time of day.", hint=_HINT)
    return minutes


def _clock(minutes: int) -> str:
    shown = minutes if minutes <= _DAY else minutes - _DAY
    return f"{shown // 60:02d}:{shown % 60:02d}"
