"""The evidence of an audit: everything the verdict is computed from, kept at the site, loadable without pickle."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from privacy_audit.evidence_parts import PARTS, Booleans, EvidencePart, Floats, Integers
from privacy_audit.result import TestResult

PartT = TypeVar("PartT", bound=EvidencePart)

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
    stated: Mapping[str, Any] = field(default_factory=dict)  # what the report repeats: references, tool
    parts: Mapping[str, EvidencePart] = field(default_factory=dict)  # by the names of `evidence_parts.PARTS`

    def part(self, kind: type[PartT]) -> PartT | None:
        """The part of a kind; None where it was not measured."""
        return next((part for part in self.parts.values() if isinstance(part, kind)), None)

    def to_bytes(self) -> bytes:
        """One `.npz`; equal evidence gives equal bytes."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        words: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, np.ndarray):
                arrays[one.name] = _stored(one.name, value)
            elif one.name == "preconditions":
                words[one.name] = [test.model_dump(mode="json") for test in value]
            elif one.name == "parts":
                words[one.name] = {name: part.words() for name, part in value.items()}
                for name, part in value.items():
                    for key, array in part.arrays().items():
                        arrays[f"{name}.{key}"] = _stored(key, array)
            else:
                words[one.name] = value
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
        return cls.from_bytes(read_evidence_bytes(path), path.name)

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "evidence") -> Evidence:
        """What `to_bytes` wrote.

        Raises:
            EvidenceError: damaged, or of another version.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            words = json.loads(arrays.pop("words").tobytes())
            words["preconditions"] = tuple(TestResult.model_validate(test) for test in words["preconditions"])
            for name in ("released_ids", "released_nearest"):
                words[name] = tuple(words[name])
            for name, array in arrays.items():
                if name.endswith("distances"):
                    arrays[name] = array.astype(np.float64)
            own = {name: array for name, array in arrays.items() if "." not in name}
            words["parts"] = {
                name: PARTS[name].restore(
                    {
                        key.removeprefix(f"{name}."): array
                        for key, array in arrays.items()
                        if key.startswith(f"{name}.")
                    },
                    said,
                )
                for name, said in words["parts"].items()
            }
            return cls(**own, **words)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise EvidenceError(
                f"The evidence {name} is damaged or of another version.",
                hint="Run the audit again.",
            ) from error


def read_evidence_bytes(path: Path) -> bytes:
    """The file's bytes, read once: what is digested must be what is judged.

    Raises:
        EvidenceError: missing or too large.
    """
    if not path.is_file() or path.stat().st_size > MAX_EVIDENCE_BYTES:
        raise EvidenceError(
            f"The evidence {path.name} is not here.",
            hint="The evidence stays at the site; verify there, or check the shareable report alone.",
            code="evidence-missing",
        )
    return path.read_bytes()


def _stored(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(np.float32) if name.endswith("distances") else array


def as_stored(distances: npt.NDArray[Any]) -> Floats:
    """Round distances to what the evidence keeps, so that judging before and after storing agree."""
    return distances.astype(np.float32).astype(np.float64)
