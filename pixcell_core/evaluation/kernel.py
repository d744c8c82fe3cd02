"""Kernel distance (squared maximum mean discrepancy, unbiased) between two feature sets.

Gretton et al. 2012, eq. 3. With the cubic polynomial kernel (x.y / d + 1)^3 it is the measure of Binkowski et al. 2018
(with Inception features: KID); with a Gaussian kernel that of Jayasumana et al. 2024 (there on CLIP features).
Unlike the Frechet distance its expectation does not depend on the number of tiles, and it can be negative.

Sums of the kernel are kept per pair of patients, so a resample of patients costs one small matrix product.
Legend: n rows, d feature width, C clusters (patients).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.bootstrap import Ints, PatientClusters
from pixcell_core.evaluation.feature_set import Floats, checked_features

Kernel = Callable[[Floats, Floats], Floats]
BLOCK = 1024


def polynomial_kernel(first: Floats, second: Floats) -> Floats:
    """(x.y / d + 1)^3 of rows (n, d) and (m, d): (n, m)."""
    base: Floats = first @ second.T / first.shape[1] + 1.0
    return base * base * base


def gaussian_kernel(bandwidth: float) -> Kernel:
    """exp(-|x - y|^2 / (2 bandwidth^2)) as a function of two sets of rows."""

    def kernel(first: Floats, second: Floats) -> Floats:
        squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
        value: Floats = np.exp(-np.clip(squares, 0, None) / (2 * bandwidth**2))
        return value

    return kernel


def median_bandwidth(rows: npt.ArrayLike, *, seed: int = 0, at_most: int = 1000) -> float:
    """Median distance between rows (n, d), of `at_most` of them: the usual width of a Gaussian kernel."""
    from scipy.spatial.distance import pdist

    matrix = checked_features(rows, "the real set")
    picked = np.random.default_rng(seed).permutation(len(matrix))[:at_most]
    distances = pdist(matrix[picked])
    return float(np.median(distances)) or float(distances.max()) or 1.0


@dataclass(frozen=True)
class KernelSums:
    """Sums of a kernel over pairs of rows, per pair of clusters: all a kernel distance needs.

    Attributes:
        real, cross, synthetic: (C, C) sums over real-real, real-synthetic and synthetic-synthetic pairs.
        real_self, synthetic_self: (C,) sums over pairs of a row with itself.
        real_rows, synthetic_rows: (C,) rows of each cluster.
    """

    real: Floats
    cross: Floats
    synthetic: Floats
    real_self: Floats
    synthetic_self: Floats
    real_rows: Ints
    synthetic_rows: Ints

    @classmethod
    def of(cls, real: Floats, synthetic: Floats, clusters: PatientClusters, kernel: Kernel) -> KernelSums:
        """Sum `kernel` over all pairs of real (n, d) and synthetic (m, d) rows, a block of rows at a time."""
        first, second = clusters.codes
        return cls(
            _pair_sums(real, real, first, first, clusters.count, kernel),
            _pair_sums(real, synthetic, first, second, clusters.count, kernel),
            _pair_sums(synthetic, synthetic, second, second, clusters.count, kernel),
            _self_sums(real, first, clusters.count, kernel),
            _self_sums(synthetic, second, clusters.count, kernel),
            np.bincount(first, minlength=clusters.count),
            np.bincount(second, minlength=clusters.count),
        )

    def distance(self, weights: Ints | None = None) -> float:
        """Unbiased squared discrepancy; `weights` (C,) is a resample of clusters.

        A pair of a row with itself (or with its own copy in a resample) is left out: it says nothing of the spread.
        """
        w = np.ones(len(self.real_rows)) if weights is None else weights.astype(np.float64)
        n, m = w @ self.real_rows, w @ self.synthetic_rows
        within_real = w @ self.real @ w - (w**2) @ self.real_self
        within_synthetic = w @ self.synthetic @ w - (w**2) @ self.synthetic_self
        pairs_real = n**2 - (w**2) @ self.real_rows
        pairs_synthetic = m**2 - (w**2) @ self.synthetic_rows
        if pairs_real <= 0 or pairs_synthetic <= 0:
            return float("nan")
        return float(
            within_real / pairs_real + within_synthetic / pairs_synthetic - 2 * (w @ self.cross @ w) / (n * m)
        )


@dataclass(frozen=True)
class SubsetDistance:
    """Kernel distance as the mean over random subsets, with the spread over them.

    The spread is of subsets of one sample: it shows whether enough subsets were drawn, and is no confidence interval.
    """

    value: float
    standard_deviation: float
    low: float
    high: float
    subsets: int
    subset_size: int


def kernel_distance(
    real: npt.ArrayLike, synthetic: npt.ArrayLike, *, kernel: Kernel = polynomial_kernel
) -> float:
    """Unbiased kernel distance of features (n, d) and (m, d), over all rows.

    Raises:
        BadInputError: unusable features or different widths.
    """
    first, second = _both(real, synthetic)
    one = PatientClusters((np.zeros(len(first), np.int64), np.zeros(len(second), np.int64)), (), 1)
    return KernelSums.of(first, second, one, kernel).distance()


def subset_kernel_distance(
    real: npt.ArrayLike,
    synthetic: npt.ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    kernel: Kernel = polynomial_kernel,
) -> SubsetDistance:
    """Mean kernel distance over `subsets` pairs of random subsets without replacement, as published tables report it.

    Raises:
        BadInputError: a subset larger than a set, or of fewer than two rows.
    """
    first, second = _both(real, synthetic)
    smaller = min(len(first), len(second))
    if not 2 <= subset_size <= smaller or subsets < 1:
        raise BadInputError(
            f"{subsets} subsets of {subset_size} rows were asked for; at least one, of 2 to {smaller} rows, is "
            "expected.",
            hint=f"Use a subset size of {smaller} or fewer, or add tiles.",
            code="bad-subset",
        )
    generator = np.random.default_rng(seed)
    values = [
        kernel_distance(
            first[generator.permutation(len(first))[:subset_size]],
            second[generator.permutation(len(second))[:subset_size]],
            kernel=kernel,
        )
        for _ in range(subsets)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return SubsetDistance(
        float(np.mean(values)), float(np.std(values)), float(low), float(high), subsets, subset_size
    )


def _both(real: npt.ArrayLike, synthetic: npt.ArrayLike) -> tuple[Floats, Floats]:
    first, second = checked_features(real, "the real set"), checked_features(synthetic, "the synthetic set")
    if first.shape[1] != second.shape[1]:
        raise BadInputError(
            f"The real features have width {first.shape[1]}, the synthetic ones {second.shape[1]}; equal widths are "
            "expected.",
            hint="Extract both sets with the same encoder.",
            code="widths-differ",
        )
    return first, second


def _pair_sums(
    first: Floats, second: Floats, first_codes: Ints, second_codes: Ints, count: int, kernel: Kernel
) -> Floats:
    sums = np.zeros((count, count))
    columns = scipy.sparse.csr_array(
        (np.ones(len(second)), (second_codes, np.arange(len(second)))), shape=(count, len(second))
    )
    for start in range(0, len(first), BLOCK):
        part = first_codes[start : start + BLOCK]
        rows = scipy.sparse.csr_array(
            (np.ones(len(part)), (part, np.arange(len(part)))), shape=(count, len(part))
        )
        per_row = columns @ kernel(first[start : start + BLOCK], second).T  # (C, block)
        sums += (rows @ per_row.T).reshape(count, count)
    return sums


def _self_sums(rows: Floats, codes: Ints, count: int, kernel: Kernel) -> Floats:
    own = np.array([kernel(row[None], row[None])[0, 0] for row in rows])
    return np.asarray(np.bincount(codes, weights=own, minlength=count), dtype=np.float64)
