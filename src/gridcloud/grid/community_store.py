"""What communities remember, and a complete memory that forgets with the process.

Only plain texts pass, so that a store needs to know nothing of the grid: documents are kept as
they came, and verified by who reads them.
"""

from __future__ import annotations

from typing import Protocol


class CommunityStore(Protocol):
    """The communities a site is in. A write is kept when its method returns; all may wait."""

    async def communities(self) -> dict[str, str]:
        """Return the founding document of each community, by its identity."""
        ...

    async def save_community(self, community: str, document: str) -> None:
        """Keep a community's founding document."""
        ...

    async def forget_community(self, community: str) -> None:
        """Drop a community and its members; which invitations were used stays known."""
        ...

    async def members(self, community: str) -> dict[str, tuple[str, str]]:
        """Return each member's credential and presence document, by its key."""
        ...

    async def save_member(self, community: str, key: str, credential: str, presence: str) -> None:
        """Keep what is known of one member, in place of what was."""
        ...

    async def remove_member(self, community: str, key: str) -> None:
        """Drop a member; nothing happens if there is none."""
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
        self._members: dict[str, dict[str, tuple[str, str]]] = {}
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
        self._members.pop(community, None)

    async def members(self, community: str) -> dict[str, tuple[str, str]]:
        """See `CommunityStore`."""
        return dict(self._members.get(community, {}))

    async def save_member(self, community: str, key: str, credential: str, presence: str) -> None:
        """See `CommunityStore`."""
        self._members.setdefault(community, {})[key] = (credential, presence)

    async def remove_member(self, community: str, key: str) -> None:
        """See `CommunityStore`."""
        self._members.get(community, {}).pop(key, None)

    async def use_invitation(self, community: str, secret: str, key: str) -> str:
        """See `CommunityStore`."""
        return self._used.setdefault((community, secret), key)
