"""Where the tissue is: optical density and texture against the slide's own background.

Saturation with one threshold fails on tinted glass and on printed spot grids: both are colourful and smooth.
Tissue is what is denser than the *local* background and has fine structure. The background is modelled as a
quadratic surface of optical density, fitted to smooth bright pixels, so that a colour cast that grows towards
one corner is still background.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

#: Scale of the thumbnail on which the mask is made, µm per pixel.
MASK_MPP = 4.0


@dataclass(frozen=True)
class TissueSettings:
    """Thresholds of the mask; densities are decadic optical density averaged over R, G, B."""

    texture_um: float = 16.0
    background_max_texture: float = 0.012
    background_max_density: float = 0.30
    background_min_share: float = 0.02
    min_excess: float = 0.04
    min_texture: float = 0.015
    #: This much above the background is tissue (or ink), even when it is smooth.
    dense_excess: float = 0.15
    close_um: float = 24.0
    open_um: float = 8.0
    min_radius_um: float = 60.0
    fill_radius_um: float = 30.0


def optical_density(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Decadic optical density per channel, Beer and Lambert with white at 255: -log10((I + 1) / 256)."""
    return np.asarray(-np.log10((rgb.astype(np.float32) + 1.0) / 256.0), dtype=np.float32)


def mean_density(density: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mean over the three channels, (H, W); written out because a reduction over so short an axis is slow."""
    return np.asarray((density[..., 0] + density[..., 1] + density[..., 2]) / 3, dtype=np.float32)


def _surface_terms(height: int, width: int) -> npt.NDArray[np.float32]:
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).astype(np.float32)


def background_density(
    density: npt.NDArray[np.float32], texture: npt.NDArray[np.float32], settings: TissueSettings
) -> npt.NDArray[np.float32]:
    """The optical density the glass would have at each pixel, (H, W, 3).

    A robust least-squares quadratic over smooth, bright pixels; where the slide shows too little glass
    for a fit, the brightest half percent of its pixels stands for all of it.
    """
    height, width, _ = density.shape
    mean = mean_density(density)
    candidate = (texture < settings.background_max_texture) & (mean < settings.background_max_density)
    if candidate.mean() < settings.background_min_share:
        return np.full_like(density, np.quantile(mean, 0.005))
    terms = _surface_terms(height, width)
    surface = np.zeros_like(density)
    for _ in range(4):
        index = np.flatnonzero(candidate)
        if index.size < terms.shape[-1] * 4:
            break
        index = index[:: max(1, index.size // 20_000)]
        solution = np.linalg.lstsq(terms.reshape(-1, 6)[index], density.reshape(-1, 3)[index], rcond=None)[0]
        surface = (terms @ solution).astype(np.float32)
        residual = mean - mean_density(surface)
        spread = 1.48 * float(np.median(np.abs(residual.reshape(-1)[index])))
        candidate = (texture < settings.background_max_texture) & (np.abs(residual) < max(3 * spread, 0.01))
    return np.maximum(surface, 0.0)


def _drop_small(mask: npt.NDArray[np.bool_], min_pixels: float) -> npt.NDArray[np.bool_]:
    labels, count = ndimage.label(mask)
    if not count:
        return mask
    keep = np.bincount(labels.ravel()) >= min_pixels
    keep[0] = False
    return np.asarray(keep[labels], dtype=np.bool_)


def tissue_mask(
    rgb: npt.NDArray[np.uint8],
    mpp: float,
    seen: npt.NDArray[np.bool_] | None = None,
    settings: TissueSettings | None = None,
) -> npt.NDArray[np.bool_]:
    """Mark tissue on a thumbnail.

    Args:
        rgb: (H, W, 3) uint8 thumbnail.
        mpp: its microns per pixel.
        seen: (H, W) where the scanner recorded pixels; elsewhere there is never tissue.

    Returns:
        (H, W) bool.
    """
    settings = settings or TissueSettings()
    density = optical_density(rgb)
    mean = mean_density(density)
    sigma = settings.texture_um / mpp
    local = ndimage.gaussian_filter(mean, sigma)
    texture = np.sqrt(np.maximum(ndimage.gaussian_filter(mean * mean, sigma) - local**2, 0.0))
    background = background_density(density, texture, settings)
    excess = ndimage.gaussian_filter(mean - mean_density(background), sigma / 2)
    mask = ((excess > settings.min_excess) & (texture > settings.min_texture)) | (
        excess > settings.dense_excess
    )
    if seen is not None:
        mask &= seen

    def pixels(um: float) -> int:
        return max(1, round(um / mpp))

    pad = pixels(settings.close_um)
    closed = ndimage.binary_closing(np.pad(mask, pad, mode="edge"), iterations=pad)[pad:-pad, pad:-pad]
    opened = ndimage.binary_opening(np.pad(closed, pad, mode="edge"), iterations=pixels(settings.open_um))
    mask = opened[pad:-pad, pad:-pad]
    mask = _drop_small(mask, np.pi * settings.min_radius_um**2 / mpp**2)
    mask = ~_drop_small(~mask, np.pi * settings.fill_radius_um**2 / mpp**2)
    if seen is not None:
        mask &= seen
    return np.asarray(mask, dtype=np.bool_)
