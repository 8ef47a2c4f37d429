"""The shapes of a cloud and what its quota leaves, as last asked."""

from __future__ import annotations

import asyncio
import difflib

from gridcloud.errors import GridcloudError, InvalidSpec, NotFound
from gridcloud.model.lease import Lease
from gridcloud.model.need import Resources
from gridcloud.model.shape import Headroom, Shape
from gridcloud.providers.base import Capacity
from gridcloud.providers.cloud.clouds import Cloud
from gridcloud.providers.cloud.pace import Pace

_SHAPES_HOLD_SECONDS = 1800.0
_HEADROOM_HOLDS_SECONDS = 60.0
_RETRY_AFTER_SECONDS = 15.0
#: How long the first plan waits for a cloud, and how long it may take to answer at all.
_FIRST_WAIT_SECONDS, _ANSWER_SECONDS = 15.0, 120.0


class Catalogue:
    """Asks in the background when it is time, so that a plan never waits but for the first."""

    def __init__(self, cloud: Cloud, pace: Pace) -> None:
        self._cloud, self._pace = cloud, pace
        self._shapes: tuple[Shape, ...] = ()
        self._headroom: dict[str, Headroom] = {}
        self._problem = ""
        self._shapes_until = self._headroom_until = float("-inf")
        self._asked = False
        self._asking: asyncio.Task[None] | None = None

    async def capacity(self) -> Capacity:
        """Return what was learned last; only the first call waits for the cloud."""
        if self._now() >= self._headroom_until and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask(), name="ask a cloud for its shapes")
        if not self._asked and self._asking is not None:
            await asyncio.wait({self._asking}, timeout=_FIRST_WAIT_SECONDS)
        return self._told()

    async def asked_anew(self) -> Capacity:
        """Ask now; return what was learned."""
        await self.close()
        self.outdated(shapes=True)
        await self._ask()
        return self._told()

    def outdated(self, *, shapes: bool = False) -> None:
        """Have the quota (and the shapes) asked for again when they are next wanted."""
        self._headroom_until = float("-inf")
        if shapes:
            self._shapes_until = float("-inf")

    async def shape(self, lease: Lease) -> tuple[Shape, Resources]:
        """Return the shape that a lease names, or the smallest that fits, and what a machine of it
        would have.

        Raises `NotFound`, naming near ones, `InvalidSpec` if it is too small, and what the cloud
        raises if it was never asked.
        """
        shapes = self._shapes or await self._fetched()
        found = _named(shapes, lease)
        if not found:
            found = _named(await self._fetched(), lease)
        if not found:
            names = {shape.name for shape in self._shapes}
            near = ", ".join(difflib.get_close_matches(lease.shape, names, 5) or sorted(names)[:5])
            where = f" in {lease.region}" if lease.region else ""
            raise NotFound(
                f"There is no shape {lease.shape!r}{where}.",
                hint=f"There are for instance: {near}." if near else "There are none at all.",
            )
        fitting = [(shape, fitted) for shape in found if (fitted := shape.fitted(lease.need))]
        if not fitting:
            lacking = ", ".join(found[0].resources.lacking(lease.need.resources))
            raise InvalidSpec(
                f"The shape {found[0].name} {lacking}.", hint="Ask for less, or a larger shape."
            )
        return min(fitting, key=lambda one: _size(one[0], one[1]))

    async def close(self) -> None:
        """End a question that is under way."""
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def _told(self) -> Capacity:
        sizes = [shape.resources for shape in self._shapes]
        most = Resources(
            cpus=max((size.cpus for size in sizes), default=0),
            memory_bytes=max((size.memory_bytes for size in sizes), default=0),
            gpus=max((size.gpus for size in sizes), default=0),
        )
        problem = self._problem if self._asked else "It has not answered yet."
        if not problem and not self._shapes:
            problem = "This account may make machines of no shape."
        regions = ", ".join(sorted({shape.region for shape in self._shapes} - {""}))
        detail = f"{len(sizes)} shapes" + (f" in {regions}" if regions else "")
        return Capacity(
            resources=most,
            known=bool(sizes),
            problem=problem,
            detail=detail,
            shapes=self._shapes,
            headroom=dict(self._headroom),
        )

    async def _fetched(self) -> tuple[Shape, ...]:
        self._shapes = await self._pace.call(self._cloud.shapes)
        self._shapes_until = self._now() + _SHAPES_HOLD_SECONDS
        return self._shapes

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._ask_all()
            self._problem, hold = "", _HEADROOM_HOLDS_SECONDS
        except GridcloudError as error:
            self._problem, hold = str(error), _RETRY_AFTER_SECONDS
        except TimeoutError:
            self._problem, hold = "No answer came in time.", _RETRY_AFTER_SECONDS
        self._headroom_until = self._now() + hold
        self._asked = True

    async def _ask_all(self) -> None:
        if self._now() >= self._shapes_until or not self._shapes:
            await self._fetched()
        regions = sorted({shape.region for shape in self._shapes})
        left = await asyncio.gather(*(self._headroom_of(region) for region in regions))
        self._headroom = dict(zip(regions, left, strict=True))

    async def _headroom_of(self, region: str) -> Headroom:
        return await self._pace.call(lambda: self._cloud.headroom(region))

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _named(shapes: tuple[Shape, ...], lease: Lease) -> list[Shape]:
    """Return the shapes that a lease may mean: those of its name and region, or all of its kind."""
    spot = lease.order.spot
    if lease.shape:
        named = [s for s in shapes if s.name == lease.shape and s.region == lease.region]
        return [s for s in named if s.spot == spot] or named
    regions = {lease.region} if lease.region else {shape.region for shape in shapes}
    return [s for s in shapes if s.region in regions and s.spot == spot]


def _size(shape: Shape, fitted: Resources) -> tuple[float, int, int, int, str]:
    price = float("inf") if shape.price is None else shape.price
    return price, fitted.gpus, fitted.cpus, fitted.memory_bytes, shape.name
