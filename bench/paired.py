"""Paired timing: two ways of doing one thing, alternating in one process, compared by CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Median CPU seconds of ours and theirs, and the median of the paired ratios ours / theirs."""

    ours: float
    theirs: float
    ratio: float


def compare(ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 7) -> Ratio:
    """Alternate the two, after one warm-up each."""

    def cost(act: Callable[[], object]) -> float:
        start = time.process_time()
        act()
        return time.process_time() - start

    ours(), theirs()
    pairs = [(cost(ours), cost(theirs)) for _ in range(repeats)]
    return Ratio(
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def show(name: str, alternative: str, found: Ratio) -> None:
    """Print one line: ratio first."""
    print(
        f"{name}: {found.ratio:.2f} x the CPU time of {alternative} ({found.ours:.3f} s against {found.theirs:.3f} s)"
    )
