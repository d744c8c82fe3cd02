"""Epsilon of 1000 heterogeneous events, cross-check included; the goal is below 5 s. Also the filter and a calibration."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from pixcell_core.private.accounting import GaussianEvent, calibrate_noise, epsilon
from pixcell_core.private.filters import BudgetFilter

DELTA = 1e-5


def events(kind: str, rng: random.Random) -> list[GaussianEvent]:
    """A thousand events: all of everybody, few settings, or every setting different and sampled."""
    if kind == "everybody, 1000 different sigmas":
        return [GaussianEvent(1.0, rng.uniform(60.0, 150.0), rng.randint(1, 20)) for _ in range(1000)]
    if kind == "40 settings, sampled or not":
        return [
            GaussianEvent(rng.choice((0.1, 0.2, 0.5, 1.0)), float(rng.randint(41, 50)), 20)
            for _ in range(1000)
        ]
    return [GaussianEvent(rng.uniform(0.01, 0.5), rng.uniform(6.0, 16.0), 1) for _ in range(1000)]


def timed(act: Callable[[], object]) -> tuple[float, object]:
    """CPU seconds and the answer."""
    start = time.process_time()
    answer = act()
    return time.process_time() - start, answer


def main() -> None:
    """Print one line for each."""
    epsilon([GaussianEvent(0.2, 4.0, 10)], DELTA)  # imports
    for kind in (
        "everybody, 1000 different sigmas",
        "40 settings, sampled or not",
        "1000 different sampled settings",
    ):
        charged = events(kind, random.Random(0))
        seconds, found = timed(lambda charged=charged: epsilon(charged, DELTA).value)
        print(
            f"1000 events, {kind}: {seconds:.2f} CPU-s (epsilon {found:.3f} per patient at delta {DELTA:g})"
        )
    budget = BudgetFilter(8.0, DELTA)
    for q, sigma in ((1.0, 300.0), (0.1, 30.0)):
        seconds, _ = timed(lambda q=q, sigma=sigma: budget.admits([GaussianEvent(q, sigma, 1)] * 10_000))
        print(f"filter, 10,000 charges of one step, q = {q:g}: {seconds:.2f} CPU-s")
        seconds, _ = timed(lambda q=q: calibrate_noise(q, 50, 8.0, DELTA))
        print(f"calibration to epsilon 8, 50 steps, q = {q:g}: {seconds:.2f} CPU-s")


if __name__ == "__main__":
    main()
