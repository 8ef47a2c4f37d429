"""How long it takes to choose among ten thousand offers: ``make bench`` runs it, or by itself.

The bare thing beside it is ``sorted()`` over as many tuples of three numbers and a name: what any
way to rank them would take at least, if it had to put them all in order.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from gridcloud.model.choice import Constraints, Order, Strategy
from gridcloud.model.job import Job, JobSpec
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.model.prices import Prices
from gridcloud.orchestration.line import place
from gridcloud.orchestration.market import Market, Wish, able
from gridcloud.orchestration.planner import plan
from gridcloud.orchestration.strategies import best

OFFERS, ROUNDS = 10_000, 200
NEED = Need(cpus=2, memory_bytes=2 * GIB, time=timedelta(hours=1))
AIM_SECONDS = 0.005


def offers(count: int, seed: int = 1) -> list[Offer]:
    """Return offers of many sizes, of which about nine in ten can serve `NEED` now."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        cpus = draw.choice([1, 4, 8, 16, 64, 128])
        free = draw.randint(cpus // 2, cpus)
        made.append(
            Offer(
                site=f"site-{number}",
                provider="lent",
                peer=f"{number:064x}",
                community=f"{draw.choice(['physics', 'optics'])}.{0:064x}",
                capacity=Resources(cpus=cpus, memory_bytes=cpus * 4 * GIB),
                free=Resources(cpus=free, memory_bytes=free * 4 * GIB),
                max_time=timedelta(hours=draw.choice([2, 12, 24])),
                country=draw.choice(["DK", "DE", "SE", "NO"]),
                kind=draw.choice(["local", "ssh"]),
                prices=Prices(cpu_hour=draw.choice([0.0, 0.5, 1.0])),
                latency_seconds=draw.random() / 5,
                share=draw.random(),
            )
        )
    return made


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Return how long each of so many calls took, sorted; one more fills the caches first.

    In time of the processor, which is what a call takes where nothing else runs: the work neither
    waits nor sleeps, and so others on a shared machine do not count.
    """
    work()
    found = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return sorted(found)


def tell(what: str, times: list[float], bare: list[float]) -> float:
    """Print one row; return its median."""
    middle, late = statistics.median(times), times[int(len(times) * 0.99)]
    ratio = middle / statistics.median(bare)
    print(
        f"{what:52} p50 {middle * 1e3:7.2f} ms   p99 {late * 1e3:7.2f} ms   × {ratio:.2f} sorted()"
    )
    return middle


def main() -> None:
    """Measure, print, and say whether the aim is met."""
    known = offers(OFFERS)
    market = Market(known)
    draw = random.Random(2)
    tuples = [(draw.random(), draw.random(), draw.random(), o.place) for o in known]
    bare = seconds(lambda: sorted(tuples))
    tell(f"sorted() over {OFFERS} bare tuples", bare, bare)
    medians = []
    for strategy in Strategy:
        wish = Wish(need=NEED, strategy=strategy)
        match = seconds(lambda wish=wish: best(able(market.rows, wish), wish))
        medians.append(tell(f"match, {strategy}", match, bare))
    wish = Wish(
        need=NEED,
        constraints=Constraints(
            countries=("DK", "DE"), kinds=("local",), within=("physics",), max_price=4
        ),
    )
    match = seconds(lambda: best(able(market.rows, wish), wish))
    medians.append(tell("match, first-fit with every constraint", match, bare))
    tell("the offers taken in, none changed", seconds(lambda: market.refreshed(known), 40), bare)
    tell("the offers taken in, all of them new", seconds(lambda: Market(known), 10), bare)
    tell(
        "gridcloud offers: the best 200 with verdicts", seconds(lambda: plan(NEED, known), 10), bare
    )
    now = datetime.now(UTC)
    spec = JobSpec(command=("true",), need=NEED)
    line = [Job(id=str(n), spec=spec, created_at=now) for n in range(200)]
    for order in Order:
        each = seconds(lambda order=order: place(line, Market(known), order=order, now=now), 5)
        tell(f"200 alike jobs placed in one round, {order}", each, bare)
    word = "met" if max(medians) <= AIM_SECONDS else "missed"
    print(f"aim: a match within {AIM_SECONDS * 1e3:.0f} ms at the median: {word}")


if __name__ == "__main__":
    main()
