"""What cannot be promised at all: deltas too large for a cohort, targets that mean nothing, a cohort of one."""

from __future__ import annotations

import math

from pixcell_core.errors import BadInputError

LARGEST_DELTA = 1e-5
LARGEST_EPSILON = 50.0
"""A promise above it protects nobody, and accounting of that width only fills the memory."""


def largest_delta(patients: int) -> float:
    """Return the largest delta a cohort of `patients` may be reported with: min(1e-5, 1 / (10 N))."""
    return min(LARGEST_DELTA, 1.0 / (10.0 * max(1, patients)))


def check_delta(delta: float, patients: int | None = None) -> None:
    """Raise `BadInputError` unless 0 < delta <= min(1e-5, 1 / (10 N)); NaN is refused as well."""
    limit = LARGEST_DELTA if patients is None else largest_delta(patients)
    if 0.0 < delta <= limit:
        return
    told = f"A delta of {delta:g} cannot be used; it must lie above 0 and be at most {limit:g}."
    if patients is not None and delta > 1.0 / max(1, patients):
        told += (
            f" Above 1/N = {1.0 / max(1, patients):g} it would even permit to publish one of the "
            f"{patients} patients outright."
        )
    raise BadInputError(
        told, hint="Delta is the chance that the statement fails; keep it under a tenth of 1/N.", code="delta"
    )


def check_target(epsilon: float) -> None:
    """Raise `BadInputError` unless 0 < epsilon <= 50 (per patient)."""
    if not 0.0 < epsilon <= LARGEST_EPSILON:
        raise BadInputError(
            f"A target epsilon of {epsilon:g} per patient is not above 0 and at most {LARGEST_EPSILON:g}.",
            hint="Promises people act on lie between 0.5 and 10. Nothing was charged.",
            code="privacy-setting",
        )


def check_cohort(patients: int) -> None:
    """Raise `BadInputError` for a cohort of fewer than two patients: whatever is released would be about one person."""
    if patients < 2:
        raise BadInputError(
            f"A cohort of {patients} is no cohort: with fewer than two patients every release is about one person.",
            hint="Bring the slides of more patients together before planning; nothing was charged.",
            code="cohort-of-one",
        )


def check_sample_rate(sample_rate: float) -> None:
    """Raise `BadInputError` unless 0 < q <= 1."""
    if not (math.isfinite(sample_rate) and 0.0 < sample_rate <= 1.0):
        raise BadInputError(
            f"A sample rate of {sample_rate:g} is not a probability above 0.",
            hint="Give the chance with which a patient takes part in a step: above 0, at most 1 (everybody).",
            code="privacy-setting",
        )
