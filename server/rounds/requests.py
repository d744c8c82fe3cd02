"""What commands leave in a run's folder for its loop: waiting times at the start, and the wish that it stops.

The loop looks for the wish between two polls and between two rounds. The folder's permissions are its authentication.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import Document, load_document, parse_json, read_bounded
from pixcell_core.contracts.study import Study
from pixcell_core.errors import BadInputError
from pixcell_core.flower.pace import Pace

STOP_FILE = "stop.json"
LOOP_FILE = "loop.json"

When = Literal["now", "after-round"]


QUIET_FACTOR = 5.0


def look_pace(poll_s: float) -> Pace:
    """Pauses between two looks at the replies: `poll_s` after one came, up to five times that in silence.

    A look costs the hub some 10 ms of a processor, and a round of training may last hours.
    """
    return Pace(poll_s, QUIET_FACTOR * poll_s)


@dataclass(frozen=True)
class LoopSettings:
    """Waiting times: between polls, between two askings of a site, for the sites to become ready at all, for a round.

    While no reply comes the polls grow rarer, see `look_pace`.
    `round_timeout_s` may shorten the study's deadline for this run; None keeps it.
    """

    poll_s: float = 0.2
    ask_again_s: float = 3.0
    ready_timeout_s: float = 180.0
    round_timeout_s: float | None = None

    def timeout_of(self, study: Study) -> float:
        """Seconds a round of `study` waits. Raises `BadInputError` where that is more than the study says, or too few."""
        wanted = self.round_timeout_s
        if wanted is None:
            return study.round_timeout_s
        least = 2.0 * study.reply_grid_s
        if not max(least, 1e-3) <= wanted <= study.round_timeout_s:
            raise BadInputError(
                f"A round of {study.id} cannot wait {wanted:g} s.",
                hint=f"Give at least {least:g} s (twice the grid on which replies leave) and at most the "
                f"{study.round_timeout_s:g} s of the study, when the sites give up.",
                code="round-timeout",
            )
        return wanted

    def write(self, folder: Path) -> None:
        """Leave them for the loop that starts next."""
        write_atomically(folder / LOOP_FILE, json.dumps(asdict(self), sort_keys=True).encode())

    @classmethod
    def read(cls, folder: Path) -> LoopSettings:
        """Those that were left, or the defaults."""
        path = folder / LOOP_FILE
        return cls(**parse_json(read_bounded(path), name=path.name)) if path.is_file() else cls()


class StopWish(Document):
    """When the run is to stop: at once, or when the round in hand is committed."""

    schema_version: Literal["stop/v1"] = "stop/v1"
    when: When


class StopRequest:
    """Asks one run to stop, and tells its loop."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STOP_FILE

    def ask(self, when: When) -> None:
        """Ask; the loop obeys within a poll, or at the end of its round."""
        write_atomically(self._path, StopWish(when=when).to_bytes())

    def wanted(self) -> When | None:
        """What was asked for. A file that cannot be read is a wish all the same: to stop loses nothing."""
        if not self._path.is_file():
            return None
        try:
            return load_document(StopWish, self._path).when
        except BadInputError:
            return "now"

    def clear(self) -> None:
        """Forget it: the run stopped, or is started anew."""
        self._path.unlink(missing_ok=True)
