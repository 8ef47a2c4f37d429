"""Receipts, their texts, sums and names, and what was borrowed."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "receipts",
        sa.Column("row", sa.Integer, primary_key=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("side", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("community", sa.String, nullable=False),
        sa.Column("lender", sa.String, nullable=False),
        sa.Column("borrower", sa.String, nullable=False),
        sa.Column("site", sa.String, nullable=False),
        sa.Column("person", sa.String, nullable=False),
        sa.Column("lease_id", sa.String, nullable=False, index=True),
        sa.Column("cpus", sa.Integer, nullable=False),
        sa.Column("memory_bytes", sa.BigInteger, nullable=False),
        sa.Column("gpus", sa.Integer, nullable=False),
        sa.Column("begun", sa.Float, nullable=False),
        sa.Column("ended", sa.Float, nullable=False, index=True),
        sa.Column("month", sa.String, nullable=False),
        sa.Column("cpu_hours", sa.Float, nullable=False),
        sa.Column("gb_hours", sa.Float, nullable=False),
        sa.Column("gpu_hours", sa.Float, nullable=False),
        sa.Column("credits", sa.Float, nullable=False),
        sa.Column("remark", sa.Text, nullable=False),
    )
    lent, unsettled = sa.text("side = 'lent'"), sa.text("state != 'agreed'")
    op.create_index("receipts_by_number", "receipts", ["lender", "community", "number"])
    for name, columns in (
        ("receipts_once_for_a_loan", ["lease_id"]),
        ("receipts_once_a_number", ["community", "number"]),
    ):
        op.create_index(
            name, "receipts", columns, unique=True, sqlite_where=lent, postgresql_where=lent
        )
    op.create_index(
        "receipts_unsettled",
        "receipts",
        ["state", "borrower"],
        sqlite_where=unsettled,
        postgresql_where=unsettled,
    )
    op.create_table(
        "receipt_texts",
        sa.Column("row", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("countersignature", sa.Text, nullable=False),
    )
    op.create_table(
        "receipt_sums",
        *(
            sa.Column(name, sa.String, primary_key=True)
            for name in ("side", "community", "site", "person", "month")
        ),
        sa.Column("receipts", sa.Integer, nullable=False),
        *(
            sa.Column(name, sa.Float, nullable=False)
            for name in ("cpu_hours", "gb_hours", "gpu_hours", "credits", "begun", "ended")
        ),
    )
    op.create_table(
        "receipt_names",
        sa.Column("community", sa.String, primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("credential", sa.Text, nullable=False),
    )
    op.create_table(
        "borrowed_loans",
        sa.Column("lease_id", sa.String, primary_key=True),
        sa.Column("ended", sa.Float, nullable=False),
        sa.Column("receipted", sa.Boolean, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_index("borrowed_loans_without_receipt", "borrowed_loans", ["receipted", "ended"])


def downgrade() -> None:
    """Remove the tables."""
    for name in ("borrowed_loans", "receipt_names", "receipt_sums", "receipt_texts", "receipts"):
        op.drop_table(name)
