"""The tables. A value is kept whole as JSON beside the columns it is looked up by."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

#: The newest migration; `migrations/versions` holds it and its forerunners.
REVISION = "0003"

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("number", Integer, nullable=False, unique=True),
    Column("array_id", String, index=True),
    Column("state", String, nullable=False, index=True),
    Column("value", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("job_id", String, nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("kind", String, nullable=False),
    Column("message", Text, nullable=False),
)

#: ``machine`` is the name of a machine without a job, ``shape`` of what was made at a cloud.
leases = Table(
    "leases",
    metadata,
    Column("id", String, primary_key=True),
    Column("role", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("value", Text, nullable=False),
    Column("machine", String, index=True),
    Column("shape", String, index=True),
)

#: How making a machine goes on.
launch_events = Table(
    "launch_events",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("lease_id", String, nullable=False, index=True),
    Column("at", Float, nullable=False, index=True),
    Column("step", String, nullable=False),
    Column("message", Text, nullable=False),
    sqlite_autoincrement=True,
)

#: Machines that were asked for; ``pending`` while some of them are neither ready nor given up.
machine_starts = Table(
    "machine_starts",
    metadata,
    Column("id", String, primary_key=True),
    Column("at", Float, nullable=False),
    Column("pending", Boolean, nullable=False, index=True),
    Column("value", Text, nullable=False),
)
#: Which machines each of them is of.
machine_names = Table(
    "machine_names",
    metadata,
    Column("start_id", String, primary_key=True),
    Column("name", String, primary_key=True),
)
Index("machine_starts_by_name", machine_names.c.name)

#: Signed documents of communities, as they came: communities, memberships, used invitations,
#: granted leases. ``community`` and ``subject`` are what a document is about.
papers = Table(
    "papers",
    metadata,
    Column("kind", String, primary_key=True),
    Column("community", String, primary_key=True),
    Column("subject", String, primary_key=True),
    Column("document", Text, nullable=False),
    Column("note", Text, nullable=False, default=""),
)
Index("papers_by_community", papers.c.kind, papers.c.community)

#: Receipts of what was lent and borrowed, without their texts: sums over all of them stay quick.
#: Times are seconds since the epoch, ``month`` is that of the end in UTC, as ``2026-05``.
receipts = Table(
    "receipts",
    metadata,
    Column("row", Integer, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("side", String, nullable=False),
    Column("state", String, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("community", String, nullable=False),
    Column("lender", String, nullable=False),
    Column("borrower", String, nullable=False),
    Column("site", String, nullable=False),
    Column("person", String, nullable=False),
    Column("lease_id", String, nullable=False, index=True),
    Column("cpus", Integer, nullable=False),
    Column("memory_bytes", BigInteger, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("begun", Float, nullable=False),
    Column("ended", Float, nullable=False, index=True),
    Column("month", String, nullable=False),
    Column("cpu_hours", Float, nullable=False),
    Column("gb_hours", Float, nullable=False),
    Column("gpu_hours", Float, nullable=False),
    Column("credits", Float, nullable=False),
    Column("remark", Text, nullable=False),
)
_lent = receipts.c.side == "lent"
_unsettled = receipts.c.state != "agreed"
Index("receipts_by_number", receipts.c.lender, receipts.c.community, receipts.c.number)
#: What makes a loan's receipt be made once, and a number be given once, whatever happens.
Index(
    "receipts_once_for_a_loan",
    receipts.c.lease_id,
    unique=True,
    sqlite_where=_lent,
    postgresql_where=_lent,
)
Index(
    "receipts_once_a_number",
    receipts.c.community,
    receipts.c.number,
    unique=True,
    sqlite_where=_lent,
    postgresql_where=_lent,
)
Index(
    "receipts_unsettled",
    receipts.c.state,
    receipts.c.borrower,
    sqlite_where=_unsettled,
    postgresql_where=_unsettled,
)

#: The signed texts of receipts.
receipt_texts = Table(
    "receipt_texts",
    metadata,
    Column("row", Integer, primary_key=True, autoincrement=False),
    Column("document", Text, nullable=False),
    Column("countersignature", Text, nullable=False),
)

#: Sums of agreed receipts by all that a usage table can be grouped by; they only ever grow.
receipt_sums = Table(
    "receipt_sums",
    metadata,
    Column("side", String, primary_key=True),
    Column("community", String, primary_key=True),
    Column("site", String, primary_key=True),
    Column("person", String, primary_key=True),
    Column("month", String, primary_key=True),
    Column("receipts", Integer, nullable=False),
    Column("cpu_hours", Float, nullable=False),
    Column("gb_hours", Float, nullable=False),
    Column("gpu_hours", Float, nullable=False),
    Column("credits", Float, nullable=False),
    Column("begun", Float, nullable=False),
    Column("ended", Float, nullable=False),
)

#: Credentials that prove the names of who is named in receipts, also once they have left.
receipt_names = Table(
    "receipt_names",
    metadata,
    Column("community", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("name", String, primary_key=True),
    Column("credential", Text, nullable=False),
)

#: What was borrowed, and whether any receipt came for it.
borrowed_loans = Table(
    "borrowed_loans",
    metadata,
    Column("lease_id", String, primary_key=True),
    Column("ended", Float, nullable=False),
    Column("receipted", Boolean, nullable=False),
    Column("value", Text, nullable=False),
)
Index("borrowed_loans_without_receipt", borrowed_loans.c.receipted, borrowed_loans.c.ended)
