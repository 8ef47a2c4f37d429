"""Measuring side by side: contestants take turns within a round, so that what else the machine
does meanwhile falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Table:
    """Rows of results as they are found, printed at once and kept as Markdown."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, what: str, ours: str, beside: str = "", ratio: str = "") -> None:
        """Keep and print one row: what was measured, ours, the other's, ours ÷ the other's."""
        self.rows.append((what, ours, beside, ratio))
        print(f"{what:46} {ours:34} {beside:44} {ratio}".rstrip(), flush=True)

    def skip(self, what: str, why: str) -> None:
        """Say that a row could not be measured here."""
        self.add(what, "not measured", why)

    def markdown(self) -> str:
        """Return the table in Markdown."""
        head = ("what", "gridcloud", "beside it", "ratio")
        lines = [head, ("---",) * len(head), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interleaved(
    contestants: Mapping[str, Callable[[], float | None]], rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Return seconds for each contestant, each called once a round.

    With ``warm`` an unmeasured call of each comes first, which fills caches. A contestant that
    returns a number has measured itself; else its call is timed.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm, rounds):
        for name, contest in contestants.items():
            began = time.perf_counter()
            measured = contest()
            seconds = time.perf_counter() - began if measured is None else measured
            if number >= 0:
                found[name].append(seconds)
    return found


def told(values: list[float]) -> str:
    """Return the median and the smallest of some seconds, in words."""
    return f"{_seconds(statistics.median(values))} (min {_seconds(min(values))})"


def ratio(ours: list[float], others: list[float]) -> str:
    """Return how many times the others' median ours is, and the same of the smallest."""
    medians = statistics.median(ours) / statistics.median(others)
    return f"{medians:.2f} (min {min(ours) / min(others):.2f})"


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 0.1 else f"{value * 1000:.0f} ms"
