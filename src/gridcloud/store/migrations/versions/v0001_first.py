"""First schema: jobs, events, leases, papers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("number", sa.Integer, nullable=False, unique=True),
        sa.Column("array_id", sa.String, index=True),
        sa.Column("state", sa.String, nullable=False, index=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("job_id", sa.String, nullable=False, index=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("role", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False, index=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "papers",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("community", sa.String, primary_key=True),
        sa.Column("subject", sa.String, primary_key=True),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False, server_default=""),
    )
    op.create_index("papers_by_community", "papers", ["kind", "community"])


def downgrade() -> None:
    """Remove the tables."""
    for name in ("papers", "leases", "events", "jobs"):
        op.drop_table(name)
