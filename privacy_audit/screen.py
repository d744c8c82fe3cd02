"""The near-copy screen: one score per tile, the same for released, holdout and planted tiles.

Candidates come from four retrievals that fail differently: the second eye, shape spectra (blind to shifts), pooled
haematoxylin (blind to detail) under the eight symmetries, and votes of keypoints (blind to turns, zooms and pastes).
Candidates are compared in two ways. Correlation: in every symmetry at coarse size with a shift
search, and the best few pairs again at full thumbnail size, see `geometry.correlate`. Keypoints: matched, and one
similarity transform fitted to the matches, see `keypoints.agreement`. Fine detail needs no candidates: every query is
compared with every tile, see `detail`. The score is the best of the three, on one scale from 0 to 1.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pixcell_core.cli.progress import progress
from privacy_audit.detail import DetailIndex, DetailMatches, DetailShift
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
from privacy_audit.keypoints import NOTHING, Agreement, Keypoints, agreements, mirror
from privacy_audit.neighbours import Standardiser, most_similar, nearest
from privacy_audit.policy import CopyPolicy
from privacy_audit.spectrum import ShapeSpectra, most_alike
from privacy_audit.votes import VoteIndex

_QUERIES_AT_ONCE = 32
_VOTES_AT_ONCE = 64


@dataclass(frozen=True)
class ScreenScores:
    """Best match of each query among the reference tiles.

    `aligned` holds the symmetry to apply to the query and the shift (dy, dx), in thumbnail pixels, that then
    brings the reference onto it; it belongs to the correlation or the fine detail, which may have chosen another
    reference tile than the keypoints did.
    """

    score: npt.NDArray[np.float64]  # (q,) in [0, 1]
    match: npt.NDArray[np.int64]  # (q,) row of the reference
    aligned: npt.NDArray[np.int64]  # (q, 3): symmetry, dy, dx
    correlation: npt.NDArray[np.float64]  # (q,) in [0, 1], before keypoints
    detail: npt.NDArray[
        np.float64
    ]  # (q,) largest correlation of fine detail: with any tile, or shifted with a candidate
    inliers: npt.NDArray[np.int64]  # (q,) most matches with any reference tile that obey one transform
    by_keypoints: npt.NDArray[np.bool_]  # (q,) whether the keypoints alone chose the match

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> ScreenScores:
        return ScreenScores(
            self.score[rows],
            self.match[rows],
            self.aligned[rows],
            self.correlation[rows],
            self.detail[rows],
            self.inliers[rows],
            self.by_keypoints[rows],
        )


@dataclass(frozen=True)
class _Agreed:
    """Keypoints of one query: with the tile that correlation chose, and with the best tile of all, `row`."""

    same: Agreement
    best: Agreement
    row: int


def combined(
    correlation: npt.NDArray[np.float64], points: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Two kinds of evidence for one pair: what speaks against it must speak against both."""
    return np.asarray(1.0 - (1.0 - correlation) * (1.0 - points))


def keypoint_score(inliers: npt.NDArray[np.int64], policy: CopyPolicy) -> npt.NDArray[np.float64]:
    """Put a number of inliers on the scale of a correlation: 0 at `chance_inliers`, half at `half_inliers` more."""
    beyond = np.maximum(inliers - policy.chance_inliers, 0).astype(np.float64)
    return np.asarray(beyond / (beyond + policy.half_inliers))


def detail_score(correlation: npt.NDArray[np.float64], policy: CopyPolicy) -> npt.NDArray[np.float64]:
    """Put a correlation of fine detail on the common scale: 0 at `chance_detail`, half at `half_detail` more."""
    beyond = np.maximum(correlation - policy.chance_detail, 0.0)
    return np.asarray(beyond / (beyond + policy.half_detail))


class CopyScreen:
    """Scores any tiles against one fixed reference set (the training tiles).

    The set and the scores lie in the processor's memory. Vectors and correlations are compared on the device of
    `shapes`; keypoints, of which each tile has another number, by the processor.
    """

    def __init__(
        self, reference: TileFeatures, standardise: Standardiser, shapes: ShapeSpectra, policy: CopyPolicy
    ) -> None:
        self._policy, self._standardise, self._shapes = policy, standardise, shapes
        self._device = shapes.device
        self._embeddings = standardise(reference.embeddings)
        self._spectra = shapes.base(reference.thumbs)
        self._fine = reference.thumbs
        self._pooled = torch.cat(
            [pooled(part.to(self._device).float()).to("cpu") for part in reference.thumbs.split(512)]
        )
        self._detail = DetailIndex(reference.thumbs, self._device)
        self._keypoints = reference.keypoints
        self._votes = VoteIndex(reference.keypoints)
        self._fine_plan = Shifts.of(FINE_SIDE, policy.min_overlap, self._device)
        self._coarse_plan = Shifts.of(COARSE_SIDE, policy.min_overlap, self._device)

    def score(self, queries: TileFeatures, label: str) -> ScreenScores:
        """Score every query; `label` names the work on the progress bar."""
        k = self._policy.candidates_per_source
        by_eye = nearest(
            self._standardise(queries.embeddings),
            self._embeddings,
            k,
            device=self._device,
            label=f"{label}: second eye",
        )[1]
        candidates = torch.cat([by_eye, self._candidates_by_spectrum(queries.thumbs, k, label)], dim=1)
        shape_rows, shape_turns = self._candidates_by_shape(queries.thumbs, label)
        fine = self._detail.best(queries.thumbs, 1, f"{label}: fine detail")
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        moved: list[DetailShift] = []
        with progress(label, total=len(queries), unit="tiles") as bar:
            for start in range(0, len(queries), _QUERIES_AT_ONCE):
                rows = slice(start, min(start + _QUERIES_AT_ONCE, len(queries)))
                thumbs = queries.thumbs[rows].float()
                eye_rows, eye_turns = self._best_turns(thumbs, candidates[rows])
                who = torch.cat([eye_rows, shape_rows[rows]], dim=1)
                how = torch.cat([eye_turns, shape_turns[rows]], dim=1)
                found.append(self._verify(thumbs, who, how))
                moved.append(self._detail.best_shift(thumbs, candidates[rows]))
                bar.advance(len(thumbs))
        best, match, aligned = (torch.cat(parts) for parts in zip(*found, strict=True))
        correlation, by_shape = best.double().numpy(), match.numpy()
        agreed = self._agree(queries, by_shape, aligned[:, 0].numpy() >= ORIENTATIONS // 2, label)
        inliers = np.array([found.best.inliers for found in agreed], dtype=np.int64)
        points = keypoint_score(inliers, self._policy)
        same = keypoint_score(np.array([found.same.inliers for found in agreed]), self._policy)
        shape = combined(correlation, same)
        beneath = _strongest(fine, DetailShift.join(moved))
        detail = beneath.correlation.double().numpy()
        under = detail_score(detail, self._policy)
        by_detail = under > shape
        seen = np.maximum(shape, under)
        row = np.where(by_detail, beneath.row.numpy(), by_shape)
        return ScreenScores(
            np.maximum(seen, points),
            np.where(points > seen, [found.row for found in agreed], row).astype(np.int64),
            np.where(by_detail[:, None], beneath.aligned.numpy(), aligned.numpy()),
            correlation,
            detail,
            inliers,
            points > seen,
        )

    def _agree(
        self,
        queries: TileFeatures,
        by_shape: npt.NDArray[np.int64],
        turned_over: npt.NDArray[np.bool_],
        label: str,
    ) -> list[_Agreed]:
        """Verify the candidates of the keypoints' votes, and the correlation's best match of each query."""
        keep = self._policy.voted_candidates
        if not keep:
            return [_Agreed(NOTHING, NOTHING, int(row)) for row in by_shape]

        def block(start: int) -> list[_Agreed]:
            rows = slice(start, start + _VOTES_AT_ONCE)
            return self._agree_block(queries.keypoints[rows], by_shape[rows], turned_over[rows], keep)

        agreed: list[_Agreed] = []
        starts = range(0, len(queries), _VOTES_AT_ONCE)
        # Tallies and fits leave the interpreter's lock, so as many threads help as torch may use; the order stays.
        with (
            progress(f"{label}: keypoints", total=len(queries), unit="tiles") as bar,
            ThreadPoolExecutor(torch.get_num_threads()) as pool,
        ):
            for found in pool.map(block, starts):
                agreed += found
                bar.advance(len(found))
        return agreed

    def _agree_block(
        self,
        queries: Keypoints,
        by_shape: npt.NDArray[np.int64],
        turned_over: npt.NDArray[np.bool_],
        keep: int,
    ) -> list[_Agreed]:
        mirrored = mirror(queries)
        agreed = []
        for number, votes in enumerate(self._votes.vote(queries, keep)):
            rows = [int(by_shape[number]), *votes.row.tolist()]
            found = agreements(
                queries[number : number + 1],
                mirrored[number : number + 1],
                self._keypoints[torch.tensor(rows)],
                [bool(turned_over[number]), *votes.mirrored.tolist()],
            )
            best = max(range(len(rows)), key=lambda one: found[one].inliers)  # the first of equals
            agreed.append(_Agreed(found[0], found[best], rows[best]))
        return agreed

    def _candidates_by_spectrum(self, thumbs: Tensor, k: int, label: str) -> Tensor:
        """Reference rows (q, k) that share the most of their field with the query, wherever it lies."""
        return most_alike(
            self._shapes.queries(thumbs), self._spectra, k, f"{label}: spectra", device=self._device
        )

    def _candidates_by_shape(self, thumbs: Tensor, label: str) -> tuple[Tensor, Tensor]:
        """Reference rows and symmetries, both (q, m), whose pooled shape fits best without a shift."""
        keep = self._policy.verified_orientations
        rows, turns = [], []
        with progress(f"{label}: pooled shape", total=len(thumbs), unit="tiles") as bar:
            for block in thumbs.split(512):
                similar, found = [], []
                for which in range(ORIENTATIONS):
                    turned = pooled(orient(block.to(self._device).float(), which))
                    near, at = most_similar(turned, self._pooled, keep, device=self._device)
                    similar.append(near)
                    found.append(at)
                order = torch.cat(similar, dim=1).topk(found[0].shape[1], dim=1).indices
                rows.append(torch.cat(found, dim=1).gather(1, order))
                turns.append(order // found[0].shape[1])
                bar.advance(len(block))
        return torch.cat(rows), torch.cat(turns)

    def _best_turns(self, thumbs: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Compare (q, k) candidates in every symmetry at coarse size; the best (q, m) rows and symmetries."""
        count, k = candidates.shape
        unique, inverse = candidates.unique(return_inverse=True)
        base = spectra(_shrink(self._fine[unique].to(self._device)), self._coarse_plan, moving=True)
        base = base[inverse.reshape(-1).to(self._device)]
        small = _shrink(thumbs.to(self._device))
        rows = torch.arange(count, device=self._device)[:, None].expand(count, k).reshape(-1)
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
        fixed = spectra(turned.to(self._device), self._fine_plan, moving=False)
        moving = spectra(self._fine[who.reshape(-1)].to(self._device), self._fine_plan, moving=True)
        fine, shift = (found.to("cpu") for found in correlate(fixed, moving, self._fine_plan))
        best, at = fine.view(count, pairs).max(dim=1)
        pick = torch.arange(count) * pairs + at
        return best, who.reshape(-1)[pick], torch.cat([how.reshape(-1)[pick, None], shift[pick]], dim=1)


def _shrink(thumbs: Tensor) -> Tensor:
    return F.avg_pool2d(thumbs[:, None].float(), FINE_SIDE // COARSE_SIDE)[:, 0]


def _strongest(unmoved: DetailMatches, moved: DetailShift) -> DetailShift:
    """The better of the best match without a shift, among all tiles, and at any shift, among the candidates."""
    first = unmoved.correlation[:, 0] >= moved.correlation
    aligned = F.pad(unmoved.turn[:, :1], (0, 2))
    return DetailShift(
        torch.where(first, unmoved.correlation[:, 0], moved.correlation),
        torch.where(first, unmoved.row[:, 0], moved.row),
        torch.where(first[:, None], aligned, moved.aligned),
    )
