"""Relaying: a site that two others can reach carries bytes between them, unable to read them.

The asker opens ``relay`` at the helper and names the target; the helper opens ``relayed`` at the
target over the link it has, and copies both ways. Through this the two do the same handshake as
over TCP (`gridcloud.grid.tls_channel`), which proves both keys to one another and nothing to the
helper; what comes out is a link like any other.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import structlog

from gridcloud.errors import GridcloudError
from gridcloud.grid.identity import short
from gridcloud.grid.links import Link, LinkDown, LinkTable, broken
from gridcloud.grid.mux_link import MuxLink
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.rates import Door, TokenBucket
from gridcloud.grid.streams import open_on, read_exactly
from gridcloud.grid.tls_channel import TlsIdentity, answer_over, dial_over
from gridcloud.grid.transport import ByteStream

log = structlog.get_logger()

RELAY, RELAYED = "relay", "relayed"
_KEY_BYTES = 32
_HANDSHAKE_TIMEOUT = 10.0
_CHUNK = 16 * 1024
_MAX_RELAYED = 64
_MAX_RELAYED_PER_SOURCE = 8
#: Links give a sign of life more often than that.
_IDLE_TIMEOUT = 120.0
_GOES, _DECLINED, _NOT_LINKED, _FULL = b"\x01", b"\x02", b"\x03", b"\x04"
_REASONS = {
    _DECLINED: "it does not relay between the two",
    _NOT_LINKED: "it has no link to that site itself",
    _FULL: "it relays as much as it may already",
}


class Relaying:
    """Relays for others, takes what is relayed here, and asks to be relayed."""

    def __init__(
        self,
        mine: TlsIdentity,
        links: LinkTable,
        neighbourhood: Callable[[], Neighbourhood],
        door: Door,
        on_link: Callable[[MuxLink], bool],
    ) -> None:
        self._mine = mine
        self._links = links
        self._neighbourhood = neighbourhood
        self._door = door
        self._on_link = on_link
        self._relayed: Counter[str] = Counter()
        self._bucket = TokenBucket(1, 1, 0)
        self._rate = 0
        self._holding: set[asyncio.Task[None]] = set()

    async def relay(self, target: str, helper: Link) -> MuxLink:
        """Return a link to the target through a helper; raises `Unavailable` or `LinkDown`."""
        if helper.path().how == "relayed":
            raise broken(helper.key, "it is itself reached through another site only")
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
                stream = await open_on(helper, RELAY, bytes.fromhex(target))
                try:
                    said = await read_exactly(stream, 1, helper.key)
                    if said != _GOES:
                        raise broken(helper.key, _REASONS.get(said, "it said nonsense"))
                    channel = await dial_over(stream, self._mine, target)
                except BaseException:
                    stream.close()
                    raise
        except TimeoutError as error:
            raise broken(helper.key, "the relayed site did not answer in time") from error
        link = MuxLink(channel, target, dialled=True, how="relayed", via=helper.key)
        task = asyncio.create_task(self._hold(helper, link), name="relayed")
        self._holding.add(task)
        task.add_done_callback(self._holding.discard)
        return link

    async def accept_relay(self, key: str, stream: ByteStream) -> None:
        """Serve ``relay``: copy between the asker and whom it names, if policy lets this site."""
        async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
            target = (await read_exactly(stream, _KEY_BYTES, key)).hex()
        if target == key or not self._neighbourhood().may_relay(key, target):
            await _refuse(stream, _DECLINED)
            return
        link = self._links.best(target)
        if link is None or link.path().how == "relayed":
            await _refuse(stream, _NOT_LINKED)
            return
        full = self._relayed[key] >= _MAX_RELAYED_PER_SOURCE
        if full or self._relayed.total() >= _MAX_RELAYED:
            await _refuse(stream, _FULL)
            return
        self._relayed[key] += 1
        try:
            with self._links.using(link):
                await self._relay(key, stream, link)
        finally:
            self._relayed[key] -= 1
            self._relayed += Counter()  # drops those at nought

    async def accept_relayed(self, key: str, stream: ByteStream) -> None:
        """Serve ``relayed``: take a link that the helper with this key carries here."""
        with self._door.enter(f"relayed by {key}") as admitted:
            if not admitted:
                return
            try:
                async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
                    await read_exactly(stream, _KEY_BYTES, key)  # whom the helper says it is
                    channel, source = await answer_over(stream, self._mine)
            except LinkDown as down:
                log.debug("relayed connection failed", by=short(key), error=str(down))
                return
        link = MuxLink(channel, source, dialled=False, how="relayed", via=key)
        if self._on_link(link):
            await link.closed()

    async def close(self) -> None:
        """Let go of what is held."""
        for task in list(self._holding):
            task.cancel()
        await asyncio.gather(*self._holding, return_exceptions=True)

    async def _relay(self, key: str, stream: ByteStream, link: Link) -> None:
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
                onward = await open_on(link, RELAYED, bytes.fromhex(key))
        except (LinkDown, TimeoutError):
            await _refuse(stream, _NOT_LINKED)
            return
        try:
            await stream.write(_GOES)
            async with asyncio.TaskGroup() as copying:
                copying.create_task(self._copy(stream, onward))
                copying.create_task(self._copy(onward, stream))
        except* (GridcloudError, TimeoutError) as ended:
            log.debug("relaying ended", source=short(key), cause=str(ended.exceptions[0]))
        finally:
            onward.close()

    async def _copy(self, source: ByteStream, target: ByteStream) -> None:
        while True:
            async with asyncio.timeout(_IDLE_TIMEOUT):
                data = await source.read(_CHUNK)
            if not data:
                await target.write_eof()
                return
            if (pause := self._pause(len(data))) > 0:
                await asyncio.sleep(pause)
            async with asyncio.timeout(_IDLE_TIMEOUT):
                await target.write(data)

    def _pause(self, size: int) -> float:
        rate, now = self._neighbourhood().relay_bytes_per_second, time.monotonic()
        if rate != self._rate:
            self._bucket, self._rate = TokenBucket(rate, rate / 4, now), rate
        return self._bucket.take(size, now)

    async def _hold(self, helper: Link, link: MuxLink) -> None:
        """Count the helper's link as in use while what it carries lives."""
        with self._links.using(helper):
            await link.closed()


async def _refuse(stream: ByteStream, reason: bytes) -> None:
    await stream.write(reason)
    await stream.write_eof()
