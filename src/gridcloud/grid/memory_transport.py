"""A whole network in one process: the seeded twin of the real transport, for tests and simulation.

Every link, one direction at a time, may lose, delay and duplicate messages; nodes may be parted,
killed and started again. All chance comes from one seed and all waiting goes through one ``sleep``,
so that a simulation can replay a run and use virtual time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, NoReturn, TypeVar

import structlog

from gridcloud.errors import Conflict, TimedOut, Unavailable
from gridcloud.grid.identity import short
from gridcloud.grid.transport import Handler, PeerAddress, check_size
from gridcloud.model.frozen import Frozen

log = structlog.get_logger()

Sleep = Callable[[float], Awaitable[None]]
_T = TypeVar("_T")


class Link(Frozen):
    """One direction between two nodes: chances from 0 to 1, delays in seconds."""

    loss: float = 0.0
    duplicate: float = 0.0
    delay_min: float = 0.0
    delay_max: float = 0.0


class MemoryNetwork:
    """The nodes and the links between them."""

    def __init__(self, seed: int, sleep: Sleep = asyncio.sleep) -> None:
        self.sleep = sleep
        self._random = random.Random(seed)  # noqa: S311  reproducible, not secret
        self._links: dict[tuple[str, str], Link] = {}
        self._default = Link()
        self._sides: dict[str, int] = {}
        self._nodes: dict[str, MemoryTransport] = {}
        self._addresses: dict[str, str] = {}

    def node(self, key: str) -> MemoryTransport:
        """Return the one node with this key, made at first; it keeps its address for good."""
        if key not in self._nodes:
            number = len(self._nodes) + 1
            address = f"10.0.{number // 256}.{number % 256}:4433"
            self._nodes[key] = MemoryTransport(self, PeerAddress(key=key, addresses=(address,)))
            self._addresses[address] = key
        return self._nodes[key]

    def set_link(self, link: Link, source: str | None = None, target: str | None = None) -> None:
        """Set what one direction does to messages; without ends, what all others do."""
        if source is None or target is None:
            self._default = link
        else:
            self._links[source, target] = link

    def partition(self, *groups: Iterable[str]) -> None:
        """Part the nodes: silently, messages pass only within a group; the unnamed form one."""
        self._sides = {key: side for side, group in enumerate(groups, 1) for key in group}

    def heal(self) -> None:
        """Undo the partition."""
        self._sides = {}

    async def kill(self, key: str) -> None:
        """Stop a node as a crash does: what it handled is cut off, and nobody is told."""
        await self._nodes[key].kill()

    async def restart(self, key: str) -> None:
        """Start a killed node again, with the handler it had."""
        await self._nodes[key].restart()

    def found(self, source: str, peer: PeerAddress) -> MemoryTransport | None:
        """Return the live node that answers at the peer's addresses with its key, if reachable."""
        at = {self._addresses.get(address) for address in peer.addresses}
        node = self._nodes.get(peer.key) if peer.key in at else None
        return node if node is not None and node.up and self._joined(source, peer.key) else None

    async def carry(self, source: str, target: str) -> int:
        """Take one message across a link; return how many copies arrive (0, 1 or 2)."""
        link = self._links.get((source, target), self._default)
        lost, twice, lag = (self._random.random() for _ in range(3))
        await self.sleep(link.delay_min + lag * (link.delay_max - link.delay_min))
        if lost < link.loss or not self._joined(source, target):
            return 0
        return 2 if twice < link.duplicate else 1

    def _joined(self, one: str, other: str) -> bool:
        return self._sides.get(one, 0) == self._sides.get(other, 0)


class MemoryTransport:
    """See `gridcloud.grid.transport.Transport`; made by `MemoryNetwork.node`."""

    def __init__(self, network: MemoryNetwork, address: PeerAddress) -> None:
        self._network = network
        self._address = address
        self._handler: Handler | None = None
        self._handling: set[asyncio.Task[bytes | None]] = set()
        self.up = False

    async def start(self, handler: Handler) -> None:
        """See `Transport`."""
        if self.up:
            raise Conflict("The transport is started already.")
        self._handler = handler
        self.up = True

    def address(self) -> PeerAddress:
        """See `Transport`."""
        return self._address

    async def request(self, peer: PeerAddress, message: bytes, timeout: float) -> bytes:
        """See `Transport`. A peer that is down or parted is noticed only by its silence."""
        check_size(message)
        if not self.up:
            raise Unavailable("This site's grid transport is closed.")
        node = self._network.found(self._address.key, peer)
        if node is None:
            await self._network.sleep(timeout)
            raise Unavailable(
                f"{short(peer.key)} cannot be reached at {', '.join(peer.addresses) or 'nowhere'}: "
                f"nobody with that key answered within {timeout:g} s.",
                hint="Is that site up, and its port open to this one?",
            )
        done, reply = await _first(self._talk(node, message), self._network.sleep(timeout))
        if not done:
            raise TimedOut(
                f"{short(peer.key)} did not answer within {timeout:g} s.", hint="Try again."
            )
        if reply is None:
            raise Unavailable(f"{short(peer.key)} dropped the request.", hint="Try again.")
        return reply

    async def close(self) -> None:
        """See `Transport`."""
        await self.kill()

    async def kill(self) -> None:
        """See `MemoryNetwork.kill`."""
        self.up = False
        handling = list(self._handling)
        for task in handling:
            task.cancel()
        await asyncio.gather(*handling, return_exceptions=True)

    async def restart(self) -> None:
        """See `MemoryNetwork.restart`."""
        assert self._handler is not None, "a node is started before it is started again"
        await self.start(self._handler)

    async def _talk(self, node: MemoryTransport, message: bytes) -> bytes | None:
        """Have a message answered; None if it was dropped, no end at all if it was lost."""
        me, peer = self._address.key, node.address().key
        copies = await self._network.carry(me, peer)
        handled = [node.handle(me, message) for _ in range(copies)]
        if not handled:
            return await _never()
        finished, _ = await asyncio.wait(handled, return_when=asyncio.FIRST_COMPLETED)
        first = finished.pop()
        if first.cancelled() or await self._network.carry(peer, me) == 0:
            return await _never()
        return first.result()

    def handle(self, source: str, message: bytes) -> asyncio.Task[bytes | None]:
        """Begin to handle a message that arrived, on this node's own account."""
        task = asyncio.create_task(self._handle(source, message))
        self._handling.add(task)
        task.add_done_callback(self._handling.discard)
        return task

    async def _handle(self, source: str, message: bytes) -> bytes | None:
        if self._handler is None or not self.up:
            return await _never()
        try:
            reply = await self._handler(source, message)
            check_size(reply)
        except Exception:  # the handler's fault; it costs one request
            log.exception("request failed", peer=short(source))
            return None
        return reply


async def _never() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody ends this wait but by cancelling it")


async def _first(work: Coroutine[Any, Any, _T], limit: Awaitable[None]) -> tuple[bool, _T | None]:
    """Return whether ``work`` was done before ``limit``, and its result; what lost is cancelled."""
    working = asyncio.create_task(work)
    waiting = asyncio.ensure_future(limit)
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        return (True, working.result()) if working.done() else (False, None)
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)
