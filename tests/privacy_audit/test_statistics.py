"""Counts, conformal p-values, neighbours and the patient permutation against oracles, and mutants that must fail."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy_audit import intervals
from privacy_audit.copies import Conformal
from privacy_audit.neighbours import most_similar, nearest, patient_minima
from privacy_audit.patients import (
    TAIL_EYE,
    RankedDistances,
    View,
    patient_tests,
    permutation_tail,
    permutations,
    tail_asymmetry,
)
from privacy_audit.policy import load_policy
from privacy_audit.result import Status, worst
from privacy_audit.subject import Cohort


@given(hits=st.integers(0, 60), extra=st.integers(0, 60))
def test_clopper_pearson_agrees_with_scipy(hits: int, extra: int) -> None:
    trials = hits + extra
    if trials == 0:
        assert intervals.clopper_pearson_lower(0, 0) == 0.0
        return
    oracle = stats.binomtest(hits, trials).proportion_ci(0.90, method="exact")
    assert intervals.clopper_pearson_lower(hits, trials) == pytest.approx(oracle.low, abs=1e-9)
    assert intervals.clopper_pearson_upper(hits, trials) == pytest.approx(oracle.high, abs=1e-9)


def test_the_policys_sources_say_what_is_true() -> None:
    assert intervals.clopper_pearson_lower(60, 60) == pytest.approx(0.951, abs=5e-4)
    assert intervals.clopper_pearson_upper(0, 1000) == pytest.approx(0.0030, abs=5e-5)


def test_holm_is_the_textbook_procedure() -> None:
    adjusted = intervals.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def slow_p(null: npt.NDArray[np.float64], score: float) -> float:
    return (1 + sum(1 for value in null if value >= score)) / (len(null) + 1)


@settings(max_examples=50)
@given(null=st.lists(st.integers(0, 8), min_size=1, max_size=30), score=st.integers(-1, 9))
def test_conformal_p_counts_ties_against_the_release(null: list[int], score: int) -> None:
    values = np.array(null, dtype=float) / 8
    assert Conformal(values).p_values(np.array([score / 8]))[0] == pytest.approx(slow_p(values, score / 8))


@settings(max_examples=50)
@given(seed=st.integers(0, 999), size=st.integers(5, 300), flag_p=st.sampled_from([0.001, 0.01, 0.05, 0.2]))
def test_the_drawn_threshold_is_the_one_that_flags(seed: int, size: int, flag_p: float) -> None:
    rng = np.random.default_rng(seed)
    judge = Conformal(rng.normal(size=size))
    scores = np.concatenate([rng.normal(size=200), judge.null])
    limit = judge.threshold(flag_p)
    flagged = judge.p_values(scores) <= flag_p
    assert (not flagged.any()) if limit is None else np.array_equal(flagged, scores > limit)


def uniform_enough(p_values: list[float]) -> bool:
    return bool(stats.kstest(p_values, "uniform", alternative="greater").pvalue > 0.001)


def test_conformal_p_is_never_too_small_under_the_null_and_an_off_by_one_mutant_is() -> None:
    rng = np.random.default_rng(2)
    honest, mutant = [], []
    for _ in range(1500):
        null, score = rng.normal(size=9), rng.normal()
        honest.append(float(Conformal(null).p_values(np.array([score]))[0]))
        mutant.append(float((null >= score).sum() / len(null)))
    assert np.mean(np.array(honest) <= 0.1) <= 0.125
    assert np.mean(np.array(mutant) <= 0.05) > 0.08  # p = 0 where 1 in 10 is the least one can claim


def test_nearest_neighbours_equal_faiss() -> None:
    rng = np.random.default_rng(0)
    base, queries = rng.normal(size=(5000, 16)).astype("f4"), rng.normal(size=(700, 16)).astype("f4")
    distance, index = nearest(torch.from_numpy(queries), torch.from_numpy(base), 5)
    flat = faiss.IndexFlatL2(16)
    flat.add(base)
    oracle, where = flat.search(queries, 5)
    assert np.allclose(distance.numpy() ** 2, oracle, atol=1e-4)
    assert (index.numpy() == where).mean() > 0.999
    inner = faiss.IndexFlatIP(16)
    inner.add(base)
    product, at = inner.search(queries, 3)
    ours, rows = most_similar(torch.from_numpy(queries), torch.from_numpy(base), 3)
    assert np.allclose(ours.numpy(), product, atol=1e-4) and (rows.numpy() == at).mean() > 0.999


def test_patient_minima_equal_the_double_loop() -> None:
    rng = np.random.default_rng(1)
    base, queries = rng.normal(size=(60, 4)), rng.normal(size=(7, 4))
    owner = np.arange(60) % 5
    found = patient_minima(
        torch.from_numpy(queries).float(), torch.from_numpy(base).float(), torch.from_numpy(owner), 6
    ).numpy()
    slow = [[np.linalg.norm(base[owner == p] - q, axis=1).min() for p in range(5)] for q in queries]
    assert np.allclose(found[:, :5], slow, atol=1e-5)
    assert np.isinf(found[:, 5]).all()


def cohort(patients: int, strata: int = 1) -> Cohort:
    empty = np.empty(0, dtype=np.int64)
    is_train = np.arange(patients) < patients // 2
    return Cohort(empty, empty, is_train, np.arange(patients, dtype=np.int64) % strata)


def innocent(rng: np.random.Generator, patients: int, released: int) -> npt.NDArray[np.float64]:
    """Tiles scattered around some patients of either side: a release that does not know the labels."""
    centres = rng.normal(size=(patients, 3))
    liked = rng.choice(patients, size=max(patients // 4, 3), replace=False)  # a generator has favourites
    tiles = centres[rng.choice(liked, size=released)] + rng.normal(size=(released, 3)) * 0.5
    return np.linalg.norm(tiles[:, None] - centres[None], axis=2) + 0.05


def test_log_ratio_equals_the_definition() -> None:
    rng = np.random.default_rng(4)
    distances = rng.uniform(0.5, 2.0, size=(9, 14))
    labels = permutations(cohort(14), 6, rng)
    found = RankedDistances.of(distances).log_ratio(labels)
    for row, side in enumerate(labels):
        slow = np.log(distances[:, ~side].min(axis=1) / distances[:, side].min(axis=1))
        assert np.allclose(found[row], slow)
        top = np.sort(slow)
        assert tail_asymmetry(found[row : row + 1], 3)[0] == pytest.approx(
            top[-3:].mean() - np.sort(-slow)[-3:].mean()
        )


def test_permutations_keep_every_stratum() -> None:
    group = cohort(20, strata=3)
    labels = permutations(group, 50, np.random.default_rng(0))
    for value in range(3):
        members = group.stratum == value
        assert (labels[:, members].sum(axis=1) == group.is_train[members].sum()).all()
    assert len({tuple(row) for row in labels}) > 40


def permutation_p(
    distances: npt.NDArray[np.float64], group: Cohort, rng: np.random.Generator, tail: int = 4
) -> float:
    return permutation_tail(
        RankedDistances.of(distances), group.is_train, permutations(group, 99, rng), tail
    ).p


def permutation_ps(statistic: Callable[..., float], worlds: int, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    group = cohort(20)
    return [statistic(innocent(rng, 20, 40), group, rng) for _ in range(worlds)]


def test_permutation_p_is_uniform_under_the_null() -> None:
    p_values = np.array(permutation_ps(permutation_p, 300, 5))
    jittered = p_values - np.random.default_rng(0).uniform(0, 0.01, size=len(p_values))
    assert stats.kstest(jittered, "uniform").pvalue > 0.001
    assert np.mean(p_values <= 0.05) < 0.10


def test_a_tile_level_test_would_condemn_honest_releases() -> None:
    """Why patients are permuted and not tiles: the naive test rejects far too often."""

    def naive(distances: npt.NDArray[np.float64], group: Cohort, rng: np.random.Generator) -> float:
        nearer = distances[:, group.is_train].min(axis=1) < distances[:, ~group.is_train].min(axis=1)
        return float(stats.binomtest(int(nearer.sum()), len(nearer)).pvalue)

    assert np.mean(np.array(permutation_ps(naive, 200, 6)) <= 0.05) > 0.12


def test_planted_patients_are_caught_and_swapped_sides_are_not() -> None:
    rng = np.random.default_rng(8)
    group = cohort(24)
    distances = innocent(rng, 24, 80)
    for row, patient in enumerate(rng.permutation(12)[:10]):
        distances[row, patient] = 0.01
    assert permutation_p(distances, group, rng, tail=10) <= 0.02
    swapped = Cohort(group.of_train, group.of_holdout, ~group.is_train, group.stratum)
    assert permutation_p(distances, swapped, rng, tail=10) > 0.5


def test_power_is_high_with_clear_copies_and_nil_with_copies_that_look_like_anyone() -> None:
    rng = np.random.default_rng(9)
    policy = load_policy("core").patients.model_copy(
        update={"permutations": 99, "power_simulations": 20, "power_permutations": 199}
    )
    group = cohort(40)
    released = innocent(rng, 40, 60)
    owner = np.arange(40, dtype=np.int64)
    clear = innocent(rng, 40, 40)
    clear[np.arange(40), owner] = 0.02
    everyone = np.ones(60, dtype=bool)

    def power(planted: npt.NDArray[np.float64]) -> float:
        views = {TAIL_EYE: View(released, planted)}
        return patient_tests(
            views,
            group,
            policy,
            np.random.default_rng(1),
            planted_patient=owner,
            unflagged=everyone,
            family=3,
        ).power

    assert power(clear) >= 0.8
    assert power(innocent(rng, 40, 40)) <= 0.3


def test_statuses_form_one_ladder() -> None:
    assert worst([Status.PASS, Status.REVIEW]) is Status.REVIEW
    assert worst([Status.FAIL, Status.REVIEW]) is Status.FAIL
    assert worst([Status.FAIL, Status.INVALID]) is Status.INVALID
    assert worst([]) is Status.INVALID
