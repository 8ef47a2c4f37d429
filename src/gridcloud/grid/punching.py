"""Meeting through a third site: two sites behind NAT dial one another at the same time.

Both have a link to some third site, which sees them come from the addresses their NATs gave them.
It tells each where it sees the other. What each then sends opens its own NAT for what the other
sends, if that NAT keeps one address for all targets; where it does not, relaying is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import structlog
from pydantic import Field, ValidationError

from gridcloud.errors import InvalidSpec, Unavailable
from gridcloud.grid.addresses import parse_listen
from gridcloud.grid.identity import short
from gridcloud.grid.links import Link, LinkDown, LinkTable, broken
from gridcloud.grid.neighbourhood import Neighbourhood
from gridcloud.grid.papers import Address, Key
from gridcloud.grid.rates import Buckets
from gridcloud.grid.streams import open_on, read_to_end
from gridcloud.grid.transport import ByteStream, PeerAddress
from gridcloud.model.frozen import Frozen

log = structlog.get_logger()
_V = TypeVar("_V", bound=Frozen)

INTRODUCE, MEET, OBSERVE = "introduce", "meet", "observe"
_MAX_BYTES = 4096
_TALK_TIMEOUT = 5.0
#: Either the first few packets get through or none will.
_MEET_TIMEOUT = 8.0
_MAX_MEETINGS = 16
_PER_SECOND, _AT_ONCE = 1.0, 20.0
_MOST = 8

_Few = Annotated[tuple[Address, ...], Field(max_length=_MOST)]


class Meeting(Frozen):
    """``site`` may be found at these UDP addresses: sent to a helper, and on to whom it names."""

    site: Key
    addresses: _Few


class Places(Frozen):
    """Where a site may be found, the likeliest first; empty if it is not over UDP."""

    addresses: _Few


class Punching:
    """Introduces others, meets whom others introduce, and asks to be introduced."""

    def __init__(
        self,
        links: LinkTable,
        neighbourhood: Callable[[], Neighbourhood],
        addresses: Callable[[], tuple[str, ...]],
        dial: Callable[[PeerAddress], Awaitable[Link]],
    ) -> None:
        self._links = links
        self._neighbourhood = neighbourhood
        self._addresses = addresses
        self._dial = dial
        self._rates = Buckets(_PER_SECOND, _AT_ONCE)
        self._meetings: set[asyncio.Task[None]] = set()

    async def punch(self, target: str, helper: Link) -> Link:
        """Return a straight link to the target, met through a helper.

        Raises `Unavailable` if the helper does not introduce, or if the NATs let nothing through.
        """
        ask = Meeting(site=target, addresses=self._addresses()[:_MOST])
        places = await _ask(helper, INTRODUCE, ask, Places)
        if not places.addresses:
            raise broken(helper.key, f"it sees no UDP of {short(target)}, or of this site")
        tries = [
            asyncio.ensure_future(self._dial(PeerAddress(key=target, addresses=places.addresses))),
            asyncio.ensure_future(self._links.arrival(target)),
        ]
        try:
            async with asyncio.timeout(_MEET_TIMEOUT):
                await asyncio.wait(tries, return_when=asyncio.FIRST_COMPLETED)
            return next(one.result() for one in tries if one.done())
        except TimeoutError as error:
            raise Unavailable(
                f"{short(target)} and this site sent to one another and nothing came through.",
                hint="A NAT or firewall is in the way; a member that relays can help.",
            ) from error
        finally:
            for one in tries:
                one.cancel()
            await asyncio.gather(*tries, return_exceptions=True)

    async def observe(self, link: Link) -> str:
        """Ask a peer where it sees this site's UDP; empty if it does not, or says nonsense."""
        try:
            places = await _ask(link, OBSERVE, None, Places)
        except (LinkDown, Unavailable):
            return ""
        return next((each for each in places.addresses if _is_public(each)), "")

    async def accept_observe(self, key: str, stream: ByteStream) -> None:
        """Serve ``observe``: tell a peer where it is seen."""
        await _tell(stream, Places(addresses=self._seen(key)))

    async def accept_introduce(self, key: str, stream: ByteStream) -> None:
        """Serve ``introduce``: bring two sites together that both have a link here."""
        asked = await _hear(stream, key, Meeting)
        link = self._links.best(asked.site)
        if (
            link is None
            or not self._may_ask(key)
            or not self._neighbourhood().may_introduce(key, asked.site)
        ):
            await _tell(stream, None)
            return
        source, seen = self._seen(key), self._seen(asked.site)
        if not source or not seen:
            await _tell(stream, Places(addresses=()))
            return
        meeting = Meeting(site=key, addresses=_merged(source, asked.addresses))
        theirs: Places | None = None
        with contextlib.suppress(LinkDown, Unavailable):
            theirs = await _ask(link, MEET, meeting, Places)
        if theirs is not None and theirs.addresses:
            theirs = Places(addresses=_merged(seen, theirs.addresses))
        await _tell(stream, theirs)

    async def accept_meet(self, key: str, stream: ByteStream) -> None:
        """Serve ``meet``: dial a site that a helper names, and say where this one may be found."""
        meeting = await _hear(stream, key, Meeting)
        neighbourhood = self._neighbourhood()
        if (
            len(self._meetings) >= _MAX_MEETINGS
            or not (neighbourhood.knows(key) and neighbourhood.knows(meeting.site))
            or not self._may_ask(key)
        ):
            await _tell(stream, None)
            return
        if mine := self._addresses():
            task = asyncio.create_task(self._meet(meeting), name="meet")
            self._meetings.add(task)
            task.add_done_callback(self._meetings.discard)
        await _tell(stream, Places(addresses=mine[:_MOST]))

    async def close(self) -> None:
        """Give up the meetings under way."""
        for task in list(self._meetings):
            task.cancel()
        await asyncio.gather(*self._meetings, return_exceptions=True)

    async def _meet(self, meeting: Meeting) -> None:
        try:
            async with asyncio.timeout(_MEET_TIMEOUT):
                await self._dial(PeerAddress(key=meeting.site, addresses=meeting.addresses))
        except (TimeoutError, Unavailable) as error:
            log.debug("not met", peer=short(meeting.site), error=str(error))

    def _may_ask(self, key: str) -> bool:
        now = time.monotonic()
        return self._rates.of(key, now).try_take(1, now)

    def _seen(self, key: str) -> tuple[str, ...]:
        observed = self._links.observed(key)
        return (observed,) if observed else ()


async def _ask(link: Link, service: str, what: Frozen | None, answer: type[_V]) -> _V:
    said = what.model_dump_json().encode() if what is not None else b""
    try:
        async with asyncio.timeout(_TALK_TIMEOUT):
            stream = await open_on(link, service, said)
            try:
                await stream.write_eof()
                return await _hear(stream, link.key, answer)
            finally:
                stream.close()
    except TimeoutError as error:
        raise broken(link.key, "it did not answer in time") from error


async def _hear(stream: ByteStream, key: str, kind: type[_V]) -> _V:
    async with asyncio.timeout(_TALK_TIMEOUT):
        said = await read_to_end(stream, _MAX_BYTES, key)
    try:
        return kind.model_validate_json(said)
    except ValidationError as error:
        raise broken(key, "it declined" if not said else "it said nonsense") from error


async def _tell(stream: ByteStream, what: Frozen | None) -> None:
    """Answer and end; with nothing to decline."""
    async with asyncio.timeout(_TALK_TIMEOUT):
        if what is not None:
            await stream.write(what.model_dump_json().encode())
        await stream.write_eof()


def _merged(seen: tuple[str, ...], said: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*seen, *said]))[:_MOST]


def _is_public(address: str) -> bool:
    """Say whether it makes sense to be told that one is seen at this address."""
    try:
        host, port = parse_listen(address)
    except InvalidSpec:
        return False
    special = host.is_loopback or host.is_unspecified or host.is_multicast or host.is_link_local
    return port > 0 and not special
