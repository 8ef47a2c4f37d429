"""All offers known, in a shape that is quick to search: one look at ten thousand of them takes a
few milliseconds. Pure and synchronous; one `Market` is not for several threads at a time.

An offer is a checked value, whose attributes cost ten times what a plain slot does. So each is
copied into a `Row` once, when it first comes or changes, and what is asked is plain comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf
from operator import attrgetter, is_
from typing import Self

from gridcloud.model.choice import Constraints, Strategy
from gridcloud.model.job import Job
from gridcloud.model.need import GIB, Need, Resources
from gridcloud.model.offer import Offer
from gridcloud.orchestration.shapes import Pool, ShapeRow

#: Added to the score of a peer's offer where home comes first: more than any other score.
_FAR = 2.0**40
#: The same of a machine that has to be made first.
_YET_TO_BE_MADE = 2.0**50
#: The distance of a peer that was never measured: farther than any other.
_UNMEASURED = 1e6
#: How long spot capacity is there for those who do not ask for it, in seconds: not at all.
SPOT = -1.0
SHAPE = attrgetter("shape")
_OFFER, _TAKEN = attrgetter("offer"), attrgetter("taken")


@dataclass(frozen=True, slots=True)
class Wish:
    """What one job asks of a place; jobs that wish alike are answered alike.

    ``barred`` are offers (`Offer.key`) that the job lost before. ``input_bytes`` is what has to be
    copied there. With ``spot`` a machine is made of capacity that its cloud may take back, without
    it never.
    """

    need: Need
    site: str | None = None
    constraints: Constraints = field(default_factory=Constraints)
    strategy: Strategy = Strategy.FIRST_FIT
    barred: tuple[str, ...] = ()
    input_bytes: int = 0
    spot: bool = False

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
            spot=spec.machine.spot,
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

    One with a ``shape`` is of a cloud: it is farther away than any peer, since a machine is to be
    made there first, and has nothing left over.
    """

    offer: Offer
    index: int
    place: str
    site: str
    source: str
    key: str
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
    shape: ShapeRow | None = None
    taken: int = 0

    @classmethod
    def of(cls, offer: Offer, index: int) -> Self:
        """Return the offer as a row."""
        row = cls._of_any(offer, index)
        if offer.shape:
            row.shape = ShapeRow.of(offer)
            row.away = row.latency = row.share = row.cpus_left = _YET_TO_BE_MADE
            row.spare_cpus = row.spare_gpus = 0
            row.part_cpu = row.part_memory = row.part_gpu = row.memory_left = 0.0
            if offer.spot:
                row.longest = SPOT
        return row

    @classmethod
    def _of_any(cls, offer: Offer, index: int) -> Self:
        capacity, free, known, prices = offer.capacity, offer.free, offer.known, offer.prices
        return cls(
            offer=offer,
            index=index,
            place=offer.label,
            site=offer.site,
            source=offer.source,
            key=offer.key,
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

    def shut(self, why: str) -> None:
        """Note that it cannot serve in this round after all."""
        self.offer = self.offer.model_copy(update={"problem": why})
        self.works = False
        self.taken += 1

    def take(self, amount: Resources) -> None:
        """Note that so much is free no more; of a cloud, that one machine more is made there."""
        if self.shape is not None:
            self.taken += 1
            if self.shape.pool is not None:
                self.shape.pool.take(amount if self.shape.flexible else self.offer.capacity)
            return
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
        #: How many shapes each place has, by its name.
        self.shapes: Counter[str] = Counter()
        self._pricing: tuple[frozenset[str], frozenset[str]] | None = None
        self._look_at_shapes([row for row in self.rows if row.shape], old=0)

    def refreshed(self, offers: Iterable[Offer]) -> Market:
        """Return a market of these offers; rows of offers that are the same objects are kept."""
        offers = offers if isinstance(offers, list) else list(offers)
        if self._is_of(offers):
            return self
        known = {id(row.offer): row for row in self.rows if not row.taken}
        fresh, shapes, new_shapes = Market(), [], []
        for index, offer in enumerate(offers):
            row = known.pop(id(offer), None)
            if row is None:
                row = Row.of(offer, index)
                if row.shape:
                    new_shapes.append(row)
            elif row.shape:
                shapes.append(row)
            row.index = index
            fresh.rows.append(row)
        fresh._pricing = self._pricing
        fresh._look_at_shapes(shapes + new_shapes, old=len(shapes))
        return fresh

    def shut(self, keys: Container[str], why: str) -> None:
        """Have offers serve nobody in this round: those with such a key, area or source."""
        for row in self.rows:
            if row.source in keys or row.key in keys or (row.shape and row.offer.area in keys):
                row.shut(why)

    def _is_of(self, offers: list[Offer]) -> bool:
        same = len(offers) == len(self.rows) and all(map(is_, offers, map(_OFFER, self.rows)))
        return same and not any(map(_TAKEN, self.rows))

    def _look_at_shapes(self, rows: Sequence[Row], *, old: int) -> None:
        """Put shapes in relation to one another; the ``old`` first were so a moment ago."""
        priced = [row for row in rows if row.shape and row.shape.priced]
        currencies = frozenset(row.offer.currency for row in priced)
        sources = frozenset(row.source for row in priced)
        places = {row.source: row.offer.place for row in rows}
        counts = Counter([row.source for row in rows])
        self.shapes = Counter({places[source]: count for source, count in counts.items()})
        first = old if self._pricing == (currencies, sources) else 0
        self._pricing = (currencies, sources)
        for row in rows[first:]:
            assert row.shape
            row.shape.price(others_say=row.source in sources, comparable=len(currencies) < 2)
        pools: dict[int, Pool] = {}
        for row in rows:
            quota = row.offer.quota
            if quota is not None and row.shape:
                pool = pools.get(id(quota)) or pools.setdefault(id(quota), Pool(quota))
                row.shape.pool = pool
                pool.rows.append(row)


def able(rows: Sequence[Row], wish: Wish) -> list[Row]:
    """Return the rows that can serve the wish now."""
    need = wish.need
    cpus, memory, gpus, time = need.cpus, need.memory_bytes, need.gpus, wish.seconds
    if wish.spot:
        rows, time = _or_spot(rows, time), SPOT
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
    if wish.spot:
        rows, time = _or_spot(rows, time), SPOT
    found = [
        row
        for row in rows
        if row.all_cpus >= cpus
        and row.all_memory >= memory
        and row.all_gpus >= gpus
        and row.longest >= time
    ]
    return admitted(found, wish)


def _or_spot(rows: Sequence[Row], time: float) -> list[Row]:
    """Return the rows of spot capacity, and of what is there already for so long."""
    return [
        row for row in rows if (row.longest >= time if row.shape is None else row.longest == SPOT)
    ]


def admitted(rows: list[Row], wish: Wish) -> list[Row]:
    """Return the rows that the wish's constraints admit."""
    asked = wish.constraints
    if wish.site is not None:
        rows = [row for row in rows if row.site == wish.site]
    if wish.barred:
        rows = [row for row in rows if row.key not in wish.barred]
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


def an_hour(rows: Sequence[Row], need: Need) -> list[float]:
    """Return what an hour of the need costs at each: in credits, and of a cloud in its own
    currency, infinite where that is not known though it has prices."""
    rates = credits_an_hour(rows, need)
    if any(map(SHAPE, rows)):
        pairs = zip(rows, rates, strict=True)
        rates = [row.shape.hourly(need) if row.shape else rate for row, rate in pairs]
    return rates


def credits_an_hour(rows: Iterable[Row], need: Need) -> list[float]:
    """Return what an hour of the need costs at each, in credits; as `Prices.cost` has it."""
    cpus, gib, gpus = need.cpus, need.memory_bytes / GIB, need.gpus
    return [row.cpu_price * cpus + row.memory_price * gib + row.gpu_price * gpus for row in rows]


def is_within(community: str, names: Iterable[str]) -> bool:
    """Whether a community is one of those named, by its name or by its whole id."""
    return community in names or community.partition(".")[0] in names
