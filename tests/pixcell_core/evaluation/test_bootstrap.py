"""Intervals by patients: they cover where tile intervals do not, sets of a patient move together, seeds repeat."""

from __future__ import annotations

import numpy as np
import pytest

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.bootstrap import Interval, PatientClusters


def coverage_of(by_patient: bool, runs: int = 120, patients: int = 25, tiles: int = 16) -> float:
    """Share of intervals that hold the true mean 0 of tiles whose patients differ (intraclass correlation 0.5)."""
    rng = np.random.default_rng(0)
    names = [f"p{i // tiles}" if by_patient else f"tile-{i}" for i in range(patients * tiles)]
    clusters = PatientClusters.of(names)
    codes, hits = clusters.codes[0], 0
    for run in range(runs):
        values = rng.normal(size=(patients, 1)) + rng.normal(size=(patients, tiles))
        sums = np.bincount(codes, weights=values.ravel())
        rows = np.bincount(codes)
        interval = clusters.bootstrap(lambda w, s=sums, r=rows: [w @ s / (w @ r)], draws=100, seed=run)[0]
        assert interval is not None
        hits += interval.low <= 0 <= interval.high
    return hits / runs


def test_patient_intervals_cover_and_mutant_tile_intervals_do_not() -> None:
    assert coverage_of(by_patient=True) > 0.86
    assert coverage_of(by_patient=False) < 0.65, "tiles of a patient are no independent draws"


def test_the_mean_of_one_tile_patients_has_the_textbook_width() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = PatientClusters.of([f"p{i}" for i in range(400)]).bootstrap(
        lambda w: [w @ values / w.sum()], draws=2000, seed=0
    )[0]
    assert found is not None and found.clusters == 400 and found.draws == 2000
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert abs(found.bias) < 0.01


def test_a_patients_real_and_synthetic_rows_move_together() -> None:
    clusters = PatientClusters.of(["a", "a", "b", "c"], ["b", "a", "x", "y"])
    assert clusters.codes[0][0] == clusters.codes[1][1] and clusters.codes[0][2] == clusters.codes[1][0]
    sizes = sorted(len(s) for s in clusters.strata)
    assert sizes == [1, 2, 2], "patients of both sets, of the first alone, of the second alone"
    for seed in range(20):
        weights = clusters.draw(np.random.default_rng(seed))
        assert weights.sum() == clusters.count
        assert weights[clusters.codes[0]].sum() > 0 and weights[clusters.codes[1]].sum() > 0


def test_rows_without_a_patient_stand_alone_and_are_dealt_into_groups_when_many() -> None:
    assert PatientClusters.of(["", "", "a"]).count == 3
    many = PatientClusters.of([""] * 2500)
    assert many.count == 1000 and np.bincount(many.codes[0]).min() >= 2
    assert np.array_equal(many.codes[0], PatientClusters.of([""] * 2500).codes[0])


def test_intervals_around_the_value_repeat_by_seed_and_skip_undefined_resamples() -> None:
    values = np.random.default_rng(2).normal(size=30)
    clusters = PatientClusters.of([f"p{i}" for i in range(30)])

    def spread(w: np.ndarray) -> list[float]:
        """A statistic a resample makes smaller: the range."""
        return [float(np.ptp(values[w > 0])), float("nan") if w[0] == 0 else 1.0, float("nan")]

    def run(seed: int, around: bool = True) -> list[Interval | None]:
        return clusters.bootstrap(spread, draws=300, seed=seed, around_value=around)

    first, partly, never = run(0)
    assert first is not None and first.low < np.ptp(values) < first.high and first.bias < 0
    plain = run(0, around=False)[0]
    assert plain is not None and plain.high <= np.ptp(values)
    assert partly is not None and 150 < partly.draws < 300 and never is None
    assert run(0)[0] == first != run(1)[0]


def test_one_patient_has_no_interval_and_bad_settings_are_named() -> None:
    assert PatientClusters.of(["a", "a"]).bootstrap(lambda w: [1.0], draws=20, seed=0) == [None]
    two = PatientClusters.of(["a", "b"])
    for draws, level, code in ((19, 0.95, "too-few-draws"), (20, 1.0, "bad-level"), (20, 0.3, "bad-level")):
        with pytest.raises(BadInputError) as refused:
            two.bootstrap(lambda w: [1.0], draws=draws, seed=0, level=level)
        assert refused.value.code == code
