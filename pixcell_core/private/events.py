"""What is charged: uses of the Gaussian mechanism, each with its public settings, and nothing about who was in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pixcell_core.errors import BadInputError


@dataclass(frozen=True)
class GaussianEvent:
    """`steps` uses of a Gaussian mechanism of noise multiplier sigma on a Poisson(q) sample of the patients.

    Raises:
        BadInputError: q outside (0, 1], sigma not finite and above 0, fewer steps than 1.
    """

    sample_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 < self.sample_rate <= 1.0:
            raise _bad(
                f"A sample rate of {self.sample_rate} is not a probability above 0.",
                "Give the chance with which a patient takes part in a step: above 0, at most 1 (everybody).",
            )
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0.0):
            raise _bad(
                f"A noise multiplier of {self.noise_multiplier} gives no privacy that could be stated.",
                "Give a finite number above 0; `pixcell private plan` finds the one a target needs.",
            )
        if self.steps < 1:
            raise _bad(f"An event of {self.steps} steps charges nothing.", "Give at least 1 step.")


def group_events(events: Sequence[GaussianEvent]) -> list[GaussianEvent]:
    """Return one event per (q, sigma) with the steps added up; composition does not depend on order."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.sample_rate, event.noise_multiplier)
        steps[key] = steps.get(key, 0) + event.steps
    return [GaussianEvent(q, sigma, count) for (q, sigma), count in sorted(steps.items())]


def total_mu_squared(events: Sequence[GaussianEvent]) -> float:
    """Return the sum of T / sigma^2, every step counted as if all patients took part; correctly rounded.

    Grouped first: a charge taken step by step and the same charge taken at once give the same number to the last bit.
    """
    return math.fsum(e.steps / e.noise_multiplier**2 for e in group_events(events))


def _bad(message: str, hint: str) -> BadInputError:
    return BadInputError(message, hint=f"{hint} Nothing was charged.", code="privacy-setting")
