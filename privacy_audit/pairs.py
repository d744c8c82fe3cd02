"""Scores of given pairs of tiles: the screen's own evidence, correlation, keypoints and fine detail, without its search.

Conditioning pairs and cliques know which tiles to compare. Correlation over shifts alone is blind to a turn by fifteen
degrees and to a zoom; keypoints are not, see `keypoints`; fine detail sees the paler half of a blend, see `detail`. They
are put together as the screen does it.

Legend: m pairs, B pairs of a block, N side of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pixcell_core.cli.progress import progress
from privacy_audit.detail import detail
from privacy_audit.geometry import FINE_SIDE, ORIENTATIONS, Shifts, correlate, orient, spectra
from privacy_audit.keypoints import agreement
from privacy_audit.policy import CopyPolicy
from privacy_audit.screen import combined, detail_score, keypoint_score
from privacy_audit.subject import Group

Pairs = Sequence[tuple[int, int]]
_PAIRS_AT_ONCE = 256


@dataclass(frozen=True)
class Correlated:
    """Best shift-tolerant correlation of each pair over the eight symmetries, and whether that one is mirrored."""

    score: npt.NDArray[np.float64]  # (m,) in [0, 1]
    mirrored: npt.NDArray[np.bool_]  # (m,)


def correlations(
    left: Group, right: Group, pairs: Pairs, min_overlap: float, *, side: int = FINE_SIDE
) -> Correlated:
    """Correlate each pair (row of left, row of right).

    A smaller `side` compares reduced thumbnails: rougher, and many times faster.
    """
    plan = Shifts.of(side, min_overlap)
    step = FINE_SIDE // side
    scores, turns = np.empty(len(pairs)), np.zeros(len(pairs), dtype=np.int64)
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        block = pairs[start : start + _PAIRS_AT_ONCE]
        # A tile stands in many pairs: it is transformed once a block.
        here, at = torch.tensor([a for a, _ in block]).unique(return_inverse=True)
        there, place = torch.tensor([b for _, b in block]).unique(return_inverse=True)
        fixed = F.avg_pool2d(left.features.thumbs[here].float(), step)
        reference = F.avg_pool2d(right.features.thumbs[there].float(), step)
        moving = spectra(reference, plan, moving=True)[place]
        every = torch.stack(
            [
                correlate(spectra(orient(fixed, which), plan, moving=False)[at], moving, plan)[0]
                for which in range(ORIENTATIONS)
            ]
        )
        best, which = every.max(dim=0)
        scores[start : start + len(block)] = best.double().numpy()
        turns[start : start + len(block)] = which.numpy()
    return Correlated(scores, turns >= ORIENTATIONS // 2)


def pair_scores(
    left: Group, right: Group, pairs: Pairs, policy: CopyPolicy, label: str
) -> npt.NDArray[np.float64]:
    """The screen's score of each pair, (m,) in [0, 1]; `label` names the work on the progress bar.

    About three CPU-milliseconds a pair: eight correlations, and keypoints as they are and mirrored.
    """
    found = correlations(left, right, pairs, policy.min_overlap)
    same = np.zeros(len(pairs), dtype=np.int64)
    most = np.zeros(len(pairs), dtype=np.int64)
    with progress(label, total=len(pairs), unit="pairs") as bar:
        for place, (a, b) in enumerate(pairs):
            inliers = [
                agreement(
                    left.features.keypoints[a : a + 1],
                    right.features.keypoints[b : b + 1],
                    mirrored=mirrored,
                ).inliers
                for mirrored in (False, True)
            ]
            same[place], most[place] = inliers[int(found.mirrored[place])], max(inliers)
            bar.advance()
    shape = combined(found.score, keypoint_score(same, policy))
    beneath = detail_score(_detail(left, right, pairs), policy)
    return np.asarray(np.maximum(np.maximum(shape, beneath), keypoint_score(most, policy)))


def _detail(left: Group, right: Group, pairs: Pairs) -> npt.NDArray[np.float64]:
    """Largest unshifted correlation of fine detail of each pair over the eight symmetries, (m,), see `detail`."""
    best = np.zeros(len(pairs))
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        block = pairs[start : start + _PAIRS_AT_ONCE]
        fixed = left.features.thumbs[[a for a, _ in block]].float()
        base = detail(right.features.thumbs[[b for _, b in block]].float())
        every = [(detail(orient(fixed, which)) * base).sum(dim=1) for which in range(ORIENTATIONS)]
        best[start : start + len(block)] = torch.stack(every).max(dim=0).values.double().numpy()
    return best
