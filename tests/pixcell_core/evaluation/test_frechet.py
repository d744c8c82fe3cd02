"""Frechet distance: closed forms, scipy's and torchmetrics' formulas, sample-size warnings, and a wrong formula caught."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation import frechet
from pixcell_core.evaluation.frechet import extrapolated_frechet, frechet_distance, gaussian_frechet


def two_sets(n: int = 300, m: int = 260, d: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mix + 1.0, rng.normal(size=(m, d)) @ rng.normal(size=(d, d))


def by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as it is usually written."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    cross = scipy.linalg.sqrtm(ca @ cb).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * cross))


def agrees_with_both_oracles() -> bool:
    a, b = two_sets()
    found = frechet_distance(a, b).value
    metrics = _compute_fid(
        *(torch.from_numpy(np.asarray(x)) for x in (a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)))
    )
    return found == pytest.approx(by_sqrtm(a, b), rel=1e-9) and found == pytest.approx(
        float(metrics), rel=1e-9
    )


def test_it_equals_scipy_and_torchmetrics() -> None:
    assert agrees_with_both_oracles()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: 0.0,  # the covariance cross term forgotten
        lambda a, b: float(
            np.sqrt((a**2).sum() * (b**2).sum())
        ),  # traces' product instead of the trace of the root
        lambda a, b: float(
            np.trace(a @ b.T)
        ),  # singular values taken for eigenvalues of a non-symmetric product
    ],
)
def test_mutant_cross_terms_fail(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    monkeypatch.setattr(frechet, "cross_trace", wrong)
    assert not agrees_with_both_oracles()


@pytest.mark.parametrize("seed", [0, 1])
def test_closed_forms_of_gaussians(seed: int) -> None:
    rng = np.random.default_rng(seed)
    s, t, shift = rng.uniform(0.1, 3, 7), rng.uniform(0.1, 3, 7), rng.normal(size=7)
    turn = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    found = gaussian_frechet(shift, turn @ np.diag(s**2) @ turn.T, np.zeros(7), turn @ np.diag(t**2) @ turn.T)
    assert found.mean_part == pytest.approx((shift**2).sum(), rel=1e-12)
    assert found.value == pytest.approx((shift**2).sum() + ((s - t) ** 2).sum(), rel=1e-9)
    point = gaussian_frechet(shift, np.zeros((7, 7)), np.zeros(7), np.diag(t**2))
    assert point.value == pytest.approx((shift**2).sum() + (t**2).sum(), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(200, 8), (30, 100)])
def test_a_set_has_no_distance_to_itself_and_a_shift_costs_its_square(n: int, d: int) -> None:
    rows = np.random.default_rng(2).normal(size=(n, d)) * 50
    assert frechet_distance(rows, rows[::-1]).value < 1e-6
    assert frechet_distance(rows, rows + 3.0).value == pytest.approx(9.0 * d, rel=1e-9)
    other = np.random.default_rng(3).normal(size=(n + 5, d))
    assert frechet_distance(rows, other).value == pytest.approx(
        frechet_distance(other, rows).value, rel=1e-12
    )


def test_fewer_rows_than_features_equals_the_formula_on_singular_covariances() -> None:
    a, b = two_sets(15, 18, 40)
    from_moments = gaussian_frechet(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert frechet_distance(a, b).value == pytest.approx(from_moments.value, rel=1e-6)


def test_weights_count_rows() -> None:
    a, b = two_sets(40, 50, 6)
    weights = np.random.default_rng(4).integers(0, 3, 40)
    weighted = frechet_distance(a, b, real_weights=weights)
    assert weighted.value == pytest.approx(
        frechet_distance(np.repeat(a, weights, axis=0), b).value, rel=1e-10
    )


def test_too_few_rows_are_said() -> None:
    rng = np.random.default_rng(5)
    singular = frechet_distance(rng.normal(size=(20, 30)), rng.normal(size=(400, 30)))
    assert [("singular" in w) for w in singular.warnings] == [True]
    few = frechet_distance(rng.normal(size=(100, 30)), rng.normal(size=(290, 30)))
    assert len(few.warnings) == 2 and "100 real rows for 30 features" in few.warnings[0]
    assert not frechet_distance(rng.normal(size=(300, 30)), rng.normal(size=(300, 30))).warnings


def test_extrapolation_takes_most_of_the_small_sample_bias_away_and_repeats_by_seed() -> None:
    """Two samples of one Gaussian: the true distance is 0."""
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(600, 20)), rng.normal(size=(600, 20))
    plain, far = frechet_distance(a, b).value, extrapolated_frechet(a, b, seed=1)
    assert plain > 0.1 and abs(far.value) < plain / 4
    assert far == extrapolated_frechet(a, b, seed=1) != extrapolated_frechet(a, b, seed=2)
    assert not far.warnings and "do not rely" in extrapolated_frechet(a[:30], b[:30]).warnings[0]


@pytest.mark.parametrize(
    ("real", "synthetic", "code"),
    [
        (np.ones((1, 3)), np.eye(3), "too-few-rows"),
        (np.eye(3), np.eye(4), "widths-differ"),
        (np.array([[1.0, np.nan], [0, 1]]), np.eye(2), "features-not-finite"),
        (np.eye(2), np.array([[np.inf, 1.0], [0, 1]]), "features-not-finite"),
        (np.ones((5, 3)), np.eye(3), "constant-features"),
        (np.zeros((2, 3, 4)), np.eye(3), "features-shape"),
        (np.array([["a", "b"], ["c", "d"]]), np.eye(2), "features-shape"),
    ],
)
def test_unusable_features_are_named(real: np.ndarray, synthetic: np.ndarray, code: str) -> None:
    with pytest.raises(BadInputError) as refused:
        frechet_distance(real, synthetic)
    assert refused.value.code == code and "expected" in refused.value.message


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    for wrong in (np.diag([1.0, -1.0]), np.array([[1.0, 0.5], [0.0, 1.0]])):
        with pytest.raises(BadInputError, match="eigenvalue"):
            gaussian_frechet(np.zeros(2), wrong, np.zeros(2), np.eye(2))
