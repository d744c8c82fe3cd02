"""Haematoxylin geometry: the stain channel in which a copy keeps its shape, and correlation over turns and shifts.

Colour is the shortcut of histopathology: tiles of one slide look alike by stain alone. The haematoxylin channel,
normalised tile by tile, keeps nuclei and drops the stain, so that a similarity here is one of shape.

Legend: B tiles, N side of a thumbnail, S number of shifts, O the eight symmetries of the square (D4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

FINE_SIDE = 64
COARSE_SIDE = 32
POOLED_SIDE = 16
ORIENTATIONS = 8

# Optical-density vectors of haematoxylin, eosin and DAB: Ruifrok & Johnston, Anal Quant Cytol Histol 23 (2001), table 1.
_RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_DENSITY = -torch.log10((torch.arange(256).float() + 1.0) / 256.0)  # of every grey value
_OD_FLOOR = 0.02  # below this spread of haematoxylin (optical density) a tile is glass or fat, not texture
_DARKEST = 1.2  # optical density: folds and the dark beside a slide carry no shape above this
_BAND_SIGMA = 0.125  # of the side: slower changes than this are staining and thickness, not shape
NEAR_SHIFT = 1  # pixels of a thumbnail: hardly shifted at all
FAR_FACTOR = (
    0.75  # of the score of a real shift: the best of some thousand, while hardly shifted is the best of nine
)
_FLAT = 0.05  # an overlap with less than this share of the tile's variance proves nothing


def haematoxylin(pixels: Tensor) -> Tensor:
    """Haematoxylin density of uint8 (B, 3, H, W) tiles by Ruifrok's separation, float32 (B, H, W), >= 0 mostly."""
    vectors = _RUIFROK / np.linalg.norm(_RUIFROK, axis=1, keepdims=True)
    unmix = torch.from_numpy(np.linalg.inv(vectors)[:, 0]).float()
    tables = (_DENSITY * unmix[:, None]).to(pixels.device)
    out = torch.empty(len(pixels), *pixels.shape[-2:], device=pixels.device)
    # One table a channel, tile by tile: twelve times as fast as the densities of all and a product.
    for tile, plane in zip(pixels, out.flatten(1), strict=True):
        red, green, blue = (
            table.index_select(0, values) for table, values in zip(tables, tile.int().flatten(1), strict=True)
        )
        torch.add(red, green, out=plane).add_(blue)
    return out


def thumbnails(pixels: Tensor, side: int = FINE_SIDE) -> tuple[Tensor, Tensor]:
    """Evened haematoxylin thumbnails (B, N, N) of uint8 (B, 3, H, W) tiles, and their texture (B,)."""
    return evened_with_texture(haematoxylin(pixels), side)


def evened(density: Tensor, side: int) -> Tensor:
    """Haematoxylin densities (B, H, W) at (B, side, side): slow changes removed, divided by the spread nearby, clipped.

    Strong stain in one corner, or a dark fold, must not drown what lies elsewhere: half of a pasted or blended tile
    may be pale.
    """
    return _evened(_band(density, side))


def texture(density: Tensor, side: int) -> Tensor:
    """Robust spread (B,) of haematoxylin, in optical density: how much shape there is to recognise."""
    return _texture(_band(density, side))


def evened_with_texture(density: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """`evened` and `texture` of the same densities in one go."""
    band = _band(density, side)
    return _evened(band), _texture(band)


def _evened(band: Tensor) -> Tensor:
    spread = blur(band * band, _BAND_SIGMA * band.shape[-1]).sqrt()
    return (band / spread.clamp_min(_OD_FLOOR))[:, 0].clamp(-4.0, 4.0)


def _texture(band: Tensor) -> Tensor:
    flat = band.flatten(1)
    median = flat.median(dim=1).values[:, None]
    spread = 1.4826 * (flat - median).abs().median(dim=1).values
    return torch.maximum(spread, 0.5 * flat.std(dim=1))


def orient(images: Tensor, which: int) -> Tensor:
    """Apply symmetry 0..7 of the square to the last two axes: four quarter turns, then the same after a mirror."""
    turned = torch.rot90(images, which % 4, dims=(-2, -1))
    return turned.flip(-1) if which >= 4 else turned


def pooled(thumbs: Tensor) -> Tensor:
    """Unit vectors (B, 256) of the thumbnails pooled to 16×16, for unshifted retrieval by dot product."""
    small = F.adaptive_avg_pool2d(thumbs[:, None].float(), POOLED_SIDE).flatten(1)
    small = small - small.mean(dim=1, keepdim=True)
    # The floor keeps tiles without texture short of unit length: nothing resembles an empty field.
    return small / small.norm(dim=1, keepdim=True).clamp_min(0.2 * POOLED_SIDE)


@dataclass(frozen=True)
class Shifts:
    """Every shift (dy, dx) of an N×N tile that leaves at least `min_overlap` of its area in common."""

    side: int
    padded: int
    reach: int
    allowed: Tensor  # (2R+1, 2R+1) bool
    area: Tensor  # (2R+1, 2R+1) pixels in common
    prior: Tensor  # (2R+1, 2R+1) factor of the score: chance finds its best among thousands of shifts

    @classmethod
    def of(cls, side: int, min_overlap: float, device: torch.device | str = "cpu") -> Shifts:
        """Plan the search on a device; the transform is padded so that no shift wraps around."""
        reach = int(side * (1.0 - min_overlap))
        span = torch.arange(-reach, reach + 1, device=device)
        area = ((side - span.abs())[:, None] * (side - span.abs())[None, :]).float()
        near = (span.abs()[:, None] <= NEAR_SHIFT) & (span.abs()[None, :] <= NEAR_SHIFT)
        prior = torch.where(near, 1.0, FAR_FACTOR)
        return cls(side, side + reach, reach, area >= min_overlap * side * side, area, prior)


@dataclass(frozen=True)
class Spectra:
    """What a thumbnail needs for correlation at every shift: its transform, and two maps over the shifts.

    `centre` is the sum over the overlap divided by the root of its area; `weight` is one over the root of the
    variance sum there, times the root of the overlap's share of the tile; 0 where the shift is not allowed.
    """

    spectrum: Tensor  # (B, P, P/2+1) complex64
    centre: Tensor  # (B, 2R+1, 2R+1)
    weight: Tensor  # (B, 2R+1, 2R+1)

    def __getitem__(self, index: Tensor) -> Spectra:
        return Spectra(self.spectrum[index], self.centre[index], self.weight[index])


def spectra(images: Tensor, shifts: Shifts, *, moving: bool) -> Spectra:
    """Prepare (B, N, N) images; `moving` ones are those that are shifted over the others."""
    images = images.float()
    centre = _overlap_sums(images, shifts, moving) / shifts.area.sqrt()
    variance = _overlap_sums(images * images, shifts, moving) - centre**2
    # Thumbnails have a spread near 1, so `area` is the variance sum expected of an overlap with texture.
    weight = (shifts.area.sqrt() / shifts.side / torch.maximum(variance, _FLAT * shifts.area)).sqrt()
    return Spectra(
        torch.fft.rfft2(images, s=(shifts.padded, shifts.padded)),
        centre,
        weight * shifts.allowed.float() * shifts.prior.sqrt(),
    )


def correlate(fixed: Spectra, moving: Spectra, shifts: Shifts) -> tuple[Tensor, Tensor]:
    """Best normalised correlation of paired images over all allowed shifts.

    For shift s the two images share an overlap of n pixels; NCC(s) is Pearson's r inside it, and the score is
    r · sqrt(n / N²), times FAR_FACTOR for a real shift: a small overlap must agree better than a large one to
    count the same, and the best of thousands of shifts better than the one that was expected.

    Returns:
        scores (B,) in [0, 1] and shifts (B, 2) as (dy, dx): fixed[y, x] matches moving[y - dy, x - dx].
    """
    side, reach = shifts.padded, shifts.reach
    cross = torch.fft.irfft2(fixed.spectrum * moving.spectrum.conj(), s=(side, side))
    # Negative shifts lie at the far end of the transform.
    cross = torch.cat([cross[..., side - reach :, :], cross[..., : reach + 1, :]], dim=-2)
    cross = torch.cat([cross[..., side - reach :], cross[..., : reach + 1]], dim=-1)
    score = (
        torch.addcmul(cross, fixed.centre, moving.centre, value=-1.0).mul_(fixed.weight).mul_(moving.weight)
    )
    best, at = score.flatten(-2).max(dim=-1)
    width = 2 * reach + 1
    return best.clamp(0.0, 1.0), torch.stack([at // width - reach, at % width - reach], dim=-1)


def correlation_slow(
    fixed: npt.NDArray[np.float64], moving: npt.NDArray[np.float64], min_overlap: float
) -> tuple[float, tuple[int, int]]:
    """The obvious path of `correlate` for one pair, shift by shift; kept as its oracle."""
    side = fixed.shape[0]
    reach = int(side * (1.0 - min_overlap))
    best, where = -1.0, (0, 0)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            area = (side - abs(dy)) * (side - abs(dx))
            if area < min_overlap * side * side:
                continue
            a = fixed[max(dy, 0) : side + min(dy, 0), max(dx, 0) : side + min(dx, 0)]
            b = moving[max(-dy, 0) : side + min(-dy, 0), max(-dx, 0) : side + min(-dx, 0)]
            a, b = a - a.mean(), b - b.mean()
            floor = _FLAT * area
            score = float((a * b).sum() / np.sqrt(max((a * a).sum(), floor) * max((b * b).sum(), floor)))
            score *= np.sqrt(area) / side * (1.0 if max(abs(dy), abs(dx)) <= NEAR_SHIFT else FAR_FACTOR)
            if score > best:
                best, where = score, (dy, dx)
    return max(best, 0.0), where


def _band(density: Tensor, side: int) -> Tensor:
    clipped = density.clamp(max=_DARKEST)[:, None]
    if min(density.shape[-2:]) >= side:
        small = F.adaptive_avg_pool2d(clipped, side)
    else:  # enlarged smoothly: steps between repeated pixels would be keypoints
        small = F.interpolate(clipped, size=(side, side), mode="bilinear", align_corners=False)
    return small - blur(small, _BAND_SIGMA * side)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, 1, N, N) with mirrored borders, as two matrix products: far cheaper than a wide kernel."""
    smooth = _smoothing(images.shape[-1], sigma, images.device)
    return smooth @ images @ smooth.T


@lru_cache(maxsize=16)
def _smoothing(side: int, sigma: float, device: torch.device) -> Tensor:
    """(N, N) rows that average their neighbourhood; what would lie outside is mirrored back, the border not twice."""
    radius = int(np.ceil(2.5 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    matrix = torch.zeros(side, side)
    for row in range(side):
        at = (row + torch.arange(-radius, radius + 1)).abs()
        at = torch.where(at >= side, 2 * (side - 1) - at, at)
        matrix[row].index_add_(0, at, kernel)
    return matrix.to(device)


def _overlap_sums(values: Tensor, shifts: Shifts, moving: bool) -> Tensor:
    """Sum of (B, N, N) values over the overlap at each shift: (B, 2R+1, 2R+1), as M · values · Mᵀ with 0/1 rows."""
    side, reach = shifts.side, shifts.reach
    span = torch.arange(-reach, reach + 1, device=values.device) * (-1 if moving else 1)
    place = torch.arange(side, device=values.device)
    inside = (place >= span.clamp_min(0)[:, None]) & (place < side + span.clamp_max(0)[:, None])
    mask = inside.to(values.dtype)
    return mask @ values @ mask.T
