"""The mechanism against its accountant: correct code is consistent, every planted fault is caught.

The settings (T = 8, sigma 1.7: epsilon 8; 1000 canaries; alpha 0.001, one-sided) were fixed before any run. On ideal
scores they reject a right mechanism in 0.08 % of 20 000 trials, and one with 0.8 sigma in 98.5 % of 1000.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from pixcell_core.errors import BadInputError
from pixcell_core.private import clipping, patient_gradients, sampling
from pixcell_core.private.canaries import CanaryFinding, check_mechanism, separation
from pixcell_core.private.clipping import GradientSum
from pixcell_core.private.noise import NoiseSource, SystemNoiseSource, UnsafeFixedKeySource
from pixcell_core.private.parameters import PrivacyParameters
from pixcell_core.private.patient_gradients import PatientGradientEngine
from pixcell_core.private.sampling_game import check_sampling, total_variation

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


def find(source: NoiseSource | None = None, *, joint: bool | None = None) -> CanaryFinding:
    return check_mechanism(
        SIGMA, STEPS, noise_source=source or UnsafeFixedKeySource(KEY), seed=3, joint=joint
    )


@pytest.mark.parametrize("joint", [False, True], ids=["loop", "joint"])
def test_the_engine_is_consistent_with_the_accountant_and_the_measurement_is_sharp(joint: bool) -> None:
    finding = find(joint=joint)
    assert finding.canaries == 1000 and finding.alpha == 0.001
    assert finding.consistent, str(finding)
    assert finding.measured_mu == pytest.approx(finding.claimed_mu, rel=0.12)
    assert finding.epsilon_claimed == pytest.approx(8.0, abs=0.2)
    assert finding.epsilon_lower_bound > 0.7 * finding.epsilon_claimed
    for word in ("per patient", "delta", "not", "alpha 0.001"):
        assert word in str(finding)


def test_the_noise_of_this_machine_is_consistent() -> None:
    """Two runs with the source for real use: a right build fails here once in a million times."""
    found = [check_mechanism(SIGMA, STEPS, noise_source=SystemNoiseSource(), seed=s) for s in (1, 2)]
    assert any(finding.consistent for finding in found), [str(f) for f in found]


NOISE: dict[str, Callable[[int, npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "0.8 sigma": lambda draw, z: 0.8 * z,
    "0.5 sigma": lambda draw, z: 0.5 * z,
    "noise once per round": lambda draw, z: z if draw == 0 else 0.0 * z,
    "noise of the first step in every step": lambda draw, z: UnsafeFixedKeySource(KEY).gaussian(len(z)),
    "noise shared out over the steps": lambda draw, z: z / math.sqrt(STEPS),
    "noise on every other step": lambda draw, z: z * (draw % 2),
    "one noise number for all coordinates": lambda draw, z: np.full_like(z, z[0]),
}


@pytest.mark.parametrize("name", NOISE)
def test_a_fault_of_the_noise_is_caught(name: str) -> None:
    finding = find(Derived(NOISE[name]))
    assert not finding.consistent and "CONTRADICTS" in str(finding)


def test_a_reseeded_source_in_the_engine_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault in the engine's own release: every step makes its source anew from one key."""
    honest = PatientGradientEngine.release

    def reseeded(self: PatientGradientEngine, total: GradientSum, source: NoiseSource) -> list[Tensor]:
        return honest(self, total, UnsafeFixedKeySource(KEY))

    monkeypatch.setattr(PatientGradientEngine, "release", reseeded)
    assert not find(SystemNoiseSource()).consistent


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_a_wrong_standard_deviation_in_the_settings_is_caught(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    wrong = property(lambda self: share * self.noise_multiplier * self.max_grad_norm)
    monkeypatch.setattr(PrivacyParameters, "noise_standard_deviation", wrong)
    assert not find().consistent


def test_noise_left_out_is_caught_and_reads_as_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        patient_gradients, "gaussian_like", lambda source, tensor, sd: torch.zeros_like(tensor)
    )
    finding = find()
    assert not finding.consistent and finding.epsilon_lower_bound > 100


@pytest.mark.parametrize("joint", [False, True], ids=["loop", "joint"])
@pytest.mark.parametrize(
    "mutant",
    [lambda norm, c: 3.0 * c / norm, lambda norm, c: 1.0],
    ids=["clip at 3C", "no clip"],
)
def test_a_fault_of_the_clip_is_caught(
    monkeypatch: pytest.MonkeyPatch, mutant: Callable[[float, float], float], joint: bool
) -> None:
    monkeypatch.setattr(clipping, "clip_scale", mutant)
    assert not find(joint=joint).consistent


def test_a_patient_summed_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GradientSum.add

    def twice(self: GradientSum, unit: clipping.UnitGradient, bound: float) -> None:
        honest(self, unit, bound)
        honest(self, unit, bound)

    monkeypatch.setattr(GradientSum, "add", twice)
    assert not find().consistent


def test_the_test_keeps_its_level_and_has_its_power() -> None:
    """The statistic alone on ideal normal scores, at a level where a few hundred trials can tell."""
    rng = np.random.default_rng(7)
    mu, level, trials = 1.66, 0.05, 400

    def rejects(true: float) -> int:
        return separation(rng.normal(true, 1, 250), rng.normal(0, 1, 250), level)[1] > mu

    false_alarms = sum(rejects(mu) for _ in range(trials)) / trials
    assert 0.02 < false_alarms < 0.08
    assert sum(rejects(mu / 0.8) for _ in range(trials)) / trials > 0.95


@pytest.mark.parametrize("wrong", [{"canaries": 4}, {"alpha": 0.0}, {"steps": 1}, {"delta": 0.1}])
def test_settings_that_make_no_test_are_refused(wrong: dict[str, float]) -> None:
    given = {"noise_multiplier": SIGMA, "steps": STEPS, **wrong}
    with pytest.raises(BadInputError):
        check_mechanism(**given, noise_source=UnsafeFixedKeySource(KEY))  # type: ignore[arg-type]


GAME = {"sample_rate": 0.5, "noise_multiplier": 1.0, "steps": 4}


def test_sampling_is_consistent_with_the_accountant() -> None:
    finding = check_sampling(**GAME, noise_source=UnsafeFixedKeySource(KEY))  # type: ignore[arg-type]
    assert finding.consistent, str(finding)
    assert finding.measured_advantage == pytest.approx(finding.claimed_advantage, abs=0.1), (
        "the test is sharp"
    )
    for word in ("patient", "alpha 0.001", "consistent with"):
        assert word in str(finding)


def test_a_record_made_up_for_an_empty_sample_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `rand_on_empty` does: a made-up record joins where nobody was drawn, and one patient moves the sum by 2C."""
    honest = PatientGradientEngine.clipped_sum

    def made_up(
        self: PatientGradientEngine, source: object, patients: list[str], rng: torch.Generator
    ) -> GradientSum:
        total = honest(self, source, patients, rng)  # type: ignore[arg-type]
        if not patients:
            row = torch.zeros(1, self.trainable[0].shape[1])
            row[0, 0] = -1.0
            total.add(self.unit_gradient((row,)), self.parameters.max_grad_norm)
        return total

    monkeypatch.setattr(PatientGradientEngine, "clipped_sum", made_up)
    finding = check_sampling(**GAME, noise_source=UnsafeFixedKeySource(KEY))  # type: ignore[arg-type]
    assert not finding.consistent, str(finding)


def test_a_sampler_that_draws_more_often_than_it_says_is_caught() -> None:
    class Eager(sampling.PoissonSampler):
        def sample(self, patients: object) -> list[str]:
            return list(patients)  # type: ignore[call-overload]

    finding = check_sampling(**GAME, noise_source=UnsafeFixedKeySource(KEY), sampler_for=Eager)  # type: ignore[arg-type]
    assert not finding.consistent, str(finding)


def test_total_variation_of_everybody_is_the_closed_form() -> None:
    """delta(0) of a Gaussian mechanism of mu is 2 Phi(mu / 2) - 1."""
    from pixcell_core.private.events import GaussianEvent

    mu = math.sqrt(4) / 1.5
    exact = math.erf(mu / 2.0 / math.sqrt(2.0))
    assert total_variation([GaussianEvent(1.0, 1.5, 4)]) == pytest.approx(exact, abs=1e-3)
    assert total_variation([GaussianEvent(1.0, 1.5, 4)]) >= exact - 1e-9


def test_a_finding_at_its_bound_is_consistent() -> None:
    finding = find()
    assert dataclasses.replace(finding, epsilon_lower_bound=finding.epsilon_claimed).consistent
    assert not dataclasses.replace(finding, epsilon_lower_bound=finding.epsilon_claimed + 1e-9).consistent


@pytest.mark.parametrize("wrong", [{"games": 2}, {"alpha": 0.7}])
def test_games_that_make_no_test_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInputError):
        check_sampling(**GAME, noise_source=UnsafeFixedKeySource(KEY), **wrong)  # type: ignore[arg-type]
