"""Shows how far each site has come while the demonstration runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Board:
    """Stages with their times: a live table on a terminal, one line per event elsewhere."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}
        self._now: dict[str, str] = {}
        self._lock = threading.Lock()
        self._live: Any = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the board is on the screen."""
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(stderr=True), get_renderable=self._table, refresh_per_second=2) as live:
            self._live = live
            yield
        self._live = None

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(title=f"demonstration, {time.monotonic() - self.started:.0f} s")
        table.add_column("who")
        table.add_column("what is going on", min_width=48)
        with self._lock:
            for who, what in self._now.items():
                table.add_row(who, what)
        return table

    def say(self, who: str, what: str) -> None:
        """Note what `who` does now."""
        with self._lock:
            self._now[who] = what
        if self._live is None:
            print(f"{time.monotonic() - self.started:7.1f} s  {who:<12} {what}", file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; the time is shown in the summary."""
        self.say("stage", name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
