"""Frechet distance between the Gaussians fitted to two feature sets.

Dowson & Landau 1982; as a measure of generators Heusel et al. 2017 (with Inception features: FID)::

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a^1/2 C_b C_a^1/2)^1/2)

The last trace is the sum of the singular values of C_a^1/2 C_b^1/2, and with centred, scaled rows A (C_a = A^T A) and B
it is the sum of the singular values of A B^T. So no square root of a matrix product is taken: nothing becomes complex,
singular covariances need no added ridge, and a set has distance 0 to itself within rounding of 1e-15 of its variance.

Legend: n rows, d feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.feature_set import Floats, checked_features

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class FrechetDistance:
    """The distance (squared, as is usual), its two parts, and what limits it."""

    value: float
    mean_part: float
    covariance_part: float
    warnings: tuple[str, ...] = ()


def frechet_distance(
    real: npt.ArrayLike,
    synthetic: npt.ArrayLike,
    *,
    real_weights: npt.NDArray[np.int64] | None = None,
    synthetic_weights: npt.NDArray[np.int64] | None = None,
) -> FrechetDistance:
    """Frechet distance of features (n, d) and (m, d); covariances divide by n - 1.

    Args:
        real_weights, synthetic_weights: how often each row counts (n,), (m,): a bootstrap resample without copying.

    Raises:
        BadInputError: unusable features or different widths.
    """
    first, second = checked_features(real, "the real set"), checked_features(synthetic, "the synthetic set")
    if first.shape[1] != second.shape[1]:
        raise BadInputError(
            f"The real features have width {first.shape[1]}, the synthetic ones {second.shape[1]}; equal widths are "
            "expected.",
            hint="Extract both sets with the same encoder.",
            code="widths-differ",
        )
    warnings = (
        *sample_size_warnings(len(first), first.shape[1], "real"),
        *sample_size_warnings(len(second), first.shape[1], "synthetic"),
    )
    mean_a, root_a = _mean_and_root(first, real_weights)
    mean_b, root_b = _mean_and_root(second, synthetic_weights)
    return _distance(mean_a, root_a, mean_b, root_b, warnings)


def gaussian_frechet(mean_a: Floats, cov_a: Floats, mean_b: Floats, cov_b: Floats) -> FrechetDistance:
    """Frechet distance of two Gaussians from means (d,) and covariances (d, d).

    Raises:
        BadInputError: a covariance that is not symmetric and positive semi-definite within rounding.
    """
    return _distance(mean_a, _symmetric_root(cov_a), mean_b, _symmetric_root(cov_b), ())


def extrapolated_frechet(real: npt.ArrayLike, synthetic: npt.ArrayLike, *, seed: int = 0) -> FrechetDistance:
    """The distance at infinitely many tiles: a line through the distances of random parts of both sets against 1/share.

    The finite-sample bias of the distance falls with 1/n (Chong & Forsyth 2020, "Effectively unbiased FID"). The line
    is fitted over shares 0.5..1 of both sets, four random parts each. It needs n well above d to mean anything.
    """
    first, second = checked_features(real, "the real set"), checked_features(synthetic, "the synthetic set")
    whole = frechet_distance(first, second)
    generator = np.random.default_rng(seed)
    inverse, distances = [], []
    for share in SHARES:
        for _ in range(1 if share == 1.0 else 4):
            parts = [
                rows[generator.permutation(len(rows))[: max(2, round(share * len(rows)))]]
                for rows in (first, second)
            ]
            inverse.append(1 / share)
            distances.append(frechet_distance(*parts).value)
    intercept = np.polyfit(inverse, distances, 1)[1]
    warnings: tuple[str, ...] = ()
    if min(len(first), len(second)) < 2 * first.shape[1]:
        warnings = (
            "fewer than two rows per feature: the bias is not yet linear in 1/n, do not rely on this",
        )
    return FrechetDistance(float(intercept), whole.mean_part, float(intercept) - whole.mean_part, warnings)


def sample_size_warnings(rows: int, width: int, which: str) -> tuple[str, ...]:
    """What a covariance of `width` features from `rows` rows cannot tell."""
    if rows < width:
        return (
            f"{rows} {which} rows for {width} features: the covariance is singular and the distance far too large; "
            "compare only with distances of equally many rows",
        )
    if rows < 10 * width:
        return (
            f"{rows} {which} rows for {width} features: under 10 rows per feature the distance is biased upwards; "
            "compare only with distances of equally many rows",
        )
    return ()


def _mean_and_root(rows: Floats, weights: npt.NDArray[np.int64] | None) -> tuple[Floats, Floats]:
    """Mean (d,) and a matrix R (at most d rows) with R^T R = covariance."""
    if weights is None:
        total, mean = len(rows), rows.mean(axis=0)
        centred = (rows - mean) / np.sqrt(max(total - 1, 1))
    else:
        kept = weights > 0
        rows, counts = rows[kept], weights[kept].astype(np.float64)
        total = int(counts.sum())
        mean = counts @ rows / total
        centred = (rows - mean) * np.sqrt(counts / max(total - 1, 1))[:, None]
    if len(centred) > centred.shape[1]:
        centred = scipy.linalg.qr(centred, mode="r", check_finite=False)[0][: centred.shape[1]]
    return mean, centred


def _symmetric_root(covariance: Floats) -> Floats:
    matrix = np.asarray(covariance, dtype=np.float64)
    scale = max(float(np.abs(matrix).max()), 1e-300)
    values, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2)
    if np.abs(matrix - matrix.T).max() > 1e-8 * scale or values[0] < -1e-8 * scale:
        raise BadInputError(
            f"A covariance has the eigenvalue {values[0]:.3g}, or is not symmetric; none below zero is expected.",
            hint="Compute the covariance of the features again, in float64.",
            code="not-a-covariance",
        )
    root: Floats = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def cross_trace(root_a: Floats, root_b: Floats) -> float:
    """tr((C_a^1/2 C_b C_a^1/2)^1/2) from any R_a, R_b with R^T R = C: the sum of singular values of R_a R_b^T."""
    return float(scipy.linalg.svdvals(root_a @ root_b.T, check_finite=False).sum())


def _distance(
    mean_a: Floats, root_a: Floats, mean_b: Floats, root_b: Floats, warnings: tuple[str, ...]
) -> FrechetDistance:
    mean_part = float(((mean_a - mean_b) ** 2).sum())
    spread = float((root_a**2).sum() + (root_b**2).sum())
    # Rounding can leave the difference a hair under zero; the quantity cannot be negative.
    covariance_part = max(spread - 2 * cross_trace(root_a, root_b), 0.0)
    return FrechetDistance(mean_part + covariance_part, mean_part, covariance_part, warnings)
