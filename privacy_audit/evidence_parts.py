"""Evidence of tests that have measurements of their own: arrays and words, in named parts of the evidence file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EvidencePart:
    """What one test measured. Fields are arrays, numbers, texts or tuples of texts; nothing else is stored."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The array fields by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}

    def words(self) -> dict[str, Any]:
        """All other fields by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if not isinstance(value, np.ndarray)}

    @classmethod
    def restore(cls, arrays: dict[str, npt.NDArray[Any]], words: dict[str, Any]) -> Self:
        """Build the part from what was stored; TypeError where a field is missing or left over."""
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in words.items()}
        return cls(**arrays, **plain)


@dataclass(frozen=True)
class ConditioningEvidence(EvidencePart):
    """Pair scores of m released tiles with the training tiles they were conditioned on."""

    released: Integers  # (m,) row of the released tile
    own: Floats  # (m,) best pair score with its own conditioning tiles
    other: Floats  # (m,) best pair score with as many holdout tiles that look most like those
    owner: Integers  # (m,) patient number of the first conditioning tile


@dataclass(frozen=True)
class BaseTwinEvidence(EvidencePart):
    """What the base model drew from the same seeds and conditions, scored against training like every other tile."""

    scores: Floats  # (t,)
    root: str  # over the twins' blinded digests


@dataclass(frozen=True)
class StrataEvidence(EvidencePart):
    """Isolation of P patients, and whose tiles the best matches are."""

    isolation: Floats  # (P,) median distance of a patient's tiles to the nearest tile of another patient
    released_match: Integers  # (S,) patient number of each released tile's best match
    null_match: Integers  # (n,) the same of each holdout tile
    class_patients: Integers  # (c,) training patients of each class
    class_names: tuple[str, ...]  # (c,)


@dataclass(frozen=True)
class MembershipEvidence(EvidencePart):
    """Attack scores of m tiles under the base and the generator; larger means better known to the model."""

    owner: Integers  # (m,) patient number
    base: Floats  # (m, 3) loss, PIA, SimA under the base
    generator: Floats  # (m, 3) under the generator


@dataclass(frozen=True)
class LinkabilityEvidence(EvidencePart):
    """m attempts of an intruder who holds one tile of a patient."""

    owner: Integers  # (m,) patient number
    rank: Integers  # (m,) place of that patient among the patients nearest to the linked released tile, 0 is first


@dataclass(frozen=True)
class CliqueEvidence(EvidencePart):
    """Pairs of released tiles whose score reaches the policy's."""

    left: Integers  # (e,)
    right: Integers  # (e,)
    score: Floats  # (e,)


@dataclass(frozen=True)
class DisclosureEvidence(EvidencePart):
    """What the detectors of ink, text and labels measured on S released and n holdout tiles."""

    ink: Floats  # (S,) share of pixels in a colour no stain has
    glyphs: Integers  # (S,) longest line of text-like signs
    blocks: Integers  # (S,) blocks that look like a barcode
    holdout_row: Integers  # (n,) rows of these holdout tiles
    holdout_ink: Floats  # (n,)
    holdout_glyphs: Integers  # (n,)
    holdout_blocks: Integers  # (n,)


@dataclass(frozen=True)
class PrivacyClaimEvidence(EvidencePart):
    """What a ledger claims, what its charges add up to, and what canaries proved; NaN-free: None where not given."""

    unit: str | None
    claimed: float | None
    recomputed: float | None
    delta: float | None
    canary_unit: str | None
    canary_bound: float | None
    canary_claimed: float | None
    canary_delta: float | None
    canaries: int
    canary_guesses: int = 0  # behind the bound; 0 where it rests on none


@dataclass(frozen=True)
class ContextEvidence(EvidencePart):
    """Distances between m sampled real tiles, s sampled released tiles and P patients, and a mixture's distances."""

    owner: Integers  # (m,) patient number of each sampled tile
    real_cell: Integers  # (m,) its cell of k-means
    real_distances: Floats  # (m, P) to the nearest tile of each patient in that cell; inf where none
    released_cell: Integers  # (s,)
    released_distances: Floats  # (s, P) in that cell
    near_distances: Floats  # (s, R) from sampled released tiles to their nearest patients, nearest first
    near_patient: Integers  # (s, R) who these are
    gap_distances: Floats  # (s, R) from each such patient's nearest tile to the nearest tile of anybody else
    mixture_owner: Integers  # (m',) patient number of each tile of the mixture's sample
    mixture_distances: Floats  # (m', s') between these and some released tiles
    width: int  # of an embedding


@dataclass(frozen=True)
class GivenEvidence(EvidencePart):
    """Distances by embeddings that were handed in as files."""

    released_distances: Floats  # (S, P)


@dataclass(frozen=True)
class HumanEvidence(EvidencePart):
    """What a reviewer decided about the blinded queue."""

    queue: str  # digest of the queue
    reviewer: str  # key id
    pair_same: int
    pair_unsure: int
    pairs: int
    decoy_same: int
    decoy_unsure: int
    decoys: int
    open: int  # items without a decision


@dataclass(frozen=True)
class MarkEvidence(EvidencePart):
    """What a reviewer decided about single tiles that may bear text, ink or a label."""

    queue: str  # digest of the queue
    reviewer: str  # key id
    marked: int  # hits called marked
    unsure: int
    shown: int  # hits that were shown
    decoy_marked: int
    decoy_unsure: int
    decoys: int
    open: int  # single tiles without a decision


PARTS: dict[str, type[EvidencePart]] = {
    "base_twins": BaseTwinEvidence,
    "conditioning": ConditioningEvidence,
    "strata": StrataEvidence,
    "membership": MembershipEvidence,
    "linkability": LinkabilityEvidence,
    "cliques": CliqueEvidence,
    "disclosure": DisclosureEvidence,
    "dp": PrivacyClaimEvidence,
    "context": ContextEvidence,
    "given": GivenEvidence,
    "human": HumanEvidence,
    "marks": MarkEvidence,
}
"""Parts by their name in the evidence file. A part that is absent was not measured."""
