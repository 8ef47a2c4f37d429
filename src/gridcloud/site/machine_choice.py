"""Where a machine without a job would be made: what own clouds offer, ranked for a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from gridcloud.errors import GridcloudError, InvalidSpec, NoCapacity, Unavailable
from gridcloud.model.choice import Strategy
from gridcloud.model.fleet import MachineRequest
from gridcloud.model.offer import Offer, Plan
from gridcloud.orchestration.planner import plan as rank
from gridcloud.providers.base import MachineMaker, Provider

#: How long somebody who asks for a machine waits for a cloud's first word.
_PATIENCE_SECONDS = 30.0


class Source(Protocol):
    """Where offers and providers come from: `gridcloud.site.leasing.SiteLeasing`."""

    async def offers(self) -> list[Offer]:
        """Return what is offered now."""
        ...

    def provider(self, name: str) -> Provider:
        """Return a provider of this site by its name; raises `NotFound`."""
        ...

    def providers(self) -> list[Provider]:
        """Return the providers of this site."""
        ...


class MachineChoice:
    """Chooses among the offers of own clouds; ``strategy`` is what the site prefers by itself."""

    def __init__(self, source: Source, strategy: Callable[[], Strategy]) -> None:
        self._source = source
        self._strategy = strategy

    async def choose(self, request: MachineRequest, admitted: Callable[[Offer], bool]) -> Offer:
        """Return the best offer for one machine among those admitted.

        Raises `NoCapacity` if none can serve now, and as `judge` does.
        """
        plan = await self.judge(request, admitted)
        if plan.winners:
            return plan.winners[0]
        raise NoCapacity(
            f"No machine can be had now: {plan.explain()}.",
            hint="Try again later, or ask for less.",
        )

    async def ready(self, request: MachineRequest) -> None:
        """Give the clouds that a request is for time to say, for the first time, what they have.

        Raises `NotFound` for a provider that is named and is not there, `InvalidSpec` for one that
        makes no machines.
        """
        if request.provider:
            named = self._source.provider(request.provider)
            if not isinstance(named, MachineMaker):
                raise InvalidSpec(
                    f"The provider {request.provider!r} makes no machines.",
                    hint="See 'gridcloud provider list' for those there are.",
                )
        makers = [each for each in self._source.providers() if _meant(each, request)]
        if makers:
            asked = [asyncio.ensure_future(each.capacity()) for each in makers]
            await asyncio.wait(asked, timeout=_PATIENCE_SECONDS)
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def judge(self, request: MachineRequest, admitted: Callable[[Offer], bool]) -> Plan:
        """Judge the offers admitted; changes nothing, and waits for no cloud.

        Raises `InvalidSpec` if nothing here could ever serve, `Unavailable` if no cloud says what
        it has.
        """
        makers = {each.name for each in self._source.providers() if _meant(each, request)}
        own = [each for each in await self._source.offers() if each.peer is None]
        own = [each for each in own if each.provider in makers]
        offers = [offer for offer in own if offer.shape]
        if not offers:
            raise _no_maker(request, own)
        if request.region:
            regions = ", ".join(sorted({offer.region for offer in offers} - {""})) or "none"
            offers = [offer for offer in offers if offer.region == request.region]
            if not offers:
                raise InvalidSpec(
                    f"No machine is offered in a region {request.region!r}.",
                    hint=f"There are: {regions}.",
                )
        chosen = request.strategy or self._strategy()
        spot = request.order.spot
        among = filter(admitted, offers)
        plan = rank(request.need, among, strategy=chosen, spot=spot, most=200)
        if not plan.winners and not plan.possible_later and all(map(admitted, offers)):
            raise InvalidSpec(
                f"No provider here ever makes a machine with {request.need}: {plan.explain()}.",
                hint="Ask for less, or add a provider that has larger ones.",
            )
        return plan


def _meant(provider: Provider, request: MachineRequest) -> bool:
    """Whether a provider makes machines, and may for this request."""
    return isinstance(provider, MachineMaker) and request.provider in ("", provider.name)


def _no_maker(request: MachineRequest, told: list[Offer]) -> GridcloudError:
    problems = [f"{offer.provider}: {offer.problem}" for offer in told if offer.problem]
    if problems:
        return Unavailable(
            f"No machine can be had now: {'; '.join(problems)}",
            hint="Mend that, or try again later; see 'gridcloud provider check'.",
        )
    if request.provider:
        return Unavailable(f"The provider {request.provider!r} offers no machines.")
    return InvalidSpec(
        "No provider here makes machines.", hint="Add a cloud: see 'gridcloud provider add --help'."
    )
