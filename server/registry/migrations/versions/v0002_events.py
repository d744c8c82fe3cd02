"""The coordinator's acts, one row each, never changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from server.registry.migrations.rules import forbid

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table of acts."""
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_events"),
    )
    forbid("events", "UPDATE", why="an act is never rewritten")
    forbid("events", "DELETE", why="an act is never removed")
