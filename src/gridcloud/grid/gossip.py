"""Gossip: the shell that carries out what `swim` decides, tells news, and announces own offers.

Time is the event loop's, so that in a loop of virtual time all of this is a simulation. What one
site sends is bounded whatever the size of the grid: see docs/explanation/overlay.md. What is sent
and what is heard touch the same few tables, and so stand in one module of over 400 lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import structlog

from gridcloud.errors import GridcloudError, NoCapacity, TimedOut, Unavailable
from gridcloud.grid.announcing import Announcer
from gridcloud.grid.calling import Caller
from gridcloud.grid.circles import Circle
from gridcloud.grid.documents import Clock
from gridcloud.grid.exchanges import Exchanges
from gridcloud.grid.identity import short
from gridcloud.grid.lag import Lag
from gridcloud.grid.membership import Directory
from gridcloud.grid.messages import NewsItem
from gridcloud.grid.offers import PeerOffer
from gridcloud.grid.papers import split_community
from gridcloud.grid.seeing import PeerSeen, told
from gridcloud.grid.swim import (
    SMALL,
    Action,
    Changed,
    PeerState,
    Probe,
    ProbeVia,
    Speak,
    Swim,
    Tell,
)
from gridcloud.grid.transport import Transport

log = structlog.get_logger()
_T = TypeVar("_T")

#: How many peers are asked at once for what a person waits for, and how many at all.
FAN_OUT, MOST_ASKED = 16, 64
_TELL_TIMEOUT = 2.0
#: How often the owner is asked what it offers though it told of no change: it may lend by hours.
_ASK_OWNER_EVERY = 30.0
_PRUNE_EVERY = 30.0
#: For so long a site's signed word that it is there counts.
_WORD_HOLDS = timedelta(seconds=10)


class Gossip:
    """This site's part in the gossip of all its communities. `start` it, `close` it in the end.

    ``on_change`` is called when something new was learned of what peers offer, or of who is there.
    """

    def __init__(
        self,
        directory: Directory,
        caller: Caller,
        announcer: Announcer,
        clock: Clock,
        chance: random.Random,
    ) -> None:
        self._directory = directory
        self._me = directory.identity.key
        self._announcer = announcer
        self._clock = clock
        self._chance = chance
        self.swim = Swim(chance)
        self.exchanges = Exchanges(directory, caller, clock, chance)
        self._peers: set[str] = set()
        self._telling: set[str] = set()
        self._told_changes = 0
        self._members_changed = True
        self._problems: dict[str, str] = {}
        self._heard_at: dict[str, datetime] = {}
        self._listed: dict[str, tuple[object, datetime, list[PeerOffer]]] = {}
        self._wake = asyncio.Event()
        self._lag = Lag()
        self._offer_changed = True
        self._pruned = 0.0
        self._running: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None
        self.on_change: Callable[[], None] = lambda: None
        directory.on_news = self._on_news
        self.exchanges.on_rumour = self._on_rumour
        self.exchanges.on_offer = self._on_offer

    # Life

    async def start(self) -> None:
        """Begin to probe and to tell: that this site is there, to begin with."""
        await self._follow()
        await self._guarded(self._speak())
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop. Idempotent."""
        if self._running is not None:
            self._group = None  # what is heard from now on begins nothing
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
            self._running = None

    def offer_changed(self) -> None:
        """Have what this site offers announced anew, soon; called as often as one likes."""
        self._offer_changed = True
        self._wake.set()

    # What is known

    def knows(self, key: str) -> bool:
        """Say whether a key is a member of a community of this site."""
        return key in self._peers or bool(self.exchanges.shared(key))

    def peers_seen(self, transport: Transport) -> dict[str, PeerSeen]:
        """Return what is known of each peer's being there, by key."""
        found = {}
        for key in sorted(self._peers):
            records = [circle.roster.members[key] for circle in self.exchanges.shared(key)]
            heard, problem = self._heard_at.get(key), self._problems.get(key, "")
            found[key] = told(key, self.swim.seen(key), records, heard, problem, transport)
        return found

    async def offers(self, community: str) -> list[PeerOffer]:
        """Return what each lending member of a community offers; nobody is asked."""
        circle = await self.exchanges.circle(community)
        state = (circle.book, circle.book.changes, self.swim.changes, circle.roster.digest())
        known, until, listed = self._listed.get(community, (None, self._clock(), []))
        if known != state or self._clock() >= until:
            listed = circle.book.listed(self._me, self.swim.seen)
            until = circle.book.next_expiry()
            self._listed[community] = state, until, listed
        return listed

    def heard(self, key: str) -> None:
        """Take note that a peer, proved by the transport, asked something."""
        if key in self._peers:
            self._heard_at[key] = self._clock()
            self._problems.pop(key, None)
            self._confirm(key)
            self._do(self.swim.heard(key, _now()))

    # Asking for people

    async def meet(self, community: str, timeout: float) -> None:
        """Exchange news with members of a community now, and pull what is lacking.

        At most `MOST_ASKED` are asked. Who does not answer is noted and raises nothing.
        """
        await self._follow()
        self._wake.set()
        circle = await self.exchanges.circle(community)

        async def one(key: str) -> None:
            await self._exchange(key, timeout)
            await self.exchanges.settled(community)

        await self._each(list(circle.roster.members), one)

    async def refresh_offers(self, community: str, timeout: float, max_age: timedelta) -> None:
        """Ask lending members for what they offer whose word is older; at most `MOST_ASKED`.

        Who does not answer is noted and raises nothing.
        """
        circle = await self.exchanges.circle(community)
        now = self._clock()
        due = [
            offer.address.key
            for offer in await self.offers(community)
            if (at := circle.book.heard_at(offer.address.key)) is None or now - at >= max_age
        ]

        async def one(key: str) -> None:
            try:
                await self.exchanges.ask_offer(circle, key, timeout)
            except (Unavailable, TimedOut) as error:
                circle.book.silent(key, error.message)
                self._silent(key, error)
            else:
                self.heard(key)

        await self._each(due, one)

    async def announce(self, community: str) -> str:
        """Return this site's offer to a community, signed; it is passed on if it is new.

        Raises `NoCapacity` if this site may not lend there.
        """
        circle = await self.exchanges.circle(community)
        document = await self._announcer.current(community)
        circle.announced = _now()
        if document is None:
            mine = await self._directory.myself(community)
            name = split_community(community)[0]
            raise NoCapacity(f"{mine.site_name} lends nothing in {name}.")
        if circle.book.add(document) is not None:
            circle.spread(document)
        return document

    # Inside: the loop

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            while True:
                self._wake.clear()
                await self._guarded(self._follow())
                await self._guarded(self._announce_due())
                now = _now()
                self._do(self.swim.tick(now))
                pause = max(0.01, self.swim.wake_at(now) - now)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                self.swim.slowness = await self._lag.slowness(now + pause)

    async def _follow(self) -> None:
        """Follow who is a member of what."""
        if await self.exchanges.follow():
            self._members_changed = self._offer_changed = True
        if not self._members_changed:
            return
        self._members_changed = False
        keys: set[str] = set()
        for circle in self.exchanges.circles.values():
            if self._me in circle.roster.members:
                keys.update(circle.roster.members)
        keys.discard(self._me)
        for key in sorted(self._peers - keys):
            self.swim.remove(key)
            self._problems.pop(key, None)
            self._heard_at.pop(key, None)
        new = sorted(keys - self._peers)
        for key in new:
            self.swim.add(key)
        self._peers = keys
        for circle in self.exchanges.circles.values():
            for key in new:
                self._mark_word(circle, key)

    async def _announce_due(self) -> None:
        now = _now()
        if now - self._pruned >= _PRUNE_EVERY:
            self._pruned = now
            for circle in self.exchanges.circles.values():
                circle.book.prune()
        changed, self._offer_changed = self._offer_changed, False
        for circle in list(self.exchanges.circles.values()):
            since = now - circle.announced
            # In large communities less often: all that is announced reaches everybody.
            soonest = max(1.0, circle.others / SMALL)
            if since >= (soonest if changed else _ASK_OWNER_EVERY):
                await self._guarded(self._announce_and_tell(circle))
            elif changed:
                self._offer_changed = True

    async def _announce_and_tell(self, circle: Circle) -> None:
        circle.announced = _now()  # once for each time, whatever comes of it
        before = circle.book.version(self._me)
        with contextlib.suppress(NoCapacity):
            await self.announce(circle.community)
        if circle.book.version(self._me) != before:
            self.swim.news(_now())

    def _do(self, actions: Iterable[Action]) -> None:
        """Carry out what was decided, beside all else."""
        for action in actions:
            match action:
                case Probe(key, timeout):
                    self._begin(self._probe(key, timeout))
                case ProbeVia(key, helpers, timeout):
                    self._begin(self._probe_via(key, helpers, timeout))
                case Changed(key, state):
                    log.info("peer", key=short(key), state=str(state))
                    for circle in self.exchanges.circles.values():
                        circle.rumour(key, state)
                case Tell(to):
                    for key in to:
                        self._begin(self._tell(key))
                case Speak():
                    self._begin(self._speak())
        if self.swim.changes != self._told_changes:
            self._told_changes = self.swim.changes
            self.on_change()

    async def _tell(self, key: str) -> None:
        if key in self._telling:
            return
        self._telling.add(key)
        try:
            await self._exchange(key, _TELL_TIMEOUT * self.swim.slowness)
        finally:
            self._telling.discard(key)

    async def _speak(self) -> None:
        """Say anew that this site is there, to all of its communities."""
        self._directory.renew()
        for circle in list(self.exchanges.circles.values()):
            if self._me in circle.roster.members:
                await self._directory.asking(circle.community)

    def _begin(self, work: Coroutine[Any, Any, object]) -> None:
        if self._group is None:
            work.close()  # not running: it is only answered, and asked for people
            return
        self._group.create_task(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        try:
            return await work
        except GridcloudError as error:
            log.info("gossip failed", cause=error.message)
        except Exception:  # a fault of ours must cost one exchange, not all that follow
            log.exception("gossip failed")
        return None

    # Inside: what is asked of peers

    async def _probe(self, key: str, timeout: float) -> None:
        began = _now()
        answered = await self._guarded(self._exchange(key, timeout, probing=True))
        now = _now()
        if answered:
            self._do(self.swim.answered(key, now, now - began))
        else:
            self._do(self.swim.failed(key, now))
        self._wake.set()  # there is room for another

    async def _exchange(self, key: str, timeout: float, *, probing: bool = False) -> bool:
        """Tell a peer the news, hear its own, pull what differs; return whether it answered.

        ``probing`` says that the caller itself tells the state machine of it.
        """
        try:
            problem, differing = await self.exchanges.exchange(key, timeout)
        except (Unavailable, TimedOut) as error:
            self._silent(key, error)
            return False
        self._heard_at[key] = self._clock()
        self._problems[key] = problem
        self._confirm(key)
        if not probing and key in self._peers:
            self._do(self.swim.heard(key, _now()))
        for circle in differing:
            if probing:
                self._begin(self.exchanges.sync(circle, key))
            else:
                await self._guarded(self.exchanges.sync(circle, key))
        return True

    async def _probe_via(self, key: str, helpers: tuple[str, ...], timeout: float) -> None:
        """Have helpers bring the peer's word; the first that does decides."""
        nonce = f"{self._chance.getrandbits(128):032x}"
        brought = False

        async def one(helper: str) -> None:
            nonlocal brought
            if await self.exchanges.word_through(helper, key, nonce, timeout) and not brought:
                brought = True
                self._problems[key] = "not reached from here; others bring its word"
                self._do(self.swim.vouched(key, _now()))

        async with asyncio.TaskGroup() as group:
            for helper in helpers:
                group.create_task(self._guarded(one(helper)))
        if not brought:
            self._do(self.swim.unvouched(key, _now()))

    async def _each(self, keys: list[str], act: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        slots = asyncio.Semaphore(FAN_OUT)

        async def one(key: str) -> None:
            async with slots:
                await self._guarded(act(key))

        others = [key for key in keys if key != self._me]
        self._chance.shuffle(others)
        async with asyncio.TaskGroup() as group:
            for key in others[:MOST_ASKED]:
                group.create_task(one(key))

    # Inside: what is heard

    def _silent(self, key: str, error: GridcloudError) -> None:
        self._problems[key] = f"unreachable: {error.message}"
        if key in self._peers:
            self.swim.look(key)
            self._wake.set()

    def _confirm(self, key: str) -> None:
        for circle in self.exchanges.circles.values():
            circle.book.confirm(key)

    def _on_news(self, community: str, item: NewsItem) -> None:
        circle = self.exchanges.circles.get(community)
        if circle is not None:
            circle.spread(item)
            self._mark_word(circle, circle.roster.key_of(item))
            self.swim.news(_now())
        self._members_changed = True
        self._wake.set()
        self.on_change()

    def _mark_word(self, circle: Circle, key: str) -> None:
        """Take a member's presence that is a moment old for its word that it is there."""
        member = circle.roster.members.get(key)
        if (
            key in self._peers
            and member is not None
            and abs(self._clock() - member.presence.issued_at) < _WORD_HOLDS
        ):
            self._do(self.swim.spoke(key, _now()))

    def _on_rumour(self, teller: str, key: str, state: PeerState) -> None:
        if key in self._peers:
            self.swim.hint(teller, key, state, _now())
            self._wake.set()

    def _on_offer(self) -> None:
        self.on_change()


def _now() -> float:
    return asyncio.get_running_loop().time()
