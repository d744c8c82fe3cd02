"""Votes of keypoints: which reference tiles share places with a query, without comparing every pair.

Descriptors fall into words (the nearest of a few thousand centres); inside a word a 64-bit signature tells near
from far, and votes count only together when they agree on one turn and a possible zoom (Hamming embedding and weak
geometric consistency: Jégou, Douze & Schmid, ECCV 2008). A true copy gathers votes in one bin of turns; chance
scatters them.

Legend: n reference tiles, V words, E = sum of keypoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from privacy_audit.keypoints import KEPT, WIDTH, Keypoints, mirror

_MOST_WORDS = 4096
_PER_WORD = 64
_BITS = 64
_NEAR_BITS = 22  # of 64: two unrelated descriptors of a word differ in 32 ± 4
_SOFTNESS = 16.0
_TURN_BINS = 24
_ZOOM_OCTAVES = 1.0
_SEED = 20
_TILES_AT_ONCE = 256
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Vote:
    """The reference tiles with the most votes of one query, best first."""

    row: npt.NDArray[np.int64]  # (m,)
    mirrored: npt.NDArray[np.bool_]  # (m,)
    votes: npt.NDArray[np.float64]  # (m,)


class VoteIndex:
    """Inverted file over the keypoints of a fixed set of reference tiles."""

    def __init__(self, reference: Keypoints) -> None:
        self._tiles = len(reference)
        generator = torch.Generator().manual_seed(_SEED)
        self._project = (
            torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:, :_BITS].contiguous()
        )
        self._centres = _choose_centres(reference, generator)
        words, signatures, tiles, angles, sizes = [], [], [], [], []
        for start in range(0, len(reference), _TILES_AT_ONCE):
            part = reference[start : start + _TILES_AT_ONCE]
            which, point = torch.nonzero(torch.arange(KEPT)[None] < part.count[:, None], as_tuple=True)
            word, signature = self._encode(part.descriptor[which, point])
            words.append(word)
            signatures.append(signature)
            tiles.append((which + start).numpy().astype(np.int32))
            angles.append(part.place[which, point, 3].float().numpy())
            sizes.append(part.place[which, point, 2].float().log2().numpy())
        word = np.concatenate(words) if words else np.empty(0, dtype=np.int64)
        order = np.argsort(word, kind="stable")
        self._signature = np.concatenate(signatures)[order]
        self._tile = np.concatenate(tiles)[order]
        self._angle = np.concatenate(angles)[order]
        self._size = np.concatenate(sizes)[order]
        lengths = np.bincount(word, minlength=len(self._centres))
        self._start = np.concatenate([[0], np.cumsum(lengths)])
        self._weight = np.log1p(self._tiles / np.maximum(lengths, 1.0)) ** 2

    def vote(self, query: Keypoints, keep: int) -> list[Vote]:
        """The `keep` best reference tiles of each query tile, as it is and mirrored."""
        both = (self._encoded(query), self._encoded(mirror(query)))
        return [self._best([self._tally(*side[row]) for side in both], keep) for row in range(len(query))]

    def _encoded(
        self, query: Keypoints
    ) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64], npt.NDArray[np.float32]]]:
        which, point = torch.nonzero(torch.arange(KEPT)[None] < query.count[:, None], as_tuple=True)
        word, signature = self._encode(query.descriptor[which, point])
        place = query.place[which, point].float()
        frame = torch.stack([place[:, 3], place[:, 2].log2()], dim=1).numpy()
        bounds = np.concatenate([[0], np.cumsum(query.count.numpy().astype(np.int64))])
        return [(word[low:high], signature[low:high], frame[low:high]) for low, high in pairwise(bounds)]

    def _tally(
        self, word: npt.NDArray[np.int64], signature: npt.NDArray[np.uint64], frame: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Tiles with any vote, and the votes in their best bin of turns (two neighbouring bins together)."""
        lengths = self._start[word + 1] - self._start[word]
        asker = np.repeat(np.arange(len(word)), lengths)
        within = np.arange(len(asker)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        entry = np.repeat(self._start[word], lengths) + within
        far = np.bitwise_count(signature[asker] ^ self._signature[entry])
        near = np.flatnonzero(far <= _NEAR_BITS)
        asker, entry, far = asker[near], entry[near], far[near].astype(np.float64)
        close = np.flatnonzero(np.abs(self._size[entry] - frame[asker, 1]) <= _ZOOM_OCTAVES)
        asker, entry, far = asker[close], entry[close], far[close]
        if not len(entry):
            return np.empty(0, dtype=np.int64), np.empty(0)
        turn = (self._angle[entry] - frame[asker, 0]) % 360.0
        bin_ = (turn * (_TURN_BINS / 360.0)).astype(np.int64) % _TURN_BINS
        tiles, place = np.unique(self._tile[entry], return_inverse=True)
        weight = self._weight[word[asker]] * np.exp(-((far / _SOFTNESS) ** 2))
        table = np.bincount(place * _TURN_BINS + bin_, weights=weight, minlength=len(tiles) * _TURN_BINS)
        table = table.reshape(len(tiles), _TURN_BINS)
        return tiles.astype(np.int64), (table + np.roll(table, 1, axis=1)).max(axis=1)

    def _best(self, sides: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]], keep: int) -> Vote:
        row = np.concatenate([tiles for tiles, _ in sides])
        votes = np.concatenate([votes for _, votes in sides])
        mirrored = np.repeat([False, True], [len(tiles) for tiles, _ in sides])
        order = np.lexsort((row, -votes))[:keep]
        return Vote(row[order], mirrored[order], votes[order])

    def _encode(self, descriptors: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Word and signature of (e, W) descriptors."""
        values = descriptors.float()
        word = _nearest_centre(values, self._centres)
        bits = ((values - self._centres[word]) @ self._project > 0).numpy()
        packed = (
            np.packbits(bits, axis=1).view(np.uint64)[:, 0] if len(bits) else np.empty(0, dtype=np.uint64)
        )
        return word.numpy(), packed


def _choose_centres(reference: Keypoints, generator: torch.Generator) -> Tensor:
    """Words: descriptors drawn at random, moved once to the mean of their neighbours."""
    known = int(reference.count.sum())
    words = max(min(known // _PER_WORD, _MOST_WORDS), 1)
    tiles = torch.randperm(len(reference), generator=generator)[: max(2 * words * 16 // KEPT, 64)]
    part = reference[tiles]
    sample = part.descriptor[torch.arange(KEPT)[None] < part.count[:, None]].float()
    if not len(sample):
        return torch.zeros(1, WIDTH)
    centres = sample[torch.randperm(len(sample), generator=generator)[:words]]
    for _ in range(2):
        word = _nearest_centre(sample, centres)
        sums = torch.zeros_like(centres).index_add_(0, word, sample)
        size = torch.bincount(word, minlength=len(centres))[:, None]
        centres = torch.where(size > 0, sums / size.clamp_min(1), centres)
    return centres


def _nearest_centre(values: Tensor, centres: Tensor) -> Tensor:
    """Index (e,) of the centre nearest to each row, in blocks that stay in the processor's cache."""
    half = -0.5 * (centres**2).sum(1)
    parts = [torch.addmm(half, block, centres.T).argmax(dim=1) for block in values.split(_ROWS_AT_ONCE)]
    return torch.cat(parts) if len(values) else torch.empty(0, dtype=torch.int64)
