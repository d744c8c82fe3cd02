"""The mechanism against its accountant: correct code is consistent, every mutant is caught."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from pixcell_core.private import clipping
from pixcell_core.private.canaries import CanaryFinding, check_mechanism, gaussian_epsilon
from pixcell_core.private.noise import NoiseSource, UnsafeFixedKeySource
from pixcell_core.private.parameters import PrivacyParameters

STEPS = 8
SIGMA = 1.7
KEY = bytes(range(32))


class Derived:
    """A source made from a good one by `change(draw number, numbers)`: the mutants."""

    def __init__(self, change: Callable[[int, npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> None:
        self._good = UnsafeFixedKeySource(KEY)
        self._change = change
        self._draws = 0

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        return self._good.uniform(count)

    def gaussian(self, count: int) -> npt.NDArray[np.float64]:
        self._draws += 1
        return self._change(self._draws - 1, self._good.gaussian(count))


def find(source: NoiseSource) -> CanaryFinding:
    return check_mechanism(SIGMA, STEPS, noise_source=source, canaries=600, dimension=12_000, seed=3)


def test_the_engine_is_consistent_with_the_accountant_and_the_measurement_is_sharp() -> None:
    finding = find(UnsafeFixedKeySource(KEY))
    assert finding.consistent, str(finding)
    assert finding.measured_mu == pytest.approx(finding.claimed_mu, rel=0.12)
    assert finding.epsilon_lower_bound > 0.7 * finding.epsilon_claimed
    assert "per patient" in str(finding) and "delta" in str(finding) and "not" in str(finding)


MUTANTS: dict[str, Callable[[int, npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "noise at half of sigma": lambda draw, z: 0.5 * z,
    "noise once per round": lambda draw, z: z if draw == 0 else 0.0 * z,
    "noise shared out over the steps": lambda draw, z: z / math.sqrt(STEPS),
    "noise seed used in every step": lambda draw, z: UnsafeFixedKeySource(KEY).gaussian(len(z)),
    "noise on every other step": lambda draw, z: z * (draw % 2),
    "one noise number for all coordinates": lambda draw, z: np.full_like(z, z[0]),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_noise_is_caught(name: str) -> None:
    finding = find(Derived(MUTANTS[name]))
    assert not finding.consistent, str(finding)


@pytest.mark.parametrize(
    "mutant",
    [lambda norm, c: 3.0 * c / norm, lambda norm, c: 1.0],
    ids=["clip at 3C", "no clip"],
)
def test_a_mutant_of_the_clip_is_caught(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[float, float], float]
) -> None:
    monkeypatch.setattr(clipping, "clip_scale", mutant)
    assert not find(UnsafeFixedKeySource(KEY)).consistent


def test_a_wrong_standard_deviation_in_the_settings_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = property(lambda self: 0.5 * self.noise_multiplier * self.max_grad_norm)
    monkeypatch.setattr(PrivacyParameters, "noise_standard_deviation", wrong)
    assert not find(UnsafeFixedKeySource(KEY)).consistent


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.66, 6.0])
def test_gaussian_epsilon_solves_the_closed_form(mu: float) -> None:
    eps = gaussian_epsilon(mu, 1e-5)
    delta = stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)
    assert delta == pytest.approx(1e-5, rel=1e-5)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
