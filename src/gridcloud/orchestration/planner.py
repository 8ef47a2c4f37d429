"""Which offer serves a need best, and why each other one lost. Pure: values in, values out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import nlargest, nsmallest
from itertools import islice
from math import inf
from operator import attrgetter

from gridcloud.errors import InvalidSpec
from gridcloud.model.choice import OWN, Constraints, Strategy
from gridcloud.model.need import Need
from gridcloud.model.offer import Offer, Plan, Verdict
from gridcloud.model.quantities import format_duration
from gridcloud.orchestration.market import (
    Market,
    Row,
    Wish,
    able,
    an_hour,
    is_within,
    suitable,
)
from gridcloud.orchestration.strategies import behind, ranks

#: So many shapes of each cloud come before the rest of them.
_FEW = 5
_BY_NEED = attrgetter("all_gpus", "all_cpus", "all_memory", "place")
#: Returns so many rows, of some, that are the nearest to what is wanted.
_Nearest = Callable[[int, Iterable[Row]], list[Row]]


def plan(
    need: Need,
    offers: Iterable[Offer],
    site: str | None = None,
    constraints: Constraints | None = None,
    strategy: Strategy = Strategy.FIRST_FIT,
    *,
    spot: bool = False,
    most: int | None = None,
) -> Plan:
    """Rank ``offers`` for ``need`` by ``strategy``, and tell the ``most`` best (None: all).

    ``site`` admits only the offers of the site so named, ``constraints`` what they say. A machine
    is made of ``spot`` capacity alone, or not at all.
    """
    wish = Wish(need, site, constraints or Constraints(), strategy, spot=spot)
    return judge(Market(offers), wish, most=most)


def judge(market: Market, wish: Wish, *, most: int | None = None) -> Plan:
    """Return the verdicts on a market's offers: those that can serve the wish now, the best
    first, then those that could later, then the others.

    Verdicts are made for ``most`` of them (None: all), since each takes longer than all of the
    choosing. Of each cloud's many shapes a few come first, so that there is room for others.
    """
    now = able(market.rows, wish)
    order = {rank[-1]: rank for rank in ranks(now, wish)}
    waiting = [row for row in suitable(market.rows, wish) if row.index not in order]
    later = {row.index for row in waiting}

    def best_first(count: int, rows: Iterable[Row]) -> list[Row]:
        return nsmallest(count, rows, key=lambda row: order[row.index])

    def groups() -> Iterator[tuple[list[Row], _Nearest]]:
        yield now, best_first
        yield waiting, _smallest
        never = [row for row in market.rows if row.index not in order and row.index not in later]
        yield never, _largest

    told = list(islice(_in_turn(groups(), len(market.rows) if most is None else most), most))
    ranked = best_first(len(told), [row for row in told if row.index in order])
    verdicts = [
        Verdict(offer=row.offer, rank=i, behind=behind(row, ranked[0], wish) if i > 1 else "")
        for i, row in enumerate(ranked, start=1)
    ]
    unable = [row for row in told if row.index not in order]
    # Of one place they stay as they are: the nearest to what is wanted first.
    for row in sorted(unable, key=lambda row: (row.index not in later, row.offer.place)):
        some_day = row.index in later
        reasons = _not_now(wish.need, row.offer) if some_day else _never(wish, row)
        verdicts.append(Verdict(offer=row.offer, reasons=tuple(reasons), later=some_day))
    shapes = market.shapes - Counter([row.offer.place for row in told if row.shape])
    left_out = len(market.rows) - len(told)
    return Plan(
        verdicts=tuple(verdicts), fit=len(now), left_out=left_out, shapes_left_out=dict(shapes)
    )


def _smallest(count: int, rows: Iterable[Row]) -> list[Row]:
    return nsmallest(count, rows, key=_BY_NEED)


def _largest(count: int, rows: Iterable[Row]) -> list[Row]:
    return nlargest(count, rows, key=_BY_NEED)


def _in_turn(groups: Iterable[tuple[list[Row], _Nearest]], most: int) -> Iterator[Row]:
    """Yield rows in the order of how much they are worth telling of: of each group those that are
    the nearest to what is wanted, but of each cloud only a few before all others."""
    rest: list[tuple[list[Row], list[Row], _Nearest]] = []
    for rows, nearest in groups:
        shapes: dict[str, list[Row]] = defaultdict(list)
        plain: list[Row] = []
        for row in rows:
            (shapes[row.source] if row.shape else plain).append(row)
        yield from nearest(most, plain)
        for some in shapes.values():
            few = nearest(_FEW, some)
            yield from few
            rest.append((some, few, nearest))
    for some, few, nearest in rest:
        first = {row.index for row in few}
        yield from nearest(most, [row for row in some if row.index not in first])


def check_names(wish: Wish, offers: Sequence[Offer]) -> None:
    """Refuse a wish for a site or a community that is not known here, or not unmistakably.

    Raises `InvalidSpec`, which says what is known.
    """
    sites = sorted({offer.site for offer in offers})
    if wish.site is not None and wish.site not in sites:
        raise InvalidSpec(
            f"No site called {wish.site!r} is known here.", hint=f"Known: {', '.join(sites)}."
        )
    known = {offer.community for offer in offers if offer.community}
    for name in wish.constraints.within:
        meant = sorted(community for community in known if is_within(community, (name,)))
        if not meant and name != OWN:
            names = sorted({community.partition(".")[0] for community in known})
            raise InvalidSpec(
                f"Nothing is offered here by a community called {name!r}.",
                hint=f"Known: {', '.join([OWN, *names])}. See 'gridcloud community list'.",
            )
        if len(meant) > 1:
            raise InvalidSpec(
                f"{len(meant)} communities are called {name!r}.",
                hint=f"Name one by its whole id: {', '.join(meant)}.",
            )


def check_possible(wish: Wish, offers: Sequence[Offer]) -> None:
    """Refuse a wish that no offer could ever serve; raises `InvalidSpec` with their reasons."""
    market = Market(offers)
    if not suitable(market.rows, wish):
        raise InvalidSpec(
            f"Nothing here can ever serve {wish.need}: {judge(market, wish, most=20).explain()}.",
            hint="Ask for less, add a machine, or join a community that has it.",
        )


def _never(wish: Wish, row: Row) -> list[str]:
    """Return why an offer cannot serve a wish, however long one waits."""
    reasons = _barred(wish, row)
    need, offer = wish.need, row.offer
    if offer.known and (lacking := offer.capacity.lacking(need.resources)):
        reasons += [offer.problem] if offer.problem else lacking
    if need.time and offer.max_time and need.time > offer.max_time:
        longest, wanted = format_duration(offer.max_time), format_duration(need.time)
        reasons.append(f"lends for {longest} at most, {wanted} are needed")
    return reasons


def _barred(wish: Wish, row: Row) -> list[str]:
    """Return which of the wish's constraints an offer does not keep."""
    asked, offer = wish.constraints, row.offer
    reasons = []
    if wish.site is not None and offer.site != wish.site:
        reasons.append(f"the job is pinned to {wish.site}")
    if offer.shape and offer.spot is not wish.spot:
        reasons.append("its cloud may take it back" if offer.spot else "is no spot capacity")
    if offer.key in wish.barred:
        reasons.append("the job was lost there before")
    if asked.countries and offer.country not in asked.countries:
        where = f"is in {offer.country}" if offer.country else "does not say in which country it is"
        reasons.append(f"{where}, not in {_either(asked.countries)}")
    if asked.kinds and offer.kind not in asked.kinds:
        kind = f"is of kind {offer.kind}" if offer.kind else "does not say of which kind it is"
        reasons.append(f"{kind}, not {_either(asked.kinds)}")
    if asked.within and offer.peer and not is_within(offer.community or "", asked.within):
        reasons.append(f"is outside {_either(asked.within)}")
    if asked.max_price is not None:
        reasons += _too_dear(wish, row, asked.max_price)
    return reasons


def _too_dear(wish: Wish, row: Row, most: float) -> list[str]:
    (rate,) = an_hour([row], wish.need)
    if not rate:
        return []
    if rate == inf:
        return [f"has no known price, {most:g} at most are given"]
    money = row.offer.currency or "credits"
    if wish.need.time is None:
        return [f"costs {rate:g} {money} an hour: only with --time is it known whether {most:g} do"]
    price = rate * wish.hours
    return [f"costs {price:g} {money}, {most:g} at most are given"] if price > most else []


def _not_now(need: Need, offer: Offer) -> list[str]:
    """Return why an offer that could serve a need cannot at the moment."""
    reasons = [offer.problem] if offer.problem else []
    if offer.known and not (offer.shape and offer.problem):
        lacking = offer.free.lacking(need.resources)
        reasons += [reason.replace("has", "has free now", 1) for reason in lacking]
    return reasons


def _either(names: Sequence[str]) -> str:
    return " or ".join(name.partition(".")[0] for name in names)
