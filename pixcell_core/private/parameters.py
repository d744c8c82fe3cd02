"""The public settings of patient-level DP-SGD, and what one run may say about itself to others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pixcell_core.errors import BadInputError


@dataclass(frozen=True)
class PrivacyParameters:
    """Settings of a private training run. All are public and fixed before any patient is looked at.

    Attributes:
        noise_multiplier: sigma, standard deviation of the noise in units of `max_grad_norm`; per step.
        max_grad_norm: C, the bound on the L2 norm of what one patient adds to one step.
        sample_rate: q, the probability with which each patient takes part in a step; 1 means all.
        steps: T, optimiser steps. Each one is charged.
        expected_patients: the divisor of the noisy sum. A constant of the study, never the count of a site:
            the count would leave with the update.
        tiles_per_patient: k, tiles chosen for one patient in one step (fewer where the patient has fewer).
        noise_draws: K, diffusion noise draws per chosen tile. More draws cost time, never privacy.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int
    expected_patients: float
    tiles_per_patient: int
    noise_draws: int

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "max_grad_norm", "expected_patients"):
            value = float(getattr(self, name))
            if not (math.isfinite(value) and value > 0.0):
                raise _unusable(name, value, "a finite number above 0")
        if not 0.0 < self.sample_rate <= 1.0:
            raise _unusable("sample_rate", self.sample_rate, "a probability above 0, at most 1")
        for name in ("steps", "tiles_per_patient", "noise_draws"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise _unusable(name, count, "a whole number of at least 1")

    @property
    def noise_standard_deviation(self) -> float:
        """Standard deviation of the noise on the sum of clipped unit gradients: sigma times C."""
        return self.noise_multiplier * self.max_grad_norm


@dataclass(frozen=True)
class PrivateRoundReport:
    """What a site may send beside its update: public settings and what follows from them, nothing measured.

    Losses, gradient norms, the number of patients drawn and the time a step took depend on patients and
    have no noise of their own. They go to `LocalStepTrace`, which stays at the site.
    """

    steps: int
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_patients: float
    trainable_parameters: int
    unit: str = "patient"
    adjacency: str = "add-or-remove-one"


@dataclass(frozen=True)
class LocalStepTrace:
    """Private diagnostics of one step. They must not leave the site: no noise protects them.

    Attributes:
        step: index from 0.
        patients_sampled: how many patients were drawn.
        mean_loss: over the sampled patients; NaN when none was drawn.
        mean_gradient_norm: of the unit gradients before clipping; NaN when none was drawn.
        clipped_fraction: share of the sampled patients whose gradient was longer than C.
        discarded: patients whose gradient was not finite or who had no tiles; they added zero.
    """

    step: int
    patients_sampled: int
    mean_loss: float
    mean_gradient_norm: float
    clipped_fraction: float
    discarded: int


def _unusable(name: str, value: object, wanted: str) -> BadInputError:
    return BadInputError(
        f"The privacy setting {name} is {value!r}; it must be {wanted}.",
        hint="Correct it in the study's privacy settings; nothing was drawn and nothing was charged.",
        code="privacy-setting",
    )
