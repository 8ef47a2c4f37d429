"""The strategies: which of the offers that can serve a wish is the best.

A strategy is a few scores, each counting only among those that are equal by the one before it;
the least is the best, and the name settles what is still equal, so that the answer is stable. A
score is of many rows at a time, since calling a function for each of thousands is what takes long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from gridcloud.model.choice import Strategy
from gridcloud.orchestration.market import Row, Wish, an_hour

Score = Callable[[Sequence[Row], Wish], list[float]]
#: A row's place in the ranking: its scores, its name, its index.
Rank = tuple[Any, ...]

#: What SSH sends before it waits for an answer: a copy takes about one round trip for each.
_WINDOW_BYTES = 2 * 1024**2
#: Differences in copying time below this many seconds are nothing to choose a place by.
_SAME_SECONDS = 0.1
_PART_GPU = attrgetter("part_gpu")


def home_first(rows: Sequence[Row], _: Wish) -> list[float]:
    """Work stays at home while there is room; among others the one with most CPUs free."""
    return [row.away - row.spare_cpus for row in rows]


def left_over(rows: Sequence[Row], wish: Wish) -> list[float]:
    """What is left after the wish, of the resource of which most is left, as a part of what the
    offer has in all (its dominant share)."""
    need = wish.need
    cpus, memory, gpus = need.cpus, need.memory_bytes, need.gpus
    scores = [
        of_cpus
        if (of_cpus := row.cpus_left - cpus * row.part_cpu)
        > (of_memory := row.memory_left - memory * row.part_memory)
        else of_memory
        for row in rows
    ]
    if any(map(_PART_GPU, rows)):
        left = [(row.spare_gpus - gpus) * row.part_gpu for row in rows]
        scores = list(map(max, scores, left))
    return scores


def used_lately(rows: Sequence[Row], _: Wish) -> list[float]:
    """What this site used there lately, as a part of what is its fair part."""
    return [row.share for row in rows]


def price(rows: Sequence[Row], wish: Wish) -> list[float]:
    """Credits; how long it takes is the same everywhere, so that an hour tells."""
    return an_hour(rows, wish.need)


def copying(rows: Sequence[Row], wish: Wish) -> list[float]:
    """How long the inputs travel: no time at home, else a round trip for each window of them."""
    trips = (1 + wish.input_bytes / _WINDOW_BYTES) / _SAME_SECONDS
    return [row.away and row.latency * trips // 1 + 1 for row in rows]


STRATEGIES: Mapping[Strategy, tuple[Score, ...]] = {
    Strategy.FIRST_FIT: (home_first,),
    Strategy.BEST_FIT: (left_over, home_first),
    Strategy.FAIR_FIT: (used_lately, left_over, home_first),
    Strategy.CHEAPEST: (price, home_first),
    Strategy.NEAREST_DATA: (copying, home_first),
}


def best(rows: Sequence[Row], wish: Wish) -> Row | None:
    """Return the best of the rows by the wish's strategy; None if there are none."""
    for score in STRATEGIES[wish.strategy]:
        if len(rows) < 2:
            break
        scores = score(rows, wish)
        least = min(scores)
        rows = [row for row, value in zip(rows, scores, strict=True) if value == least]
    return min(rows, key=lambda row: row.place, default=None)


def ranks(rows: Sequence[Row], wish: Wish) -> list[Rank]:
    """Return the rank of each row, in the order of the rows; ranks sort the best first."""
    scores = [score(rows, wish) for score in STRATEGIES[wish.strategy]]
    names = [row.place for row in rows]
    numbers = [row.index for row in rows]
    return list(zip(*scores, names, numbers, strict=True))
