"""All offers known, in a shape that is quick to search: one look at ten thousand of them takes a
few milliseconds. Pure and synchronous; one `Market` is not for several threads at a time.

An offer is a checked value, whose attributes cost ten times what a plain slot does. So each is
copied into a `Row` once, when it first comes or changes, and what is asked is plain comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf
from typing import Self

from gridcloud.model.choice import Constraints, Strategy
from gridcloud.model.job import Job
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer

#: Added to the score of a peer's offer where home comes first: more than any other score.
_FAR = 2.0**40
#: The distance of a peer that was never measured: farther than any other.
_UNMEASURED = 1e6


@dataclass(frozen=True, slots=True)
class Wish:
    """What one job asks of a place; jobs that wish alike are answered alike.

    ``barred`` are sources (`Offer.source`) that the job lost before. ``input_bytes`` is what has
    to be copied there.
    """

    need: Need
    site: str | None = None
    constraints: Constraints = field(default_factory=Constraints)
    strategy: Strategy = Strategy.FIRST_FIT
    barred: tuple[str, ...] = ()
    input_bytes: int = 0

    @classmethod
    def of(cls, job: Job, strategy: Strategy) -> Self:
        """Return what a job asks; ``strategy`` is for one that names none."""
        spec = job.spec
        return cls(
            need=spec.need,
            site=spec.site,
            constraints=spec.constraints,
            strategy=spec.strategy or strategy,
            barred=job.lost_at,
            input_bytes=job.input_bytes,
        )

    @property
    def hours(self) -> float:
        """For how long at most, in hours; without a limit of the user's it is not known: inf."""
        return self.need.time / timedelta(hours=1) if self.need.time else inf

    @property
    def seconds(self) -> float:
        """How long a lease it needs at least."""
        return self.need.time.total_seconds() if self.need.time else 0.0


@dataclass(slots=True, eq=False)
class Row:
    """One offer in plain numbers; ``away`` is large for a peer's.

    ``cpus``, ``memory`` and ``gpus`` are free, ``all_…`` is what there is in all; both without
    bound where the size was never learned (``spare_…`` is not). ``part_…`` is what part of all one
    unit is, ``…_left`` what part of all is free. ``longest`` is in seconds. ``taken`` counts how
    often something was taken from it in this round.
    """

    offer: Offer
    index: int
    place: str
    site: str
    source: str
    foreign: bool
    away: float
    community: str
    country: str
    kind: str
    works: bool
    known: bool
    spare_cpus: int
    spare_memory: int
    spare_gpus: int
    cpus: float
    memory: float
    gpus: float
    all_cpus: float
    all_memory: float
    all_gpus: float
    part_cpu: float
    part_memory: float
    part_gpu: float
    cpus_left: float
    memory_left: float
    longest: float
    cpu_price: float
    memory_price: float
    gpu_price: float
    latency: float
    share: float
    taken: int = 0

    @classmethod
    def of(cls, offer: Offer, index: int) -> Self:
        """Return the offer as a row."""
        capacity, free, known, prices = offer.capacity, offer.free, offer.known, offer.prices
        return cls(
            offer=offer,
            index=index,
            place=offer.place,
            site=offer.site,
            source=offer.source,
            foreign=offer.peer is not None,
            away=_FAR if offer.peer is not None else 0.0,
            community=offer.community or "",
            country=offer.country,
            kind=offer.kind,
            works=not offer.problem,
            known=known,
            spare_cpus=free.cpus,
            spare_memory=free.memory_bytes,
            spare_gpus=free.gpus,
            cpus=free.cpus if known else inf,
            memory=free.memory_bytes if known else inf,
            gpus=free.gpus if known else inf,
            all_cpus=capacity.cpus if known else inf,
            all_memory=capacity.memory_bytes if known else inf,
            all_gpus=capacity.gpus if known else inf,
            part_cpu=(part_cpu := 1 / capacity.cpus if capacity.cpus else 0.0),
            part_memory=(
                part_memory := 1 / capacity.memory_bytes if capacity.memory_bytes else 0.0
            ),
            part_gpu=1 / capacity.gpus if capacity.gpus else 0.0,
            cpus_left=free.cpus * part_cpu,
            memory_left=free.memory_bytes * part_memory,
            longest=offer.max_time.total_seconds() if offer.max_time else inf,
            cpu_price=prices.cpu_hour,
            memory_price=prices.memory_gib_hour,
            gpu_price=prices.gpu_hour,
            latency=_UNMEASURED if offer.latency_seconds is None else offer.latency_seconds,
            share=offer.share,
        )

    def take(self, amount: Resources) -> None:
        """Note that so much is free no more."""
        free = self.offer.free.minus(amount)
        self.offer = self.offer.model_copy(update={"free": free})
        self.spare_cpus, self.spare_memory = free.cpus, free.memory_bytes
        self.spare_gpus = free.gpus
        self.cpus_left = free.cpus * self.part_cpu
        self.memory_left = free.memory_bytes * self.part_memory
        if self.known:
            self.cpus, self.memory, self.gpus = free.cpus, free.memory_bytes, free.gpus
        self.taken += 1


class Market:
    """The offers of one moment as rows. `refreshed` costs little for those that did not change."""

    def __init__(self, offers: Iterable[Offer] = ()) -> None:
        self.rows = [Row.of(offer, index) for index, offer in enumerate(offers)]

    def refreshed(self, offers: Iterable[Offer]) -> Market:
        """Return a market of these offers; rows of offers that are the same objects are kept."""
        known = {id(row.offer): row for row in self.rows if not row.taken}
        fresh = Market()
        for index, offer in enumerate(offers):
            row = known.pop(id(offer), None)
            if row is None:
                row = Row.of(offer, index)
            row.index = index
            fresh.rows.append(row)
        return fresh


def able(rows: Sequence[Row], wish: Wish) -> list[Row]:
    """Return the rows that can serve the wish now."""
    need = wish.need
    cpus, memory, gpus, time = need.cpus, need.memory_bytes, need.gpus, wish.seconds
    found = [
        row
        for row in rows
        if row.cpus >= cpus
        and row.memory >= memory
        and row.works
        and row.gpus >= gpus
        and row.longest >= time
    ]
    return admitted(found, wish)


def suitable(rows: Sequence[Row], wish: Wish) -> list[Row]:
    """Return the rows that can serve the wish now, or could once they have room."""
    need = wish.need
    cpus, memory, gpus, time = need.cpus, need.memory_bytes, need.gpus, wish.seconds
    found = [
        row
        for row in rows
        if row.all_cpus >= cpus
        and row.all_memory >= memory
        and row.all_gpus >= gpus
        and row.longest >= time
    ]
    return admitted(found, wish)


def admitted(rows: list[Row], wish: Wish) -> list[Row]:
    """Return the rows that the wish's constraints admit."""
    asked = wish.constraints
    if wish.site is not None:
        rows = [row for row in rows if row.site == wish.site]
    if wish.barred:
        rows = [row for row in rows if row.source not in wish.barred]
    if asked.countries:
        countries = frozenset(asked.countries)
        rows = [row for row in rows if row.country in countries]
    if asked.kinds:
        rows = [row for row in rows if row.kind in asked.kinds]
    if asked.within:
        known = {row.community for row in rows}
        inside = {community for community in known if is_within(community, asked.within)}
        rows = [row for row in rows if not row.foreign or row.community in inside]
    if asked.max_price is not None:
        most, hours = asked.max_price, wish.hours
        rates = an_hour(rows, wish.need)
        pairs = zip(rows, rates, strict=True)
        rows = [row for row, rate in pairs if not rate or rate * hours <= most]
    return rows


def an_hour(rows: Iterable[Row], need: Need) -> list[float]:
    """Return what an hour of the need costs at each, in credits; as `Prices.cost` has it."""
    cpus, gib, gpus = need.cpus, need.memory_bytes / GIB, need.gpus
    return [row.cpu_price * cpus + row.memory_price * gib + row.gpu_price * gpus for row in rows]


def is_within(community: str, names: Iterable[str]) -> bool:
    """Whether a community is one of those named, by its name or by its whole id."""
    return community in names or community.partition(".")[0] in names
