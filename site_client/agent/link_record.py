"""What the SuperNode's process knows of its link: when the hub last accepted a heartbeat, and what failed last.

One small file, `agent/link.json`, written by that process alone and read by the supervisor, `pixcell site status` and
`pixcell site doctor`. A process that lives but says nothing here is not healthy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import Document, load_document
from pixcell_core.errors import PixcellError
from site_client.agent.link_trouble import LinkTrouble

LINK_FILE = "link.json"


class LinkState(Document):
    """`accepted_at`: the last heartbeat the hub accepted. `trouble`: the last failure's code, empty once one passes."""

    schema_version: Literal["link/v1"] = "link/v1"
    process: Annotated[int, Field(ge=1)]
    started_at: AwareDatetime
    accepted_at: AwareDatetime | None = None
    heartbeats: Annotated[int, Field(ge=0)] = 0
    trouble: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{0,60}$")] = ""
    trouble_at: AwareDatetime | None = None
    failures: Annotated[int, Field(ge=0)] = 0

    def age_s(self, now: datetime) -> float | None:
        """Seconds since the hub last accepted a heartbeat; None where it never did."""
        return None if self.accepted_at is None else (now - self.accepted_at).total_seconds()

    @property
    def spoke_at(self) -> datetime:
        """When the process last wrote anything here."""
        return max(t for t in (self.started_at, self.accepted_at, self.trouble_at) if t is not None)


def read_link(agent_folder: Path) -> LinkState | None:
    """The last state written, or None where there is none or it cannot be read."""
    try:
        return load_document(LinkState, agent_folder / LINK_FILE, max_bytes=4096)
    except PixcellError:
        return None


class LinkRecorder:
    """Writes the state; safe to call from Flower's heartbeat thread and its main loop."""

    def __init__(
        self,
        agent_folder: Path,
        process: int,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path, self._clock, self._lock = agent_folder / LINK_FILE, clock, threading.Lock()
        before = read_link(agent_folder)
        self._state = LinkState(
            process=process,
            started_at=clock(),
            accepted_at=before.accepted_at if before else None,
            trouble=before.trouble if before else "",
            trouble_at=before.trouble_at if before else None,
        )
        self._write()

    def accepted(self) -> None:
        """The hub accepted a heartbeat."""
        with self._lock:
            self._set(
                accepted_at=self._clock(), heartbeats=self._state.heartbeats + 1, trouble="", failures=0
            )

    def failed(self, trouble: LinkTrouble) -> bool:
        """A request did not reach the hub; whether this is another trouble than the last one."""
        with self._lock:
            news = trouble.code != self._state.trouble
            self._set(trouble=trouble.code, trouble_at=self._clock(), failures=self._state.failures + 1)
            return news

    def _set(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)
        self._write()

    def _write(self) -> None:
        write_atomically(self._path, self._state.to_bytes(), durable=False)
