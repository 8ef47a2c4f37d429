"""Quantities as people write them: ``4G``, ``512MiB``, ``2h``, ``1:30:00``, ``1-20``."""

from __future__ import annotations

import re
from datetime import timedelta

from gridcloud.errors import InvalidSpec

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
MAX_TASKS = 100_000


def parse_bytes(text: str) -> int:
    """Return the bytes in ``4G`` or ``512MiB``; prefixes are powers of 1024, as Slurm has them.

    Raises `InvalidSpec` for anything else, negative amounts among them.
    """
    match = _BYTES.fullmatch(text.strip())
    if not match:
        raise InvalidSpec(f"{text!r} is not an amount of memory.", hint="Write 512M, 4G or 1.5G.")
    number, prefix, _ = match.groups()
    return int(float(number) * 1024 ** _POWERS[prefix.lower()])


def format_bytes(amount: int) -> str:
    """Return ``amount`` as a person would write it, such as ``1.5 GiB``."""
    value = float(amount)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.0f} PiB" if value >= 100 else f"{value:.3g} PiB"


def parse_duration(text: str) -> timedelta:
    """Return the time in ``90s``, ``15m``, ``2h``, ``1d``, ``1h30m``, ``1:30:00`` or ``10:00``.

    A bare number is refused, since tools disagree whether it means seconds or minutes.
    Raises `InvalidSpec`.
    """
    stripped = text.strip()
    clock = stripped.split(":")
    if 2 <= len(clock) <= 3 and all(part.isdigit() for part in clock):
        seconds = 0
        for part in clock:
            seconds = seconds * 60 + int(part)
        return timedelta(seconds=seconds)
    pieces = _DURATION.findall(stripped)
    if not pieces or _DURATION.sub("", stripped).strip():
        raise InvalidSpec(
            f"{text!r} is not a length of time.", hint="Write 90s, 15m, 2h, 1d, 1h30m or 1:30:00."
        )
    try:
        return timedelta(seconds=sum(float(n) * _SECONDS[u.lower()] for n, u in pieces))
    except OverflowError as error:
        raise InvalidSpec(f"{text!r} is longer than any job can run.") from error


def format_duration(length: timedelta) -> str:
    """Return ``length`` in its two largest units, such as ``1h 30m`` or ``2.4s``."""
    seconds = length.total_seconds()
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h"
    return f"{hour}h {minute:02d}m" if hours else f"{minute}m {second:02d}s"


def parse_tasks(text: str) -> tuple[int, ...]:
    """Return the task numbers in ``1-20``, ``1,3,5-9`` or ``0-100:10``, sorted and distinct."""
    tasks: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?\s*", part)
        if not match:
            raise InvalidSpec(
                f"{text!r} is not a range of tasks.", hint="Write 1-20, 1,3,5-9 or 0-100:10."
            )
        first, last, step = match.groups()
        numbers = range(int(first), int(last or first) + 1, int(step or 1) or 1)
        if not numbers or len(numbers) + len(tasks) > MAX_TASKS or step == "0":
            raise InvalidSpec(
                f"The range {part.strip()!r} is empty or too large.",
                hint=f"An array has 1 to {MAX_TASKS} tasks, written first-last.",
            )
        tasks.update(numbers)
    return tuple(sorted(tasks))
