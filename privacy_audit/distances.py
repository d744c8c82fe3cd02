"""Distances of tiles to every patient, in the two views whose permutations are tested.

Measured with as many tiles of a patient on either side, see `subject.cohort_of`.

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
    rows = cohort.compared_sides
    base = standardise(train.features.embeddings[rows[0]], holdout.features.embeddings[rows[1]])
    owner = torch.from_numpy(cohort.compared_owner)
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
    rows = cohort.compared_sides
    base = torch.cat(
        [shapes.base(train.features.thumbs[rows[0]]), shapes.base(holdout.features.thumbs[rows[1]])]
    )
    owner = torch.from_numpy(cohort.compared_owner)
    return [
        as_stored(
            patient_distances(
                shapes.queries(one.thumbs), base, owner, cohort.patients, "distances by shape", shapes.device
            ).numpy()
        )
        for one in queries
    ]
