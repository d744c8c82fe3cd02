"""The hub's event log: who called what, when, and whether it was accepted. Never what the call carried."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.common.event_log_plugin import EventLogWriterPlugin

QUIET = ("send-node-heartbeat", "pull-messages", "pull-object", "push-object")
"""Calls too frequent to tell anything one by one."""


class EventLog(EventLogWriterPlugin):
    """Appends one JSON object a line. Every field is chosen here; none is copied from a message's content."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()

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

    def _write(self, fields: dict[str, Any]) -> None:
        line = json.dumps(
            {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}, sort_keys=True
        )
        with self._lock:
            self._stream.write(line + "\n")
