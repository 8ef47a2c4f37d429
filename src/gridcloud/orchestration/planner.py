"""Which offer serves a need best, and why each other one lost. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

from gridcloud.errors import InvalidSpec
from gridcloud.model.choice import OWN, Constraints, Strategy
from gridcloud.model.need import Need
from gridcloud.model.offer import Offer, Plan, Verdict
from gridcloud.model.quantities import format_duration
from gridcloud.orchestration.market import Market, Wish, able, is_within, suitable
from gridcloud.orchestration.strategies import ranks


def plan(
    need: Need,
    offers: Iterable[Offer],
    site: str | None = None,
    constraints: Constraints | None = None,
    strategy: Strategy = Strategy.FIRST_FIT,
    *,
    most: int | None = None,
) -> Plan:
    """Rank ``offers`` for ``need`` by ``strategy``, and tell the ``most`` best (None: all).

    ``site`` admits only the offers of the site so named, ``constraints`` what they say.
    """
    wish = Wish(need, site, constraints or Constraints(), strategy)
    return judge(Market(offers), wish, most=most)


def judge(market: Market, wish: Wish, *, most: int | None = None) -> Plan:
    """Return the verdicts on a market's offers: those that can serve the wish now, the best
    first, then those that could later, then the others. Verdicts are made for ``most`` of them
    (None: all), since each takes longer than all of the choosing."""
    now = able(market.rows, wish)
    ranked = [market.rows[rank[-1]] for rank in sorted(ranks(now, wish))]
    fit = {row.index for row in ranked}
    waiting = [row for row in suitable(market.rows, wish) if row.index not in fit]
    fit |= {row.index for row in waiting}
    never = [row for row in market.rows if row.index not in fit]
    later = [(row, True) for row in sorted(waiting, key=lambda row: row.place)]
    unable = later + [(row, False) for row in sorted(never, key=lambda row: row.place)]
    shown = ranked[:most]
    verdicts = [Verdict(offer=row.offer, rank=i) for i, row in enumerate(shown, start=1)]
    for row, some_day in unable[: None if most is None else most - len(shown)]:
        reasons = _never(wish, row.offer) if not some_day else _not_now(wish.need, row.offer)
        verdicts.append(Verdict(offer=row.offer, reasons=tuple(reasons), later=some_day))
    return Plan(verdicts=tuple(verdicts), left_out=len(market.rows) - len(verdicts))


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


def _never(wish: Wish, offer: Offer) -> list[str]:
    """Return why an offer cannot serve a wish, however long one waits."""
    reasons = _barred(wish, offer)
    need = wish.need
    if offer.known and (lacking := offer.capacity.lacking(need.resources)):
        reasons += [offer.problem] if offer.problem else lacking
    if need.time and offer.max_time and need.time > offer.max_time:
        longest, wanted = format_duration(offer.max_time), format_duration(need.time)
        reasons.append(f"lends for {longest} at most, {wanted} are needed")
    return reasons


def _barred(wish: Wish, offer: Offer) -> list[str]:
    """Return which of the wish's constraints an offer does not keep."""
    asked, reasons = wish.constraints, []
    if wish.site is not None and offer.site != wish.site:
        reasons.append(f"the job is pinned to {wish.site}")
    if offer.source in wish.barred:
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
        reasons += _too_dear(wish, offer, asked.max_price)
    return reasons


def _too_dear(wish: Wish, offer: Offer, most: float) -> list[str]:
    rate = offer.prices.cost(wish.need.resources, timedelta(hours=1))
    if not rate:
        return []
    if wish.need.time is None:
        return [f"costs {rate:g} credits an hour: only with --time is it known whether {most:g} do"]
    price = rate * wish.hours
    return [f"costs {price:g} credits, {most:g} at most are given"] if price > most else []


def _not_now(need: Need, offer: Offer) -> list[str]:
    """Return why an offer that could serve a need cannot at the moment."""
    reasons = [offer.problem] if offer.problem else []
    if offer.known:
        lacking = offer.free.lacking(need.resources)
        reasons += [reason.replace("has", "has free now", 1) for reason in lacking]
    return reasons


def _either(names: Sequence[str]) -> str:
    return " or ".join(name.partition(".")[0] for name in names)
