"""Keypoints of a tile's haematoxylin: places that survive any turn, zoom, shift, blend or paste, and how they match.

Correlation over shifts is blind to a zoom and to a turn by fifteen degrees. Scale-invariant keypoints (SIFT: Lowe,
IJCV 60 (2004)) are not: each carries its own place, size and angle. Two tiles of one field share keypoints that
agree on one similarity transform; two tiles of one stain do not.

Legend: n tiles, M keypoints kept of each, W = 128 numbers of a descriptor.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SIDE = 128  # pixels of the haematoxylin plane in which keypoints are searched
KEPT = 128  # M: the strongest of each tile
WIDTH = 128
_LEVELS = 25.5  # grey values for one robust spread of haematoxylin
_SCALE = 512.0  # of a RootSIFT number (at most about a half) to a byte
_RATIO = 0.92  # of the angles to the best and the second best partner: repeated nuclei are no evidence
_TOLERANCE = 4.0  # pixels of SIDE: room for an elastic warp
_ZOOM = 2.0  # a transform that shrinks or grows more than this is no copy
_LEAST = 3  # matches below which no transform is fitted


@dataclass(frozen=True)
class Keypoints:
    """Keypoints of n tiles; rows past `count` are zero."""

    place: Tensor  # (n, M, 4) float16: x, y, size in pixels of SIDE; angle in degrees
    descriptor: Tensor  # (n, M, W) uint8, RootSIFT
    count: Tensor  # (n,) int16

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: Any) -> Keypoints:
        return Keypoints(self.place[rows], self.descriptor[rows], self.count[rows])

    @classmethod
    def join(cls, parts: Sequence[Keypoints]) -> Keypoints:
        """Put several sets one after the other."""
        return cls(
            torch.cat([part.place for part in parts]),
            torch.cat([part.descriptor for part in parts]),
            torch.cat([part.count for part in parts]),
        )


@dataclass(frozen=True)
class Agreement:
    """What two tiles have in common: the transform from the first to the second, and the matches that obey it."""

    inliers: int
    mirrored: bool  # the first tile was mirrored left to right before the transform
    transform: npt.NDArray[np.float64]  # (2, 3) from the (mirrored) first to the second, pixels of SIDE
    here: npt.NDArray[np.float64]  # (inliers, 2) x, y in the first tile as it is, pixels of SIDE
    there: npt.NDArray[np.float64]  # (inliers, 2) in the second

    @property
    def zoom(self) -> float:
        """How much larger the second shows the same thing."""
        return float(np.hypot(self.transform[0, 0], self.transform[1, 0]))

    @property
    def degrees(self) -> float:
        """By how much the first is turned to lie on the second."""
        return float(np.degrees(np.arctan2(self.transform[1, 0], self.transform[0, 0])))


NOTHING = Agreement(0, False, np.eye(2, 3), np.empty((0, 2)), np.empty((0, 2)))


def find_keypoints(planes: Tensor) -> Keypoints:
    """Keypoints of haematoxylin planes (n, SIDE, SIDE) as `geometry.evened` makes them."""
    grey = ((planes.float() + 4.0) * _LEVELS).clamp(0, 255).to(torch.uint8).numpy()
    place = np.zeros((len(grey), KEPT, 4), dtype=np.float16)
    descriptor = np.zeros((len(grey), KEPT, WIDTH), dtype=np.uint8)
    count = np.zeros(len(grey), dtype=np.int16)

    def search(row: int) -> None:
        points, numbers = _detector().detectAndCompute(grey[row], None)
        if not points:
            return
        # Ties in strength are cut by place, so that equal tiles keep equal keypoints.
        order = sorted(range(len(points)), key=lambda i: (-points[i].response, points[i].pt))[:KEPT]
        count[row] = len(order)
        place[row, : len(order)] = [(*points[i].pt, points[i].size, points[i].angle % 360.0) for i in order]
        descriptor[row, : len(order)] = _root(numbers[order])

    # The search leaves the interpreter's lock, so as many threads help as torch may use.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(search, range(len(grey))))
    return Keypoints(torch.from_numpy(place), torch.from_numpy(descriptor), torch.from_numpy(count))


def mirror(points: Keypoints) -> Keypoints:
    """The keypoints of the same tiles mirrored left to right, without searching again.

    In a keypoint's own frame a mirror image swaps the sides of its axis: the four rows of cells run backwards and
    each gradient turns the other way.
    """
    x, y, size, angle = points.place.float().unbind(-1)
    known = torch.arange(KEPT)[None, :] < points.count[:, None]
    place = torch.stack([SIDE - 1 - x, y, size, (180.0 - angle) % 360.0], dim=-1) * known[..., None]
    cells = points.descriptor.unflatten(-1, (4, 4, 8)).flip(-3)
    backwards = cells[..., [0, 7, 6, 5, 4, 3, 2, 1]].flatten(-3)
    return Keypoints(place.half(), backwards.contiguous(), points.count)


def agreement(first: Keypoints, second: Keypoints, *, mirrored: bool) -> Agreement:
    """Match one tile with another (both of length 1) and fit the similarity transform most matches obey.

    Matches are mutual nearest neighbours whose second-best partner is clearly worse; RANSAC (Fischler & Bolles,
    1981) over them with the four-parameter model: turn, zoom, two shifts.
    """
    return agreements(first, mirror(first) if mirrored else first, second, [mirrored])[0]


def agreements(
    first: Keypoints, turned_over: Keypoints, others: Keypoints, mirrored: Sequence[bool]
) -> list[Agreement]:
    """`agreement` of one tile with each of several.

    Args:
        first: the tile, of length 1. turned_over: the same mirrored (anything where nothing of `mirrored` is true).
        others: m tiles. mirrored: for each of them, whether the tile is to be mirrored.
    """
    if not len(others):
        return []
    side = torch.tensor([int(flag) for flag in mirrored])
    both = Keypoints.join([first, turned_over])
    matched = _matches(both.descriptor.float()[side], both.count[side], others)
    return [
        _agreed(both.place[int(flag), rows, :2], others.place[number, partners, :2], flag)
        for number, (flag, (rows, partners)) in enumerate(zip(mirrored, matched, strict=True))
    ]


def _agreed(here: Tensor, there: Tensor, mirrored: bool) -> Agreement:
    """Fit one transform to matched places (k, 2) of the (mirrored) first tile and of the second."""
    if len(here) < _LEAST:
        return NOTHING
    source, target = here.double().numpy(), there.double().numpy()
    transform, inside = _fit(source, target)
    if transform is None:
        return NOTHING
    source, target = source[inside], target[inside]
    if mirrored:
        source = np.stack([SIDE - 1 - source[:, 0], source[:, 1]], axis=1)
    # Several keypoints at one place (one per angle) are one piece of evidence.
    distinct = min(len({(round(x), round(y)) for x, y in places.tolist()}) for places in (source, target))
    return Agreement(distinct, mirrored, transform, source, target)


def _matches(first: Tensor, counts: Tensor, others: Keypoints) -> list[tuple[Tensor, Tensor]]:
    """Rows of keypoints that match, in each of m pairs of tiles.

    Args:
        first: (m, M, W) float descriptors, of which `counts` (m,) are real. others: the m partners.
    """
    places = torch.arange(KEPT)
    second = others.descriptor.float()
    unknown = (places >= counts[:, None])[:, :, None] | (places >= others.count[:, None])[:, None, :]
    lengths = (first * first).sum(2)[:, :, None] + (second * second).sum(2)[:, None, :]
    # In units of a byte's step: whole numbers below 2^24, so nothing is rounded.
    squared = torch.baddbmm(lengths, first, second.transpose(1, 2), alpha=-2.0)
    if unknown.any():
        squared.masked_fill_(unknown, torch.inf)
    values = squared.numpy()
    at = torch.from_numpy(values.argmin(axis=2))
    near = squared.gather(2, at[:, :, None])[:, :, 0]
    mutual = torch.from_numpy(values.argmin(axis=1)).gather(1, at) == places
    next_best = squared.scatter_(2, at[:, :, None], torch.inf).amin(dim=2)
    # Where there is but one partner it has no rival.
    chosen = mutual & (near < _RATIO**2 * next_best) & torch.isfinite(near)
    return [
        (rows, at[number, rows]) for number, rows in enumerate(torch.nonzero(one)[:, 0] for one in chosen)
    ]


def _fit(
    source: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64] | None, npt.NDArray[np.bool_]]:
    import cv2

    transform, inside = cv2.estimateAffinePartial2D(
        source, target, method=cv2.RANSAC, ransacReprojThreshold=_TOLERANCE, maxIters=500, confidence=0.99
    )
    if transform is None:
        return None, np.zeros(len(source), dtype=bool)
    zoom = float(np.hypot(transform[0, 0], transform[1, 0]))
    if not 1 / _ZOOM <= zoom <= _ZOOM:
        return None, np.zeros(len(source), dtype=bool)
    return np.asarray(transform, dtype=np.float64), np.asarray(inside[:, 0], dtype=bool)


def _root(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """RootSIFT (Arandjelović & Zisserman, CVPR 2012): distances of roots compare histograms by Hellinger's measure."""
    share = numbers / np.maximum(numbers.sum(axis=1, keepdims=True), 1e-6)
    return np.clip(np.round(_SCALE * np.sqrt(share)), 0, 255).astype(np.uint8)


_local = threading.local()


def _detector() -> Any:
    """One detector a thread: it keeps its pyramid between calls."""
    if not hasattr(_local, "detector"):
        import cv2

        library: Any = cv2  # its type stubs leave SIFT out
        library.setNumThreads(1)
        # Without the precise upscale every place lies a quarter of a pixel aside, and a mirror image half a pixel.
        _local.detector = library.SIFT_create(nfeatures=KEPT, enable_precise_upscale=True)
    return _local.detector
