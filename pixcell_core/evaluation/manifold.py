"""Precision, recall, density and coverage: how two sets of features lie among each other's nearest neighbours.

Precision and recall: Kynkaanniemi et al. 2019; density and coverage: Naeem et al. 2020. A ball around each row reaches to
its k-th nearest neighbour in its own set, the row itself not counted.

- precision: share of synthetic rows inside the ball of any real row (do they look real?)
- recall: share of real rows inside the ball of any synthetic row (is everything real made?)
- density: how many real balls hold a synthetic row, over k, averaged; may pass 1; less swayed by outliers than precision
- coverage: share of real rows whose own ball holds a synthetic row

Distances are computed a block of rows at a time, so memory grows with n, not with n^2.
Legend: n real rows, m synthetic rows, d feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.bootstrap import Ints
from pixcell_core.evaluation.feature_set import Floats, checked_features

BLOCK = 512
KEPT_ROWS = 3000


@dataclass(frozen=True)
class ManifoldScores:
    """The four scores; density is not bounded by 1."""

    precision: float
    recall: float
    density: float
    coverage: float


class Manifold:
    """Two feature sets whose neighbourhoods are compared, whole or as resamples.

    Raises:
        BadInputError: unusable features, different widths, or not more rows than neighbours.
    """

    def __init__(self, real: npt.ArrayLike, synthetic: npt.ArrayLike, *, neighbours: int = 5) -> None:
        first, second = (
            checked_features(real, "the real set"),
            checked_features(synthetic, "the synthetic set"),
        )
        if first.shape[1] != second.shape[1]:
            raise BadInputError(
                f"The real features have width {first.shape[1]}, the synthetic ones {second.shape[1]}; equal widths "
                "are expected.",
                hint="Extract both sets with the same encoder.",
                code="widths-differ",
            )
        if not 1 <= neighbours < min(len(first), len(second)):
            raise BadInputError(
                f"{neighbours} neighbours were asked for with {len(first)} real and {len(second)} synthetic rows; "
                "at least 1 and fewer than the rows of the smaller set are expected.",
                hint="Lower the number of neighbours (5 is usual), or add tiles.",
                code="bad-neighbours",
            )
        centre = first.mean(axis=0)  # distances do not change, their rounding error falls
        self._real, self._synthetic, self.neighbours = first - centre, second - centre, neighbours
        self._kept: dict[str, Floats] = {}

    def keep_distances(self) -> None:
        """Hold all distances where that is affordable: a resample then only picks among them."""
        if max(len(self._real), len(self._synthetic)) <= KEPT_ROWS:
            self._kept = {
                "rr": _squares(self._real, self._real),
                "rs": _squares(self._real, self._synthetic),
                "ss": _squares(self._synthetic, self._synthetic),
            }

    def scores(
        self, real_weights: Ints | None = None, synthetic_weights: Ints | None = None
    ) -> ManifoldScores:
        """The four scores; weights (n,), (m,) say how often a row is in a resample.

        Balls are drawn among the distinct rows of a resample (a copy of a row is at distance 0 and would shrink every
        ball to nothing); the weights enter the averages. All NaN when a resample has too few distinct rows.
        """
        wr = np.ones(len(self._real), np.int64) if real_weights is None else real_weights
        ws = np.ones(len(self._synthetic), np.int64) if synthetic_weights is None else synthetic_weights
        rows, columns = np.flatnonzero(wr), np.flatnonzero(ws)
        if min(len(rows), len(columns)) <= self.neighbours:
            nan = float("nan")
            return ManifoldScores(nan, nan, nan, nan)
        real_reach = self._reach("rr", self._real, rows)
        synthetic_reach = self._reach("ss", self._synthetic, columns)
        balls = np.zeros(len(columns))  # how many real balls hold each synthetic row
        inside, covered = np.empty(len(rows), bool), np.empty(len(rows), bool)
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            squares = self._block("rs", self._real, self._synthetic, rows[part], columns)
            held = squares < real_reach[part, None]
            balls += held.sum(axis=0)
            covered[part] = held.any(axis=1)
            inside[part] = (squares < synthetic_reach[None]).any(axis=1)
        return ManifoldScores(
            precision=float(np.average(balls > 0, weights=ws[columns])),
            recall=float(np.average(inside, weights=wr[rows])),
            density=float(np.average(balls, weights=ws[columns])) / self.neighbours,
            coverage=float(np.average(covered, weights=wr[rows])),
        )

    def _reach(self, kind: str, features: Floats, rows: npt.NDArray[np.intp]) -> Floats:
        """Squared distance of each row to its k-th nearest neighbour among `rows`."""
        reach = np.empty(len(rows))
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            squares = self._block(kind, features, features, part, rows)
            squares[np.arange(len(part)), np.arange(start, start + len(part))] = np.inf  # the row itself
            reach[start : start + BLOCK] = np.partition(squares, self.neighbours - 1, axis=1)[
                :, self.neighbours - 1
            ]
        return reach

    def _block(
        self,
        kind: str,
        first: Floats,
        second: Floats,
        rows: npt.NDArray[np.intp],
        columns: npt.NDArray[np.intp],
    ) -> Floats:
        if kind in self._kept:
            return self._kept[kind][np.ix_(rows, columns)]
        return _squares(first[rows], second[columns])


def manifold_scores(real: npt.ArrayLike, synthetic: npt.ArrayLike, *, neighbours: int = 5) -> ManifoldScores:
    """Precision, recall, density and coverage of features (n, d) and (m, d).

    Raises:
        BadInputError: unusable features, different widths, or not more rows than neighbours.
    """
    return Manifold(real, synthetic, neighbours=neighbours).scores()


def _squares(first: Floats, second: Floats) -> Floats:
    squares: Floats = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.maximum(squares, 0.0, out=squares)
