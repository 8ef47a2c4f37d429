"""Machines without a job: how they are made, and by which leases."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the tables and columns."""
    for name in ("machine", "shape"):
        op.add_column("leases", sa.Column(name, sa.String))
        op.create_index(f"ix_leases_{name}", "leases", [name])
    op.create_table(
        "launch_events",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("lease_id", sa.String, nullable=False, index=True),
        sa.Column("at", sa.Float, nullable=False, index=True),
        sa.Column("step", sa.String, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "machine_starts",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("pending", sa.Boolean, nullable=False, index=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "machine_names",
        sa.Column("start_id", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
    )
    op.create_index("machine_starts_by_name", "machine_names", ["name"])


def downgrade() -> None:
    """Remove them."""
    for name in ("machine_names", "machine_starts", "launch_events"):
        op.drop_table(name)
    for name in ("machine", "shape"):
        op.drop_index(f"ix_leases_{name}", "leases")
        op.drop_column("leases", name)
