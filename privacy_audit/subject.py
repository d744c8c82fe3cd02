"""What one audit looks at: the three groups of tiles with their features, patients numbered and names left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privacy_audit.features import TileFeatures


@dataclass(frozen=True)
class Group:
    """One set of tiles. `patients` and `strata` have one text per tile; for synthetic tiles they are empty."""

    name: str
    ids: tuple[str, ...]
    patients: tuple[str, ...]
    strata: tuple[str, ...]
    features: TileFeatures

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def patient_names(self) -> list[str]:
        """Distinct patients, sorted."""
        return sorted(set(self.patients))


@dataclass(frozen=True)
class Cohort:
    """Patients of training and holdout, numbered: training first, each side in sorted order.

    `of_train` and `of_holdout` give the number of each tile's patient; `is_train` and `stratum` are per patient.
    """

    of_train: npt.NDArray[np.int64]
    of_holdout: npt.NDArray[np.int64]
    is_train: npt.NDArray[np.bool_]
    stratum: npt.NDArray[np.int64]
    compared: npt.NDArray[np.int64] | None = None  # rows, training before holdout; all where absent

    @property
    def patients(self) -> int:
        """Number of patients on both sides."""
        return len(self.is_train)

    @property
    def compared_sides(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows of training and rows of holdout tiles with which distances to patients are measured."""
        many = len(self.of_train)
        if self.compared is None:
            return np.arange(many), np.arange(len(self.of_holdout))
        return self.compared[self.compared < many], self.compared[self.compared >= many] - many

    @property
    def compared_owner(self) -> npt.NDArray[np.int64]:
        """Patient of each of these tiles, training before holdout."""
        training, holdout = self.compared_sides
        return np.concatenate([self.of_train[training], self.of_holdout[holdout]])


def cohort_of(train: Group, holdout: Group, seed: int = 0) -> Cohort:
    """Number the patients; a patient's stratum is the most frequent stratum of its tiles.

    A stratum with patients on one side only cannot be permuted; such strata are merged into one. `seed` decides which tiles
    are compared where patients of the two sides have different numbers of them.
    """
    names = [(True, name) for name in train.patient_names] + [(False, name) for name in holdout.patient_names]
    number = {key: index for index, key in enumerate(names)}
    of_train = np.array([number[True, name] for name in train.patients], dtype=np.int64)
    of_holdout = np.array([number[False, name] for name in holdout.patients], dtype=np.int64)
    is_train = np.array([side for side, _ in names], dtype=bool)
    stratum = _strata(len(names), [(of_train, train.strata), (of_holdout, holdout.strata)])
    for value in np.unique(stratum):
        sides = is_train[stratum == value]
        if sides.all() or not sides.any():
            stratum[stratum == value] = -1
    return Cohort(of_train, of_holdout, is_train, stratum, _evened(of_train, of_holdout, seed))


def _evened(
    of_train: npt.NDArray[np.int64], of_holdout: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.int64]:
    """Rows, training before holdout, that leave both sides the same distribution of tiles a patient.

    Whoever has more tiles lies nearer to anything: with 100 tiles of a training patient against 17 of a holdout patient the
    patient test would fail four of five innocent releases. A patient at the u-th quantile of its side keeps as
    many tiles as the u-th quantile of the other side has, if it has so many. Where the counts agree all are kept.
    """
    rng = np.random.default_rng([seed, 15])
    sides = []
    for owner in (of_train, of_holdout):
        patients, counts = np.unique(owner, return_counts=True)
        order = np.lexsort((patients, counts))
        sides.append((owner, patients[order], counts[order]))
    kept, first = [], 0
    for (owner, patients, counts), (_, _, others) in (sides, sides[::-1]):
        quantiles = (np.arange(len(counts)) + 0.5) / len(counts)
        most = dict(
            zip(patients.tolist(), np.quantile(others, quantiles, method="inverted_cdf"), strict=True)
        )
        # In random order each tile has a rank among its patient's; the lowest ranks stay.
        order = rng.permutation(len(owner))
        ranks = np.empty(len(owner), dtype=np.int64)
        seen: dict[int, int] = {}
        for row in order.tolist():
            patient = int(owner[row])
            ranks[row] = seen[patient] = seen.get(patient, -1) + 1
        limit = np.array([most[int(patient)] for patient in owner])
        kept.append(np.flatnonzero(ranks < limit) + first)
        first += len(owner)
    return np.concatenate(kept)


def _strata(patients: int, sides: list[tuple[npt.NDArray[np.int64], Sequence[str]]]) -> npt.NDArray[np.int64]:
    texts: list[list[str]] = [[] for _ in range(patients)]
    for owner, values in sides:
        for patient, value in zip(owner, values, strict=True):
            texts[patient].append(value)
    common = [max(sorted(set(found)), key=found.count) for found in texts]
    order = {value: index for index, value in enumerate(sorted(set(common)))}
    return np.array([order[value] for value in common], dtype=np.int64)
