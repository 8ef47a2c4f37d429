"""What communities remember, and a complete memory that forgets with the process.

Only plain texts pass, so that a store needs to know nothing of the grid: documents are kept as
they came, and verified by who reads them. They stand on *shelves*; on a shelf each has a subject,
and beside the document a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Protocol

#: By subject, the document and its note.
Rows = Mapping[str, tuple[str, str]]


class Shelf(StrEnum):
    """What is kept of a community, and what document and note are.

    ``MEMBER``: credential and presence. ``REVOCATION``: revocation and its proof. ``REQUEST``: who
    asks to be admitted, by key: the invitation, and what was said and decided. ``WAITING``: where
    this site itself waits to be admitted.
    """

    MEMBER = "member"
    REVOCATION = "revocation"
    REQUEST = "request"
    WAITING = "waiting"


class CommunityStore(Protocol):
    """The communities a site is in. A write is kept when its method returns; all may wait."""

    async def communities(self) -> dict[str, str]:
        """Return the founding document of each community, by its identity."""
        ...

    async def save_community(self, community: str, document: str) -> None:
        """Keep a community's founding document."""
        ...

    async def forget_community(self, community: str) -> None:
        """Drop a community and its shelves; which invitations were used stays known."""
        ...

    async def read(self, shelf: str, community: str) -> dict[str, tuple[str, str]]:
        """Return what stands on a shelf: document and note, by subject."""
        ...

    async def read_all(self, shelf: str) -> dict[str, dict[str, tuple[str, str]]]:
        """Return what stands on a shelf of every community that has one, by community."""
        ...

    async def save(self, shelf: str, community: str, rows: Rows) -> None:
        """Put documents on a shelf, each in place of what was there; all of them or none."""
        ...

    async def remove(self, shelf: str, community: str, subjects: Iterable[str]) -> None:
        """Take documents from a shelf; those that are not there are no error."""
        ...

    async def use_invitation(self, community: str, secret: str, key: str) -> str:
        """Mark an invitation used by ``key`` unless it was before; return who used it first.

        Atomic: of any number of callers, in any processes, all get the same answer.
        """
        ...


class MemoryCommunityStore:
    """See `CommunityStore`; nothing outlives the object."""

    def __init__(self) -> None:
        self._communities: dict[str, str] = {}
        self._shelves: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
        self._used: dict[tuple[str, str], str] = {}

    async def communities(self) -> dict[str, str]:
        """See `CommunityStore`."""
        return dict(self._communities)

    async def save_community(self, community: str, document: str) -> None:
        """See `CommunityStore`."""
        self._communities[community] = document

    async def forget_community(self, community: str) -> None:
        """See `CommunityStore`."""
        self._communities.pop(community, None)
        for shelf in Shelf:
            self._shelves.pop((shelf.value, community), None)

    async def read(self, shelf: str, community: str) -> dict[str, tuple[str, str]]:
        """See `CommunityStore`."""
        return dict(self._shelves.get((str(shelf), community), {}))

    async def read_all(self, shelf: str) -> dict[str, dict[str, tuple[str, str]]]:
        """See `CommunityStore`."""
        return {c: dict(rows) for (s, c), rows in self._shelves.items() if s == shelf and rows}

    async def save(self, shelf: str, community: str, rows: Rows) -> None:
        """See `CommunityStore`."""
        self._shelves.setdefault((str(shelf), community), {}).update(rows)

    async def remove(self, shelf: str, community: str, subjects: Iterable[str]) -> None:
        """See `CommunityStore`."""
        for subject in subjects:
            self._shelves.get((str(shelf), community), {}).pop(subject, None)

    async def use_invitation(self, community: str, secret: str, key: str) -> str:
        """See `CommunityStore`."""
        return self._used.setdefault((community, secret), key)
