"""C_T and FLD's gap against closed forms and slow paths, and what they say of copies and of innocent worlds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from scipy.stats import mannwhitneyu

from privacy_audit import context, data_copying, likelihood_gap
from privacy_audit.neighbours import Standardiser
from privacy_audit.policy import load_policy
from privacy_audit.subject import Cohort, cohort_of
from tests.privacy_audit.test_cliques_and_context import measured
from tests.privacy_audit.test_linkability_and_strata import group, world

POLICY = load_policy("core")
Floats = npt.NDArray[np.float64]


def slow_z(ours: Floats, theirs: Floats) -> float:
    u = mannwhitneyu(ours, theirs).statistic
    n, m = len(ours), len(theirs)
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def test_z_is_the_textbooks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 9, 30).astype(float), rng.integers(0, 9, 17).astype(float)  # with ties
        assert data_copying.mann_whitney_z(a, b) == pytest.approx(slow_z(a, b))
    # One released tile below one holdout tile: U = 0, mean 1/2, variance 1/4.
    assert data_copying.mann_whitney_z(np.array([1.0]), np.array([2.0])) == pytest.approx(-1.0)


def test_the_number_of_cells_follows_the_sizes() -> None:
    found = [data_copying.cells_for(*sizes) for sizes in ((40, 4000), (300, 4000), (1000, 150), (1000, 4000))]
    assert found == [1, 3, 1, 10]


def test_c_t_is_the_slow_paths_in_cells() -> None:
    """Every cell by its own tiles, with scipy's statistic, weighted by the holdout's share."""
    rng = np.random.default_rng(1)
    centres = rng.normal(0, 6, (3, 5))
    names = [f"p{number:02d}" for number in range(12) for _ in range(15)]
    points = [centres[rng.integers(3, size=size)] + rng.normal(0, 1, (size, 5)) for size in (180, 180, 330)]
    train, holdout = group("train", points[0], names), group("holdout", points[1], [f"h{n}" for n in names])
    released = group("synthetic", points[2], [""] * 330)
    cohort = cohort_of(train, holdout)
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    evidence = context.gather(released, train, holdout, cohort, standardise, 100)
    t, h, s = (standardise(one.features.embeddings) for one in (train, holdout, released))
    both = torch.cat([t, h])
    cells = data_copying.cells(both, torch.cat([s, both]), 330)
    assert (cells[:330] == evidence.released_cell).all() and len(np.unique(evidence.real_cell)) == 3
    of_s, of_t, of_h = cells[:330], cells[330:510], cells[510:]
    total = weight = 0.0
    for cell in np.unique(of_t).tolist():
        ours, theirs, known = (x.numpy()[c == cell] for x, c in ((s, of_s), (h, of_h), (t, of_t)))
        if len(ours) < 20 or not len(theirs) or not len(known):
            continue
        total += len(theirs) * slow_z(cdist(ours, known).min(1), cdist(theirs, known).min(1))
        weight += len(theirs)
    found = data_copying.statistic(
        evidence.released_distances, evidence.released_cell, evidence.real_distances, evidence.real_cell,
        evidence.owner, cohort.is_train,
    )  # fmt: skip
    assert found == pytest.approx(total / weight, abs=0.02)  # distances are kept in single precision


def test_cells_with_few_released_tiles_say_nothing() -> None:
    released_cell, real_cell = np.array([0] * 25 + [1] * 19), np.array([0] * 10 + [1] * 10)
    assert data_copying.usable_cells(released_cell, real_cell) == [0]
    owner, sides = np.repeat([0, 1], 10), np.array([True, False])
    near, far = np.full((44, 2), 1.0), np.full((20, 2), np.inf)
    # The only holdout tiles lie in the cell that says nothing.
    assert data_copying.statistic(near, released_cell, far, real_cell, owner, sides) == 0.0


def test_distances_stay_inside_their_cell() -> None:
    real = torch.tensor([[0.0], [1.0], [10.0]])
    found = data_copying.distances_in_cells(
        torch.tensor([[0.4], [9.0], [50.0]]),
        np.array([0, 1, 2]),
        real,
        np.array([0, 0, 1]),
        np.array([0, 1, 1]),
        3,
    )
    expected = torch.tensor([[0.4, 0.6, np.inf], [np.inf, 1.0, np.inf], [np.inf, np.inf, np.inf]])
    assert torch.allclose(found, expected, atol=1e-5)


def test_one_gaussian_has_a_closed_form() -> None:
    """A centre alone takes all tiles: its variance is their mean squared distance per dimension."""
    rng = np.random.default_rng(2)
    width = 7
    squared = rng.uniform(1, 9, (30, 1))
    train = np.arange(30) < 18
    variance = likelihood_gap.bandwidths(squared[train], width)
    assert variance == pytest.approx(squared[train].mean() / width)
    gap = 100.0 * (squared[train].mean() - squared[~train].mean()) / (2.0 * variance[0]) / width
    assert likelihood_gap.gap(squared, width, train) == pytest.approx(gap)


def test_the_fitted_bandwidths_are_the_most_likely_ones() -> None:
    rng = np.random.default_rng(3)
    width, centres = 2, rng.normal(0, 3, (4, 2))
    tiles = centres[rng.integers(4, size=120)] + rng.normal(0, 1, (120, 2)) * rng.uniform(0.5, 2, (120, 1))
    squared = cdist(tiles, centres) ** 2

    def nll(log_variance: Floats) -> float:
        density = -0.5 * squared / np.exp(log_variance) - 0.5 * width * log_variance
        return float(-(logsumexp(density, axis=1) - np.log(4)).mean())

    best = minimize(nll, np.zeros(4))
    steps = [
        float(
            likelihood_gap.negative_log_likelihood(
                squared, likelihood_gap.bandwidths(squared, width, count), width
            ).mean()
        )
        for count in (0, 1, 3, 10, 200)
    ]
    assert steps == sorted(steps, reverse=True), "no step makes training less likely"
    assert steps[-1] == pytest.approx(best.fun, abs=1e-4)
    assert steps[3] == pytest.approx(best.fun, rel=0.02)


def test_copies_open_the_gap_and_innocent_tiles_do_not() -> None:
    train, holdout, synthetic, cohort, distances, standardise = measured()
    points = train.features.embeddings.numpy().astype(float)
    rng = np.random.default_rng(4)
    copies = group("synthetic", points[::4] + rng.normal(0, 1e-3, points[::4].shape), [""] * len(points[::4]))
    gaps = {}
    for name, released in (("innocent", synthetic), ("copies", copies)):
        evidence = context.gather(released, train, holdout, cohort, standardise, 20)
        found = context.results(evidence, distances, cohort, POLICY, np.random.default_rng(0))
        gaps[name] = next(one for one in found if one.name == context.GAP)
    assert gaps["copies"].value is not None and gaps["innocent"].value is not None
    assert gaps["copies"].value < gaps["innocent"].value - 5 and gaps["copies"].p is not None
    assert gaps["copies"].p <= 0.01 and not gaps["copies"].gating
    assert "199 permutations" in gaps["copies"].null and "evenly drawn" in gaps["copies"].statistic


def test_a_large_release_is_sub_sampled_and_the_report_says_so() -> None:
    train, holdout, _ = world(0.0, patients=10)
    rng = np.random.default_rng(5)
    synthetic = group("synthetic", rng.normal(0, 1, (1500, 12)), [""] * 1500)
    cohort = cohort_of(train, holdout)
    standardise = Standardiser.fit(train.features.embeddings, holdout.features.embeddings)
    evidence = context.gather(synthetic, train, holdout, cohort, standardise, 20)
    assert evidence.released_distances.shape == (1000, 20)
    assert evidence.mixture_distances.shape[1] == likelihood_gap.RELEASED
    assert evidence.mixture_distances.shape[0] <= likelihood_gap.REAL
    again = context.gather(synthetic, train, holdout, cohort, standardise, 20)
    assert (again.released_cell == evidence.released_cell).all()
    found = context.results(evidence, rng.uniform(1, 2, (1500, 20)), cohort, POLICY, rng)
    said = {one.name: one.statistic for one in found}
    for name in (context.DCR, context.C_T, context.AUTHENTICITY):
        assert "1000 of 1500 released tiles" in said[name]
    assert "300 of 1500 released" in said[context.GAP] and "cells of k-means" in said[context.C_T]


def test_labels_alone_decide_under_permutation() -> None:
    """The cells and the mixture do not know the labels: with all labels swapped only the sides change."""
    train, holdout, synthetic, cohort, _, standardise = measured()
    evidence = context.gather(synthetic, train, holdout, cohort, standardise, 20)
    swapped = context.gather(
        synthetic,
        train,
        holdout,
        Cohort(cohort.of_train, cohort.of_holdout, ~cohort.is_train, cohort.stratum),
        standardise,
        20,
    )
    assert (evidence.real_cell == swapped.real_cell).all()
    assert (evidence.mixture_distances == swapped.mixture_distances).all()
