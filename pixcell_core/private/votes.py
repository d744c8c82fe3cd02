"""Patients vote for public candidates; only a histogram with noise on it is ever looked at.

Private Evolution (Lin et al. 2023, "Differentially private synthetic data via foundation model APIs", algorithm 2)
asks private samples to vote for the nearest of some public candidates. Here the voter is the patient, not the tile.

**Sensitivity.** Fix the candidates and the public labels before the question is asked. A patient's tiles give counts
n_b >= 0 over the bins b = (label, candidate): each tile adds one to the bin of its own label and of the candidate
nearest to it, or to no bin at all. The patient's vote is v_b = floor(2^30 n_b / sqrt(sum n^2)) / 2^30, or zero where
no tile counts. Hence

1. sum v_b^2 <= sum n_b^2 / sum n^2 = 1, whatever the number of tiles, their labels or embeddings: rounding is towards
   zero and in whole numbers, so the bound holds exactly and not up to an error of floating point;
2. v depends on this patient's tiles, the candidates and the labels alone: every patient is compared with the
   candidates by itself, never in a batch with others, whose size could change a last bit and with it a nearest one;
3. the histogram is the sum of the votes in whole numbers, in which no addition rounds, and it is divided by nothing.

So adding or removing one patient changes the histogram by exactly that patient's vote: the L2 sensitivity is at most
1, and noise of standard deviation sigma makes each question a Gaussian mechanism of noise multiplier sigma at
q = 1. Candidates of a later question that are made from earlier noisy histograms are post-processing, and questions
compose adaptively in the accountant.
Legend: m tiles of a patient, c candidates, n tokens, d embedding width, r rows of the histogram (labels, or one).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.private.noise import NoiseSource

VOTE_UNIT_BITS: Final = 30
"""Votes are whole multiples of 2**-30: sums over up to 2**23 patients are exact in float64."""

Histogram = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PatientTiles:
    """All tiles of one patient: `embeddings` (m, n, d), and a label or None for each tile."""

    embeddings: torch.Tensor
    labels: tuple[str | None, ...]


class VotingCohort(Protocol):
    """The patients of a site, as the vote asks for them: one at a time, each once."""

    @property
    def patients(self) -> Sequence[str]:
        """Every patient once."""
        ...

    def tiles(self, patient: str) -> PatientTiles:
        """All tiles of a patient."""
        ...


def patient_vote(
    tiles: PatientTiles, candidates: torch.Tensor, labels: Sequence[str]
) -> npt.NDArray[np.int64]:
    """One patient's vote in units of 2**-30, int64 (r, c), whose L2 norm is 1 at most.

    Each tile counts for the candidate of the largest cosine between flattened embeddings (the first of equals), in the
    row of its label. A tile whose label is not among `labels` counts in no bin, and so does one whose embedding is
    zero or not finite. Without `labels` there is one row, in which every tile counts whatever its label.

    Args:
        tiles: embeddings (m, n, d) and labels.
        candidates: public embeddings (c, n, d).
        labels: public names of the classes.

    Raises:
        BadInputError: the tiles' embeddings have another shape than the candidates'.
    """
    return _vote(tiles, _directions(candidates), labels)


def exact_votes(cohort: VotingCohort, candidates: torch.Tensor, labels: Sequence[str]) -> Histogram:
    """The sum of all patients' votes, float64 (r, c): private, of L2 sensitivity 1, to be seen by nobody.

    Raises:
        BadInputError: embeddings that do not fit the candidates.
        ValueError: a patient is listed twice and would have two votes.
    """
    patients = list(cohort.patients)
    if len(set(patients)) != len(patients):
        raise ValueError("a patient is listed twice: one patient has one vote")
    directions = _directions(candidates)
    total = np.zeros((max(1, len(labels)), len(candidates)), np.int64)
    for patient in patients:
        total += _vote(cohort.tiles(patient), directions, labels)
    return total.astype(np.float64) * 2.0**-VOTE_UNIT_BITS


class NoisyVotes:
    """The one door between patients and conditions: asked with candidates, answers with a noisy histogram.

    Args:
        open_cohort: opens the patients; called after the charge, so that nothing private is read before it.
        labels: public names of the classes; none for one row.
        noise_multiplier: standard deviation of the noise of a bin, since the sensitivity is 1.
        source: where the noise comes from; one for all iterations.
        reserve: charges iteration i, and returns when that is on disk.
    """

    def __init__(
        self,
        open_cohort: Callable[[], VotingCohort],
        labels: Sequence[str],
        *,
        noise_multiplier: float,
        source: NoiseSource,
        reserve: Callable[[int], None],
    ) -> None:
        if not (math.isfinite(noise_multiplier) and noise_multiplier > 0.0):
            raise BadInputError(
                f"A noise multiplier of {noise_multiplier} hides no patient's vote.",
                hint="Give a finite number above 0; `pixcell private plan` finds one. Nothing was charged.",
                code="privacy-setting",
            )
        self._open_cohort, self._labels = open_cohort, tuple(labels)
        self._deviation, self._source, self._reserve = noise_multiplier, source, reserve

    def __call__(self, candidates: torch.Tensor, iteration: int) -> Histogram:
        """The noisy histogram (r, c) of one iteration, charged before a patient is looked at.

        Raises:
            BadInputError: embeddings that do not fit the candidates; the iteration stays charged.
        """
        self._reserve(iteration)
        exact = exact_votes(self._open_cohort(), candidates, self._labels)
        # Drawn whole even for an empty cohort: the number of draws may not depend on who is there.
        noise = self._source.gaussian(exact.size).reshape(exact.shape)
        return exact + self._deviation * noise


def _directions(candidates: torch.Tensor) -> torch.Tensor:
    """Candidates (c, n, d) at length 1, float64."""
    flat = torch.nn.functional.normalize(candidates.flatten(1).double(), dim=1)
    return flat.reshape(candidates.shape)


def _vote(tiles: PatientTiles, directions: torch.Tensor, labels: Sequence[str]) -> npt.NDArray[np.int64]:
    rows: dict[str | None, int] = {label: row for row, label in enumerate(labels)}
    vote = np.zeros((max(1, len(labels)), len(directions)), np.int64)
    if not len(tiles.embeddings):
        return vote
    counts: Counter[tuple[int, int]] = Counter()
    for nearest, label in zip(_nearest(tiles.embeddings, directions), tiles.labels, strict=True):
        row = rows.get(label, -1) if labels else 0
        if nearest >= 0 and row >= 0:
            counts[row, nearest] += 1
    square = sum(count * count for count in counts.values())
    for place, count in counts.items():
        vote[place] = math.isqrt((count * count << 2 * VOTE_UNIT_BITS) // square)
    return vote


def _nearest(embeddings: torch.Tensor, directions: torch.Tensor) -> list[int]:
    """Per tile the candidate of the largest cosine, or -1 for an embedding without direction."""
    if embeddings.shape[1:] != directions.shape[1:]:
        raise BadInputError(
            f"The features have {tuple(embeddings.shape[1:])} numbers per tile (tokens, width), the candidates "
            f"{tuple(directions.shape[1:])}.",
            hint="Make the candidates with the encoder that made this site's features.",
            code="features-do-not-fit",
        )
    flat = embeddings.flatten(1).double()
    # Where a tile itself is not finite the product is worthless, and the tile counts nowhere.
    usable = torch.isfinite(flat).all(dim=1) & (flat != 0).any(dim=1)
    nearest = (torch.where(usable[:, None], flat, 0.0) @ directions.flatten(1).T).argmax(dim=1)
    return [int(index) for index in torch.where(usable, nearest, -1)]
