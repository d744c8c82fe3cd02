"""How often to look for something that nobody announces: soon after the last news, then less and less."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

GROWTH = 1.3
"""Each pause is so many times the one before: after t seconds of silence the next look is 0.3 t and the shortest away."""
STEP_S = 0.05


@dataclass
class Pace:
    """Pauses from `shortest_s` up to `longest_s`, in seconds."""

    shortest_s: float
    longest_s: float
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.shortest_s <= self.longest_s:
            raise ValueError("a pace needs 0 < shortest <= longest")
        self._next = self.shortest_s

    def reset(self) -> None:
        """There was news: look again soon."""
        self._next = self.shortest_s

    def pause(self) -> float:
        """Seconds to wait now; the following pause is longer."""
        now, self._next = self._next, min(self._next * GROWTH, self.longest_s)
        return now


@dataclass
class Bell:
    """A file that one process touches and another watches: cheaper than asking over HTTP, and sooner noticed.

    It carries nothing, so whoever may write it can at worst make its watcher look once more.
    """

    path: Path
    _seen: int = field(default=0, repr=False)

    def ring(self) -> None:
        """Say that there is something to look for."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            now = time.time_ns()
            os.utime(descriptor, ns=(now, now))
        finally:
            os.close(descriptor)

    def rang(self) -> bool:
        """Whether it was rung since the last asking."""
        try:
            mark = self.path.stat().st_mtime_ns
        except OSError:
            return False
        fresh, self._seen = mark != self._seen, mark
        return fresh

    def wait(self, seconds: float, sleep: Callable[[float], None] = time.sleep) -> bool:
        """Wait so long, or until it rings; returns whether it did."""
        end = time.monotonic() + seconds
        while not self.rang():
            left = end - time.monotonic()
            if left <= 0:
                return False
            sleep(min(STEP_S, left))
        return True
