"""Fine detail with a flattened spectrum: what of a copy still shows under another tile of several times its contrast.

A blend hides its paler half from any comparison of shapes, for large and dark structures hold nearly all the
variance. They hold few frequencies, though. Once the contrast is evened at the size of a nucleus and the amplitudes
are flattened, each of the d frequencies weighs about the same: unrelated tiles correlate by about 1/sqrt(d) = .024,
and a half with a quarter of the other's contrast still stands ten times above that. Nothing is fitted: amplitudes of
natural images fall as one over the frequency (Field, J Opt Soc Am A 4 (1987)), so the frequency itself is the filter.

The coefficients belong to cosines and sines about the centre of the tile. The symmetries of the square then only
change signs and swap the axes, and two tiles are compared in all eight of them for 1.5 d products instead of 8 d:
what is even in both axes, or odd in both, splits further into what a swap of the axes keeps and what it turns round.

Legend: B tiles, N side of a thumbnail, K highest frequency kept, d coefficients, q queries, n tiles of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from privacy_audit.geometry import FAR_FACTOR, FINE_SIDE, NEAR_SHIFT, ORIENTATIONS, blur, orient
from privacy_audit.neighbours import base_blocks, product

REACH = 24  # K, cycles per tile; the grid of JPEG's 8-pixel blocks lies at 28 in a tile of 224 pixels
LOWEST = 3.0  # cycles per tile
_SIGMA = 0.04  # of the side: a nucleus or two
_FLOOR = 0.25  # of the spread of a thumbnail with texture: an empty field is not blown up
_CLIP = 3.0
_LEAST_LENGTH = 0.1 * FINE_SIDE  # a fifth of what a tile with texture has: nothing resembles an empty field
_BLOCK = 512
_HALF = 0.5**0.5


@dataclass(frozen=True)
class DetailMatches:
    """The base rows that are most like each query without a shift, best first."""

    correlation: Tensor  # (q, m) float32
    row: Tensor  # (q, m) int64
    turn: Tensor  # (q, m) int64, the symmetry of `geometry.orient` that lays the query on the row


@dataclass(frozen=True)
class DetailShift:
    """The candidate that is most like each query at any shift."""

    correlation: Tensor  # (q,) float32; a real shift counts `geometry.FAR_FACTOR` of one that was expected
    row: Tensor  # (q,) int64
    aligned: Tensor  # (q, 3) int64: symmetry, dy, dx, as in `geometry.correlate`

    @classmethod
    def join(cls, parts: Sequence[DetailShift]) -> DetailShift:
        """Put several sets one after the other."""
        return cls(
            torch.cat([part.correlation for part in parts]),
            torch.cat([part.row for part in parts]),
            torch.cat([part.aligned for part in parts]),
        )


def detail(thumbs: Tensor) -> Tensor:
    """Unit vectors (B, d) of (B, N, N) thumbnails as `geometry.evened` makes them; shorter for an empty field."""
    plan = _plan(thumbs.device)
    plane = ((plan.waves @ _even_contrast(thumbs) @ plan.waves.T) * plan.weight).flatten(1)
    groups = []
    for alike in (plan.even, plan.odd):
        here, swapped = plane[:, alike.above], plane[:, alike.below]
        groups += [plane[:, alike.diagonal], (here + swapped) * _HALF, (here - swapped) * _HALF]
    vectors = torch.cat([*groups, plane[:, plan.mixed], plane[:, plan.mixed_swapped]], dim=1)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(_LEAST_LENGTH)


class DetailIndex:
    """Every tile of a fixed base, to be compared with any query in all eight symmetries; no tile is left out.

    Thumbnails, vectors and what is found lie in the processor's memory; `device` is where they are compared.
    """

    def __init__(self, thumbs: Tensor, device: torch.device | str = "cpu") -> None:
        self._thumbs, self._device = thumbs, device
        self._base = self._vectors(thumbs).to("cpu")

    def __len__(self) -> int:
        return len(self._base)

    def best(self, thumbs: Tensor, keep: int, label: str = "") -> DetailMatches:
        """The `keep` rows of the base (at most n) with the largest correlation with each (q, N, N) thumbnail.

        `label` names the work on a progress bar; none without.
        """
        keep = min(keep, len(self))
        blocks = [detail(block.to(self._device)) for block in thumbs.split(_BLOCK)] if len(thumbs) else []
        found = [block.new_empty(len(block), 0) for block in blocks]
        rows = [block.new_empty(len(block), 0, dtype=torch.int64) for block in blocks]
        for low, part in base_blocks(self._base, _BLOCK, self._device, label):
            for number, block in enumerate(blocks):
                near, at = _best_of_eight(block, part).topk(min(keep, len(part)), dim=1)
                near = torch.cat([found[number], near], dim=1)
                at = torch.cat([rows[number], at + low], dim=1)
                found[number], order = near.topk(min(keep, near.shape[1]), dim=1)
                rows[number] = at.gather(1, order)
        row = torch.cat(rows).to("cpu") if rows else torch.empty(0, keep, dtype=torch.int64)
        return self._turned(thumbs, row)

    def best_shift(self, thumbs: Tensor, candidates: Tensor) -> DetailShift:
        """The best of (q, k) candidate rows for (q, N, N) thumbnails, in every symmetry and at every shift.

        Shifts wrap round: what leaves on one side meets foreign tissue on the other, which adds nothing but noise.
        """
        unique, inverse = candidates.unique(return_inverse=True)
        base = _spectra(self._thumbs[unique].to(self._device)).conj().resolve_conj()
        inverse, thumbs = inverse.to(self._device), thumbs.to(self._device)
        prior = _shift_prior(base.device)
        correlation, place = torch.zeros(len(thumbs)), torch.zeros(len(thumbs), 3, dtype=torch.int64)
        for which in range(ORIENTATIONS):
            query = _spectra(orient(thumbs.float(), which))
            for number, known in enumerate(inverse):
                cross = torch.fft.irfft2(query[number] * base[known], s=prior.shape, norm="forward")
                best, at = (cross * prior).flatten().max(dim=0)
                if best > correlation[number]:
                    candidate, where = divmod(int(at), prior.numel())
                    correlation[number] = best
                    place[number] = torch.tensor([candidate, which, where])
        row = candidates.gather(1, place[:, :1])[:, 0]
        shift = torch.stack([place[:, 2] // FINE_SIDE, place[:, 2] % FINE_SIDE], dim=1)
        shift = (shift + FINE_SIDE // 2) % FINE_SIDE - FINE_SIDE // 2
        return DetailShift(correlation, row, torch.cat([place[:, 1:2], shift], dim=1))

    def _turned(self, thumbs: Tensor, row: Tensor) -> DetailMatches:
        """Which of the eight symmetries lays each query on each of its rows (q, m)."""
        exact = torch.empty(*row.shape, ORIENTATIONS)
        for low in range(0, len(row), _BLOCK):
            part = slice(low, low + _BLOCK)
            base = self._base[row[part]].to(self._device).float()
            here = thumbs[part].to(self._device)
            for which in range(ORIENTATIONS):
                query = detail(orient(here.float(), which))
                exact[part, :, which] = torch.einsum("qd,qmd->qm", query, base)
        correlation, turn = exact.max(dim=2)
        return DetailMatches(correlation, row, turn)

    def _vectors(self, thumbs: Tensor) -> Tensor:
        """Halves (n, d), block by block: of a hundred thousand tiles no second copy may stand beside the result."""
        out = torch.empty(len(thumbs), _plan(torch.device("cpu")).ends[-1], dtype=torch.float16)
        for low in range(0, len(thumbs), _BLOCK):
            out[low : low + _BLOCK] = detail(thumbs[low : low + _BLOCK].to(self._device)).half()
        return out


def _best_of_eight(queries: Tensor, base: Tensor) -> Tensor:
    """The largest of the eight correlations of every query with every tile of the base: (q, n)."""
    ends = _plan(base.device).ends
    even, even_turned, odd, odd_turned, mixed, mixed_swapped = (
        slice(low, high) for low, high in zip((0, *ends), ends, strict=False)
    )

    def products(left: slice, right: slice) -> Tensor:
        return product(queries[:, left], base[:, right])

    keeps, turns = products(even, even), products(even_turned, even_turned)
    odd_keeps, odd_turns = products(odd, odd), products(odd_turned, odd_turned)
    best: Tensor | None = None
    for swap, sides in ((1.0, (mixed, mixed_swapped)), (-1.0, (mixed_swapped, mixed))):
        across, down = products(sides[0], mixed), products(sides[1], mixed_swapped)
        even_part = torch.add(keeps, turns, alpha=swap)
        odd_part = torch.add(odd_keeps, odd_turns, alpha=swap)
        for mirrored, mixed_part in ((1.0, across + down), (-1.0, across - down)):
            # A half turn changes the sign of what is odd in one axis alone, hence the absolute value.
            score = mixed_part.abs_().add_(even_part).add_(odd_part, alpha=mirrored)
            best = score if best is None else torch.maximum(best, score, out=best)
    assert best is not None
    return best


@dataclass(frozen=True)
class _Alike:
    """Flat places of coefficients that are even in both axes, or odd in both; swapping the axes swaps above and below."""

    diagonal: Tensor
    above: Tensor
    below: Tensor


@dataclass(frozen=True)
class _Plan:
    """Waves, filter, and where the groups of coefficients lie: in the plane, and in a vector."""

    waves: Tensor  # (2K+1, N): cosines of 0..K cycles, then sines of 1..K, orthonormal
    weight: Tensor  # (2K+1, 2K+1)
    even: _Alike
    odd: _Alike
    mixed: Tensor  # even down, odd across
    mixed_swapped: Tensor
    ends: tuple[int, ...]  # of the six groups of `_best_of_eight`


@lru_cache(maxsize=4)
def _plan(device: torch.device) -> _Plan:
    place = torch.arange(FINE_SIDE) - (FINE_SIDE - 1) / 2
    cycles = torch.cat([torch.arange(REACH + 1), torch.arange(1, REACH + 1)])
    odd = torch.arange(len(cycles)) > REACH
    angle = (2.0 * torch.pi / FINE_SIDE) * cycles[:, None] * place
    waves = torch.where(odd[:, None], angle.sin(), angle.cos())
    radius = torch.hypot(cycles[:, None].float(), cycles[None, :].float())
    inside = (radius >= LOWEST) & (radius <= REACH)

    def flat(mask: Tensor) -> tuple[Tensor, Tensor]:
        down, across = torch.nonzero(mask & inside, as_tuple=True)
        return (down * len(cycles) + across).to(device), (across * len(cycles) + down).to(device)

    def alike(which: Tensor) -> _Alike:
        square = which[:, None] & which[None, :]
        above, below = flat(square.triu(1))
        return _Alike(flat(square & torch.eye(len(cycles), dtype=torch.bool))[0], above, below)

    groups = (alike(~odd), alike(odd))
    mixed, mixed_swapped = flat(~odd[:, None] & odd[None, :])
    sizes = [size for group in groups for size in (len(group.diagonal) + len(group.above), len(group.above))]
    return _Plan(
        waves=(waves / waves.norm(dim=1, keepdim=True)).to(device),
        weight=(radius / REACH).to(device),
        even=groups[0],
        odd=groups[1],
        mixed=mixed,
        mixed_swapped=mixed_swapped,
        ends=tuple(accumulate([*sizes, len(mixed), len(mixed)])),
    )


def _even_contrast(thumbs: Tensor) -> Tensor:
    band = thumbs.float()[:, None]
    band = band - blur(band, _SIGMA * FINE_SIDE)
    spread = blur(band * band, _SIGMA * FINE_SIDE).sqrt()
    return (band / spread.clamp_min(_FLOOR))[:, 0].clamp(-_CLIP, _CLIP)


def _spectra(thumbs: Tensor) -> Tensor:
    """Fourier transforms (B, N, N/2+1) of what `detail` measures, of unit length over the whole plane."""
    cycles = torch.fft.fftfreq(FINE_SIDE, 1 / FINE_SIDE, device=thumbs.device)
    radius = torch.hypot(cycles[:, None], cycles[None, : FINE_SIDE // 2 + 1])
    weight = torch.where((radius >= LOWEST) & (radius <= REACH), radius / REACH, 0.0)
    spectrum = torch.fft.rfft2(_even_contrast(thumbs), norm="ortho") * weight
    power = spectrum.abs() ** 2
    # Each column but the first stands for two.
    length = (2.0 * power.sum((1, 2)) - power[:, :, 0].sum(1)).sqrt()
    return spectrum / length.clamp_min(_LEAST_LENGTH)[:, None, None]


@lru_cache(maxsize=4)
def _shift_prior(device: torch.device) -> Tensor:
    """(N, N) factor of the correlation at each shift that wraps round: chance finds its best among thousands."""
    steps = torch.fft.fftfreq(FINE_SIDE, 1 / FINE_SIDE, device=device).abs()
    near = (steps[:, None] <= NEAR_SHIFT) & (steps[None, :] <= NEAR_SHIFT)
    return torch.where(near, 1.0, FAR_FACTOR)
