"""A set of feature rows with what is known of each row: its name, its patient, its label, the real tile behind it.

Legend: n rows, d feature width. Everything measured in this room takes such sets and computes in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError

Floats = npt.NDArray[np.float64]
UNKNOWN = ""


@dataclass(frozen=True)
class FeatureSet:
    """Features (n, d) of one set of tiles; the text columns have one entry per row, empty where unknown.

    Attributes:
        name: what people call the set, in messages.
        features: float64 (n, d).
        encoder: which encoder made the features.
        names: name of each tile, unique inside the set.
        patients: patient of each real tile; of a synthetic tile, the patient it was conditioned on.
        labels: tissue label of each tile.
        sources: of a synthetic tile, the name of the real tile it was conditioned on.
        file_kinds: file formats the tiles were read from, such as ("PNG",); empty for stored features.

    Raises:
        BadInputError: fewer than two rows, no (n, d) matrix, NaN or infinity, all rows equal, a column of another
            length, names that repeat.
    """

    name: str
    features: Floats
    encoder: str
    names: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    file_kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "features", checked_features(self.features, self.name))
        rows = len(self.features)
        if not self.names:
            object.__setattr__(self, "names", tuple(f"row-{i}" for i in range(rows)))
        for column in ("names", "patients", "labels", "sources"):
            entries = tuple(str(entry) for entry in getattr(self, column)) or (UNKNOWN,) * rows
            if len(entries) != rows:
                raise BadInputError(
                    f"{self.name} has {rows} feature rows but {len(entries)} entries in {column}.",
                    hint="Give one entry per feature row, in the same order.",
                    code="column-length",
                )
            object.__setattr__(self, column, entries)
        if len(set(self.names)) != rows:
            twice = next(n for i, n in enumerate(self.names) if n in self.names[:i])
            raise BadInputError(
                f"{self.name} names the tile {twice!r} more than once.",
                hint="Every tile of a set needs a name of its own.",
                code="tile-named-twice",
            )

    def __len__(self) -> int:
        return len(self.features)

    @property
    def patient_count(self) -> int:
        """How many patients are named."""
        return len({*self.patients} - {UNKNOWN})

    @property
    def knows_patients(self) -> bool:
        """Whether every row names its patient."""
        return UNKNOWN not in self.patients

    def require_labels(self) -> None:
        """Raise unless every row has a label."""
        without = self.labels.count(UNKNOWN)
        if without:
            raise BadInputError(
                f"{without} of {len(self)} rows of {self.name} have no label; a study needs one for each.",
                hint="Add a column `label` to the table of tiles (or an array `labels` to the feature file).",
                code="labels-missing",
            )

    def with_columns(self, **columns: Sequence[str]) -> FeatureSet:
        """The same features with other text columns."""
        return replace(self, **{k: tuple(v) for k, v in columns.items()})  # type: ignore[arg-type]


def checked_features(features: npt.ArrayLike, name: str) -> Floats:
    """Features as float64 (n, d), or a named error.

    Raises:
        BadInputError: not a matrix, fewer than two rows, NaN or infinity, or all rows equal.
    """
    matrix = np.asarray(features)
    if matrix.ndim != 2 or not (np.issubdtype(matrix.dtype, np.floating) or matrix.dtype.kind in "iu"):
        raise BadInputError(
            f"The features of {name} are {matrix.dtype} of shape {matrix.shape}; a matrix of numbers (rows, width) "
            "is expected.",
            hint="Give one row per tile; flatten or average several tokens of a tile first.",
            code="features-shape",
        )
    matrix = np.ascontiguousarray(matrix, dtype=np.float64)
    if len(matrix) < 2 or matrix.shape[1] < 1:
        raise BadInputError(
            f"{name} has {len(matrix)} rows of width {matrix.shape[1]}; at least two rows of width one are expected.",
            hint="Add tiles; hundreds are needed before these numbers say much.",
            code="too-few-rows",
        )
    broken = ~np.isfinite(matrix)
    if broken.any():
        row, column = (int(i) for i in np.argwhere(broken)[0])
        raise BadInputError(
            f"{name} holds {int(broken.sum())} values that are NaN or infinite (first: row {row}, column {column}, "
            f"{matrix[row, column]}); finite numbers are expected.",
            hint="Extract the features again; look at the tile of that row.",
            code="features-not-finite",
        )
    if not (matrix != matrix[0]).any():
        raise BadInputError(
            f"All {len(matrix)} rows of {name} are equal; features that differ between tiles are expected.",
            hint="The tiles are copies of one image, or the encoder returned a constant: look at both.",
            code="constant-features",
        )
    return matrix


def require_comparable(real: FeatureSet, synthetic: FeatureSet) -> None:
    """Raise unless both sets have one width and one encoder."""
    if real.features.shape[1] != synthetic.features.shape[1]:
        raise BadInputError(
            f"{real.name} has features of width {real.features.shape[1]} ({real.encoder}), {synthetic.name} of width "
            f"{synthetic.features.shape[1]} ({synthetic.encoder}); equal widths are expected.",
            hint="Extract both sets with the same encoder.",
            code="widths-differ",
        )
    if real.encoder != synthetic.encoder:
        raise BadInputError(
            f"{real.name} was embedded by {real.encoder}, {synthetic.name} by {synthetic.encoder}; "
            "one encoder is expected.",
            hint="Extract both sets with the same encoder.",
            code="encoders-differ",
        )
