"""Receipts, kept: numbered without gaps, made once for each loan, and never changed.

A write is on disk when its method returns. What a receipt says is decided by who hands it in; that
it is the next of its chain, and the only one of its loan, is decided here, within the transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    Select,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from gridcloud.errors import Conflict, NotFound
from gridcloud.model.need import Resources
from gridcloud.model.usage import KeptReceipt, ReceiptFilter, ReceiptState, Side
from gridcloud.store.database import Database
from gridcloud.store.schema import (
    borrowed_loans,
    receipt_names,
    receipt_sums,
    receipt_texts,
    receipts,
)

#: The ``previous`` of a chain's first receipt.
_NO_RECEIPT = "0" * 64
# Written out, since SQLite uses no partial index for a condition on a bound value.
_LENT = receipts.c.side == literal_column(f"'{Side.LENT}'")
UNSETTLED = receipts.c.state != literal_column(f"'{ReceiptState.AGREED}'")


class ReceiptStore:
    """All receipts of this site, of what it lent and what it borrowed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(
        self, lease_id: str, community: str, make: Callable[[int, str], KeptReceipt]
    ) -> tuple[KeptReceipt, bool]:
        """Keep the receipt of a loan that this site made, unless it has one; also say if it is new.

        ``make`` returns it when told its number and the id of the one before in that community.
        Atomic: however often it is called, and whenever the process dies, a loan has at most one
        receipt and a number is given once.
        """

        def work(connection: Connection) -> tuple[KeptReceipt, bool]:
            known = connection.execute(_whole(_LENT & (receipts.c.lease_id == lease_id))).first()
            if known:
                return _receipt(known), False
            newest = connection.execute(
                select(receipts.c.number, receipts.c.id)
                .where(_LENT, receipts.c.community == community)
                .order_by(receipts.c.number.desc())
                .limit(1)
            ).first()
            number, previous = (newest.number, newest.id) if newest else (0, _NO_RECEIPT)
            made = make(number + 1, previous)
            _insert(connection, made)
            return made, True

        return await self._database.run(work)

    async def receive(
        self, shown: KeptReceipt, decide: Callable[[Sequence[KeptReceipt]], KeptReceipt]
    ) -> KeptReceipt:
        """Keep a receipt that a lender showed, and what was decided on it; the same one twice
        gets the same decision.

        ``decide`` is handed those kept of the same lease, and those numbered the same, one lower
        and one higher in the same chain; what it raises keeps nothing.
        """

        def work(connection: Connection) -> KeptReceipt:
            known = connection.execute(_whole(receipts.c.id == shown.id)).first()
            if known:
                return _receipt(known)
            chain = (receipts.c.lender == shown.lender) & (receipts.c.community == shown.community)
            near = receipts.c.number.between(shown.number - 1, shown.number + 1)
            related = _whole(or_(receipts.c.lease_id == shown.lease_id, chain & near))
            decided = decide([_receipt(row) for row in connection.execute(related)])
            _insert(connection, decided)
            connection.execute(
                update(borrowed_loans)
                .where(borrowed_loans.c.lease_id == shown.lease_id)
                .values(receipted=True)
            )
            return decided

        return await self._database.run(work)

    async def settle(
        self, receipt_id: str, state: ReceiptState, *, countersignature: str = "", remark: str = ""
    ) -> None:
        """Note the borrower's answer to a receipt that is open; on others nothing happens."""

        def work(connection: Connection) -> None:
            is_open = receipts.c.state == ReceiptState.OPEN.value
            found = connection.execute(_whole(is_open & (receipts.c.id == receipt_id))).first()
            if found is None:
                return
            connection.execute(
                update(receipts)
                .where(receipts.c.row == found.row)
                .values(state=state.value, remark=remark)
            )
            connection.execute(
                update(receipt_texts)
                .where(receipt_texts.c.row == found.row)
                .values(countersignature=countersignature)
            )
            if state is ReceiptState.AGREED:
                _count(connection, _receipt(found))

        await self._database.run(work)

    async def waiting(self) -> list[str]:
        """Return the keys of borrowers who have not answered to some receipt."""

        def work(connection: Connection) -> list[str]:
            query = select(receipts.c.borrower).where(_open()).distinct()
            return [row.borrower for row in connection.execute(query)]

        return await self._database.run(work)

    async def open_to(self, borrower: str, after: int, most: int) -> list[tuple[int, KeptReceipt]]:
        """Return receipts a borrower has not answered to, oldest first, with growing places; those
        after the place ``after``."""

        def work(connection: Connection) -> list[tuple[int, KeptReceipt]]:
            query = _whole(_open() & (receipts.c.borrower == borrower) & (receipts.c.row > after))
            query = query.order_by(receipts.c.row).limit(most)
            return [(row.row, _receipt(row)) for row in connection.execute(query)]

        return await self._database.run(work)

    async def page(
        self, chosen: ReceiptFilter, after: int, most: int
    ) -> list[tuple[int, KeptReceipt]]:
        """Return whole receipts in the order they were kept, as `open_to` does."""

        def work(connection: Connection) -> list[tuple[int, KeptReceipt]]:
            query = _whole(matching(chosen) & (receipts.c.row > after))
            query = query.order_by(receipts.c.row).limit(most)
            return [(row.row, _receipt(row)) for row in connection.execute(query)]

        return await self._database.run(work)

    async def listed(self, chosen: ReceiptFilter, latest: int) -> list[KeptReceipt]:
        """Return the latest receipts, without their texts, oldest first."""

        def work(connection: Connection) -> list[KeptReceipt]:
            order = (receipts.c.ended.desc(), receipts.c.row.desc())
            query = select(receipts).where(matching(chosen)).order_by(*order).limit(latest)
            return [_receipt(row) for row in connection.execute(query)][::-1]

        return await self._database.run(work)

    async def count(self, chosen: ReceiptFilter) -> int:
        """Return how many receipts there are."""

        def work(connection: Connection) -> int:
            query = select(func.count()).select_from(receipts).where(matching(chosen))
            return int(connection.execute(query).scalar_one())

        return await self._database.run(work)

    async def find(self, text: str) -> KeptReceipt:
        """Return the receipt whose id begins so, or of the lease of that id.

        Raises `NotFound`, and `Conflict` if there are several.
        """

        def work(connection: Connection) -> list[KeptReceipt]:
            named = receipts.c.id.startswith(text, autoescape=True)
            query = _whole(or_(receipts.c.lease_id == text, named)).limit(9)
            return [_receipt(row) for row in connection.execute(query)]

        found = await self._database.run(work)
        if not found or not text:
            raise NotFound(f"There is no receipt {text!r}.", hint="See 'gridcloud receipts list'.")
        if len(found) > 1:
            ids = ", ".join(each.id[:16] for each in found)
            raise Conflict(f"{text!r} may be any of {ids}.", hint="Give more of it.")
        return found[0]

    async def consumed(self) -> list[tuple[str, str, str, float, float]]:
        """Return borrower, community, person, end (seconds since the epoch) and CPU-seconds of
        all that was lent."""

        def work(connection: Connection) -> list[tuple[str, str, str, float, float]]:
            c = receipts.c
            query = select(c.borrower, c.community, c.person, c.ended, c.cpu_hours * 3600)
            found = connection.execute(query.where(c.side == Side.LENT.value))
            return [tuple(row) for row in found]

        return await self._database.run(work)

    async def borrowed_from(self) -> list[tuple[str, float, float]]:
        """Return lender, end (seconds since the epoch) and CPU-seconds of all that was borrowed."""

        def work(connection: Connection) -> list[tuple[str, float, float]]:
            c = receipts.c
            query = select(c.lender, c.ended, c.cpu_hours * 3600)
            found = connection.execute(query.where(c.side == Side.BORROWED.value))
            return [tuple(row) for row in found]

        return await self._database.run(work)

    async def knows_name(self, community: str, key: str, name: str = "") -> str:
        """Return the name kept of a member if it is ``name`` (any if that is empty), else ""."""

        def work(connection: Connection) -> str:
            query = select(receipt_names.c.name).filter_by(community=community, key=key)
            if name:
                query = query.filter_by(name=name)
            return str(connection.execute(query.limit(1)).scalar() or "")

        return await self._database.run(work)

    async def save_name(self, community: str, key: str, name: str, credential: str) -> None:
        """Keep the credential that proves a member's name."""
        row = {"community": community, "key": key, "name": name, "credential": credential}
        keys = ["community", "key", "name"]

        def work(connection: Connection) -> None:
            new = upsert(receipt_names).values(row)
            connection.execute(new.on_conflict_do_update(index_elements=keys, set_=row))

        await self._database.run(work)

    async def names(self, community: str | None = None) -> list[tuple[str, str]]:
        """Return community and credential of all whose names are kept; in one community, or all."""

        def work(connection: Connection) -> list[tuple[str, str]]:
            c = receipt_names.c
            query = select(c.community, c.credential).order_by(c.community, c.key, c.name)
            if community:
                query = query.where(in_community(c.community, community))
            return [(row.community, row.credential) for row in connection.execute(query)]

        return await self._database.run(work)


def matching(chosen: ReceiptFilter) -> ColumnElement[bool]:
    """Return the condition that a row of `receipts` meets the filter."""
    found = about(receipts.c, chosen)
    if chosen.states:
        found &= receipts.c.state.in_([state.value for state in chosen.states])
    if chosen.since:
        found &= receipts.c.ended >= chosen.since.timestamp()
    return found


def about(
    columns: ReadOnlyColumnCollection[str, Column[Any]], chosen: ReceiptFilter
) -> ColumnElement[bool]:
    """Return the condition that community, person and side are those of the filter."""
    found: ColumnElement[bool] = true()
    if chosen.community:
        found &= in_community(columns.community, chosen.community)
    if chosen.person:
        found &= columns.person == chosen.person
    if chosen.side:
        found &= columns.side == chosen.side.value
    return found


def in_community(column: ColumnElement[str], text: str) -> ColumnElement[bool]:
    """Return the condition that a community is the one called so: NAME, NAME.PREFIX or NAME.KEY."""
    prefix = text if "." in text else f"{text}."
    return column.startswith(prefix, autoescape=True)


def _open() -> ColumnElement[bool]:
    return UNSETTLED & _LENT & (receipts.c.state == ReceiptState.OPEN.value)


def _whole(condition: ColumnElement[bool]) -> Select[Any]:
    texts = (receipt_texts.c.document, receipt_texts.c.countersignature)
    joined = receipts.join(receipt_texts, receipts.c.row == receipt_texts.c.row)
    return select(receipts, *texts).select_from(joined).where(condition)


def _insert(connection: Connection, receipt: KeptReceipt) -> None:
    place = connection.execute(select(func.coalesce(func.max(receipts.c.row), 0))).scalar_one() + 1
    connection.execute(insert(receipts).values(_row(receipt) | {"row": place}))
    texts = {"document": receipt.document, "countersignature": receipt.countersignature}
    connection.execute(insert(receipt_texts).values(texts | {"row": place}))
    if receipt.state is ReceiptState.AGREED:
        _count(connection, receipt)


def _count(connection: Connection, receipt: KeptReceipt) -> None:
    """Add a receipt that was just agreed to the sums."""
    row = {name: value for name, value in _row(receipt).items() if name in receipt_sums.c}
    new = upsert(receipt_sums).values(row | {"receipts": 1})
    known, more = receipt_sums.c, new.excluded
    added = ("receipts", "cpu_hours", "gb_hours", "gpu_hours", "credits")
    changes = {name: known[name] + more[name] for name in added}
    changes |= {
        "begun": func.min(known.begun, more.begun),
        "ended": func.max(known.ended, more.ended),
    }
    keys = [column.name for column in receipt_sums.primary_key]
    connection.execute(new.on_conflict_do_update(index_elements=keys, set_=changes))


def _row(receipt: KeptReceipt) -> dict[str, object]:
    figures = receipt.figures
    return {
        **receipt.model_dump(
            exclude={"document", "countersignature", "resources", "begun_at", "ended_at"}
        ),
        "side": receipt.side.value,
        "state": receipt.state.value,
        "cpus": receipt.resources.cpus,
        "memory_bytes": receipt.resources.memory_bytes,
        "gpus": receipt.resources.gpus,
        "begun": receipt.begun_at.timestamp(),
        "ended": receipt.ended_at.timestamp(),
        "month": receipt.ended_at.astimezone(UTC).strftime("%Y-%m"),
        "cpu_hours": figures.cpu_hours,
        "gb_hours": figures.gb_hours,
        "gpu_hours": figures.gpu_hours,
    }


def _receipt(row: Row[Any]) -> KeptReceipt:
    fields = row._mapping
    return KeptReceipt(
        id=fields["id"],
        side=Side(fields["side"]),
        state=ReceiptState(fields["state"]),
        number=fields["number"],
        community=fields["community"],
        lender=fields["lender"],
        borrower=fields["borrower"],
        site=fields["site"],
        person=fields["person"],
        lease_id=fields["lease_id"],
        resources=Resources(
            cpus=fields["cpus"], memory_bytes=fields["memory_bytes"], gpus=fields["gpus"]
        ),
        begun_at=datetime.fromtimestamp(fields["begun"], UTC),
        ended_at=datetime.fromtimestamp(fields["ended"], UTC),
        credits=fields["credits"],
        remark=fields["remark"],
        document=fields.get("document", ""),
        countersignature=fields.get("countersignature", ""),
    )
