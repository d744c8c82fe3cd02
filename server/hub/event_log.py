"""The hub's event log: who called what, when, and whether it was accepted. Never what the call carried."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.common.event_log_plugin import EventLogWriterPlugin

QUIET = ("send-node-heartbeat", "pull-messages", "pull-object", "push-object")
"""Calls too frequent to tell anything one by one."""

WINDOW_S = 10.0
"""Refusals that are alike are counted for so long and told as one line."""

MAX_KINDS = 256
"""Kinds of refusal told apart in one window; the rest is counted together."""

MAX_BYTES = 16 * 1024 * 1024
KEPT_FILES = 8
"""A full log is put aside as `.1`, the one before as `.2` and so on: at most 144 MiB in all."""


class EventLog(EventLogWriterPlugin):
    """Appends one JSON object a line. Every field is chosen here; none is copied from a message's content."""

    def __init__(
        self, path: Path, max_bytes: int = MAX_BYTES, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._max_bytes, self._ticks = path, max_bytes, ticks
        self._stream = path.open("a", encoding="utf-8", buffering=1)
        self._size = path.stat().st_size
        self._lock = threading.Lock()
        self._alike: dict[tuple[str, str, str], int] = {}
        self._window_began = ticks()

    def check_plugin(self) -> None:
        """Flower's hook to check the plugin's set-up; there is nothing to check."""

    def compose_log_before_event(
        self, request: Any, context: Any, account_info: Any, method_name: str
    ) -> Any:
        """Flower's hook before a call."""
        return None

    def compose_log_after_event(
        self, request: Any, context: Any, account_info: Any, method_name: str, response: Any
    ) -> Any:
        """Flower's hook after a call."""
        method = str(method_name).rsplit("/", 1)[-1]
        failed = response is None or isinstance(response, BaseException)
        if method in QUIET and not failed:
            return None
        node = getattr(getattr(request, "node", None), "node_id", 0) or getattr(request, "node_id", 0)
        return {
            "event": "fleet-call",
            "method": method,
            "node": str(node) if isinstance(node, int) else "",
            "accepted": not failed,
        }

    def write_log(self, log_entry: Any) -> None:
        """Flower's hook to write what was composed."""
        if log_entry is not None:
            self._write(log_entry)

    def say(self, event: str, **public: str | int | bool) -> None:
        """Record an event of the hub itself."""
        self._write({"event": event, **public})

    def refuse(self, reason: str, *, party: str = "", method: str = "") -> None:
        """Record a refusal. The first of its kind in a window is told at once, the others as a number at its end."""
        kind = (reason, party, method)
        with self._lock:
            if kind not in self._alike and len(self._alike) >= MAX_KINDS:
                kind = ("others", "", "")
            first = kind not in self._alike
            self._alike[kind] = 0 if first else self._alike[kind] + 1
        if first:
            self._write(_refusal(kind))

    def tick(self, *, final: bool = False) -> None:
        """Tell what was counted in a window that is over. Called about twice a second."""
        with self._lock:
            if not final and self._ticks() - self._window_began < WINDOW_S:
                return
            counted, self._alike, self._window_began = self._alike, {}, self._ticks()
        for kind, repeats in counted.items():
            if repeats:
                self._write(_refusal(kind) | {"repeats": repeats})

    def _write(self, fields: dict[str, Any]) -> None:
        line = json.dumps(
            {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}, sort_keys=True
        )
        with self._lock:
            if self._size + len(line) > self._max_bytes:
                self._put_aside()
            self._stream.write(line + "\n")
            self._size += len(line) + 1

    def _put_aside(self) -> None:
        self._stream.close()
        for number in range(KEPT_FILES - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            if older.exists():
                older.replace(self._path.with_name(f"{self._path.name}.{number + 1}"))
        self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        self._stream = self._path.open("a", encoding="utf-8", buffering=1)
        self._size = 0


def _refusal(kind: tuple[str, str, str]) -> dict[str, Any]:
    reason, party, method = kind
    return {"event": "refused", "reason": reason, "party": party, "method": method}
