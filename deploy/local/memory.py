"""Watches the memory of the demonstration's processes together."""

from __future__ import annotations

import os
import threading


class MemoryWatch:
    """Samples the proportional memory of this process and all its descendants; keeps the highest, in MB."""

    def __init__(self, every_s: float = 2.0) -> None:
        self.peak_mb = 0.0
        self._every, self._done = every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process(os.getpid())
        while not self._done.wait(self._every):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    info = process.memory_full_info()
                    total += getattr(info, "pss", 0) or info.rss
                except psutil.Error:
                    continue
            self.peak_mb = max(self.peak_mb, total / 1e6)
