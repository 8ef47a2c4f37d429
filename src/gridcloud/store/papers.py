"""Signed documents, kept as they came: communities, members, used invitations, granted leases.

Fits `gridcloud.grid.community_store.CommunityStore`, without knowing of it. A write is on disk
when its method returns.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from gridcloud.store.database import Database
from gridcloud.store.schema import papers

_COMMUNITY, _MEMBER, _INVITATION, _GRANT = "community", "member", "invitation", "grant"


class PaperStore:
    """Documents by kind, community and subject."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def communities(self) -> dict[str, str]:
        """Return the founding document of each community, by its identity."""

        def work(connection: Connection) -> dict[str, str]:
            query = select(papers).where(papers.c.kind == _COMMUNITY)
            return {row.community: row.document for row in connection.execute(query)}

        return await self._database.run(work)

    async def save_community(self, community: str, document: str) -> None:
        """Keep a community's founding document."""
        await self._put(_COMMUNITY, community, "", document)

    async def forget_community(self, community: str) -> None:
        """Drop a community and its members; used invitations and grants stay known."""
        gone = papers.c.kind.in_([_COMMUNITY, _MEMBER])
        await self._delete(gone & (papers.c.community == community))

    async def members(self, community: str) -> dict[str, tuple[str, str]]:
        """Return each member's credential and presence document, by its key."""

        def work(connection: Connection) -> dict[str, tuple[str, str]]:
            query = select(papers).where(papers.c.kind == _MEMBER, papers.c.community == community)
            return {row.subject: (row.document, row.note) for row in connection.execute(query)}

        return await self._database.run(work)

    async def save_member(self, community: str, key: str, credential: str, presence: str) -> None:
        """Keep what is known of one member, in place of what was."""
        await self._put(_MEMBER, community, key, credential, presence)

    async def remove_member(self, community: str, key: str) -> None:
        """Drop a member. Idempotent."""
        about = (papers.c.community == community) & (papers.c.subject == key)
        await self._delete((papers.c.kind == _MEMBER) & about)

    async def use_invitation(self, community: str, secret: str, key: str) -> str:
        """Mark an invitation used by ``key`` unless it was; return who used it first. Atomic."""

        def work(connection: Connection) -> str:
            row = {"kind": _INVITATION, "community": community, "subject": secret}
            new = insert(papers).values(row | {"document": key, "note": ""})
            connection.execute(new.on_conflict_do_nothing())
            return str(connection.execute(select(papers.c.document).filter_by(**row)).scalar_one())

        return await self._database.run(work)

    async def save_grant(self, community: str, lease_id: str, grant: str) -> None:
        """Keep what was granted, so that a request that comes twice gets the same answer."""
        await self._put(_GRANT, community, lease_id, grant)

    async def grant(self, lease_id: str) -> str | None:
        """Return what was granted under this id, or None."""

        def work(connection: Connection) -> str | None:
            query = select(papers.c.document).filter_by(kind=_GRANT, subject=lease_id)
            document: str | None = connection.execute(query).scalar()
            return document

        return await self._database.run(work)

    async def _put(
        self, kind: str, community: str, subject: str, document: str, note: str = ""
    ) -> None:
        row = {
            "kind": kind,
            "community": community,
            "subject": subject,
            "document": document,
            "note": note,
        }

        def work(connection: Connection) -> None:
            connection.execute(
                insert(papers)
                .values(row)
                .on_conflict_do_update(index_elements=["kind", "community", "subject"], set_=row)
            )

        await self._database.run(work)

    async def _delete(self, which: ColumnElement[bool]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(delete(papers).where(which))

        await self._database.run(work)
