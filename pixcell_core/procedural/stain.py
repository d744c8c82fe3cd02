"""Dyes and scanner of a site: from concentrations of haematoxylin, eosin and DAB to pixels, and back.

Light through a stained section follows Beer-Lambert: I_c = I0_c * exp(-sum_s C_s * v_sc), with v_s the unit
optical density vector of stain s over the channels R, G, B (Ruifrok and Johnston, Anal Quant Cytol Histol
23:291, 2001, eq. 1 and table 1). Concentrations are therefore in units of optical density (natural
logarithm).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from pixcell_core.procedural.texture import FloatPlane, generator

Vector = tuple[float, float, float]
RGB = npt.NDArray[np.uint8]

#: Extremes of the two dyes as laboratories show them; a site's dye lies somewhere between.
HAEMATOXYLIN_PURPLE: Vector = (0.480, 0.770, 0.420)
HAEMATOXYLIN_BLUE: Vector = (0.640, 0.700, 0.315)
EOSIN_MAGENTA: Vector = (0.140, 0.935, 0.325)
EOSIN_SALMON: Vector = (0.225, 0.800, 0.555)
#: Diaminobenzidine, after Ruifrok and Johnston, table 1.
DAB: Vector = (0.268, 0.570, 0.776)


def _unit(vector: npt.NDArray[np.float64]) -> Vector:
    length = float(np.linalg.norm(vector))
    return float(vector[0]) / length, float(vector[1]) / length, float(vector[2]) / length


@dataclass(frozen=True)
class SiteLook:
    """One laboratory: its dyes and its scanner.

    Stain vectors are unit optical-density directions (R, G, B). `background` is the empty-glass level per
    channel, 0..255. `contrast` scales optical density. `blur_um` is the standard deviation of the point
    spread function, `noise` that of the sensor in grey levels; `jpeg_quality` 0 means that nothing is
    compressed.
    """

    seed: int
    haematoxylin: Vector
    eosin: Vector
    dab: Vector
    haematoxylin_strength: float
    eosin_strength: float
    background: Vector
    contrast: float
    blur_um: float
    noise: float
    jpeg_quality: int

    def without_scanner(self) -> SiteLook:
        """The same dyes seen by a perfect instrument: white glass, no blur, no noise, no compression."""
        return replace(
            self, background=(255.0, 255.0, 255.0), contrast=1.0, blur_um=0.0, noise=0.0, jpeg_quality=0
        )


def site_look(site_seed: int) -> SiteLook:
    """Draw a laboratory; the same seed gives the same one."""
    rng = generator(0x517E, site_seed)

    def between(one: Vector, other: Vector, spread: float) -> Vector:
        share = rng.beta(0.8, 0.8)
        mixed = (1 - share) * np.asarray(one) + share * np.asarray(other)
        return _unit(np.clip(mixed + rng.normal(0, spread, 3), 0.03, None))

    bright = rng.uniform(234, 247)
    return SiteLook(
        seed=site_seed,
        haematoxylin=between(HAEMATOXYLIN_PURPLE, HAEMATOXYLIN_BLUE, 0.012),
        eosin=between(EOSIN_MAGENTA, EOSIN_SALMON, 0.015),
        dab=between(DAB, DAB, 0.015),
        haematoxylin_strength=rng.uniform(0.85, 1.15),
        eosin_strength=rng.uniform(0.75, 1.3),
        background=(bright + rng.normal(0, 3), bright + rng.normal(0, 3), bright + rng.normal(0, 3)),
        contrast=rng.uniform(0.85, 1.15),
        blur_um=rng.uniform(0.22, 0.42),
        noise=rng.uniform(0.8, 2.4),
        jpeg_quality=int(rng.integers(82, 95)),
    )


def transmit(site: SiteLook, stains: list[tuple[FloatPlane, Vector]]) -> list[FloatPlane]:
    """Beer-Lambert: three channels, float32 (height, width) in 0..255, behind the concentrations given."""
    channels = []
    for c in range(3):
        density = np.float32(-site.contrast * stains[0][1][c]) * stains[0][0]
        for concentration, vector in stains[1:]:
            density += np.float32(-site.contrast * vector[c]) * concentration
        np.exp(density, out=density)
        density *= np.float32(site.background[c])
        channels.append(density)
    return channels


def scan(site: SiteLook, channels: list[FloatPlane], *, mpp: float, rng: np.random.Generator) -> RGB:
    """What the scanner writes: blurred, noisy, quantised and compressed, uint8 (height, width, 3)."""
    sigma = site.blur_um / mpp
    if sigma > 0.2:
        channels = [cast(FloatPlane, cv2.GaussianBlur(plane, (0, 0), sigma)) for plane in channels]
    if site.noise > 0:
        shot = rng.standard_normal(channels[0].shape, dtype=np.float32)
        shot *= np.float32(site.noise)
        # One noise plane, moved by a different step for each channel, is as uncorrelated as three.
        for c, plane in enumerate(channels):
            plane += np.roll(shot, (37 * c, 91 * c), axis=(0, 1))
    image = np.empty((*channels[0].shape, 3), np.uint8)
    for c, plane in enumerate(channels):
        image[..., c] = cv2.convertScaleAbs(np.maximum(plane, 0, out=plane))
    if site.jpeg_quality:
        _, packed = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, site.jpeg_quality])
        image = cast(RGB, cv2.imdecode(packed, cv2.IMREAD_COLOR_RGB))
    return image


def separate(rgb: RGB, site: SiteLook, *, second: Vector | None = None) -> tuple[FloatPlane, FloatPlane]:
    """Colour deconvolution: haematoxylin and eosin (or the `second` stain given) by least squares.

    The inverse of `transmit` up to quantisation; negative concentrations are returned as they come.
    """
    glass = np.maximum(np.asarray(site.background, np.float32), 1.0)
    density = -np.log(np.maximum(rgb.astype(np.float32), 0.5) / glass)
    vectors = np.asarray([site.haematoxylin, second or site.eosin], np.float32) * np.float32(site.contrast)
    solved = density.reshape(-1, 3) @ np.linalg.pinv(vectors).astype(np.float32)
    planes = solved.reshape(*rgb.shape[:2], 2)
    return planes[..., 0], planes[..., 1]
