"""The state of a run for those who watch: one JSON file, replaced whole at every change."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.round import RunState, SiteState
from pixcell_core.contracts.study import Study

UNFINISHED = ("submitted", "waiting", "running")


class RunBoard:
    """Reads and writes `run.json` of one run's folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"

    def read(self) -> RunState | None:
        """The last state written, or None."""
        return load_document(RunState, self.path) if self.path.is_file() else None

    def write(self, state: RunState) -> RunState:
        """Replace the state."""
        stamped = state.model_copy(update={"updated_at": datetime.now(UTC)})
        write_atomically(self.path, stamped.to_bytes(), durable=False)
        return stamped

    def submit(self, study: Study) -> RunState:
        """Say that a run was asked for."""
        now = datetime.now(UTC)
        return self.write(
            RunState(
                study_id=study.id,
                study_digest=study.digest,
                state="submitted",
                rounds=study.rounds,
                started_at=now,
                updated_at=now,
                sites=tuple(SiteState(site=site) for site in study.sites),
            )
        )

    def fail_if_unfinished(self, reason: str) -> None:
        """Say that a run ended without saying so itself."""
        state = self.read()
        if state is not None and state.state in UNFINISHED:
            sites = tuple(s.model_copy(update={"training": False}) for s in state.sites)
            self.write(state.model_copy(update={"state": "failed", "reason": reason[:500], "sites": sites}))


class LiveBoard:
    """The running loop's own view of the board: changes fields and writes through."""

    def __init__(self, board: RunBoard, study: Study) -> None:
        self._board = board
        self._state = board.submit(study).model_copy(update={"process": os.getpid(), "state": "waiting"})
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
