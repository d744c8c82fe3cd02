"""Random textures: smooth noise at a chosen length, fine grain, and wavy oriented fibres.

All arrays are float32 of shape (height, width), roughly zero mean and unit variance. Every texture is drawn
anew from the generator it is given: no two fields share one, so that pixels of two tiles never agree by
construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

FloatPlane = npt.NDArray[np.float32]

#: Smooth fields are computed once per this many pixels and interpolated: they hold no finer detail.
COARSE = 4


def generator(*words: int) -> np.random.Generator:
    """Return a generator that depends on every word (any integer) and on nothing else."""
    return np.random.default_rng([word & 0xFFFFFFFFFFFFFFFF for word in words])


def resize(plane: npt.NDArray[np.float32], height: int, width: int, *, cubic: bool = False) -> FloatPlane:
    """Interpolate a plane to (height, width)."""
    how = cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR
    return cast(FloatPlane, cv2.resize(plane, (width, height), interpolation=how))


def smooth_noise(
    rng: np.random.Generator, height: int, width: int, length: float, *, octaves: int = 1
) -> FloatPlane:
    """Noise with features `length` pixels wide; each further octave halves length and amplitude."""
    total = np.zeros((height, width), np.float32)
    amplitude, power = 1.0, 0.0
    for _ in range(octaves):
        step = max(length, 1.0)
        rows, columns = int(np.ceil(height / step)) + 3, int(np.ceil(width / step)) + 3
        knots = rng.standard_normal((rows, columns), dtype=np.float32)
        # A random sub-cell offset keeps the lattice of knots from lying on the same pixels in every field.
        top, left = rng.random(2) * step
        matrix = np.array([[1 / step, 0, (left / step) + 0.5], [0, 1 / step, (top / step) + 0.5]], np.float32)
        total += np.float32(amplitude) * cv2.warpAffine(
            knots,
            matrix,
            (width, height),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        power += amplitude * amplitude
        amplitude, length = amplitude / 2, length / 2
    # Cubic interpolation of white knots leaves a standard deviation of 0.86, averaged over a cell.
    total *= np.float32(1 / (0.86 * np.sqrt(power)))
    return total


def coarse_noise(
    rng: np.random.Generator, height: int, width: int, length: float, *, octaves: int = 1
) -> FloatPlane:
    """`smooth_noise` computed at a quarter of the resolution, for lengths above some 16 pixels."""
    rows, columns = -(-height // COARSE), -(-width // COARSE)
    small = smooth_noise(rng, rows, columns, length / COARSE, octaves=octaves)
    return resize(small, height, width)


def grain(rng: np.random.Generator, height: int, width: int, sigma: float) -> FloatPlane:
    """White noise blurred by `sigma` pixels, scaled back to unit variance."""
    white = rng.standard_normal((height, width), dtype=np.float32)
    if sigma <= 0:
        return white
    soft = cast(FloatPlane, cv2.GaussianBlur(white, (0, 0), sigma))
    soft *= np.float32(2 * np.sqrt(np.pi) * sigma)
    return soft


@dataclass(frozen=True)
class Fibres:
    """Oriented wavy fibres: `texture` (height, width), unit variance, and `angle`, the local direction.

    `angle` is in radians, one value per COARSE pixels.
    """

    texture: FloatPlane
    angle: FloatPlane

    def angle_at(
        self, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Direction of the fibres (radians, image axes) at full-resolution positions."""
        return self.angle[rows // COARSE, columns // COARSE]


def fibres(
    rng: np.random.Generator, height: int, width: int, *, angle: float, wavelength: float, width_px: float
) -> Fibres:
    """Draw collagen: streaks along a wandering direction, waved with `wavelength` pixels.

    Streak noise is drawn straight and then looked up through a rotated and warped coordinate system, so
    that the fibres bend together as bundles do.
    """
    rows, columns = -(-height // COARSE), -(-width // COARSE)
    turn = angle + rng.normal(0, 0.35)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) * COARSE
    along = np.float32(np.cos(turn)) * x + np.float32(np.sin(turn)) * y
    across = np.float32(-np.sin(turn)) * x + np.float32(np.cos(turn)) * y
    bend = smooth_noise(rng, rows, columns, 3.2 * wavelength / COARSE, octaves=2)
    phase = smooth_noise(rng, rows, columns, 1.6 * wavelength / COARSE)
    across += np.float32(0.54 * wavelength) * bend
    across += np.float32(0.06 * wavelength) * np.sin(
        np.float32(2 * np.pi / wavelength) * along + np.float32(2.1) * phase
    )
    slope_y, slope_x = np.gradient(across)
    direction = np.arctan2(slope_x, -slope_y).astype(np.float32)

    size = int(np.ceil(np.hypot(height, width))) + 64
    streaks = _streaks(rng, size, width_px)
    shift = rng.random(2) * 64
    texture = cv2.remap(
        streaks,
        resize(along + np.float32(shift[0]), height, width),
        resize(across + np.float32(shift[1]), height, width),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return Fibres(cast(FloatPlane, texture), direction)


def _streaks(rng: np.random.Generator, size: int, width_px: float) -> FloatPlane:
    """Straight horizontal streaks, unit variance, (size, size): fibrils over fibres over bundles.

    Widths are 0.7, 1 and 4 times `width_px`, lengths 9, 28 and 90 times.
    """
    total = np.zeros((size, size), np.float32)
    for breadth, length, weight in ((0.7, 9, 0.75), (1.0, 28, 0.8), (4.0, 90, 0.85)):
        rows = int(size / max(breadth * width_px, 0.8)) + 2
        columns = int(size / max(length * width_px, 4.0)) + 2
        knots = rng.standard_normal((rows, columns), dtype=np.float32)
        total += np.float32(weight) * resize(knots, size, size, cubic=True)
    total *= np.float32(1 / total[::8, ::8].std())
    return total
