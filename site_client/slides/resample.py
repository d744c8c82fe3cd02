"""Averages areas of a picture exactly, at any scale and any fractional offset."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def _mean_along(
    values: npt.NDArray[np.float64], start: float, step: float, count: int
) -> npt.NDArray[np.float64]:
    """Means of `count` consecutive intervals of length `step` from `start` along axis 0.

    The running sum, continued linearly inside each source pixel, is read at the intervals' ends.
    """
    total = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
    ends = np.clip(start + step * np.arange(count + 1), 0, len(values))
    whole = np.minimum(ends.astype(np.int64), len(values) - 1)
    part = (ends - whole).reshape(-1, *[1] * (values.ndim - 1))
    at_ends = total[whole] + part * values[whole]
    lengths = np.maximum(np.diff(ends), 1e-9).reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(np.diff(at_ends, axis=0) / lengths)


def area_mean(
    rgb: npt.NDArray[np.uint8], offset: tuple[float, float], step: float, size: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Downscale by `step` >= 1, every source pixel weighted by the area of it that a target pixel covers.

    Args:
        rgb: (H, W, C) uint8.
        offset: (x, y) of the left upper corner in source pixels, fractions allowed.
        step: source pixels per target pixel.
        size: (width, height) of the result.

    Returns:
        (height, width, C) uint8, rounded to nearest.
    """
    rows = _mean_along(rgb.astype(np.float64), offset[1], step, size[1])
    both = _mean_along(rows.transpose(1, 0, 2), offset[0], step, size[0]).transpose(1, 0, 2)
    return np.asarray(np.rint(both), dtype=np.uint8)
