"""What gossip keeps of one community: its roster and offers, and what is still to be passed on."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import structlog

from gridcloud.errors import GridcloudError
from gridcloud.grid.documents import Clock, claimed_signer
from gridcloud.grid.identity import short
from gridcloud.grid.membership import Directory
from gridcloud.grid.messages import Asking, MemberRecord, NewsItem, RevocationRecord
from gridcloud.grid.news import MOST_RUMOURS, News, Rumour, SyncBody, SyncReply, Word
from gridcloud.grid.offers import OfferBook, unreadable
from gridcloud.grid.roster import Roster
from gridcloud.grid.swim import PeerState

log = structlog.get_logger()

#: A message that holds so many items which prove nothing is not read further.
_BAD_ITEMS = 8
_AT_ONCE = 64
_MOST_KEPT = 4096
_MOST_AT_ONCE = 512
#: What came by comparison is passed on only where it is little: others compare too.
_FEW = 8

Item = NewsItem | str


@dataclass
class _Entry:
    item: Item
    size: int
    left: int
    told: set[str] = field(default_factory=set)


class NewsBox:
    """News on its way: each item goes to a number of peers that grows with the logarithm of all,
    those first that were sent least lately, and to nobody twice."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def put(self, name: str, item: Item, peers: int, teller: str | None = None) -> None:
        """Pass an item on, in place of what had its name; not to who told it."""
        told = set() if teller is None else {teller}
        copies = min(peers - len(told), math.ceil(1.5 * math.log2(peers + 2)) + 2)
        self._entries.pop(name, None)
        if copies <= 0:
            return
        self._entries[name] = _Entry(item, size_of(item), copies, told)
        self._entries.move_to_end(name, last=False)
        if len(self._entries) > _MOST_KEPT:
            self._entries.popitem()

    def pick(self, peer: str, budget: int) -> tuple[list[Item], int]:
        """Return what to tell a peer now, and what is left of a budget of bytes."""
        chosen: list[Item] = []
        for name in list(self._entries)[:_MOST_AT_ONCE]:
            entry = self._entries[name]
            if peer in entry.told or entry.size > budget:
                continue
            chosen.append(entry.item)
            budget -= entry.size
            entry.told.add(peer)
            entry.left -= 1
            if entry.left > 0:
                self._entries.move_to_end(name)
            else:
                del self._entries[name]
        return chosen, budget

    def told(self, name: str, peer: str, *, drop: bool) -> None:
        """Take note that a peer knows an item already; ``drop`` to pass it on to nobody."""
        entry = self._entries.get(name)
        if entry is None:
            return
        if peer not in entry.told:
            entry.told.add(peer)
            entry.left -= 1
        if drop or entry.left <= 0:
            del self._entries[name]


class Circle:
    """One community, as far as gossip goes. ``me`` is this site's key."""

    def __init__(self, directory: Directory, roster: Roster, clock: Clock) -> None:
        self.roster = roster
        self.book = OfferBook(roster, clock)
        self._directory = directory
        self._me = directory.identity.key
        self._news = NewsBox()
        #: Peers' new states that are still to be told, and how often.
        self._rumours: OrderedDict[str, tuple[PeerState, int]] = OrderedDict()
        self.last_sync = -math.inf
        self.last_offers_sync = -math.inf
        self.announced = -math.inf

    @property
    def community(self) -> str:
        """Its identity."""
        return self.roster.community

    @property
    def others(self) -> int:
        """How many members there are besides this site."""
        return len(self.roster.members) - (self._me in self.roster.members)

    def spread(self, item: Item, teller: str | None = None) -> None:
        """Pass an item on to some members."""
        self._news.put(_name(item), item, self.others, teller)

    def rumour(self, key: str, state: PeerState) -> None:
        """Tell, with the next messages, what is thought of a peer."""
        if key in self.roster.members:
            self._rumours[key] = state, 2 + math.ceil(math.log2(self.others + 1))
            self._rumours.move_to_end(key, last=False)
            if len(self._rumours) > _MOST_KEPT:
                self._rumours.popitem()

    def word(self, asking: Asking, peer: str, budget: int) -> tuple[Word, int]:
        """Return what to tell a peer now, and what is left of a budget of bytes."""
        items, left = self._news.pick(peer, budget)
        word = Word(
            community=asking.community,
            credential=asking.credential,
            presence=asking.presence,
            members_digest=self.roster.digest(),
            offers_digest=self.book.digest(),
            news=sorted_out(items),
            rumours=self._pick_rumours(peer),
        )
        return word, left

    async def take(self, news: News, teller: str, *, pass_on: bool) -> bool:
        """Keep what is new and proved; return whether an offer was. The roster tells of its own.

        What is not proved is left out, and a message with much of that is not read to its end.
        ``pass_on`` says that all that is new is passed on; otherwise it is where it is little.
        """
        bad = 0
        for chunk in _chunks((*news.revocations, *news.members)):
            bad += await self._directory.merge(self.community, chunk)
            for item in chunk:
                self._news.told(_name(item), teller, drop=not pass_on and len(news.members) > _FEW)
            if bad >= _BAD_ITEMS:
                return False
        fresh = []
        for document in news.offers:
            try:
                if self.book.add(document) is not None:
                    fresh.append(document)
            except GridcloudError as error:
                self._blame(document, teller, error)
                bad += 1
                if bad >= _BAD_ITEMS:
                    break
        if pass_on or len(fresh) <= _FEW:
            for document in fresh:
                self.spread(document, teller)
        return bool(fresh)

    def page(self, body: SyncBody, budget: int) -> SyncReply:
        """Return a page of what differs from what an asker knows."""
        items: list[Item] = list(
            self.roster.items_in(_differing(body.members, summary_of(self.roster)))
        )
        items += self.book.documents_in(_differing(body.offers, self.book.summary()))
        chosen: list[Item] = []
        for item in items[body.offset :]:
            budget -= size_of(item)
            if chosen and budget < 0:
                break
            chosen.append(item)
        end = body.offset + len(chosen)
        return SyncReply(news=sorted_out(chosen), offset=end if end < len(items) else None)

    def _pick_rumours(self, peer: str) -> tuple[Rumour, ...]:
        chosen = []
        for key in list(self._rumours)[:MOST_RUMOURS]:
            state, left = self._rumours[key]
            if key == peer:
                continue
            chosen.append(Rumour(key=key, state=state))
            if left > 1:
                self._rumours[key] = state, left - 1
                self._rumours.move_to_end(key)
            else:
                del self._rumours[key]
        return tuple(chosen)

    def _blame(self, document: str, teller: str, error: GridcloudError) -> None:
        """Show what is wrong with an offer as its owner's problem, if the owner itself told it."""
        log.info("offer refused", teller=short(teller), cause=error.message)
        try:
            own = claimed_signer(document) == teller
        except GridcloudError:
            own = True  # no document at all: nobody else has made this up
        if own and teller in self.roster.members:
            self.book.blame(teller, unreadable(error))


def summary_of(roster: Roster) -> tuple[int, ...]:
    """Return the summary of a roster as it goes over the wire."""
    return tuple(each for _, each in sorted(roster.summary().items()))


def sorted_out(items: Iterable[Item]) -> News:
    """Return items by their kinds."""
    members, revocations, offers = [], [], []
    for item in items:
        if isinstance(item, MemberRecord):
            members.append(item)
        elif isinstance(item, RevocationRecord):
            revocations.append(item)
        else:
            offers.append(item)
    return News.model_construct(
        members=tuple(members), revocations=tuple(revocations), offers=tuple(offers)
    )


def _chunks(items: tuple[NewsItem, ...]) -> Iterator[tuple[NewsItem, ...]]:
    for begin in range(0, len(items), _AT_ONCE):
        yield items[begin : begin + _AT_ONCE]


def _differing(theirs: Iterable[int], mine: Iterable[int]) -> list[int]:
    both = zip(theirs, mine, strict=True)
    return [bucket for bucket, (one, other) in enumerate(both) if one != other]


def _name(item: Item) -> str:
    """Return what one item replaces another by."""
    if isinstance(item, str):
        return f"offer {claimed_signer(item)}"
    if isinstance(item, RevocationRecord):
        return f"revocation {item.revocation}"
    return f"member {item.credential}"


def size_of(item: Item) -> int:
    """Return about how many bytes an item takes in a message."""
    if isinstance(item, str):
        return len(item) + 3
    if isinstance(item, RevocationRecord):
        return len(item.revocation) + len(item.proof) + 40
    return len(item.credential) + len(item.presence) + 40
