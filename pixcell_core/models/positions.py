"""Fixed sine-cosine position tables, as PixCell lays them over latent patches and condition tokens."""

from __future__ import annotations

import numpy as np
import torch


def sincos_table(
    width: int, grid_height: int, grid_width: int, *, base: int, scale: float, phase: float = 0.0
) -> torch.Tensor:
    """Table of (grid_height * grid_width, width), row-major.

    The first half of the width encodes the column, the second half the row; inside each half sines come first,
    then cosines, at frequencies 1 / 10000^(k / (width / 4)). The coordinate of column j is
    j / (grid_width / base) / scale + phase. Computed in float64, stored in float32.
    """
    if width % 4:
        raise ValueError("the width must be divisible by 4")
    frequency = 1.0 / 10000.0 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))

    def encode(coordinates: np.ndarray) -> np.ndarray:
        angles = np.outer(coordinates.reshape(-1), frequency)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    columns = np.arange(grid_width, dtype=np.float64) / (grid_width / base) / scale + phase
    rows = np.arange(grid_height, dtype=np.float64) / (grid_height / base) / scale + phase
    column_of, row_of = np.meshgrid(columns, rows)
    return torch.from_numpy(np.concatenate([encode(column_of), encode(row_of)], axis=1)).float()
