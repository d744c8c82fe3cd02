"""The site's own event log, `logs/events.jsonl`: what the agent refused or noticed. Never what a message carried."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path


class SiteLog:
    """Appends one JSON object a line; each line is one write, so that several processes may append."""

    def __init__(self, logs: Path) -> None:
        self._path = logs / "events.jsonl"

    def say(self, event: str, **public: str | int | bool) -> None:
        """Record an event. Fields are codes, digests and names of studies; nothing of patients or messages."""
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        line = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **public}
        data = (json.dumps(line, sort_keys=True) + "\n").encode("utf-8")
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
