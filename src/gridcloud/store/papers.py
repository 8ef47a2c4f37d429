"""Signed documents, kept as they came: communities and their shelves, invitations used, grants.

Fits `gridcloud.grid.community_store.CommunityStore`, without knowing of it. A write is on disk
when its method returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, Connection, delete, or_, select
from sqlalchemy.dialects.sqlite import insert

from gridcloud.store.database import Database
from gridcloud.store.schema import papers

_COMMUNITY, _INVITATION, _GRANT = "community", "invitation", "grant"
_OF_A_MEMBER = (_COMMUNITY, "member", "revocation", "request", "waiting")
#: So many documents are written, or named to be removed, by one statement.
_AT_ONCE = 500


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
        await self._put([_row(_COMMUNITY, community, "", document)])

    async def forget_community(self, community: str) -> None:
        """Drop a community and its shelves; used invitations and grants stay known."""
        gone = papers.c.kind.in_(_OF_A_MEMBER)
        await self._delete(gone & (papers.c.community == community))

    async def read(self, shelf: str, community: str) -> dict[str, tuple[str, str]]:
        """Return what stands on a shelf: document and note, by subject."""

        def work(connection: Connection) -> dict[str, tuple[str, str]]:
            query = select(papers).where(papers.c.kind == shelf, papers.c.community == community)
            return {row.subject: (row.document, row.note) for row in connection.execute(query)}

        return await self._database.run(work)

    async def read_about(self, shelf: str, community: str, key: str) -> dict[str, tuple[str, str]]:
        """Return what stands on a shelf under ``key`` or ``key/…``: document and note, by subject.

        However many others stand there, it costs what it returns.
        """

        def work(connection: Connection) -> dict[str, tuple[str, str]]:
            query = select(papers).where(
                papers.c.kind == shelf,
                papers.c.community == community,
                or_(
                    papers.c.subject == key,
                    # "0" comes right after "/".
                    (papers.c.subject >= f"{key}/") & (papers.c.subject < f"{key}0"),
                ),
            )
            return {row.subject: (row.document, row.note) for row in connection.execute(query)}

        return await self._database.run(work)

    async def read_all(self, shelf: str) -> dict[str, dict[str, tuple[str, str]]]:
        """Return what stands on a shelf of every community that has one, by community."""

        def work(connection: Connection) -> dict[str, dict[str, tuple[str, str]]]:
            found: dict[str, dict[str, tuple[str, str]]] = {}
            for row in connection.execute(select(papers).where(papers.c.kind == shelf)):
                found.setdefault(row.community, {})[row.subject] = (row.document, row.note)
            return found

        return await self._database.run(work)

    async def save(self, shelf: str, community: str, rows: Mapping[str, tuple[str, str]]) -> None:
        """Put documents on a shelf, each in place of what was there; all of them or none."""
        values = [
            _row(shelf, community, subject, document, note)
            for subject, (document, note) in rows.items()
        ]
        await self._put(values)

    async def remove(self, shelf: str, community: str, subjects: Iterable[str]) -> None:
        """Take documents from a shelf. Idempotent."""
        names = list(subjects)
        about = (papers.c.kind == shelf) & (papers.c.community == community)
        for start in range(0, len(names), _AT_ONCE):
            await self._delete(about & papers.c.subject.in_(names[start : start + _AT_ONCE]))

    async def use_invitation(self, community: str, secret: str, key: str) -> str:
        """Mark an invitation used by ``key`` unless it was; return who used it first. Atomic."""

        def work(connection: Connection) -> str:
            row = {"kind": _INVITATION, "community": community, "subject": secret}
            new = insert(papers).values(row | {"document": key, "note": ""})
            connection.execute(new.on_conflict_do_nothing())
            return str(connection.execute(select(papers.c.document).filter_by(**row)).scalar_one())

        return await self._database.run(work)

    async def save_grant(
        self, community: str, lease_id: str, grant: str, ends_at: datetime
    ) -> None:
        """Keep what was granted, so that a request that comes twice gets the same answer."""
        await self._put([_row(_GRANT, community, lease_id, grant, _moment(ends_at))])

    async def forget_grants(self, before: datetime, keep: Iterable[str]) -> None:
        """Drop the grants that ended before a time, but those of the leases to ``keep``."""
        old = (papers.c.kind == _GRANT) & (papers.c.note != "") & (papers.c.note < _moment(before))
        await self._delete(old & papers.c.subject.not_in(list(keep)))

    async def grant(self, lease_id: str) -> str | None:
        """Return what was granted under this id, or None."""

        def work(connection: Connection) -> str | None:
            query = select(papers.c.document).filter_by(kind=_GRANT, subject=lease_id)
            document: str | None = connection.execute(query).scalar()
            return document

        return await self._database.run(work)

    async def _put(self, rows: list[dict[str, str]]) -> None:
        def work(connection: Connection) -> None:
            for start in range(0, len(rows), _AT_ONCE):
                new = insert(papers).values(rows[start : start + _AT_ONCE])
                changed = {"document": new.excluded.document, "note": new.excluded.note}
                connection.execute(
                    new.on_conflict_do_update(
                        index_elements=["kind", "community", "subject"], set_=changed
                    )
                )

        if rows:
            await self._database.run(work)

    async def _delete(self, which: ColumnElement[bool]) -> None:
        def work(connection: Connection) -> None:
            connection.execute(delete(papers).where(which))

        await self._database.run(work)


def _moment(time: datetime) -> str:
    """Return a time as text that sorts as times do."""
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _row(kind: str, community: str, subject: str, document: str, note: str = "") -> dict[str, str]:
    return {
        "kind": kind,
        "community": community,
        "subject": subject,
        "document": document,
        "note": note,
    }
