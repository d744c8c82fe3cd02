"""The signal model against a simulation of clipped, noised, averaged steps, and its closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pixcell_core.private.closed_form import gaussian_mu
from pixcell_core.private.usefulness import patients_needed, update_quality

SETTING = {
    "noise_multiplier": 4.0,
    "steps": 20,
    "sample_rate": 1.0,
    "patients": 60,
    "parameters": 400,
    "sites": 3,
}


def simulated_cosine(
    *, noise_multiplier: float, consensus: float, divisor: float, repeats: int = 200
) -> float:
    """Mean cosine between sums of noisy and of clean steps: unit patients that share one direction, C = 0.5."""
    rng = np.random.default_rng(5)
    n, d, steps, sites, norm = (
        SETTING["patients"],
        SETTING["parameters"],
        SETTING["steps"],
        SETTING["sites"],
        0.5,
    )
    shared = np.zeros(int(d))
    shared[0] = 1.0
    found = []
    for _ in range(repeats):
        # The patient's own part is left out: it is signal of this cohort, and the noise is what is measured.
        clean = steps * norm * consensus * n / divisor * shared
        spread = noise_multiplier * norm / divisor * math.sqrt(steps / sites)
        noisy = clean + spread * rng.standard_normal(int(d))
        found.append(float(noisy @ clean / (np.linalg.norm(noisy) * np.linalg.norm(clean))))
    return float(np.mean(found))


@pytest.mark.parametrize("sigma", (1.0, 4.0, 16.0))
@pytest.mark.parametrize("divisor", (60.0, 25.0))
def test_the_cosine_is_what_a_simulation_finds(sigma: float, divisor: float) -> None:
    found = update_quality(**{**SETTING, "noise_multiplier": sigma}, consensus=0.4, divisor=divisor)  # type: ignore[arg-type]
    expected = simulated_cosine(noise_multiplier=sigma, consensus=0.4, divisor=divisor)
    assert found.cosine == pytest.approx(expected, abs=0.02)


def test_a_wrong_power_of_the_dimension_would_be_noticed() -> None:
    found = update_quality(**{**SETTING, "noise_multiplier": 16.0}, consensus=0.4)  # type: ignore[arg-type]
    wrong = found.snr * SETTING["parameters"] ** 0.25
    expected = simulated_cosine(noise_multiplier=16.0, consensus=0.4, divisor=60.0)
    assert found.cosine == pytest.approx(expected, abs=0.02)
    assert abs(wrong / math.sqrt(1 + wrong**2) - expected) > 0.1


def test_steps_cancel_where_everybody_takes_part() -> None:
    mu = gaussian_mu(8.0, 1e-5)
    snr = {
        steps: update_quality(
            **{**SETTING, "steps": steps, "noise_multiplier": math.sqrt(steps) / mu},
            consensus=0.4,  # type: ignore[arg-type]
        ).snr
        for steps in (1, 20, 500)
    }
    expected = 0.4 * mu * 60 * math.sqrt(3) / math.sqrt(400)
    assert all(value == pytest.approx(expected) for value in snr.values())


def test_the_noise_per_coordinate_is_sigma_over_the_divisor() -> None:
    assert update_quality(**SETTING, divisor=40.0).noise_per_coordinate == 0.1  # type: ignore[arg-type]
    sampled = update_quality(**{**SETTING, "sample_rate": 0.25})  # type: ignore[arg-type]
    assert sampled.noise_per_coordinate == pytest.approx(4.0 / 15.0)


@pytest.mark.parametrize("cosine", (0.3, 0.7, 0.9))
def test_the_patients_needed_are_just_enough(cosine: float) -> None:
    settings = {k: v for k, v in SETTING.items() if k != "patients"}
    needed = patients_needed(**settings, consensus=0.2, cosine=cosine)  # type: ignore[arg-type]
    reached = update_quality(**settings, patients=needed, consensus=0.2)  # type: ignore[arg-type]
    short = update_quality(**settings, patients=needed - 1, consensus=0.2)  # type: ignore[arg-type]
    assert short.cosine < cosine <= reached.cosine + 1e-9


@pytest.mark.parametrize(("sigma", "verdict"), [(1.0, "useful"), (10.0, "weak"), (60.0, "noise")])
def test_verdicts(sigma: float, verdict: str) -> None:
    assert update_quality(**{**SETTING, "noise_multiplier": sigma}, consensus=0.4).verdict == verdict  # type: ignore[arg-type]
