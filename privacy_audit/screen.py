"""The near-copy screen: one score per tile, the same for released, holdout and planted tiles.

Candidates come from three retrievals that fail differently: the second eye, shape spectra (blind to shifts), and
pooled haematoxylin (blind to detail) under the eight symmetries. Candidates are compared in every symmetry at
coarse size with a shift search, and the best few pairs again at full thumbnail size. The score is the best
shift-tolerant correlation, see `geometry.correlate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pixcell_core.cli.progress import progress
from privacy_audit.features import TileFeatures
from privacy_audit.geometry import (
    COARSE_SIDE,
    FINE_SIDE,
    ORIENTATIONS,
    Shifts,
    correlate,
    orient,
    pooled,
    spectra,
)
from privacy_audit.neighbours import Standardiser, most_similar, nearest
from privacy_audit.policy import CopyPolicy
from privacy_audit.spectrum import TURNS, ShapeSpectra

_QUERIES_AT_ONCE = 32


@dataclass(frozen=True)
class ScreenScores:
    """Best match of each query among the reference tiles.

    `aligned` holds the symmetry to apply to the query and the shift (dy, dx), in thumbnail pixels, that then
    brings the reference onto it.
    """

    score: npt.NDArray[np.float64]  # (q,) in [-1, 1]
    match: npt.NDArray[np.int64]  # (q,) row of the reference
    aligned: npt.NDArray[np.int64]  # (q, 3): symmetry, dy, dx


class CopyScreen:
    """Scores any tiles against one fixed reference set (the training tiles)."""

    def __init__(
        self, reference: TileFeatures, standardise: Standardiser, shapes: ShapeSpectra, policy: CopyPolicy
    ) -> None:
        self._policy, self._standardise, self._shapes = policy, standardise, shapes
        self._embeddings = standardise(reference.embeddings)
        self._spectra = shapes(reference.thumbs)
        self._fine = reference.thumbs
        self._coarse = _shrink(reference.thumbs)
        self._pooled = torch.cat([pooled(part.float()) for part in reference.thumbs.split(512)])
        self._fine_plan = Shifts.of(FINE_SIDE, policy.min_overlap)
        self._coarse_plan = Shifts.of(COARSE_SIDE, policy.min_overlap)

    def score(self, queries: TileFeatures, label: str) -> ScreenScores:
        """Score every query; `label` names the work on the progress bar."""
        k = self._policy.candidates_per_source
        by_eye = nearest(self._standardise(queries.embeddings), self._embeddings, k)[1]
        candidates = torch.cat([by_eye, self._candidates_by_spectrum(queries.thumbs, k)], dim=1)
        shape_rows, shape_turns = self._candidates_by_shape(queries.thumbs)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        with progress(label, total=len(queries), unit="tiles") as bar:
            for start in range(0, len(queries), _QUERIES_AT_ONCE):
                rows = slice(start, min(start + _QUERIES_AT_ONCE, len(queries)))
                thumbs = queries.thumbs[rows].float()
                eye_rows, eye_turns = self._best_turns(thumbs, candidates[rows])
                who = torch.cat([eye_rows, shape_rows[rows]], dim=1)
                how = torch.cat([eye_turns, shape_turns[rows]], dim=1)
                found.append(self._verify(thumbs, who, how))
                bar.advance(len(thumbs))
        best, match, aligned = (torch.cat(parts) for parts in zip(*found, strict=True))
        return ScreenScores(best.double().numpy(), match.numpy(), aligned.numpy())

    def _candidates_by_spectrum(self, thumbs: Tensor, k: int) -> Tensor:
        """Reference rows (q, k) that share the most of their field with the query, wherever it lies."""
        similar, rows = [], []
        for turn in TURNS:
            turned = self._shapes(thumbs, turn)
            near, at = most_similar(turned, self._spectra, k)
            similar.append(near)
            rows.append(at)
        best = torch.cat(similar, dim=1).topk(rows[0].shape[1], dim=1).indices
        return torch.cat(rows, dim=1).gather(1, best)

    def _candidates_by_shape(self, thumbs: Tensor) -> tuple[Tensor, Tensor]:
        """Reference rows and symmetries, both (q, m), whose pooled shape fits best without a shift."""
        keep = self._policy.verified_orientations
        rows, turns = [], []
        for block in thumbs.split(512):
            similar, found = [], []
            for which in range(ORIENTATIONS):
                turned = pooled(orient(block.float(), which))
                near, at = most_similar(turned, self._pooled, keep)
                similar.append(near)
                found.append(at)
            order = torch.cat(similar, dim=1).topk(found[0].shape[1], dim=1).indices
            rows.append(torch.cat(found, dim=1).gather(1, order))
            turns.append(order // found[0].shape[1])
        return torch.cat(rows), torch.cat(turns)

    def _best_turns(self, thumbs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Compare (q, k) candidates in every symmetry at coarse size; the best (q, m) rows and symmetries."""
        count, k = candidates.shape
        unique, inverse = candidates.unique(return_inverse=True)
        base = spectra(self._coarse[unique], self._coarse_plan, moving=True)[inverse.reshape(-1)]
        small = _shrink(thumbs)
        rows = torch.arange(count)[:, None].expand(count, k).reshape(-1)
        coarse = torch.empty(count, k, ORIENTATIONS)
        for which in range(ORIENTATIONS):
            query = spectra(orient(small, which), self._coarse_plan, moving=False)
            coarse[:, :, which] = correlate(query[rows], base, self._coarse_plan)[0].view(count, k)
        keep = min(self._policy.verified_orientations, k * ORIENTATIONS)
        chosen = coarse.view(count, -1).topk(keep, dim=1).indices
        return candidates.gather(1, chosen // ORIENTATIONS), chosen % ORIENTATIONS

    def _verify(self, thumbs: Tensor, who: Tensor, how: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare (q, m) pairs at full thumbnail size; the best score, row and alignment of each query."""
        count, pairs = who.shape
        turned = torch.stack([orient(thumbs[i], int(turn)) for i, turns in enumerate(how) for turn in turns])
        fixed = spectra(turned, self._fine_plan, moving=False)
        moving = spectra(self._fine[who.reshape(-1)], self._fine_plan, moving=True)
        fine, shift = correlate(fixed, moving, self._fine_plan)
        best, at = fine.view(count, pairs).max(dim=1)
        pick = torch.arange(count) * pairs + at
        return best, who.reshape(-1)[pick], torch.cat([how.reshape(-1)[pick, None], shift[pick]], dim=1)


def _shrink(thumbs: Tensor) -> Tensor:
    return F.avg_pool2d(thumbs[:, None].float(), FINE_SIDE // COARSE_SIDE)[:, 0]
