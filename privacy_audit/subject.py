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

    @property
    def patients(self) -> int:
        """Number of patients on both sides."""
        return len(self.is_train)


def cohort_of(train: Group, holdout: Group) -> Cohort:
    """Number the patients; a patient's stratum is the most frequent stratum of its tiles.

    A stratum with patients on one side only cannot be permuted; such strata are merged into one.
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
    return Cohort(of_train, of_holdout, is_train, stratum)


def _strata(patients: int, sides: list[tuple[npt.NDArray[np.int64], Sequence[str]]]) -> npt.NDArray[np.int64]:
    texts: list[list[str]] = [[] for _ in range(patients)]
    for owner, values in sides:
        for patient, value in zip(owner, values, strict=True):
            texts[patient].append(value)
    common = [max(sorted(set(found)), key=found.count) for found in texts]
    order = {value: index for index, value in enumerate(sorted(set(common)))}
    return np.array([order[value] for value in common], dtype=np.int64)
