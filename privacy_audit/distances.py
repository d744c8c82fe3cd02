"""Distances of tiles to every patient, in the two views whose permutations are tested.

Legend: q queries, P patients, training first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from privacy_audit.evidence import as_stored
from privacy_audit.features import TileFeatures
from privacy_audit.neighbours import Standardiser, patient_minima
from privacy_audit.spectrum import ShapeSpectra, patient_distances
from privacy_audit.subject import Cohort, Group


def distances_by_eye(
    queries: Sequence[TileFeatures],
    train: Group,
    holdout: Group,
    cohort: Cohort,
    standardise: Standardiser,
    device: torch.device,
) -> list[npt.NDArray[np.float64]]:
    """D (q, P) of each set of queries, in the second eye's standardised embeddings."""
    base = standardise(train.features.embeddings, holdout.features.embeddings)
    owner = torch.from_numpy(np.concatenate([cohort.of_train, cohort.of_holdout]))
    return [
        as_stored(
            patient_minima(
                standardise(one.embeddings),
                base,
                owner,
                cohort.patients,
                device=device,
                label="distances by the second eye",
            ).numpy()
        )
        for one in queries
    ]


def distances_by_shape(
    queries: Sequence[TileFeatures], train: Group, holdout: Group, cohort: Cohort, shapes: ShapeSpectra
) -> list[npt.NDArray[np.float64]]:
    """D (q, P) of each set of queries, in shape spectra."""
    base = torch.cat([shapes.base(train.features.thumbs), shapes.base(holdout.features.thumbs)])
    owner = torch.from_numpy(np.concatenate([cohort.of_train, cohort.of_holdout]))
    return [
        as_stored(
            patient_distances(
                shapes.queries(one.thumbs), base, owner, cohort.patients, "distances by shape", shapes.device
            ).numpy()
        )
        for one in queries
    ]
