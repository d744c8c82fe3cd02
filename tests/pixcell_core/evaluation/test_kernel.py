"""Kernel distance: torchmetrics' and the pair-by-pair formula, no bias, resamples by weights, and mutants that fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation import kernel as kernels
from pixcell_core.evaluation.bootstrap import PatientClusters
from pixcell_core.evaluation.kernel import (
    KernelSums,
    gaussian_kernel,
    kernel_distance,
    median_bandwidth,
    polynomial_kernel,
    subset_kernel_distance,
)

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(60, 9)), RNG.normal(size=(60, 9)) * 1.3 + 0.2


def pair_by_pair(a: np.ndarray, b: np.ndarray, value) -> float:  # type: ignore[no-untyped-def]
    n, m = len(a), len(b)
    aa = sum(value(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    bb = sum(value(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return float(aa + bb - 2 * sum(value(x, y) for x in a for y in b) / (n * m))


def agrees_with_torchmetrics() -> bool:
    wanted = float(poly_mmd(torch.from_numpy(A), torch.from_numpy(B)))
    return kernel_distance(A, B) == pytest.approx(wanted, rel=1e-10)


def test_it_equals_torchmetrics() -> None:
    assert agrees_with_torchmetrics()


def test_mutant_biased_estimate_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of a row with itself counted."""
    plain = KernelSums.of.__func__  # type: ignore[attr-defined]

    def biased(cls, *arguments):  # type: ignore[no-untyped-def]
        sums = plain(cls, *arguments)
        zero = np.zeros_like(sums.real_self)
        return replace(sums, real_self=zero, synthetic_self=zero)

    monkeypatch.setattr(KernelSums, "of", classmethod(biased))
    assert not agrees_with_torchmetrics()


@pytest.mark.parametrize(
    "wrong",
    [lambda a, b: (a @ b.T + 1) ** 3, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 2, lambda a, b: a @ b.T],
)
def test_mutant_kernels_fail(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    monkeypatch.setattr(kernel_distance, "__kwdefaults__", {"kernel": wrong})
    assert not agrees_with_torchmetrics()


def test_unequal_sizes_blocks_and_both_kernels_equal_the_slow_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 7)
    a, b = A[:23], B[:31]
    assert kernel_distance(a, b) == pytest.approx(
        pair_by_pair(a, b, lambda x, y: (x @ y / 9 + 1) ** 3), rel=1e-10
    )
    width = median_bandwidth(a)
    slow = pair_by_pair(a, b, lambda x, y: np.exp(-((x - y) ** 2).sum() / (2 * width**2)))
    assert kernel_distance(a, b, kernel=gaussian_kernel(width)) == pytest.approx(slow, rel=1e-10)


def test_two_samples_of_one_distribution_have_no_distance_on_average() -> None:
    rng = np.random.default_rng(1)
    found = [kernel_distance(rng.normal(size=(20, 5)), rng.normal(size=(25, 5))) for _ in range(300)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(300)
    assert min(found) < 0 < max(found), "an unbiased estimate of zero falls on both sides of it"


def test_a_resample_by_weights_is_the_distance_without_pairs_of_copies() -> None:
    patients = [f"p{i % 6}" for i in range(60)]
    clusters = PatientClusters.of(patients, patients)
    sums = KernelSums.of(A, B, clusters, polynomial_kernel)
    assert sums.distance() == pytest.approx(kernel_distance(A, B), rel=1e-10)
    weights = np.array([2, 0, 1, 3, 0, 0])
    rows = np.repeat(np.arange(60), weights[clusters.codes[0]])
    other = rows[:, None] != rows[None]
    a, b = A[rows], B[rows]
    slow = (
        polynomial_kernel(a, a)[other].mean()
        + polynomial_kernel(b, b)[other].mean()
        - 2 * polynomial_kernel(a, b).mean()
    )
    assert sums.distance(weights) == pytest.approx(slow, rel=1e-9)
    assert np.isnan(sums.distance(np.zeros(6, dtype=np.int64)))


def test_subsets_repeat_by_seed_and_centre_on_the_whole() -> None:
    first = subset_kernel_distance(A, B, subsets=60, subset_size=30, seed=3)
    assert first == subset_kernel_distance(A, B, subsets=60, subset_size=30, seed=3)
    assert first != subset_kernel_distance(A, B, subsets=60, subset_size=30, seed=4)
    assert first.low < first.value < first.high
    assert first.value == pytest.approx(kernel_distance(A, B), abs=4 * first.standard_deviation / np.sqrt(60))
    for size in (1, 61):
        with pytest.raises(BadInputError, match="2 to 60 rows"):
            subset_kernel_distance(A, B, subset_size=size)
    with pytest.raises(BadInputError, match="equal widths"):
        kernel_distance(A, B[:, :4])
