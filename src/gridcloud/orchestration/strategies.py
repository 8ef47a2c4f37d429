"""The strategies: which of the offers that can serve a wish is the best.

A strategy is a few scores, each counting only among those that are equal by the one before it;
the least is the best, and the name settles what is still equal, so that the answer is stable. A
score is of many rows at a time, since calling a function for each of thousands is what takes long.

A machine is made only where nothing that is there already will do, but for `cheapest`: a `Row` with
``made`` is by its numbers farther than any peer. Among shapes the smallest that fits wins: the
cheapest, then the one with fewest GPUs, CPUs, and least memory; and one whose GPUs would stay idle
is the last of all. Money of different currencies is not compared: where clouds give their prices in
several, size alone decides. A cloud that gives no prices counts as one that costs nothing; a shape
without a price, of a cloud that has prices, counts as the dearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from gridcloud.model.choice import Strategy
from gridcloud.orchestration.market import SHAPE, Row, Wish, credits_an_hour
from gridcloud.orchestration.shapes import ShapeRow

Score = Callable[[Sequence[Row], Wish], Sequence[Any]]
#: A row's place in the ranking: its scores, its name, its index.
Rank = tuple[Any, ...]

#: What SSH sends before it waits for an answer: a copy takes about one round trip for each.
_WINDOW_BYTES = 2 * 1024**2
#: Differences in copying time below this many seconds are nothing to choose a place by.
_SAME_SECONDS = 0.1
#: Added to the price of a machine whose GPUs would stay idle: more than any other.
_IDLE = 1e15
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
    """What an hour costs: how long it takes is the same everywhere. A credit counts as much as the
    unit of the currency that clouds are paid in."""
    rates = credits_an_hour(rows, wish.need)
    if any(map(SHAPE, rows)):
        pairs = zip(rows, rates, strict=True)
        rates = [_money(row.shape, wish) if row.shape else rate for row, rate in pairs]
    return rates


def _money(shape: ShapeRow, wish: Wish) -> float:
    idle = _IDLE if shape.offer.capacity.gpus and not wish.need.gpus else 0.0
    return shape.money + shape.cpu_cost * wish.need.cpus + idle


def idle_gpus(rows: Sequence[Row], wish: Wish) -> list[bool]:
    """A machine with GPUs is not made for work that asks for none, while another will do."""
    if wish.need.gpus:
        return [False] * len(rows)
    return [row.shape is not None and row.all_gpus > 0 for row in rows]


def size(rows: Sequence[Row], wish: Wish) -> list[tuple[float, ...]]:
    """How dear and how large a machine would be made; nothing is made of what is there."""
    return [
        () if (shape := row.shape) is None else shape.size or _fitted(shape, wish) for row in rows
    ]


def _fitted(shape: ShapeRow, wish: Wish) -> tuple[float, ...]:
    """The size of a flexible one, which depends on what is needed."""
    need, gpus = wish.need, shape.offer.capacity.gpus
    money = shape.money + shape.cpu_cost * need.cpus
    return (money, gpus, need.cpus, need.memory_bytes, shape.hourly(need))


def copying(rows: Sequence[Row], wish: Wish) -> list[float]:
    """How long the inputs travel: no time at home, else a round trip for each window of them."""
    trips = (1 + wish.input_bytes / _WINDOW_BYTES) / _SAME_SECONDS
    return [row.away and row.latency * trips // 1 + 1 for row in rows]


_SMALLEST: tuple[Score, ...] = (home_first, idle_gpus, size)
STRATEGIES: Mapping[Strategy, tuple[Score, ...]] = {
    Strategy.FIRST_FIT: _SMALLEST,
    Strategy.BEST_FIT: (left_over, *_SMALLEST),
    Strategy.FAIR_FIT: (used_lately, left_over, *_SMALLEST),
    Strategy.CHEAPEST: (price, *_SMALLEST),
    Strategy.NEAREST_DATA: (copying, *_SMALLEST),
}
#: Why one that is behind by a score is; `size` has words of its own.
_BEHIND: Mapping[Score, str] = {
    idle_gpus: "its GPUs would stay idle",
    left_over: "more would be left over",
    used_lately: "more was used there lately",
    price: "dearer",
    copying: "the inputs arrive later",
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


def behind(row: Row, first: Row, wish: Wish) -> str:
    """Return why a row is not the best, which is ``first``, in words."""
    for score in STRATEGIES[wish.strategy]:
        mine, best_one = score([row, first], wish)
        if mine == best_one:
            continue
        if row.shape and not first.shape and score is not price:
            return "a machine would have to be made"
        if score is home_first:
            return "less is free there" if row.away == first.away else "farther away"
        if score is size:
            return _larger(mine, best_one)
        return _BEHIND[idle_gpus if score is price and mine >= _IDLE > best_one else score]
    return "equal, so that the name decides"


def _larger(mine: Sequence[float], best_one: Sequence[float]) -> str:
    words = ("dearer", "more GPUs", "more CPUs", "more memory", "dearer")
    return next(word for word, a, b in zip(words, mine, best_one, strict=True) if a != b)
