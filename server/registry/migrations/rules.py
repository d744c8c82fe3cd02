"""Rules the database keeps by itself, in the words of SQLite and of PostgreSQL."""

from __future__ import annotations

from alembic import op


def forbid(table: str, act: str, *, when: str = "", why: str) -> None:
    """Refuse `act` (UPDATE or DELETE) on rows of `table`, always or when a condition on OLD and NEW holds."""
    name = f"{table}_{act.lower()}_refused"
    condition = f" WHEN ({when})" if when else ""
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            f"CREATE TRIGGER {name} BEFORE {act} ON {table}{condition} BEGIN SELECT RAISE(ABORT, '{why}'); END"
        )
        return
    op.execute(
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"RAISE EXCEPTION '{why}' USING ERRCODE = 'integrity_constraint_violation'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {name} BEFORE {act} ON {table} FOR EACH ROW{condition} EXECUTE FUNCTION {name}()"
    )


def allow(table: str, act: str) -> None:
    """Take back what `forbid` said."""
    name = f"{table}_{act.lower()}_refused"
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"DROP TRIGGER {name}")
        return
    op.execute(f"DROP TRIGGER {name} ON {table}")
    op.execute(f"DROP FUNCTION {name}()")
