"""The exact privacy of two Gaussian steps when the second is chosen by what the first one released.

Independent of every accountant: densities on a grid, in float64. The transcript is (y, choice(y), z). Against the
likelihood ratio threshold exp(epsilon) the best choice after y is the one with the largest remaining hockey-stick
divergence, so that::

    delta = E_P[ max over choices c of H_c(epsilon - loss(y)) ],   H_c(t) = E_P[(1 - exp(t - loss_c))+]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pixcell_core.private.events import GaussianEvent

Array = NDArray[np.float64]


def log_densities(event: GaussianEvent, points: Array) -> tuple[Array, Array]:
    """Log densities of one step's output with the patient (a mixture) and without (centred)."""
    q, sigma = event.sample_rate, event.noise_multiplier
    without = -0.5 * (points / sigma) ** 2 - math.log(sigma * math.sqrt(2 * math.pi))
    shifted = (points - 0.5) / sigma**2
    ratio = shifted if q == 1.0 else np.logaddexp(math.log1p(-q), math.log(q) + shifted)
    return ratio + without, without


def hockey_stick(event: GaussianEvent, thresholds: Array) -> Array:
    """H(t) of one step, for each t of `thresholds`."""
    sigma = event.noise_multiplier
    points = np.linspace(-12 * sigma, 12 * sigma + 1, 4001)
    with_patient, without = (np.exp(d) for d in log_densities(event, points))
    width = points[1] - points[0]
    return np.array([np.maximum(with_patient - math.exp(t) * without, 0).sum() * width for t in thresholds])


def adaptive_delta(first: GaussianEvent, choices: Sequence[GaussianEvent], epsilon: float) -> float:
    """The smallest delta that is true at `epsilon`, for the adversary who picks the second step or stops."""
    sigma = first.noise_multiplier
    points = np.linspace(-12 * sigma, 12 * sigma + 1, 4001)
    with_patient, without = log_densities(first, points)
    loss = with_patient - without
    thresholds = np.linspace(epsilon - loss.max(), epsilon - loss.min(), 300)
    best = np.maximum(0.0, 1.0 - np.exp(thresholds))
    for choice in choices:
        best = np.maximum(best, hockey_stick(choice, thresholds))
    width = points[1] - points[0]
    return float((np.exp(with_patient) * np.interp(epsilon - loss, thresholds, best)).sum() * width)
