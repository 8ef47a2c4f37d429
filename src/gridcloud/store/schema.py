"""The tables. A value is kept whole as JSON beside the columns it is looked up by."""

from __future__ import annotations

from sqlalchemy import Column, Float, Index, Integer, MetaData, String, Table, Text

#: The newest migration; `migrations/versions` holds it and its forerunners.
REVISION = "0001"

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

leases = Table(
    "leases",
    metadata,
    Column("id", String, primary_key=True),
    Column("role", String, nullable=False),
    Column("state", String, nullable=False, index=True),
    Column("value", Text, nullable=False),
)

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
