"""Shape spectra: what of a tile survives every shift, for finding shifted and turned copies by one dot product.

A shift changes only the phase of a Fourier transform, so two tiles with a share r of their field in common have
spectra of magnitude correlated by about r², wherever the common part lies; unrelated tiles by about
1/sqrt(number of frequencies). Quarter turns and mirrors permute the frequencies, and a half turn none, so that
four symmetries stand for all eight.

Legend: B tiles, N side of a thumbnail, K highest frequency kept, d = (2K+1)(K+1) frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from privacy_audit.geometry import FINE_SIDE, orient

REACH = 24
LOWEST = 2.0  # cycles per tile: slower changes were removed from the thumbnails
TURNS = (0, 1, 4, 5)  # of `geometry.orient`; the other four are half turns of these
_BLOCK = 512


@dataclass(frozen=True)
class ShapeSpectra:
    """Turns thumbnails into unit vectors; whitened by the mean spectrum of training and holdout together."""

    mean: Tensor  # (2K+1, 2K+1)

    @classmethod
    def fit(cls, *groups: Tensor) -> ShapeSpectra:
        """Fit the mean magnitude on the union of (n, N, N) thumbnails."""
        total, count = torch.zeros(2 * REACH + 1, 2 * REACH + 1), 0
        for group in groups:
            for block in group.split(_BLOCK):
                total += _magnitude(block).sum(dim=0)
                count += len(block)
        return cls((total / max(count, 1)).clamp_min(1e-6))

    def __call__(self, thumbs: Tensor, turn: int = 0) -> Tensor:
        """Unit vectors (n, d) of (n, N, N) thumbnails after one of the symmetries `TURNS`."""
        parts = [self._vectors(orient(block.float(), turn)) for block in thumbs.split(_BLOCK)]
        return torch.cat(parts)

    def _vectors(self, thumbs: Tensor) -> Tensor:
        span = torch.arange(-REACH, REACH + 1).float()
        radius = torch.hypot(span[:, None], span[None, :])
        ring = ((radius >= LOWEST) & (radius <= REACH)).float()[:, REACH:]
        whitened = (_magnitude(thumbs) / self.mean)[..., REACH:]
        # Half the plane suffices: the magnitude of a real image is symmetric about the origin.
        centred = (whitened - (whitened * ring).sum((1, 2), keepdim=True) / ring.sum()) * ring
        flat = centred.flatten(1)
        return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)


def _magnitude(thumbs: Tensor) -> Tensor:
    spectrum = torch.fft.fftshift(torch.fft.fft2(thumbs.float()).abs(), dim=(-2, -1))
    centre = FINE_SIDE // 2
    return spectrum[:, centre - REACH : centre + REACH + 1, centre - REACH : centre + REACH + 1]
