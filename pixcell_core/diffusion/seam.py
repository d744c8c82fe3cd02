"""How visible the borders of an image's windows are, as one number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def seam_ratio(
    image: np.ndarray, rows: Sequence[int] = (), columns: Sequence[int] = (), *, period: int = 1
) -> float:
    """Mean gradient across the given borders over the mean gradient elsewhere.

    1 where borders cannot be told from the rest, above 1 where they show. Each border is compared with gradients
    of its own direction, because tissue may be streaked.

    Args:
        image: (H, W) or (H, W, 3), any numeric type.
        rows: borders between pixel rows r - 1 and r, each in 1..H-1.
        columns: borders between pixel columns c - 1 and c, each in 1..W-1.
        period: compare with lines that lie as the borders do in a pattern of this period. A decoder leaves a faint
            pattern of 8 px of its own; 8 keeps it out of the ratio of borders that are multiples of 8.

    Raises:
        ValueError: no border, one outside the image, or nothing to compare the borders with.
    """
    pixels = np.asarray(image, dtype=np.float64)
    across: list[np.ndarray] = []
    elsewhere: list[float] = []
    for axis, borders in enumerate((sorted(set(rows)), sorted(set(columns)))):
        if not borders:
            continue
        if borders[0] < 1 or borders[-1] >= pixels.shape[axis]:
            raise ValueError(f"borders must lie in 1..{pixels.shape[axis] - 1}, met {borders}")
        jumps = np.abs(np.diff(pixels, axis=axis)).mean(
            axis=tuple(i for i in range(pixels.ndim) if i != axis)
        )
        line = np.arange(1, len(jumps) + 1)
        at = np.isin(line, borders)
        usual_lines = ~at & np.isin(line % period, [b % period for b in borders])
        if not usual_lines.any():
            raise ValueError("every row or column is a border: nothing is left to compare with")
        across.append(jumps[at])
        elsewhere += [float(jumps[usual_lines].mean())] * int(at.sum())
    if not across:
        raise ValueError("give at least one border")
    usual = float(np.mean(elsewhere))
    met = float(np.concatenate(across).mean())
    if usual == 0.0:
        return 1.0 if met == 0.0 else float("inf")
    return met / usual
