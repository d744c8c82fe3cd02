"""Sites, studies, heads, runs and rounds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from server.registry.migrations.rules import forbid

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables of documents, and the rules about what is written once."""
    op.create_table(
        "sites",
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("node_key_digest", sa.String(), nullable=False),
        sa.Column("approval_key_digest", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("site", name="pk_sites"),
        sa.UniqueConstraint("node_key_digest", name="uq_sites_node_key_digest"),
        sa.UniqueConstraint("approval_key_digest", name="uq_sites_approval_key_digest"),
    )
    op.create_table(
        "studies",
        sa.Column("study_id", sa.String(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("study_id", name="pk_studies"),
        sa.UniqueConstraint("digest", name="uq_studies_digest"),
    )
    op.create_table(
        "heads",
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("site", name="pk_heads"),
    )
    op.create_table(
        "runs",
        sa.Column("study_id", sa.String(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("study_id", name="pk_runs"),
    )
    op.create_table(
        "rounds",
        sa.Column("study_id", sa.String(), nullable=False),
        sa.Column("round", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("previous", sa.String(), nullable=True),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("study_id", "round", name="pk_rounds"),
        sa.ForeignKeyConstraint(["previous"], ["rounds.digest"], name="fk_rounds_previous"),
        sa.UniqueConstraint("digest", name="uq_rounds_digest"),
        sa.UniqueConstraint("study_id", "previous", name="uq_rounds_study_id_previous"),
    )
    forbid("studies", "UPDATE", why="a study is never replaced")
    forbid("studies", "DELETE", why="a study is never removed")
    forbid("rounds", "UPDATE", why="a committed round is never replaced")
    forbid("rounds", "DELETE", why="a committed round is never removed")
    forbid("heads", "UPDATE", when="NEW.sequence < OLD.sequence", why="a head never goes back")
    forbid("heads", "DELETE", why="a head is never forgotten")
