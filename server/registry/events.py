"""The coordinator's acts, in the order in which they became true: when, what, and about whom. Nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, func, insert, select

from server.registry.registry import Registry
from server.registry.tables import EventRow

MAX_TEXT = 200


@dataclass(frozen=True)
class Act:
    """One act. `number` grows with time; numbers may be left out, never used twice."""

    number: int
    at: datetime
    kind: str
    subject: str


def note_act(connection: Connection, kind: str, subject: str) -> None:
    """Add an act in the transaction that makes it true: both are there, or neither."""
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")
    connection.execute(insert(EventRow).values(at=moment, kind=kind[:MAX_TEXT], subject=subject[:MAX_TEXT]))


class ActLog:
    """Reads the acts, and adds those that change nothing else."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def note(self, kind: str, subject: str) -> None:
        """Add an act; it survives a power cut when this returns."""
        with self._registry.write() as connection:
            note_act(connection, kind, subject)

    def newest(self) -> int:
        """Number of the newest act; 0 where there is none."""
        with self._registry.read() as connection:
            return int(connection.execute(select(func.max(EventRow.id))).scalar() or 0)

    def since(self, number: int = 0, limit: int = 10_000) -> list[Act]:
        """Acts after `number`, oldest first, at most `limit`."""
        wanted = select(EventRow.id, EventRow.at, EventRow.kind, EventRow.subject)
        with self._registry.read() as connection:
            rows = connection.execute(
                wanted.where(EventRow.id > number).order_by(EventRow.id).limit(limit)
            ).all()
        return [Act(row.id, datetime.fromisoformat(row.at), row.kind, row.subject) for row in rows]
