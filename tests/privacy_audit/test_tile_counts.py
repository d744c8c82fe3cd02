"""Patients with more tiles lie nearer to anything: distances use as many of a patient on either side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from privacy_audit.duplicates import Duplicates
from privacy_audit.identity import identity_distances
from privacy_audit.neighbours import patient_minima
from privacy_audit.patients import RankedDistances, permutation_tail, permutations, tail_size
from privacy_audit.policy import load_policy
from privacy_audit.subject import Cohort
from privacy_audit.subject import _evened as evened

POLICY = load_policy("core").patients
PATIENTS, RELEASED, WIDTH = 60, 400, 12


def counts(owner: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> list[int]:
    return sorted(np.unique(owner[rows], return_counts=True)[1].tolist())


@pytest.mark.parametrize(
    ("training", "holdout"),
    [([9] * 6, [9] * 6), ([9] * 6, [4] * 6), ([2, 5, 40], [3, 30, 30]), ([1, 100], [7] * 4)],
)
def test_both_sides_keep_the_same_distribution(training: list[int], holdout: list[int]) -> None:
    of_train = np.repeat(np.arange(len(training)), training)
    of_holdout = np.repeat(np.arange(len(holdout)), holdout) + len(training)
    cohort = Cohort(
        of_train, of_holdout, np.empty(0, bool), np.empty(0, int), evened(of_train, of_holdout, 1)
    )
    rows = cohort.compared_sides
    kept = counts(of_train, rows[0]), counts(of_holdout, rows[1])
    grid = (np.arange(60) + 0.5) / 60
    assert (
        np.quantile(kept[0], grid, method="inverted_cdf") == np.quantile(kept[1], grid, method="inverted_cdf")
    ).all()
    assert len(kept[0]) == len(training) and min(kept[0]) >= 1, "nobody is left out"
    if training == holdout:
        assert len(cohort.compared_owner) == len(of_train) + len(of_holdout), "equal counts lose nothing"


def rejected(tiles: tuple[int, int], *, even: bool, releases: int = 20) -> float:
    """Share of innocent releases that the tail test rejects at 5 %, in a world of patients around nothing."""
    found = 0
    for number in range(releases):
        rng = np.random.default_rng([number, *tiles])
        owner = [np.repeat(np.arange(PATIENTS) + side * PATIENTS, tiles[side]) for side in (0, 1)]
        centres = rng.normal(size=(3 * PATIENTS, WIDTH))
        points = [centres[one] + 0.5 * rng.normal(size=(len(one), WIDTH)) for one in owner]
        released = centres[rng.integers(2 * PATIENTS, 3 * PATIENTS, RELEASED)]
        released = released + 0.5 * rng.normal(size=(RELEASED, WIDTH))
        is_train = np.arange(2 * PATIENTS) < PATIENTS
        cohort = Cohort(*owner, is_train, np.zeros(2 * PATIENTS, dtype=np.int64))
        if even:
            cohort = replace(cohort, compared=evened(*owner, number))
        rows = cohort.compared_sides
        base = torch.from_numpy(np.concatenate([points[0][rows[0]], points[1][rows[1]]])).float()
        distances = patient_minima(
            torch.from_numpy(released).float(), base, torch.from_numpy(cohort.compared_owner), cohort.patients
        ).double()
        labels = permutations(cohort, 199, rng)
        tail = permutation_tail(
            RankedDistances.of(distances.numpy()), is_train, labels, tail_size(RELEASED, POLICY)
        )
        found += tail.p <= 0.05
    return found / releases


@pytest.mark.parametrize("tiles", [(17, 17), (100, 17), (17, 60)])
def test_an_innocent_release_is_rejected_no_more_often_than_it_may(tiles: tuple[int, int]) -> None:
    assert rejected(tiles, even=True) <= 0.15


def test_by_all_tiles_an_innocent_release_is_rejected_for_the_counts_alone() -> None:
    assert rejected((100, 17), even=False) > 0.5


def test_identity_is_planted_against_the_same_tiles() -> None:
    of_train, of_holdout = np.array([0, 0, 0, 1]), np.array([2])
    cohort = Cohort(of_train, of_holdout, np.array([True, True, False]), np.zeros(3, dtype=np.int64))
    base = torch.tensor([[0.0], [1.0], [5.0], [9.0], [-3.0]])
    alone = Duplicates(np.arange(4))
    assert identity_distances(np.array([0]), base, cohort, alone).tolist() == [[1.0, 9.0, 3.0]]
    fewer = replace(cohort, compared=np.array([0, 2, 3, 4]))
    assert identity_distances(np.array([0]), base, fewer, alone).tolist() == [[5.0, 9.0, 3.0]]


def test_the_seed_decides_which() -> None:
    of_train, of_holdout = np.zeros(30, dtype=np.int64), np.ones(5, dtype=np.int64)
    first, again, other = (evened(of_train, of_holdout, seed) for seed in (1, 1, 2))
    assert (first == again).all() and first.tolist() != other.tolist() and len(first) == 10
