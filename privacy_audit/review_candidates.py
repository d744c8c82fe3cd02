"""What may be shown to a reviewer: nearest pairs and tiles that may bear a mark, each among innocent ones.

Two questions are asked. Of two tiles: do both show the same field? Of one tile: does it bear text, ink or a label?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from privacy_audit.policy import ReviewPolicy

Kind = Literal["pair", "decoy", "mark", "clean"]
Question = Literal["field", "mark"]
ASKS: dict[Kind, Question] = {"pair": "field", "decoy": "field", "mark": "mark", "clean": "mark"}


@dataclass(frozen=True)
class Candidate:
    """One possible item: where it comes from, and how suspect it is. A single tile has no training tile beside it."""

    kind: Kind
    left: str
    left_row: int
    left_digest: str
    score: float
    training_row: int | None = None
    training_tile: str = ""
    training_digest: str = ""


def pairs(
    kind: Literal["pair", "decoy"],
    names: tuple[str, ...],
    digests: tuple[str, ...],
    match: npt.NDArray[np.int64],
    score: npt.NDArray[np.float64],
    training_names: tuple[str, ...],
    training_digests: tuple[str, ...],
) -> list[Candidate]:
    """Each tile beside its best match."""
    return [
        Candidate(
            kind=kind,
            left=names[row],
            left_row=row,
            left_digest=digests[row],
            training_row=int(match[row]),
            training_tile=training_names[int(match[row])],
            training_digest=training_digests[int(match[row])],
            score=float(score[row]),
        )
        for row in range(len(names))
    ]


def singles(
    kind: Literal["mark", "clean"],
    names: tuple[str, ...],
    digests: tuple[str, ...],
    rows: npt.NDArray[np.int64],
    severity: npt.NDArray[np.float64],
) -> list[Candidate]:
    """Single tiles: some rows of a group, and how strongly the detectors saw a mark on each."""
    return [
        Candidate(kind, names[row], row, digests[row], float(score))
        for row, score in zip(rows.tolist(), severity, strict=True)
    ]


def choose(
    near: list[Candidate], decoys: list[Candidate], policy: ReviewPolicy, rng: np.random.Generator
) -> list[Candidate]:
    """The nearest pairs and the nearest decoys, shuffled: a decoy that looks like nothing would give itself away."""
    return _shuffled(_first(near, policy.pairs) + _first(decoys, policy.decoys), rng)


def choose_marks(
    hits: list[Candidate], clean: list[Candidate], policy: ReviewPolicy, rng: np.random.Generator
) -> list[Candidate]:
    """The worst hits, and as many innocent tiles: those on which the detectors saw most without calling it a hit."""
    shown = _first(hits, policy.marks)
    return _shuffled(shown + _first(clean, len(shown)), rng)


def _first(group: list[Candidate], count: int) -> list[Candidate]:
    return sorted(group, key=lambda one: (-one.score, one.left))[:count]


def _shuffled(chosen: list[Candidate], rng: np.random.Generator) -> list[Candidate]:
    return [chosen[int(place)] for place in rng.permutation(len(chosen))]
