"""Embeddings that were handed in as a file: another examiner's eye, for the patient test.

One vector per tile, keyed by `train/`, `holdout/` or `synthetic/` and the tile's path in its folder. Planted copies have
no vector there, so these embeddings add a view to the permutation test and never replace the audit's own eye.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixcell_core.errors import BadInputError
from privacy_audit.evidence import as_stored
from privacy_audit.evidence_parts import GivenEvidence
from privacy_audit.neighbours import Standardiser, patient_minima
from privacy_audit.subject import Cohort
from privacy_audit.tiles import TileSource

SIDES = ("train", "holdout", "synthetic")
MAX_BYTES = 16 * 1024**3
MAX_WIDTH = 65_536


class EmbeddingsError(BadInputError):
    """Given embeddings are missing, of several widths, or no finite numbers."""

    default_code = "bad-embeddings"


@dataclass(frozen=True)
class GivenEmbeddings:
    """Embeddings of training, holdout and released tiles in the order of their sources; (n, d) float32 each."""

    train: Tensor
    holdout: Tensor
    synthetic: Tensor


def read(path: Path, sources: tuple[TileSource, TileSource, TileSource]) -> GivenEmbeddings:
    """Read a `.npz` or `.safetensors` file, one entry per tile.

    Raises:
        EmbeddingsError: unreadable, a tile without a vector, another width, or numbers that are not finite.
    """
    table = _table(path)
    groups: list[Tensor] = []
    width: int | None = None
    for side, source in zip(SIDES, sources, strict=True):
        rows = []
        for tile in source.ids:
            key = f"{side}/{tile}"
            if key not in table:
                raise EmbeddingsError(
                    f"{path.name} has no entry {key!r}.",
                    hint="Give one vector per tile, keyed train/PATH, holdout/PATH or synthetic/PATH.",
                    code="embeddings-missing",
                )
            vector = np.asarray(table[key], dtype=np.float32).reshape(-1)
            width = width or len(vector)
            if len(vector) != width or not 1 <= len(vector) <= MAX_WIDTH:
                raise EmbeddingsError(
                    f"The embedding of {key!r} has {len(vector)} numbers, others have {width}.",
                    hint="All tiles have to be embedded by one encoder.",
                    code="embeddings-width",
                )
            if not np.isfinite(vector).all():
                raise EmbeddingsError(
                    f"The embedding of {key!r} holds NaN or infinite numbers.",
                    hint="Embed the tile again, in full precision.",
                    code="embeddings-not-finite",
                )
            rows.append(torch.from_numpy(vector.copy()))
        groups.append(torch.stack(rows))
    return GivenEmbeddings(*groups)


def gather(given: GivenEmbeddings, cohort: Cohort) -> GivenEvidence:
    """Distances of the released tiles to every patient, (S, P)."""
    standardise = Standardiser.fit(given.train, given.holdout)
    rows = cohort.compared_sides
    base = standardise(torch.cat([given.train[rows[0]], given.holdout[rows[1]]]))
    owner = torch.from_numpy(cohort.compared_owner)
    distances = patient_minima(standardise(given.synthetic), base, owner, cohort.patients)
    return GivenEvidence(as_stored(distances.numpy()))


def _table(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise EmbeddingsError(
            f"The embeddings {path.name} are not here, or larger than {MAX_BYTES} bytes.",
            hint="Give a .npz or .safetensors file.",
            code="embeddings-missing",
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # the two readers raise a dozen kinds between them, all saying the same
        raise EmbeddingsError(
            f"{path.name} cannot be read as .npz or .safetensors.",
            hint="Write it again with numpy.savez or safetensors; pickled arrays are refused.",
        ) from error
