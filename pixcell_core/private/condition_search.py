"""From votes to conditions: public candidates, noisy histograms, winners, and variations of the winners.

Everything here is post-processing. The search sees the public embeddings, public settings, a public seed and the noisy
histograms, and it is a function of them alone: whoever has the histograms can compute the conditions again, bit for
bit, without a patient in the room (`VotedConditions.histograms`, `replayed`).
Legend: c candidates, n tokens, d embedding width, r rows of the histogram (labels, or one), T iterations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pixcell_core.contracts.canonical import canonical_bytes, digest
from pixcell_core.contracts.study import PatientVotes
from pixcell_core.errors import RefusedError
from pixcell_core.private.votes import Histogram

FIRST_STEP = 1.0
"""How far the first variations go towards a neighbour; every iteration halves it.

The first go all the way, since a mean of embeddings is less varied than embeddings are: half-way steps made the
Frechet distance to the cohort larger in every setting that was measured.
"""

NEIGHBOURS = 8
"""Among how many of the nearest public embeddings a variation finds its direction, so that tissue stays its kind."""

_ROWS_AT_ONCE = 1024

Ask = Callable[[torch.Tensor, int], Histogram]
"""Candidates (c, n, d) and the iteration's number to a noisy histogram (r, c)."""


class Variation(Protocol):
    """Makes new public embeddings that resemble given ones."""

    name: str

    def __call__(self, parents: torch.Tensor, iteration: int, rng: np.random.Generator) -> torch.Tensor:
        """One variation (k, n, d) of each parent (k, n, d); `rng` is public."""
        ...


class Interpolation:
    """A step from each parent towards one of its nearest public embeddings, at a length between the two."""

    name = "interpolation"

    def __init__(self, bank: torch.Tensor) -> None:
        self._bank = bank.float()
        self._directions = torch.nn.functional.normalize(self._bank.flatten(1), dim=1)

    def __call__(self, parents: torch.Tensor, iteration: int, rng: np.random.Generator) -> torch.Tensor:
        """Parents (k, n, d) moved by `FIRST_STEP` / 2^iteration of the way."""
        step = FIRST_STEP / 2.0**iteration
        towards = self._bank[self._neighbours(parents, rng)]
        moved = (1.0 - step) * parents + step * towards
        # A mean of two directions is shorter than both; give it their length so that it stays a likely embedding.
        length = (1.0 - step) * parents.flatten(1).norm(dim=1) + step * towards.flatten(1).norm(dim=1)
        scale = length / moved.flatten(1).norm(dim=1).clamp(min=1e-6)
        return moved * scale[:, None, None]

    def _neighbours(self, parents: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """For each parent the row of one of its nearest public embeddings, itself left out."""
        count = min(NEIGHBOURS, len(self._bank))
        chosen = torch.from_numpy(rng.integers(count, size=len(parents)))
        rows = [torch.empty(0, dtype=torch.int64)]
        for part, drawn in zip(parents.split(_ROWS_AT_ONCE), chosen.split(_ROWS_AT_ONCE), strict=True):
            if len(part):
                cosine = torch.nn.functional.normalize(part.flatten(1), dim=1) @ self._directions.T
                near = cosine.masked_fill(cosine > 1.0 - 1e-5, -2.0).topk(count, dim=1).indices
                rows.append(near[torch.arange(len(part)), drawn])
        return torch.cat(rows)


@dataclass(frozen=True)
class WinningShares:
    """Which bins won: `shares`, as the histogram in shape, sum to 1; `uniform` where no bin passed and all count alike."""

    shares: npt.NDArray[np.float64]
    uniform: bool


def winning_shares(noisy: Histogram, votes: PatientVotes) -> WinningShares:
    """Drop bins under `votes.threshold` standard deviations of the noise; share the rest out in proportion.

    Where no bin is left, all public candidates and labels count alike: a decision made on the noisy histogram, so it
    tells no more than the histogram does.
    """
    kept = np.where(noisy >= votes.threshold * votes.noise_multiplier, noisy, 0.0)
    total = float(kept.sum())
    if total <= 0.0:
        return WinningShares(np.full(noisy.shape, 1.0 / noisy.size), uniform=True)
    return WinningShares(kept / total, uniform=False)


@dataclass(frozen=True)
class VotedConditions:
    """What a search released: all that follows is drawn from this and from nothing private.

    Attributes:
        candidates: each iteration's candidates, float32 (T, c, n, d).
        histograms: the noisy histograms of all iterations, float64 (T, r, c).
        votes: the public settings they were asked with.
        variation: name of what made the later candidates.
    """

    candidates: torch.Tensor
    histograms: npt.NDArray[np.float64]
    votes: PatientVotes
    variation: str

    @property
    def winners(self) -> WinningShares:
        """The bins (T, r, c) that won, all iterations together: every vote was paid for, and more of them say more."""
        return winning_shares(self.histograms, self.votes)

    @property
    def labels(self) -> tuple[str | None, ...]:
        """The label of each row; None for the one row of unlabelled votes."""
        return self.votes.labels or (None,)

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over settings, candidates and histograms."""
        named = {"votes": self.votes.model_dump(mode="json"), "variation": self.variation}
        arrays = (self.candidates.numpy().astype("<f4"), self.histograms.astype("<f8"))
        parts = [hashlib.sha256(canonical_bytes([list(a.shape)]) + a.tobytes()).hexdigest() for a in arrays]
        return digest({**named, "arrays": parts})


def public_seed(study_digest: str) -> int:
    """The seed of a study's search: public, and the same at every site."""
    return int.from_bytes(hashlib.sha256(f"private conditions/{study_digest}".encode()).digest()[:8], "big")


def search_conditions(
    bank: torch.Tensor, votes: PatientVotes, ask: Ask, vary: Variation, *, seed: int
) -> VotedConditions:
    """Ask `votes.iterations` times, each time with the winners of the time before and variations of them.

    A candidate drawn once among the winners stays as it is; drawn again, it makes room for a variation of itself, so
    that the search grows finer where the votes are.

    Args:
        bank: public embeddings (M, n, d), at least `votes.candidates` of them.
        votes: the study's public settings.
        ask: answers with noisy histograms, charging each before it is drawn.
        vary: makes variations of public embeddings.
        seed: public; with it and the histograms the search can be repeated.

    Raises:
        RefusedError: too few public embeddings.
    """
    if len(bank) < votes.candidates:
        raise RefusedError(
            f"There are {len(bank)} public embeddings, the study's votes need {votes.candidates} candidates.",
            hint="Make a larger file: pixcell site candidates make; its digest must stand in the study.",
            code="too-few-candidates",
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(bank))[: votes.candidates]
    candidates = bank[torch.from_numpy(np.sort(chosen))].float()
    histograms: list[Histogram] = []
    asked: list[torch.Tensor] = []
    for iteration in range(votes.iterations):
        if iteration:
            candidates = _next_candidates(candidates, histograms[-1], votes, vary, iteration, rng)
        asked.append(candidates)
        histograms.append(np.asarray(ask(candidates, iteration), np.float64))
    return VotedConditions(torch.stack(asked), np.stack(histograms), votes, vary.name)


def replayed(voted: VotedConditions, bank: torch.Tensor, vary: Variation, *, seed: int) -> VotedConditions:
    """The same search from its own noisy histograms: what it released follows from them, and from nothing else."""

    def remembered(candidates: torch.Tensor, iteration: int) -> Histogram:
        histogram: Histogram = voted.histograms[iteration]
        return histogram

    return search_conditions(bank, voted.votes, remembered, vary, seed=seed)


def _next_candidates(
    candidates: torch.Tensor,
    noisy: Histogram,
    votes: PatientVotes,
    vary: Variation,
    iteration: int,
    rng: np.random.Generator,
) -> torch.Tensor:
    by_candidate = winning_shares(noisy, votes).shares.sum(axis=0)
    # Systematic sampling (Kitagawa 1996): a candidate whose share is s is drawn floor or ceil of c s times, so that one
    # with a fair share of its own is never lost to chance, as it often would be in independent draws.
    places = (rng.random() + np.arange(len(candidates))) / len(candidates)
    reached = np.cumsum(by_candidate) / by_candidate.sum()
    drawn = np.minimum(np.searchsorted(reached, places, side="right"), len(candidates) - 1)
    kept = np.unique(drawn)
    # Every winner stands once in `kept`; `repeats` are its further draws.
    repeats = np.repeat(kept, np.bincount(drawn, minlength=len(candidates))[kept] - 1)
    varied = vary(candidates[torch.from_numpy(repeats)], iteration - 1, rng)
    return torch.cat([candidates[torch.from_numpy(kept)], varied])
