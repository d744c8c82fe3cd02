"""The evidence of an audit: everything the verdict is computed from, kept at the site, loadable without pickle."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from privacy_audit.result import TestResult

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

MAX_EVIDENCE_BYTES = 4 * 1024**3


class EvidenceError(BadInputError):
    """The evidence file is missing, damaged or of another version."""

    default_code = "bad-evidence"


@dataclass(frozen=True)
class Evidence:
    """Scores and distances of one audit.

    S released tiles, n holdout tiles, K planted tiles, m recoloured tiles, P patients (training first).
    """

    released_ids: tuple[str, ...]  # (S,)
    released_scores: Floats  # (S,) screen score against training
    released_nearest: tuple[str, ...]  # (S,) blinded digest of the best-matching training tile
    released_exact: Booleans  # (S,) pixels of a training tile in some symmetry
    released_distances: Floats  # (S, P) to the nearest tile of each patient
    released_shape_distances: Floats  # (S, P) the same by shape spectra
    null_scores: Floats  # (n,) holdout tiles against training
    null_owner: Integers  # (n,) patient number of each
    planted_scores: Floats  # (K,)
    planted_kind: Integers  # (K,) index into plants.KINDS
    planted_same: Booleans  # (K,) found by digest alone
    planted_right: Booleans  # (K,) the best match is the tile it was made from
    planted_distances: Floats  # (K, P)
    planted_shape_distances: Floats  # (K, P)
    planted_patient: Integers  # (K,) patient number of the source
    recoloured_scores: Floats  # (m,)
    recoloured_owner: Integers  # (m,) patient number of the holdout tile
    is_train: Booleans  # (P,)
    stratum: Integers  # (P,)
    unrecognisable: float  # share of training tiles without texture
    preconditions: tuple[TestResult, ...]

    def to_bytes(self) -> bytes:
        """One `.npz`; equal evidence gives equal bytes."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        words: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                arrays[field.name] = value.astype(np.float32) if field.name.endswith("distances") else value
            elif field.name == "preconditions":
                words[field.name] = [test.model_dump(mode="json") for test in value]
            else:
                words[field.name] = value
        arrays["words"] = np.frombuffer(json.dumps(words, sort_keys=True).encode(), dtype=np.uint8)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(arrays):
                member = io.BytesIO()
                np.lib.format.write_array(member, np.ascontiguousarray(arrays[name]), allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
        return out.getvalue()

    @classmethod
    def load(cls, path: Path) -> Evidence:
        """Read evidence back.

        Raises:
            EvidenceError: missing, too large, damaged, or of another version.
        """
        if not path.is_file() or path.stat().st_size > MAX_EVIDENCE_BYTES:
            raise EvidenceError(
                f"The evidence {path.name} is not here.",
                hint="The evidence stays at the site; verify there, or check the shareable report alone.",
                code="evidence-missing",
            )
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            words = json.loads(arrays.pop("words").tobytes())
            words["preconditions"] = tuple(TestResult.model_validate(test) for test in words["preconditions"])
            for name in ("released_ids", "released_nearest"):
                words[name] = tuple(words[name])
            for name, array in arrays.items():
                if name.endswith("distances"):
                    arrays[name] = array.astype(np.float64)
            return cls(**arrays, **words)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise EvidenceError(
                f"The evidence {path.name} is damaged or of another version.",
                hint="Run the audit again.",
            ) from error


def as_stored(distances: npt.NDArray[Any]) -> Floats:
    """Round distances to what the evidence keeps, so that judging before and after storing agree."""
    return distances.astype(np.float32).astype(np.float64)
