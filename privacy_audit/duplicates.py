"""Training tiles that show one field: overlapping strides and repeated scans, found before anything is calibrated.

A private set cut with overlap holds every field several times. A copy then has several true sources, and whatever is
calibrated on distances between training tiles falls silent: with twins in the set, published memorisation scores
read zero at five per cent of copies. So the audit never calibrates there, plants from different fields, and says how
many fields there are.

Legend: n training tiles, C clusters (fields).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixcell_core.cli.progress import progress
from pixcell_core.contracts.bands import band
from privacy_audit.geometry import FINE_SIDE, Shifts, correlate, spectra
from privacy_audit.neighbours import most_similar
from privacy_audit.result import Status, TestResult
from privacy_audit.spectrum import ShapeSpectra
from privacy_audit.subject import Group

DUPLICATES = "near-duplicate training tiles"
_NEIGHBOURS = 8  # a tile cut with a stride of half its side overlaps eight others
_ALIKE = 0.12  # shape spectra: half a field in common gives about .25, nothing in common .03
_ONE_FIELD = 0.48  # shift-tolerant correlation: above every unrelated pair seen, below half a field (.53)
_PAIRS_AT_ONCE = 256


@dataclass(frozen=True)
class Duplicates:
    """Which training tiles show one field."""

    cluster: npt.NDArray[np.int64]  # (n,) number of each tile's field, 0..C-1

    @property
    def fields(self) -> int:
        """C."""
        return int(self.cluster.max()) + 1 if len(self.cluster) else 0

    @property
    def largest(self) -> int:
        """Tiles of the field that stands there most often."""
        return int(np.bincount(self.cluster).max()) if len(self.cluster) else 0

    @property
    def share(self) -> float:
        """Share of tiles whose field another tile shows too."""
        sizes = np.bincount(self.cluster) if len(self.cluster) else np.empty(0, dtype=np.int64)
        return float((sizes[self.cluster] > 1).mean()) if len(self.cluster) else 0.0

    def same(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether two rows of training tiles show one field."""
        return np.asarray(self.cluster[first] == self.cluster[second])


def find_duplicates(train: Group, shapes: ShapeSpectra, min_overlap: float) -> Duplicates:
    """Cluster the tiles of each patient: overlap arises inside a slide, and patients are compared elsewhere.

    Pairs come from the nearest shape spectra, which a shift leaves alone, and count when their correlation at the
    best shift says that they share half of their field; clusters are the connected components.
    """
    pairs = _candidates(train, shapes)
    plan = Shifts.of(FINE_SIDE, min_overlap, shapes.device)
    thumbs = train.features.thumbs
    parent = list(range(len(train)))
    with progress("comparing training tiles of a patient", total=len(pairs), unit="pairs") as bar:
        for block in pairs.split(_PAIRS_AT_ONCE) if len(pairs) else ():
            first = spectra(thumbs[block[:, 0]].to(shapes.device), plan, moving=False)
            second = spectra(thumbs[block[:, 1]].to(shapes.device), plan, moving=True)
            alike = correlate(first, second, plan)[0].to("cpu") >= _ONE_FIELD
            for a, b in block[alike].tolist():
                parent[_root(parent, a)] = _root(parent, b)
            bar.advance(len(block))
    roots = np.array([_root(parent, row) for row in range(len(train))], dtype=np.int64)
    return Duplicates(np.unique(roots, return_inverse=True)[1].astype(np.int64))


def duplicates_result(found: Duplicates, needed: int) -> TestResult:
    """What the report says about it, counts in bands; INVALID where fewer than `needed` fields can be planted."""
    few = found.fields < needed
    return TestResult(
        name=DUPLICATES,
        section="preconditions",
        claim="Training tiles that show one field are counted as one.",
        statistic="share of training tiles whose field another training tile shows too",
        value=round(found.share, 2),
        direction="lower is safer",
        status=Status.INVALID if few else Status.PASS,
        gating=few,
        why=(
            f"There are fewer than {needed} different fields of tissue: copies planted again and again from the same few "
            "would prove nothing. "
            if few
            else ""
        )
        + (
            f"About {band(len(found.cluster))} training tiles show about {band(found.fields)} different fields. No "
            "threshold of this audit rests on distances between training tiles, and copies are planted from "
            "different fields."
        ),
        cannot_show="Serial sections: neighbouring slices of one block differ in every nucleus.",
        details={"train_tiles": band(len(found.cluster)), "train_fields": band(found.fields)},
    )


def _candidates(train: Group, shapes: ShapeSpectra) -> Tensor:
    """Pairs (m, 2) of rows of one patient with like spectra, each once."""
    patients = np.array(train.patients)
    pairs: list[Tensor] = []
    for name in train.patient_names:
        rows = torch.from_numpy(np.flatnonzero(patients == name))
        if len(rows) < 2:
            continue
        vectors = shapes(train.features.thumbs[rows])
        near, at = most_similar(vectors, vectors, _NEIGHBOURS + 1, device=shapes.device)
        here, rank = torch.nonzero(near >= _ALIKE, as_tuple=True)
        first, second = rows[here], rows[at[here, rank]]
        ordered = torch.stack([torch.minimum(first, second), torch.maximum(first, second)], dim=1)
        pairs.append(ordered[first != second].unique(dim=0))
    return torch.cat(pairs) if pairs else torch.empty(0, 2, dtype=torch.int64)


def _root(parent: list[int], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row
