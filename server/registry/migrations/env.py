"""Runs the migrations on the connection it is given; the caller owns the transaction."""

from __future__ import annotations

from alembic import context

from server.registry.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
