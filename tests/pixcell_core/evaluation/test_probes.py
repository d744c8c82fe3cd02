"""Probes: perfect features score 1, noise scores chance, and a patient in both folds is noticed."""

from __future__ import annotations

import numpy as np
import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.probes import colour_histogram, probe


def cohort(patients: int, tiles: int) -> tuple[list[str], list[str]]:
    """Each patient has one label; half of the patients each."""
    groups = [f"p{i}" for i in range(patients) for _ in range(tiles)]
    return [("tumour", "normal")[int(g[1:]) % 2] for g in groups], groups


def test_separable_features_score_one() -> None:
    labels, groups = cohort(10, 6)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 8)).astype(np.float32)
    features[:, 0] += np.where(np.array(labels) == "tumour", 20, -20)
    features[:, 1] -= np.where(np.array(labels) == "tumour", 20, -20)
    score = probe(features, labels, groups)
    assert (score.knn, score.linear, score.tiles, score.groups) == (1.0, 1.0, 60, 10)


def test_random_features_score_about_chance() -> None:
    labels, groups = cohort(40, 10)
    scores = [
        probe(np.random.default_rng(s).normal(size=(400, 6)).astype(np.float32), labels, groups, seed=s)
        for s in range(3)
    ]
    assert np.mean([s.knn for s in scores]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([s.linear for s in scores]) == pytest.approx(0.5, abs=0.08)


def test_features_that_know_the_patient_alone_do_not_score_mutant_folds_by_image_do() -> None:
    """Each patient's tiles lie in a cluster of their own, in a random place: nothing there is tissue.

    Folds that split patients (here: every tile its own group) see the patient in training and call it learning.
    """
    labels, groups = cohort(24, 12)
    rng = np.random.default_rng(1)
    place = {g: rng.normal(size=16) * 5 for g in sorted(set(groups))}
    features = np.stack([place[g] + rng.normal(size=16) * 0.05 for g in groups]).astype(np.float32)
    honest = probe(features, labels, groups)
    leaking = probe(features, labels, [f"tile-{i}" for i in range(len(groups))])
    assert leaking.knn > 0.98
    assert honest.knn < 0.75, "whole patients are held out"
    assert leaking.knn - honest.knn > 0.25


def test_the_score_is_balanced() -> None:
    """Always saying the common label earns one over the number of labels, however common it is."""
    labels = ["normal"] * 90 + ["tumour"] * 10
    groups = [f"p{i % 10}" for i in range(100)]
    assert probe(np.zeros((100, 3), np.float32), labels, groups).knn == pytest.approx(0.5)


def test_small_cohorts_score_or_are_refused_but_never_crash() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(4, 3)).astype(np.float32)
    one_each = probe(features, ["a", "a", "b", "b"], ["p", "p", "q", "q"])
    assert one_each.knn == one_each.linear == 0.0, "trained on one label, tested on the other"
    assert 0 <= probe(features, ["a", "b", "a", "b"], ["p", "p", "q", "q"]).knn <= 1
    for labels, groups in ((["a", "b", "a", "b"], ["p"] * 4), (["a"] * 4, ["p", "q", "p", "q"])):
        with pytest.raises(BadInputError) as refused:
            probe(features, labels, groups)
        assert refused.value.code == "too-few-groups"


def test_colour_histogram_counts_colours_and_forgets_place() -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    histogram = colour_histogram(pixels)
    assert histogram.shape == (512,) and histogram.sum() == pytest.approx(1.0)
    assert np.array_equal(histogram, colour_histogram(pixels[::-1, ::-1]))
    expected, _ = np.histogramdd(pixels.reshape(-1, 3).astype(float), bins=8, range=[(0, 256)] * 3)
    assert np.allclose(histogram, expected.ravel() / 256)
