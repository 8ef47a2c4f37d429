"""News: what members tell one another of their communities, as it goes over the wire.

Every item proves itself, so that anyone may pass it on; rumours prove nothing, and are taken as
such. What is said of one community stands apart from what is said of another, since each is
authorised by itself, and a peer learns only of those it shares with the teller.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar

from pydantic import Field

from gridcloud.grid.messages import Asking, Document, MemberRecord, RevocationRecord
from gridcloud.grid.papers import CommunityId, Key, Moment, Paper
from gridcloud.grid.swim import PeerState
from gridcloud.model.frozen import Frozen

#: How much news goes with one message, all communities together.
NEWS_BYTES = 64 * 1024
#: How much is sent at a time to a peer that asks for what it lacks.
PAGE_BYTES = 256 * 1024
#: Of how many communities one message tells.
MOST_WORDS = 32
#: Of how many peers one word tells a rumour.
MOST_RUMOURS = 16
#: Into how many parts what is known of a community is divided for comparison.
BUCKETS = 64
_ITEMS = 4096

Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Summary = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**64)], ...],
    Field(min_length=BUCKETS, max_length=BUCKETS),
]


class News(Frozen):
    """Signed texts: members, removals, and offers (each an `OfferDigest`)."""

    members: Annotated[tuple[MemberRecord, ...], Field(max_length=_ITEMS)] = ()
    revocations: Annotated[tuple[RevocationRecord, ...], Field(max_length=_ITEMS)] = ()
    offers: Annotated[tuple[Document, ...], Field(max_length=_ITEMS)] = ()


class Rumour(Frozen):
    """What the teller thinks of a peer: a hint."""

    key: Key
    state: PeerState


class Word(Asking):
    """What one member tells another about one community.

    ``members_digest`` and ``offers_digest`` are equal exactly where both know the same.
    """

    members_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
    offers_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
    news: News = News()
    rumours: Annotated[tuple[Rumour, ...], Field(max_length=MOST_RUMOURS)] = ()


class ProbeBody(Frozen):
    """Are you there? And what I know, of the communities we share. See `ProbeReply`."""

    words: Annotated[tuple[Word, ...], Field(min_length=1, max_length=MOST_WORDS)]


class Refused(Frozen):
    """Why the asker was not heard about one of the communities it asked for.

    If it was removed, ``revocations`` are what removed it, so that it learns of that.
    """

    community: CommunityId
    problem: Annotated[str, Field(max_length=4096)]
    revocations: Annotated[tuple[RevocationRecord, ...], Field(max_length=8)] = ()


class ProbeReply(Frozen):
    """I am; and what I know. Of each community that was asked for a word, or why not."""

    words: Annotated[tuple[Word, ...], Field(max_length=MOST_WORDS)]
    refused: Annotated[tuple[Refused, ...], Field(max_length=MOST_WORDS)] = ()


class SyncBody(Asking):
    """Send me, from the ``offset``-th on, what differs from these summaries of what I know."""

    members: Summary
    offers: Summary
    offset: Annotated[int, Field(ge=0, le=2**32)] = 0


class SyncReply(Frozen):
    """A page of it; ``offset`` is where the next begins, None where there is none."""

    news: News
    offset: Annotated[int, Field(ge=0, le=2**32)] | None = None


class ProbeForBody(Asking):
    """Ask ``target`` for its word that it is there, for me. Answered by `VouchReply`."""

    target: Key
    nonce: Nonce


class VouchBody(Asking):
    """Give your word that you are there, for ``asker``. Answered by `VouchReply`."""

    asker: Key
    nonce: Nonce


class VouchReply(Frozen):
    """A signed `Alive`."""

    word: Document


class Alive(Paper):
    """A site's word that it is there, for one asker and its nonce alone."""

    kind: ClassVar[str] = "gridcloud-alive"
    site: Key
    asker: Key
    nonce: Nonce
    said_at: Moment

    @property
    def signer(self) -> str:
        """The site itself."""
        return self.site

    @property
    def begins_at(self) -> datetime:
        """When it was said."""
        return self.said_at
