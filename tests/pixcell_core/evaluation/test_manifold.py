"""Precision, recall, density, coverage: the package prdc as oracle, known cases, resamples, and swapped roles caught."""

from __future__ import annotations

import numpy as np
import pytest
from prdc import compute_prdc

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation import manifold
from pixcell_core.evaluation.manifold import Manifold, ManifoldScores, manifold_scores

NAMES = ("precision", "recall", "density", "coverage")


def two_sets(n: int = 90, m: int = 70, d: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) * 0.7 + 0.6


def agrees_with_prdc() -> bool:
    for k in (1, 3, 5):
        for sets in (two_sets(), two_sets(40, 200), two_sets(60, 60, 30)):
            wanted = compute_prdc(*sets, nearest_k=k)
            found = manifold_scores(*sets, neighbours=k)
            if any(getattr(found, name) != pytest.approx(wanted[name], abs=1e-12) for name in NAMES):
                return False
    return True


def test_it_equals_prdc() -> None:
    assert agrees_with_prdc()


def test_blocks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = manifold_scores(*two_sets())
    monkeypatch.setattr(manifold, "BLOCK", 7)
    assert manifold_scores(*two_sets()) == whole


def test_memory_is_bounded_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, right = [], manifold._squares

    def spy(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        sizes.append(len(first) * len(second))
        return right(first, second)

    monkeypatch.setattr(manifold, "_squares", spy)
    monkeypatch.setattr(manifold, "BLOCK", 8)
    monkeypatch.setattr(manifold, "KEPT_ROWS", 50)
    large = Manifold(*two_sets())
    large.keep_distances()  # 90 rows are more than may be kept
    large.scores()
    assert max(sizes) <= 8 * 90


def test_mutant_swapped_precision_and_recall_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Manifold.scores

    def swapped(self: Manifold, *weights: object) -> ManifoldScores:
        found = right(self, *weights)  # type: ignore[arg-type]
        return ManifoldScores(found.recall, found.precision, found.density, found.coverage)

    monkeypatch.setattr(Manifold, "scores", swapped)
    assert not agrees_with_prdc()


def test_mutant_that_counts_a_row_as_its_own_neighbour_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Manifold._reach

    def with_itself(self: Manifold, kind: str, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
        self.neighbours -= 1
        try:
            return right(self, kind, features, rows) if self.neighbours else np.zeros(len(rows))
        finally:
            self.neighbours += 1

    monkeypatch.setattr(Manifold, "_reach", with_itself)
    assert not agrees_with_prdc()


def test_precision_falls_with_odd_tiles_and_recall_with_missing_modes() -> None:
    rng = np.random.default_rng(1)
    modes = np.repeat(np.eye(4) * 30, 50, axis=0)
    real = modes + rng.normal(size=(200, 4))
    one_mode = real[:50] + rng.normal(size=(50, 4)) * 0.2
    collapsed = manifold_scores(real, one_mode)
    assert collapsed.precision > 0.95 and collapsed.recall < 0.3 and collapsed.coverage <= 0.26
    odd = np.concatenate([modes[::2] + rng.normal(size=(100, 4)), rng.normal(size=(100, 4)) * 3 - 90])
    strange = manifold_scores(real, odd)
    assert strange.precision < 0.55 and strange.recall > 0.9
    assert manifold_scores(real, real).coverage == 1.0


def test_resamples_use_distinct_rows_and_kept_distances_change_nothing() -> None:
    real, made = two_sets()
    weights = np.random.default_rng(2).integers(0, 3, 90)
    plain, kept = Manifold(real, made), Manifold(real, made)
    kept.keep_distances()
    found, again = plain.scores(weights), kept.scores(weights)
    assert all(getattr(found, n) == pytest.approx(getattr(again, n), abs=1e-12) for n in NAMES)
    distinct = weights > 0
    wanted = compute_prdc(real[distinct], made, nearest_k=5)
    assert found.precision == pytest.approx(wanted["precision"]) and found.density == pytest.approx(
        wanted["density"]
    )
    assert found.recall != pytest.approx(wanted["recall"]), (
        "averages over real rows count a row as often as drawn"
    )
    assert np.isnan(plain.scores(np.eye(90, dtype=np.int64)[0]).precision)


@pytest.mark.parametrize("neighbours", [0, 70])
def test_more_neighbours_than_rows_are_refused(neighbours: int) -> None:
    with pytest.raises(BadInputError, match="fewer than the rows"):
        manifold_scores(*two_sets(), neighbours=neighbours)
