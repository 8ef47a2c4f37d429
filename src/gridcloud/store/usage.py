"""Sums over receipts, and what was borrowed whether or not a receipt came for it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Row,
    Select,
    func,
    literal,
    select,
    union_all,
)
from sqlalchemy.dialects.sqlite import insert

from gridcloud.model.usage import (
    Figures,
    Grouping,
    KeptReceipt,
    Loan,
    ReceiptFilter,
    ReceiptState,
    Side,
    UsageReport,
    UsageRow,
)
from gridcloud.store.database import Database
from gridcloud.store.receipts import UNSETTLED, about, matching
from gridcloud.store.schema import borrowed_loans, receipt_sums, receipts

#: How long after a loan's end its receipt is waited for.
MISSING_AFTER = timedelta(days=1)
_SUMS = ("receipts", "cpu_hours", "gb_hours", "gpu_hours", "credits")


class UsageStore:
    """Questions about all receipts at once, and the loans of this site."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def usage(self, by: Grouping, chosen: ReceiptFilter, now: datetime) -> UsageReport:
        """Return the figures of agreed receipts, and how many others there are; the filter's own
        ``states`` do not matter."""
        c = receipts.c
        chosen = chosen.model_copy(update={"states": ()})

        def work(connection: Connection) -> UsageReport:
            part = _agreed(chosen).subquery()
            group = part.c[by.value]
            where = group if by is Grouping.MONTH else part.c.community
            columns: list[ColumnElement[Any]] = [
                part.c.side,
                where.label("where"),
                group.label("group"),
                *(func.sum(part.c[name]).label(name) for name in _SUMS),
                func.min(part.c.begun).label("begun"),
                func.max(part.c.ended).label("ended"),
            ]
            query = select(*columns).group_by(part.c.side, where, group)
            found = connection.execute(query.order_by(part.c.side.desc(), where, group))
            rows = tuple(_row(row, by) for row in found)
            unsettled = matching(chosen) & UNSETTLED
            counts = select(c.state, func.count().label("number")).where(unsettled)
            number = {row.state: row.number for row in connection.execute(counts.group_by(c.state))}
            return UsageReport(
                by=by,
                since=chosen.since,
                rows=rows,
                open=number.get(ReceiptState.OPEN.value, 0),
                disputed=number.get(ReceiptState.DISPUTED.value, 0),
                missing=len(_missing(connection, chosen, now)),
            )

        return await self._database.run(work)

    async def missing(self, chosen: ReceiptFilter, now: datetime) -> list[KeptReceipt]:
        """Return the loans that ended a day ago or longer and have no receipt, oldest first."""
        return await self._database.run(lambda connection: _missing(connection, chosen, now))

    async def loan(self, lease_id: str) -> Loan | None:
        """Return what was borrowed under that lease, or None."""

        def work(connection: Connection) -> Loan | None:
            return _find(connection, lease_id)

        return await self._database.run(work)

    async def change_loan(
        self, lease_id: str, change: Callable[[Loan | None], Loan | None]
    ) -> None:
        """Keep what ``change`` makes of the loan that is known; None of nothing keeps nothing."""

        def work(connection: Connection) -> None:
            loan = change(_find(connection, lease_id))
            if loan is None:
                return
            row = {"ended": loan.ended_at.timestamp(), "value": loan.model_dump_json()}
            new = insert(borrowed_loans).values(row | {"lease_id": lease_id, "receipted": False})
            connection.execute(new.on_conflict_do_update(index_elements=["lease_id"], set_=row))

        await self._database.run(work)


def _agreed(chosen: ReceiptFilter) -> CompoundSelect[Any] | Select[Any]:
    """Return sums of agreed receipts: those kept by the month, and one by one in the month that
    ``since`` is in."""
    sums, c = receipt_sums.c, receipts.c
    whole = select(receipt_sums).where(about(sums, chosen))
    if chosen.since is None:
        return whole
    month = chosen.since.astimezone(UTC).strftime("%Y-%m")
    counted = literal(1).label("receipts")
    columns = [counted if name == "receipts" else c[name] for name, _ in sums.items()]
    agreed = c.state == ReceiptState.AGREED.value
    rest = select(*columns).where(matching(chosen), agreed, c.month == month)
    return union_all(whole.where(sums.month > month), rest)


def _find(connection: Connection, lease_id: str) -> Loan | None:
    query = select(borrowed_loans.c.value).where(borrowed_loans.c.lease_id == lease_id)
    value = connection.execute(query).scalar()
    return Loan.model_validate_json(value) if value else None


def _missing(connection: Connection, chosen: ReceiptFilter, now: datetime) -> list[KeptReceipt]:
    if chosen.side is Side.LENT or (chosen.states and ReceiptState.MISSING not in chosen.states):
        return []
    latest = (now - MISSING_AFTER).timestamp()
    c = borrowed_loans.c
    wanted: ColumnElement[bool] = ~c.receipted & (c.ended <= latest)
    if chosen.since:
        wanted &= c.ended >= chosen.since.timestamp()
    query = select(c.value).where(wanted).order_by(c.ended, c.lease_id)
    loans = [Loan.model_validate_json(row.value) for row in connection.execute(query)]
    return [
        _without_receipt(loan)
        for loan in loans
        if chosen.person in (None, loan.person) and _within(loan.community, chosen.community)
    ]


def _within(community: str, text: str | None) -> bool:
    """As `gridcloud.store.receipts.in_community`, of one value."""
    return not text or community.startswith(text if "." in text else f"{text}.")


def _without_receipt(loan: Loan) -> KeptReceipt:
    return KeptReceipt(
        side=Side.BORROWED,
        state=ReceiptState.MISSING,
        community=loan.community,
        lender=loan.lender,
        borrower="",
        site=loan.site,
        person=loan.person,
        lease_id=loan.lease_id,
        resources=loan.resources,
        begun_at=loan.starts_at,
        ended_at=loan.ended_at,
        remark="its lender has shown no receipt",
    )


def _row(row: Row[Any], by: Grouping) -> UsageRow:
    return UsageRow(
        side=Side(row.side),
        community="" if by is Grouping.MONTH else row.where,
        group=row.group,
        figures=Figures(
            receipts=row.receipts,
            cpu_hours=row.cpu_hours,
            gb_hours=row.gb_hours,
            gpu_hours=row.gpu_hours,
            credits=row.credits,
            begun_at=datetime.fromtimestamp(row.begun, UTC),
            ended_at=datetime.fromtimestamp(row.ended, UTC),
        ),
    )
