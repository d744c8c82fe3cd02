"""The one-run audit: its bound against closed forms and simulations, a sound training passes, a leaking one does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pixcell_core.errors import BadInputError
from pixcell_core.private import patient_gradients
from pixcell_core.private.canary_patients import OneRunFinding, audit_with_canaries
from pixcell_core.private.noise import UnsafeFixedKeySource
from pixcell_core.private.one_run_bound import guess_probability, one_run_ceiling, one_run_lower_bound
from tests.pixcell_core.private.test_joint_gradients import KINDS, Patients, patients, pixcell

NOISY = 12.0
"""sigma of the runs below; with 2 steps the accountant says epsilon 0.4 per patient at delta 1e-5."""


@pytest.mark.parametrize("m", [10, 50, 100, 1000])
def test_the_ceiling_without_delta_is_the_closed_form(m: int) -> None:
    """All m right has probability p^m, so that epsilon = log(p / (1 - p)) at p = 0.05^(1/m)."""
    p = 0.05 ** (1.0 / m)
    assert one_run_ceiling(m, m, delta=0.0) == pytest.approx(math.log(p / (1.0 - p)), abs=1e-6)


@pytest.mark.parametrize(("m", "known"), [(10, 1.05), (100, 3.49), (1000, 5.8)])
def test_the_ceiling_at_small_delta_is_as_published_figures_say(m: int, known: float) -> None:
    assert one_run_ceiling(m, m, delta=1e-5) == pytest.approx(known, abs=0.03)


def test_the_probability_is_the_sum_of_the_theorem() -> None:
    m, r, v, eps, delta = 40, 30, 22, 0.7, 1e-3
    p = math.exp(eps) / (1.0 + math.exp(eps))
    exact = sum(math.comb(r, k) * p**k * (1 - p) ** (r - k) for k in range(v, r + 1))
    below = [
        sum(math.comb(r, k) * p**k * (1 - p) ** (r - k) for k in range(v - i, v)) / i for i in range(1, v + 1)
    ]
    assert guess_probability(m, r, v, eps, delta) == pytest.approx(
        exact + 2 * m * delta * max(below), rel=1e-10
    )
    assert guess_probability(m, r, v, eps, 0.0) == pytest.approx(exact, rel=1e-10)


def test_randomised_response_is_accused_at_most_as_often_as_the_level_says() -> None:
    """The tight case: each guess is right with probability e^eps / (1 + e^eps) exactly."""
    rng, eps, m = np.random.default_rng(0), 1.0, 200
    right = rng.binomial(m, 1.0 / (1.0 + math.exp(-eps)), size=2000)
    bounds = {v: one_run_lower_bound(m, m, int(v), delta=0.0) for v in np.unique(right)}
    accused = np.mean([bounds[v] > eps for v in right])
    assert accused <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.mean([bounds[v] > 0.8 * eps for v in right]) > 0.05, "the bound is not vacuous"
    plugged = np.mean([math.log(v / (m - v)) > eps for v in right])
    assert plugged > 0.4, "mutant: the plain estimate in place of the bound accuses half of all sound runs"


def test_the_bound_falls_with_delta_and_confidence_and_grows_with_right_guesses() -> None:
    base = one_run_lower_bound(100, 50, 45, delta=1e-5)
    assert one_run_lower_bound(100, 50, 45, delta=1e-3) < base < one_run_lower_bound(100, 50, 46, delta=1e-5)
    assert one_run_lower_bound(100, 50, 45, delta=1e-5, confidence=0.99) < base
    assert one_run_lower_bound(100, 50, 27, delta=1e-5) == 0.0
    assert base == pytest.approx(-math.log(1 / stats.beta.ppf(0.05, 45, 6) - 1), abs=0.02), (
        "Clopper & Pearson"
    )


@pytest.mark.parametrize(
    ("m", "r", "v", "confidence"), [(10, 11, 5, 0.95), (10, 5, 6, 0.95), (10, 0, 0, 0.95), (10, 5, 5, 1.0)]
)
def test_what_is_no_result_is_refused(m: int, r: int, v: int, confidence: float) -> None:
    with pytest.raises(BadInputError):
        one_run_lower_bound(m, r, v, delta=1e-5, confidence=confidence)


def run(kind: str = "ffa-lora", public: Patients | None = None, canaries: int = 60) -> OneRunFinding:
    return audit_with_canaries(
        pixcell(kind),  # type: ignore[arg-type]
        noise_multiplier=NOISY,
        steps=2,
        canaries=canaries,
        noise_source=UnsafeFixedKeySource(bytes(range(32))),
        public=public,
        public_patients=len(public.patients) if public is not None else 0,
        tiles_per_patient=8,
    )


def public_patients() -> Patients:
    """Public rows in the order of the audit: latents, conditions, time steps, noise."""
    tiles = {name: (a, b, t, n) for name, (a, b, n, t) in patients((2, 3, 1)).tiles.items()}
    return Patients({name: tuple(rows) for name, rows in tiles.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_training_is_consistent(kind: str) -> None:
    finding = run(kind)
    assert finding.consistent and finding.guesses == 30 and finding.canaries == 60
    assert finding.epsilon_lower_bound < finding.epsilon_claimed < finding.ceiling
    for word in ("per patient", "delta 1e-05", "95%", "at most", "Not seen", "consistent with"):
        assert word in str(finding)


def test_public_patients_take_part_and_do_not_blur_the_accusation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    public = public_patients()
    honest = Patients.rows

    def watched(self: Patients, patient: str, k: int, rng: torch.Generator) -> tuple[torch.Tensor, ...]:
        seen.append(patient)
        return honest(self, patient, k, rng)

    monkeypatch.setattr(Patients, "rows", watched)
    assert run(public=public).public_patients == 3
    assert set(seen) == set(public.patients)


def test_a_training_without_noise_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        patient_gradients,
        "gaussian_like",
        lambda source, tensor, deviation: 1e-3 * deviation * torch.ones_like(tensor),
    )
    finding = run()
    assert not finding.consistent and "CONTRADICTS" in str(finding), str(finding)


def test_guesses_are_counted_against_the_coins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: scores turned round must be wrong where they were right."""
    from pixcell_core.private import canary_patients

    monkeypatch.setattr(patient_gradients, "gaussian_like", lambda source, tensor, deviation: tensor * 0.0)
    right = run()
    honest = canary_patients._Observer.scores
    monkeypatch.setattr(canary_patients._Observer, "scores", lambda self: -honest(self))
    turned = run()
    assert turned.correct == turned.guesses - right.correct < right.correct
    assert turned.epsilon_lower_bound == 0.0


def test_too_few_canaries_are_refused() -> None:
    with pytest.raises(BadInputError, match="prove next to nothing"):
        run(canaries=10)
