"""Whether a job may still hope for the communities that it is bound to. Pure: values in, words out.

A member that is away comes back, so a job waits for it. A membership that has ended comes back only
by somebody's doing, of which a job that waits in line would never hear.
"""

from __future__ import annotations

from collections.abc import Sequence

from gridcloud.model.api import CommunityInfo
from gridcloud.model.choice import OWN
from gridcloud.orchestration.market import Market, Wish, is_within, suitable


def bound(wish: Wish) -> bool:
    """Whether a wish names a site, or a community other than the user's own site."""
    return wish.site is not None or any(name != OWN for name in wish.constraints.within)


def out_of_reach(wish: Wish, market: Market, communities: Sequence[CommunityInfo]) -> str:
    """Return why nothing can come of a wish as long as this site is in no other communities than
    ``communities``; empty where something may.

    Those that this site asks to be admitted to are among ``communities``: something may come of
    them. So it does of a site that a community of this site has, or may have again.
    """
    told = _gone(wish, market, communities) if bound(wish) else ""
    return "" if told and suitable(market.rows, wish) else told


def _gone(wish: Wish, market: Market, communities: Sequence[CommunityInfo]) -> str:
    ended = {each.id: each.problem for each in communities if each.problem and not each.waiting}
    held = [each.id for each in communities if each.id not in ended]
    if names := [name for name in wish.constraints.within if name != OWN]:
        if any(is_within(community, names) for community in held):
            return ""
        about = [community for community in ended if is_within(community, names)]
        lacking = [name for name in names if not any(is_within(each, (name,)) for each in about)]
        return " ".join([ended[each] for each in about] + [_left(name) for name in lacking])
    rows = [row for row in market.rows if row.site == wish.site]
    if rows and all(row.community in ended for row in rows):
        return " ".join(ended[each] for each in sorted({row.community for row in rows}))
    if rows or held:
        return ""
    return (
        f"No site called {wish.site!r} is known here any more: this site is in no community. "
        "Join one that it is in, and hand the job in again."
    )


def _left(name: str) -> str:
    short = name.partition(".")[0]
    return f"This site is not in {short} any more. Join it again, and hand the job in again."
