"""Cosine of pairs: known angles, the mismatched null by brute force, pairs found by name, intervals by patients."""

from __future__ import annotations

import numpy as np
import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation import similarity
from pixcell_core.evaluation.feature_set import FeatureSet
from pixcell_core.evaluation.similarity import pair_rows, paired_similarity, similarity_of_sets


def test_known_angles() -> None:
    real = np.array([[1.0, 0], [2.0, 0], [0, 3.0]])
    made = np.array([[5.0, 0], [1.0, 1.0], [0, 0.5]])
    found = paired_similarity(real, made, ["a", "a", "b"])
    half = np.sqrt(0.5)
    assert found.paired == pytest.approx((1 + half + 1) / 3)
    # synthetic of a against real of b: 0 and half; synthetic of b against both real of a: 0 and 0
    assert found.mismatched == pytest.approx(half / 4)
    assert found.gap == pytest.approx(found.paired - found.mismatched)
    assert found.beats_mismatch == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert (found.pairs, found.patients, found.paired_interval) == (3, 2, None)


def brute_force(real: np.ndarray, made: np.ndarray, patients: list[str]) -> tuple[float, float]:
    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    null, wins = [], []
    for j, y in enumerate(made):
        for i, x in enumerate(real):
            if patients[i] != patients[j]:
                null.append(cosine(x, y))
                wins.append(cosine(real[j], y) > null[-1])
    return float(np.mean(null)), float(np.mean(wins))


def test_mismatches_are_of_other_patients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "BLOCK", 5)
    rng = np.random.default_rng(0)
    patients = [f"p{i % 4}" for i in range(22)]
    centre = {p: rng.normal(size=6) * 3 for p in set(patients)}
    real = np.stack([centre[p] + rng.normal(size=6) for p in patients])
    made = real + rng.normal(size=real.shape) * 0.3
    found = paired_similarity(real, made, patients)
    null, wins = brute_force(real, made, patients)
    assert (found.mismatched, found.beats_mismatch) == (pytest.approx(null), pytest.approx(wins))
    with_own = brute_force(real, made, [f"t{i}" for i in range(22)])[0]
    assert with_own > null + 0.05, "mutant: tiles of the same patient taken for mismatches flatter the null"


def test_surrogates_stand_out_and_seeds_repeat() -> None:
    rng = np.random.default_rng(1)
    real, patients = rng.normal(size=(200, 20)) + 1, [f"p{i // 5}" for i in range(200)]
    near = paired_similarity(real, real + rng.normal(size=real.shape) * 0.5, patients, draws=200, seed=0)
    assert near.gap_interval is not None and near.gap_interval.low > 0.2 and near.beats_mismatch > 0.95
    again = paired_similarity(real, real * 2, patients, draws=50, seed=3)
    assert again == paired_similarity(real, real * 2, patients, draws=50, seed=3)
    assert again.paired == pytest.approx(1.0)


def test_independent_tiles_have_a_high_cosine_and_no_gap() -> None:
    """The interval of the gap holds 0 about as often as its level says, over fixed seeds."""
    patients, held, beats = [f"p{i // 2}" for i in range(120)], 0, []
    for seed in range(60):
        rng = np.random.default_rng(5000 + seed)
        real, made = rng.normal(size=(120, 20)) + 1, rng.normal(size=(120, 20)) + 1
        far = paired_similarity(real, made, patients, draws=100, seed=0)
        assert far.gap_interval is not None and far.paired > 0.3, "the cosine alone looks like likeness"
        held += far.gap_interval.low < 0 < far.gap_interval.high
        beats.append(far.beats_mismatch)
    assert held / 60 > 0.86 and abs(np.mean(beats) - 0.5) < 0.02


def named(names: list[str], sources: list[str] | None = None) -> FeatureSet:
    features = np.random.default_rng(len(names)).normal(size=(len(names), 4))
    return FeatureSet("a set", features, "eye", tuple(names), sources=tuple(sources or ()))


def test_pairs_are_found_by_source_or_by_name() -> None:
    real = named(["x/one_real.jpg", "x/two_real.jpg", "y/three.png"])
    first, second = pair_rows(real, named(["two_syn.jpg", "three_synthetic.png", "stranger.png"]))
    assert (first.tolist(), second.tolist()) == ([1, 2], [0, 1])
    by_source = named(["s1.png", "s2.png", "s3.png"], ["y/three.png", "x/one_real.jpg", "x/one_real.jpg"])
    assert pair_rows(real, by_source)[0].tolist() == [2, 0, 0]
    with pytest.raises(BadInputError) as none:
        pair_rows(real, named(["s1", "s2"]))
    assert none.value.code == "no-pairs"
    with pytest.raises(BadInputError) as unclear:
        pair_rows(named(["x/1.png", "y/1.png"]), named(["1.jpg", "2.jpg"]))
    assert unclear.value.code == "pair-ambiguous"


def test_sets_are_paired_under_the_real_tiles_patients() -> None:
    real = named(["1", "2", "3"]).with_columns(patients=["a", "b", "b"])
    assert similarity_of_sets(real, real, draws=20).paired == pytest.approx(1.0)


def test_what_cannot_be_compared_is_named() -> None:
    eye = np.eye(3)
    for real, made, patients, code in (
        (eye, np.eye(4), list("abc"), "pairs-differ"),
        (eye, eye, ["a", "b"], "pairs-differ"),
        (eye, eye, ["a"] * 3, "too-few-patients"),
        (np.array([[0.0, 0], [1, 2]]), np.eye(2), ["a", "b"], "zero-row"),
    ):
        with pytest.raises(BadInputError) as refused:
            paired_similarity(real, made, patients)
        assert refused.value.code == code
