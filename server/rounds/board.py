"""The state of a run for those who watch: one row, replaced whole at every change.

Committed rounds stand in rows of their own; a board that is read shows them as its history, and one that is written
leaves them out, so that the hundredth round costs no more to show than the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from pixcell_core.contracts.round import RunState, SiteState
from pixcell_core.contracts.study import Study
from server.registry.events import note_act
from server.registry.registry import Registry
from server.registry.sealed import altered, seal, unseal
from server.registry.tables import RunRow
from server.rounds.records import read_records

UNFINISHED = ("submitted", "waiting", "running")


class RunBoard:
    """Reads and writes the board of one study's run."""

    def __init__(self, registry: Registry, study_id: str) -> None:
        self._registry, self._study_id = registry, study_id

    @staticmethod
    def ids(registry: Registry) -> list[str]:
        """Ids of the studies that have a board, sorted."""
        with registry.read() as connection:
            return sorted(connection.execute(select(RunRow.study_id)).scalars())

    def read(self, *, history: bool = True) -> RunState | None:
        """The last state written, with the rounds committed by now unless they are not wanted; or None."""
        with self._registry.read() as connection:
            state, _ = self._read(connection)
            if state is None or not history:
                return state
            return state.model_copy(update={"history": tuple(read_records(connection, self._study_id))})

    def version(self) -> int:
        """How often the board was written; 0 where there is none. Cheap: for those who wait for a change."""
        with self._registry.read() as connection:
            found = connection.execute(
                select(RunRow.version).where(RunRow.study_id == self._study_id)
            ).scalar()
        return int(found or 0)

    def write(self, state: RunState, *, act: str | None = None) -> RunState:
        """Replace the state. It survives a kill of every process; a power cut may lose the last moments of it.

        `act` names what the coordinator did by it; it is then noted in the same transaction.
        """
        stamped = _stamped(state)
        try:
            self._put(_row(stamped), act)
        except IntegrityError:
            # Another process made the row between our look and our insert: now there is one to replace.
            self._put(_row(stamped), act)
        return stamped

    def change(self, change: Callable[[RunState], RunState | None]) -> RunState | None:
        """Replace the state by what `change` makes of it, if it makes something; nobody else's write comes between."""
        while True:
            with self._registry.read() as connection:
                state, version = self._read(connection)
            changed = change(state) if state is not None else None
            if changed is None:
                return None
            stamped = _stamped(changed)
            with self._registry.write(durable=False) as connection:
                ours = update(RunRow).where(RunRow.study_id == self._study_id, RunRow.version == version)
                if connection.execute(ours.values(version=version + 1, **_row(stamped))).rowcount:
                    return stamped

    def submit(self, study: Study, *, act: str = "run-submitted") -> RunState:
        """Say that a run was asked for."""
        now = datetime.now(UTC)
        state = RunState(
            study_id=study.id,
            study_digest=study.digest,
            state="submitted",
            rounds=study.rounds,
            started_at=now,
            updated_at=now,
            sites=tuple(SiteState(site=site) for site in study.sites),
        )
        return self.write(state, act=act)

    def fail_if_unfinished(self, reason: str) -> None:
        """Say that a run ended without saying so itself."""

        def fail(state: RunState) -> RunState | None:
            if state.state not in UNFINISHED:
                return None
            sites = tuple(s.model_copy(update={"training": False}) for s in state.sites)
            return state.model_copy(update={"state": "failed", "reason": reason[:500], "sites": sites})

        self.change(fail)

    def _read(self, connection: Connection) -> tuple[RunState | None, int]:
        row = connection.execute(select(RunRow.__table__).where(RunRow.study_id == self._study_id)).first()
        if row is None:
            return None, 0
        what = f"the run of {self._study_id}"
        state = unseal(RunState, row.document, row.digest, what=what)
        if state.study_id != self._study_id:
            raise altered(what)
        return state, int(row.version)

    def _put(self, row: dict[str, Any], act: str | None) -> None:
        ours = update(RunRow).where(RunRow.study_id == self._study_id)
        with self._registry.write(durable=False) as connection:
            if not connection.execute(ours.values(version=RunRow.version + 1, **row)).rowcount:
                connection.execute(insert(RunRow).values(study_id=self._study_id, version=1, **row))
            if act is not None:
                note_act(connection, act, self._study_id)


def _stamped(state: RunState) -> RunState:
    return state.model_copy(update={"updated_at": datetime.now(UTC)})


def _row(state: RunState) -> dict[str, Any]:
    return dict(seal(state.model_copy(update={"history": ()})))


class LiveBoard:
    """The running loop's own view of the board: changes fields and writes through."""

    def __init__(self, board: RunBoard, study: Study) -> None:
        self._board = board
        self._state = board.submit(study, act="run-began").model_copy(
            update={"process": os.getpid(), "state": "waiting"}
        )
        self.flush()

    @property
    def state(self) -> RunState:
        """What is shown now."""
        return self._state

    def run(self, **changes: Any) -> None:
        """Change fields of the run and write."""
        self._state = self._state.model_copy(update=changes)
        self.flush()

    def site(self, name: str, **changes: Any) -> None:
        """Change fields of one site (not written until the next `flush` or `run`)."""
        sites = tuple(s.model_copy(update=changes) if s.site == name else s for s in self._state.sites)
        self._state = self._state.model_copy(update={"sites": sites})

    def flush(self) -> None:
        """Write."""
        self._state = self._board.write(self._state)
