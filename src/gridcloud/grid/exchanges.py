"""Exchanges between two members: what one tells the other, both ways, and what each answers.

A probe *is* the exchange: it asks whether the peer is there, and carries for each community that
both are in what the prober knows (`news`); the reply carries the same back. Where digests then
differ, what is lacking is pulled page by page (Kind.SYNC).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from typing import Any

import structlog
from pydantic import JsonValue

from gridcloud.errors import Forbidden, GridcloudError, InvalidSpec, Unavailable
from gridcloud.grid.calling import Caller
from gridcloud.grid.circles import Circle, size_of, summary_of
from gridcloud.grid.documents import Clock, sign, verify
from gridcloud.grid.identity import short
from gridcloud.grid.membership import Directory
from gridcloud.grid.messages import (
    Asking,
    DigestBody,
    Kind,
    RevocationRecord,
    decode_body,
    printable,
)
from gridcloud.grid.news import (
    MOST_WORDS,
    NEWS_BYTES,
    PAGE_BYTES,
    Alive,
    News,
    ProbeBody,
    ProbeForBody,
    ProbeReply,
    Refused,
    SyncBody,
    SyncReply,
    VouchBody,
    VouchReply,
    Word,
)
from gridcloud.grid.offers import unreadable
from gridcloud.grid.swim import SMALL, PeerState
from gridcloud.model.frozen import Frozen

log = structlog.get_logger()

_SYNC_TIMEOUT = 5.0
_HELPER_TIMEOUT = 0.8
#: Between two comparisons of a community's members, and of its offers; in large ones more.
_SYNC_EVERY, _OFFERS_EVERY = 1.0, 3.0
_MOST_PAGES = 1024
#: A whole comparison takes no longer: while it goes on, no other peer is compared with.
_LONGEST_SYNC = 120.0


class Exchanges:
    """This site's side of all exchanges.

    ``on_rumour`` is called with teller, peer and state; ``on_offer`` when a new offer was heard.
    """

    def __init__(
        self, directory: Directory, caller: Caller, clock: Clock, chance: random.Random
    ) -> None:
        self._directory = directory
        self._me = directory.identity.key
        self._caller = caller
        self._clock = clock
        self._chance = chance
        self._syncing: dict[str, asyncio.Event] = {}
        self.circles: dict[str, Circle] = {}
        self.on_rumour: Callable[[str, str, PeerState], None] = lambda teller, key, state: None
        self.on_offer: Callable[[], None] = lambda: None

    async def circle(self, community: str) -> Circle:
        """Return what is known of a community this site is in; raises `NotFound`."""
        roster = await self._directory.roster(community)
        circle = self.circles.get(community)
        if circle is None or circle.roster is not roster:
            circle = self.circles[community] = Circle(self._directory, roster, self._clock)
        return circle

    async def follow(self) -> bool:
        """Take up the communities that this site entered, and let go of those it left.

        Returns whether there were any.
        """
        before = dict(self.circles)
        communities = await self._directory.communities()
        for gone in [each for each in self.circles if each not in communities]:
            del self.circles[gone]
        for community in communities:
            await self.circle(community)
        return before != self.circles

    def shared(self, key: str) -> list[Circle]:
        """Return the communities in which a peer is a member, as this site is."""
        return [
            circle
            for _, circle in sorted(self.circles.items())
            if key in circle.roster.members and self._me in circle.roster.members
        ]

    # Asking

    async def exchange(self, key: str, timeout: float) -> tuple[str, list[Circle]]:
        """Tell a peer the news and hear its own.

        Returns why it did not take us, if so (it is there all the same), and the communities of
        which it knows something else. Raises `Unavailable` and `TimedOut` if it did not answer,
        `Forbidden` if no community is shared.
        """
        words, budget = [], NEWS_BYTES
        shared = self.shared(key)
        if not shared:
            raise Forbidden(f"No community is shared with {short(key)}.")
        if len(shared) > MOST_WORDS:
            shared = self._chance.sample(shared, MOST_WORDS)
        for circle in shared:
            asking = await self._directory.asking(circle.community)
            word, budget = circle.word(asking, key, budget)
            words.append(word)
        latest = max(
            (circle.roster.members[key] for circle in shared if key in circle.roster.members),
            key=lambda each: each.presence.issued_at,
            default=None,
        )
        if latest is None:  # it left while we wrote
            raise Forbidden(f"No community is shared with {short(key)}.")
        body = ProbeBody(words=tuple(words))
        message = await self._caller.carry(latest.address, Kind.PROBE, body, timeout)
        try:
            reply = self._caller.read(message, ProbeReply)
        except GridcloudError as error:
            return error.message, []
        return await self._hear(key, reply, {word.community for word in words})

    async def sync(self, circle: Circle, key: str) -> None:
        """Pull from a peer what differs, page by page; one at a time for each community.

        Raises what the way to the peer raises; what came until then is kept.
        """
        community = circle.community
        if community in self._syncing:
            return
        done = self._syncing[community] = asyncio.Event()
        circle.last_sync = circle.last_offers_sync = _now()
        try:
            asking = fields(await self._directory.asking(community))
            members, offers = summary_of(circle.roster), circle.book.summary()
            offset, began = 0, _now()
            for _ in range(_MOST_PAGES):
                body = SyncBody(**asking, members=members, offers=offers, offset=offset)
                peer = await self._directory.member(community, key)
                reply = await self._caller.ask(
                    peer.address, Kind.SYNC, body, SyncReply, _SYNC_TIMEOUT
                )
                if await circle.take(reply.news, key, pass_on=False):
                    self.on_offer()
                if reply.offset is None or reply.offset <= offset or reply.news == News():
                    break
                if _now() - began > _LONGEST_SYNC:
                    break  # a peer that is slow on purpose; others tell the rest
                offset = reply.offset
        finally:
            del self._syncing[community]
            done.set()

    async def settled(self, community: str) -> None:
        """Wait until nothing is being pulled of a community."""
        if (pulling := self._syncing.get(community)) is not None:
            await pulling.wait()

    async def word_through(self, helper: str, key: str, nonce: str, timeout: float) -> bool:
        """Return whether a helper brought a peer's own word, on our nonce, that it is there.

        Raises what the way to the helper raises, and `Forbidden` for another's word.
        """
        for circle in self.shared(key):
            members = circle.roster.members
            if helper not in members:
                continue
            asking = fields(await self._directory.asking(circle.community))
            body = ProbeForBody(**asking, target=key, nonce=nonce)
            reply = await self._caller.ask(
                members[helper].address, Kind.PROBE_FOR, body, VouchReply, timeout
            )
            word = verify(reply.word, Alive, key, self._clock())
            return (word.asker, word.nonce) == (self._me, nonce)
        return False

    async def ask_offer(self, circle: Circle, key: str, timeout: float) -> None:
        """Ask a member itself for what it offers; what is wrong with it is shown as its problem.

        Raises `Unavailable` and `TimedOut` if it did not answer, `NotFound` for a non-member.
        """
        member = await self._directory.member(circle.community, key)
        asking = await self._directory.asking(circle.community)
        message = await self._caller.carry(member.address, Kind.OFFERS, asking, timeout)
        try:
            reply = self._caller.read(message, DigestBody)
        except GridcloudError as error:
            circle.book.blame(key, error.message)
            return
        try:
            if circle.book.add(reply.digest, signer=key) is not None:
                circle.spread(reply.digest, key)
                self.on_offer()
        except GridcloudError as error:
            circle.book.blame(key, unreadable(error))

    # Answering

    async def answer(self, key: str, kind: Kind, body: dict[str, JsonValue]) -> Frozen:
        """Answer the request of a peer whose ``key`` is proved; raises what it is refused by."""
        match kind:
            case Kind.PROBE:
                return await self.probed(key, decode_body(body, ProbeBody))
            case Kind.PROBE_FOR:
                return await self.probe_for(key, decode_body(body, ProbeForBody))
            case Kind.VOUCH:
                return await self.vouch(key, decode_body(body, VouchBody))
            case Kind.SYNC:
                return await self.synced(key, decode_body(body, SyncBody))
        raise InvalidSpec(f"{kind} is not part of gossip.")

    async def probed(self, key: str, body: ProbeBody) -> ProbeReply:
        """Answer a probe: hear what the peer knows, and tell it what this site does.

        Raises `Forbidden` if it is, and was, no member of any of the communities it speaks of.
        """
        replies: list[Word] = []
        refused: list[Refused] = []
        first: GridcloudError | None = None
        budget = NEWS_BYTES
        _check_size(word.news for word in body.words)
        for word in {word.community: word for word in body.words}.values():
            try:
                await self._directory.admit(key, word)
            except GridcloudError as error:
                first = first or error
                refused.append(await self._refused(key, word.community, error))
                continue
            circle = await self._take(key, word)
            asking = await self._directory.asking(word.community)
            reply, budget = circle.word(asking, key, budget)
            replies.append(reply)
        if not replies and first is not None and not any(each.revocations for each in refused):
            raise first
        return ProbeReply(words=tuple(replies), refused=tuple(refused))

    async def synced(self, key: str, body: SyncBody) -> SyncReply:
        """Answer with a page of what differs from what the peer knows."""
        await self._directory.admit(key, body)
        await self._directory.asking(body.community)  # this site's record is up to date
        return (await self.circle(body.community)).page(body, PAGE_BYTES)

    async def vouch(self, key: str, body: VouchBody) -> VouchReply:
        """Give this site's word that it is there, for another member's nonce."""
        await self._directory.admit(key, body)
        await self._directory.member(body.community, body.asker)
        word = Alive(site=self._me, asker=body.asker, nonce=body.nonce, said_at=self._clock())
        return VouchReply(word=sign(self._directory.identity, word))

    async def probe_for(self, key: str, body: ProbeForBody) -> VouchReply:
        """Bring the asker the word of another member."""
        await self._directory.admit(key, body)
        member = await self._directory.member(body.community, body.target)
        asking = fields(await self._directory.asking(body.community))
        vouch = VouchBody(**asking, asker=key, nonce=body.nonce)
        try:
            return await self._caller.ask(
                member.address, Kind.VOUCH, vouch, VouchReply, _HELPER_TIMEOUT
            )
        except GridcloudError as error:
            # Why is not told: the target says where it is to be dialled, and the asker could learn
            # by it what answers in this site's network.
            raise Unavailable(f"{short(body.target)} gave this site no word.") from error

    # Inside

    async def _hear(self, key: str, reply: ProbeReply, asked: set[str]) -> tuple[str, list[Circle]]:
        problems, differing = [], []
        for refusal in reply.refused:
            problems.append(printable(refusal.problem))
            if refusal.community in asked and refusal.revocations:
                await self._directory.merge(refusal.community, refusal.revocations)
        for word in reply.words:
            if word.community not in asked:
                continue
            try:
                await self._directory.admit(key, word)
                circle = await self._take(key, word)
            except GridcloudError as error:
                problems.append(error.message)
                continue
            if _sync_due(circle, word):
                differing.append(circle)
        return " ".join(problems), differing

    async def _take(self, key: str, word: Word) -> Circle:
        """Keep a member's news, and hand its rumours on."""
        circle = await self.circle(word.community)
        if await circle.take(word.news, key, pass_on=True):
            self.on_offer()
        for rumour in word.rumours:
            if rumour.key != self._me and rumour.key in circle.roster.members:
                self.on_rumour(key, rumour.key, rumour.state)
        return circle

    async def _refused(self, key: str, community: str, error: GridcloudError) -> Refused:
        circle = self.circles.get(community)
        revocations: list[RevocationRecord] = []
        if circle is not None and circle.roster.revoked(key) is not None:
            items = circle.roster.items_of(key)
            revocations = [item for item in items if isinstance(item, RevocationRecord)][:8]
        return Refused(
            community=community, problem=str(error)[:4096], revocations=tuple(revocations)
        )


def fields(asking: Asking) -> dict[str, Any]:
    """Return what a body that extends `Asking` takes from it."""
    return {
        "community": asking.community,
        "credential": asking.credential,
        "presence": asking.presence,
    }


def _sync_due(circle: Circle, word: Word) -> bool:
    now, slower = _now(), max(1.0, circle.others / SMALL)
    if word.members_digest != circle.roster.digest():
        return now - circle.last_sync >= _SYNC_EVERY * min(5.0, slower)
    if word.offers_digest != circle.book.digest():
        return now - circle.last_offers_sync >= _OFFERS_EVERY * min(10.0, slower)
    return False


def _check_size(told: Iterable[News]) -> None:
    size = 0
    for news in told:
        size += sum(map(size_of, news.members)) + sum(map(size_of, news.revocations))
        size += sum(map(size_of, news.offers))
    if size > 2 * NEWS_BYTES:
        raise InvalidSpec(f"A probe brings {size} bytes of news; {NEWS_BYTES} are the most.")


def _now() -> float:
    return asyncio.get_running_loop().time()
