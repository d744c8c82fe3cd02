"""Processor seconds and memory of trees of processes, read from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil


def family(roots: Iterable[int]) -> list[psutil.Process]:
    """The processes of these ids with all their descendants."""
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        try:
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
        except psutil.Error:
            continue
    return list(found.values())


def cpu_seconds(roots: Iterable[int]) -> float:
    """Processor seconds, user and system, of these trees, with those of every child that was waited for."""
    total = 0.0
    for process in family(roots):
        try:
            spent = process.cpu_times()
        except psutil.Error:
            continue
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def resident_mb(roots: Iterable[int]) -> float:
    """Memory of these trees, MB; what several processes share is counted once (proportional set size)."""
    total = 0
    for process in family(roots):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


@dataclass(frozen=True)
class Lap:
    """What one round took: wall seconds, and processor seconds of each named group of processes."""

    wall: float
    cpu: dict[str, float]

    @property
    def total(self) -> float:
        """Processor seconds of all groups."""
        return sum(self.cpu.values())


@dataclass
class Meter:
    """Reads groups of process trees at every end of a round, and the peak memory of one of them meanwhile."""

    groups: dict[str, Callable[[], list[int]]]
    watched: str
    peak_mb: float = 0.0
    _last: tuple[float, dict[str, float]] | None = field(default=None, repr=False)
    laps: list[Lap] = field(default_factory=list)

    def look(self) -> None:
        """Note the memory now."""
        self.peak_mb = max(self.peak_mb, resident_mb(self.groups[self.watched]()))

    def lap(self) -> None:
        """A round ended; the first call only starts the clock."""
        now = time.monotonic(), {name: cpu_seconds(roots()) for name, roots in self.groups.items()}
        if self._last is not None:
            before, spent = self._last
            self.laps.append(Lap(now[0] - before, {name: now[1][name] - spent[name] for name in spent}))
        self._last = now
