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

from pixcell_core.cli.progress import progress
from privacy_audit.keypoints import KEPT, WIDTH, Keypoints, mirror

_MOST_WORDS = 4096
_PER_WORD = 64
_BITS = 64
_NEAR_BITS = 22  # of 64: two unrelated descriptors of a word differ in 32 ± 4
_SOFTNESS = 16.0
_TURN_BINS = 24
_ZOOM_OCTAVES = 1.0
_TRUST = np.exp(-((np.arange(_BITS + 1) / _SOFTNESS) ** 2))  # of a vote, by the bits that differ
_MANY = 2048  # votes of a query from which on most tiles are left out unseen
_LOOKED_AT = 256  # tiles with the most votes in all, whose votes are counted turn by turn first
_SEED = 20
_TILES_AT_ONCE = 256
_ROWS_AT_ONCE = 1024
_EXHAUSTIVE = 1024  # words that are simply all compared
_PROBES = 4  # groups of words whose members are compared
_ROUNDS = 4
_DESCRIPTORS_AT_ONCE = 32_768


@dataclass(frozen=True)
class Vote:
    """The reference tiles with the most votes of one query, best first."""

    row: npt.NDArray[np.int64]  # (m,)
    mirrored: npt.NDArray[np.bool_]  # (m,)
    votes: npt.NDArray[np.float64]  # (m,)


@dataclass(frozen=True)
class _Hits:
    """Pairs of a query's keypoint and a near keypoint of the reference, sorted by the query's number."""

    asker: npt.NDArray[np.int64]
    tile: npt.NDArray[np.int32]
    turn: npt.NDArray[np.int64]  # bin of turns
    weight: npt.NDArray[np.float64]


class VoteIndex:
    """Inverted file over the keypoints of a fixed set of reference tiles."""

    def __init__(self, reference: Keypoints) -> None:
        self._tiles = len(reference)
        generator = torch.Generator().manual_seed(_SEED)
        self._project = (
            torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:, :_BITS].contiguous()
        )
        self._centres = _choose_centres(reference, generator)
        self._cells = _Cells.of(self._centres)
        known = int(reference.count.sum())
        # Filled in place: pieces kept one by one among large passing ones would hold the memory in between.
        word, tile = np.empty(known, dtype=np.int32), np.empty(known, dtype=np.int32)
        signature, angle, size = (
            np.empty(known, dtype=np.uint64),
            np.empty(known, "f4"),
            np.empty(known, "f4"),
        )
        high = 0
        with progress("indexing keypoints", total=len(reference), unit="tiles") as bar:
            for start in range(0, len(reference), _TILES_AT_ONCE):
                part = reference[start : start + _TILES_AT_ONCE]
                which, point = torch.nonzero(torch.arange(KEPT)[None] < part.count[:, None], as_tuple=True)
                here = slice(high, high := high + len(which))
                word[here], signature[here] = self._encode(part.descriptor[which, point])
                tile[here] = (which + start).numpy()
                angle[here] = part.place[which, point, 3].float().numpy()
                size[here] = part.place[which, point, 2].float().log2().numpy()
                bar.advance(len(part))
        order = np.argsort(word, kind="stable")
        self._signature, self._tile = signature[order], tile[order]
        self._angle, self._size = angle[order], size[order]
        lengths = np.bincount(word, minlength=len(self._centres))
        self._start = np.concatenate([[0], np.cumsum(lengths)])
        self._weight = np.log1p(self._tiles / np.maximum(lengths, 1.0)) ** 2

    def vote(self, query: Keypoints, keep: int) -> list[Vote]:
        """The `keep` best reference tiles of each query tile, as it is and mirrored."""
        hits = self._hits(*self._encoded(Keypoints.join([query, mirror(query)])))
        bounds = np.searchsorted(hits.asker, np.arange(2 * len(query) + 1))
        tallies = [self._tally(hits, low, high, keep) for low, high in pairwise(bounds)]
        return [self._best([tallies[row], tallies[len(query) + row]], keep) for row in range(len(query))]

    def _encoded(
        self, query: Keypoints
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
        """Of every keypoint: number of its tile, word, signature, angle with log size."""
        which, point = torch.nonzero(torch.arange(KEPT)[None] < query.count[:, None], as_tuple=True)
        word, signature = self._encode(query.descriptor[which, point])
        place = query.place[which, point].float()
        frame = torch.stack([place[:, 3], place[:, 2].log2()], dim=1).numpy()
        return which.numpy(), word, signature, frame

    def _hits(
        self,
        asker: npt.NDArray[np.int64],
        word: npt.NDArray[np.int64],
        signature: npt.NDArray[np.uint64],
        frame: npt.NDArray[np.float32],
    ) -> _Hits:
        """Entries of the same word that are near and of like size, by asker."""
        order = np.argsort(word, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(word, minlength=len(self._centres)))])
        points, entries, apart = [], [], []
        # Word by word: all keypoints of a word against its whole list, which is read once and stays in the cache.
        for number in np.unique(word).tolist():
            low, high = self._start[number], self._start[number + 1]
            asking = order[bounds[number] : bounds[number + 1]]
            far = np.bitwise_count(signature[asking][:, None] ^ self._signature[None, low:high])
            row, column = np.divmod(np.flatnonzero(far <= _NEAR_BITS), max(high - low, 1))
            points.append(asking[row].astype(np.int32))
            entries.append((column + low).astype(np.int32))
            apart.append(far[row, column])
        point, entry, far = (
            np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
            for parts in (points, entries, apart)
        )
        close = np.flatnonzero(np.abs(self._size[entry] - frame[point, 1]) <= _ZOOM_OCTAVES)
        close = close[np.argsort(asker[point[close]].astype(np.int16), kind="stable")]
        point, entry = point[close], entry[close]
        turn = (self._angle[entry] - frame[point, 0]) % 360.0
        return _Hits(
            asker[point],
            self._tile[entry],
            (turn * (_TURN_BINS / 360.0)).astype(np.int64) % _TURN_BINS,
            self._weight[word[point]] * _TRUST[far[close]],
        )

    def _tally(
        self, hits: _Hits, low: int, high: int, keep: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Tiles and their votes in their best bin of turns (two neighbouring bins together): at least the `keep` best."""
        tile, turn, weight = hits.tile[low:high], hits.turn[low:high], hits.weight[low:high]
        if len(tile) < _MANY:
            tiles, place = np.unique(tile, return_inverse=True)
            return tiles.astype(np.int64), _best_bins(place, turn, weight, len(tiles))
        # No bin holds more than all of them, so the totals say which tiles need not be looked at.
        totals = np.bincount(tile, weights=weight, minlength=self._tiles)
        voted = np.flatnonzero(totals)
        few = min(max(_LOOKED_AT, 2 * keep), len(voted))
        likely = np.zeros(self._tiles, dtype=bool)
        likely[voted[np.argpartition(totals[voted], len(voted) - few)[-few:]]] = True
        votes = self._some(tile, turn, weight, likely)[1]
        if len(votes) > keep:
            likely |= totals >= np.partition(votes, len(votes) - keep)[-keep]
        return self._some(tile, turn, weight, likely)

    def _some(
        self,
        tile: npt.NDArray[np.int32],
        turn: npt.NDArray[np.int64],
        weight: npt.NDArray[np.float64],
        wanted: npt.NDArray[np.bool_],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Votes of the wanted tiles alone."""
        tiles = np.flatnonzero(wanted)
        number = np.zeros(self._tiles, dtype=np.int64)
        number[tiles] = np.arange(len(tiles))
        rows = np.flatnonzero(wanted[tile])
        return tiles, _best_bins(number[tile[rows]], turn[rows], weight[rows], len(tiles))

    def _best(self, sides: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]], keep: int) -> Vote:
        row = np.concatenate([tiles for tiles, _ in sides])
        votes = np.concatenate([votes for _, votes in sides])
        mirrored = np.repeat([False, True], [len(tiles) for tiles, _ in sides])
        order = np.lexsort((row, -votes))[:keep]
        return Vote(row[order], mirrored[order], votes[order])

    def _encode(self, descriptors: Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Word and signature of (e, W) descriptors."""
        values = descriptors.float()
        word = self._cells.nearest(descriptors)
        bits = ((values - self._centres[word]) @ self._project > 0).numpy()
        packed = (
            np.packbits(bits, axis=1).view(np.uint64)[:, 0] if len(bits) else np.empty(0, dtype=np.uint64)
        )
        return word.numpy(), packed


def _best_bins(
    place: npt.NDArray[np.int64], turn: npt.NDArray[np.int64], weight: npt.NDArray[np.float64], tiles: int
) -> npt.NDArray[np.float64]:
    table = np.bincount(place * _TURN_BINS + turn, weights=weight, minlength=tiles * _TURN_BINS)
    table = table.reshape(tiles, _TURN_BINS)
    return np.asarray((table + np.roll(table, 1, axis=1)).max(axis=1, initial=0.0))


@dataclass(frozen=True)
class _Cells:
    """Words grouped around a few of their number: only those of the nearest groups are compared.

    With thousands of words a comparison with each would cost more than all the rest of the index. The rule is one for
    reference and queries, so that the few descriptors whose nearest word lies in a group farther away still meet.
    """

    heads: Tensor  # (G, W)
    members: tuple[Tensor, ...]  # of each group, the rows of `centres`
    centres: Tensor  # (V, W)

    @classmethod
    def of(cls, centres: Tensor) -> _Cells:
        """Group the words; few of them make one group, which is an exhaustive search."""
        groups = int(len(centres) ** 0.5) if len(centres) > _EXHAUSTIVE else 1
        heads = centres[torch.linspace(0, len(centres) - 1, groups).long()]
        for _ in range(_ROUNDS):
            which = _nearest_centre(centres, heads)
            sums = torch.zeros_like(heads).index_add_(0, which, centres)
            size = torch.bincount(which, minlength=groups)[:, None]
            heads = torch.where(size > 0, sums / size.clamp_min(1), heads)
        which = _nearest_centre(centres, heads)
        return cls(heads, tuple(torch.nonzero(which == group)[:, 0] for group in range(groups)), centres)

    def nearest(self, values: Tensor) -> Tensor:
        """Row of the nearest word of the `_PROBES` nearest groups, for (e, W) descriptors as they are kept, in bytes."""
        if len(self.heads) == 1:
            return _nearest_centre(values.float(), self.centres)
        found = [self._block(block) for block in values.split(_DESCRIPTORS_AT_ONCE)]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)

    def _block(self, values: Tensor) -> Tensor:
        scores = torch.addmm(-0.5 * (self.heads**2).sum(1), values.float(), self.heads.T)
        # Small numbers sort by counting.
        near = scores.topk(_PROBES, dim=1, sorted=False).indices.flatten().to(torch.uint8).numpy()
        row = torch.from_numpy(np.argsort(near, kind="stable") // _PROBES)
        parts = row.split(np.bincount(near, minlength=len(self.heads)).tolist())
        best = torch.full((len(values),), -torch.inf)
        word = torch.zeros(len(values), dtype=torch.int64)
        for members, rows in zip(self.members, parts, strict=True):
            if not len(members) or not len(rows):
                continue
            centres = self.centres[members]
            score, at = torch.addmm(-0.5 * (centres**2).sum(1), values[rows].float(), centres.T).max(dim=1)
            better = score > best[rows]
            rows = rows[better]
            best[rows] = score[better]
            word[rows] = members[at[better]]
        return word


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
    out = torch.empty(len(values), dtype=torch.int64)
    # One buffer for all blocks: freed ones of this size left holes that added up to gigabytes.
    room = torch.empty(min(len(values), _ROWS_AT_ONCE), len(centres))
    for block, rows in zip(values.split(_ROWS_AT_ONCE), out.split(_ROWS_AT_ONCE), strict=True):
        torch.argmax(torch.addmm(half, block, centres.T, out=room[: len(block)]), dim=1, out=rows)
    return out
