"""Shape spectra: what of a tile survives every shift, for finding shifted and turned copies by one dot product.

A shift changes only the phase of a Fourier transform, so two tiles with a share r of their field in common have
spectra of magnitude correlated by about r², wherever the common part lies; unrelated tiles by about
1/sqrt(number of frequencies). Quarter turns and mirrors permute the frequencies, and a half turn none, so that
four symmetries stand for all eight.

These four form a group in which the order does not matter, and every spectrum is a sum of four parts that a symmetry
only multiplies by 1 or -1, one part for each character of the group. The products of a query in all four symmetries
are therefore sums and differences of four products of parts, which together are no longer than one spectrum.

Legend: B tiles, N side of a thumbnail, K highest frequency kept, d frequencies of the upper half ring, D about d numbers
of all parts together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from privacy_audit.geometry import FINE_SIDE, orient
from privacy_audit.neighbours import minima_by_patient, product, smallest

REACH = 24
LOWEST = 2.0  # cycles per tile: slower changes were removed from the thumbnails
TURNS = (0, 1, 4, 5)  # of `geometry.orient`; the other four are half turns of these
_CHARACTERS = ((1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))  # of each of `TURNS`
_BLOCK = 512
_QUERIES_AT_ONCE = 256  # rows whose products in four symmetries stay near the processor


@dataclass(frozen=True)
class ShapeSpectra:
    """Turns thumbnails into unit vectors; whitened by the mean spectrum of training and holdout together.

    Thumbnails come from the processor's memory and vectors go back to it; between, the work is done where `mean` lies.
    """

    mean: Tensor  # (2K+1, 2K+1)

    @classmethod
    def fit(cls, *groups: Tensor, device: torch.device | str = "cpu") -> ShapeSpectra:
        """Fit the mean magnitude on the union of (n, N, N) thumbnails; the device of the work from here on."""
        total, count = torch.zeros(2 * REACH + 1, 2 * REACH + 1, device=device), 0
        for group in groups:
            for block in group.split(_BLOCK):
                total += _magnitude(block.to(device)).sum(dim=0)
                count += len(block)
        return cls((total / max(count, 1)).clamp_min(1e-6))

    @property
    def device(self) -> torch.device:
        """Where vectors are made."""
        return self.mean.device

    def __call__(self, thumbs: Tensor, turn: int = 0) -> Tensor:
        """Unit vectors (n, d) of (n, N, N) thumbnails after one of the symmetries `TURNS`."""
        parts = [
            self._vectors(orient(_magnitude(block.to(self.device)), turn))[0].to("cpu")
            for block in thumbs.split(_BLOCK)
        ]
        return torch.cat(parts)

    def base(self, thumbs: Tensor) -> Tensor:
        """The same vectors of (n, N, N) thumbnails in parts, to be searched: (n, D + 1), squared length last."""
        out = torch.empty(len(thumbs), sum(_widths()) + 1)
        even = _evened_mean(self.mean)
        for block, rows in zip(thumbs.split(_BLOCK), out.split(_BLOCK), strict=True):
            vectors, _ = self._vectors(_magnitude(block.to(self.device)))
            whole = torch.zeros(len(block), 2 * REACH + 1, 2 * REACH + 1, device=self.device)
            whole[:, _ring(self.device)] = vectors
            whole *= even / self.mean
            rows[:, :-1] = _parts(0.5 * (whole + whole.flip((1, 2))))
            rows[:, -1] = (vectors**2).sum(dim=1)
        return out

    def queries(self, thumbs: Tensor) -> Tensor:
        """(n, N, N) thumbnails in parts, to be searched for in all of `TURNS`: (n, D + 5).

        Last come one over the length in each symmetry and the squared length after that division, 1 or 0.
        """
        out = torch.empty(len(thumbs), sum(_widths()) + len(TURNS) + 1)
        even = _evened_mean(self.mean)
        for block, rows in zip(thumbs.split(_BLOCK), out.split(_BLOCK), strict=True):
            magnitude = _magnitude(block.to(self.device))
            rows[:, : -len(TURNS) - 1] = _parts(magnitude / even)
            for number, turn in enumerate(TURNS):
                vectors, length = self._vectors(orient(magnitude, turn))
                rows[:, number - len(TURNS) - 1] = 1.0 / length
                rows[:, -1] = (vectors**2).sum(dim=1)
        return out

    def _vectors(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, d), and the lengths (B,) they had."""
        # Half the plane suffices: the magnitude of a real image is symmetric about the origin.
        flat = (magnitude / self.mean)[:, _ring(self.device)]
        flat = flat - flat.mean(dim=1, keepdim=True)
        length = flat.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return flat / length, length[:, 0]


def best_similarity(queries: Tensor, base: Tensor) -> Tensor:
    """Largest dot product over `TURNS` of each query with each base row, (q, n).

    Args:
        queries: (q, D + 5) of `ShapeSpectra.queries`. base: (n, D + 1) of `ShapeSpectra.base`.
    """
    out = torch.empty(len(queries), len(base), device=queries.device)
    columns = base[:, :-1].split(_widths(), dim=1)
    for block, rows in zip(queries.split(_QUERIES_AT_ONCE), out.split(_QUERIES_AT_ONCE), strict=True):
        *parts, scale, _ = block.split([*_widths(), len(TURNS), 1], dim=1)
        a, b, c, d = (product(part, column) for part, column in zip(parts, columns, strict=True))
        scales = scale.unsqueeze(2).unbind(1)
        # Sums and differences by the table of characters: (1, 1, 1, 1), (1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1).
        first, second = a + b, c + d
        torch.add(first, second, out=rows).mul_(scales[0])
        torch.maximum(rows, first.sub_(second).mul_(scales[1]), out=rows)
        a.sub_(b)
        c.sub_(d)
        torch.add(a, c, out=first).mul_(scales[2])
        torch.maximum(rows, first, out=rows)
        torch.maximum(rows, a.sub_(c).mul_(scales[3]), out=rows)
    return out


def most_alike(
    queries: Tensor, base: Tensor, k: int, label: str = "", device: torch.device | str = "cpu"
) -> Tensor:
    """The k base rows most similar to each query in any of `TURNS`, best first, (q, k)."""

    def measure(part: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda block: best_similarity(block, part).neg_()

    return smallest(queries, base, k, measure, label=label, device=device)[1]


def patient_distances(
    queries: Tensor,
    base: Tensor,
    patient: Tensor,
    patients: int,
    label: str = "",
    device: torch.device | str = "cpu",
) -> Tensor:
    """D (q, P): distance of each query, in its best symmetry, to the nearest base row of each patient."""

    def measure(part: Tensor) -> Callable[[Tensor], Tensor]:
        squares = part[:, -1]
        return lambda block: best_similarity(block, part).mul_(-2.0).add_(squares)

    minima = minima_by_patient(queries, base, patient, patients, measure, label=label, device=device)
    return minima.add_(queries[:, -1:]).clamp_min_(0).sqrt_()


def _evened_mean(mean: Tensor) -> Tensor:
    """Mean of a (2K+1, 2K+1) spectrum over the symmetries: dividing by it does not disturb them."""
    turned = torch.stack([orient(mean, turn) for turn in TURNS]).mean(dim=0)
    return 0.5 * (turned + turned.flip((0, 1)))


def _parts(spectra: Tensor) -> Tensor:
    """(B, 2K+1, 2K+1) spectra, symmetric about the origin, in parts (B, D): products of parts add up to products."""
    turned = torch.stack([orient(spectra, turn) for turn in TURNS], dim=1)
    places, weights = _places(spectra.device)
    signs_of = torch.tensor(_CHARACTERS, dtype=torch.float32).to(spectra.device) / 4
    found = []
    for signs, place, weight in zip(signs_of, places, weights, strict=True):
        # One orbit is represented by one frequency, so its weight is the root of how many there are.
        values = turned.flatten(2)[:, :, place]
        found.append(torch.einsum("bgk,g->bk", values, signs) * weight)
    return torch.cat(found, dim=1)


@lru_cache(maxsize=4)
def _ring(device: torch.device) -> Tensor:
    """(2K+1, 2K+1) bool: the frequencies kept, of the half plane."""
    span = torch.arange(-REACH, REACH + 1).float()
    radius = torch.hypot(span[:, None], span[None, :])
    return ((radius >= LOWEST) & (radius <= REACH) & (span[None, :] >= 0)).to(device)


@lru_cache(maxsize=4)
def _places(device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """For each character: one frequency of each orbit on which it does not vanish, and the root of the orbit's size."""
    side = 2 * REACH + 1
    grid = torch.arange(side * side).view(side, side)
    images = torch.stack([orient(grid, which) for which in range(8)]).flatten(1)  # (8, side²)
    least = images.amin(dim=0)
    half = _ring(torch.device("cpu"))
    ring = (half | half.flip((0, 1))).flatten()
    inside = torch.nonzero((least == grid.flatten()) & ring)[:, 0]
    turned = torch.stack([orient(grid, turn) for turn in TURNS]).flatten(1)[:, inside]
    opposite = side * side - 1 - inside
    fixed = (turned == inside) | (turned == opposite)  # (4, orbits)
    size = torch.tensor([len(column.unique()) for column in images[:, inside].T]).float()
    places, weights = [], []
    for signs in _CHARACTERS:
        vanishes = (fixed & (torch.tensor(signs)[:, None] < 0)).any(dim=0)
        places.append(inside[~vanishes])
        weights.append(size[~vanishes].sqrt())
    return tuple(one.to(device) for one in places), tuple(one.to(device) for one in weights)


@lru_cache(maxsize=1)
def _widths() -> tuple[int, ...]:
    return tuple(len(place) for place in _places(torch.device("cpu"))[0])


def _magnitude(thumbs: Tensor) -> Tensor:
    spectrum = torch.fft.fftshift(torch.fft.fft2(thumbs.float()).abs(), dim=(-2, -1))
    centre = FINE_SIDE // 2
    return spectrum[:, centre - REACH : centre + REACH + 1, centre - REACH : centre + REACH + 1]
