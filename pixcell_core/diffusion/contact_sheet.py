"""A sheet of small pictures for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

LARGEST = 256
"""Pictures with a longer side than this are shrunk on the sheet."""


def contact_sheet(images: Sequence[np.ndarray], columns: int = 8, gap: int = 4) -> Image.Image:
    """Pictures in reading order on white.

    Args:
        images: each (H, W, 3) uint8, all of one size, at least one.
        columns: pictures per row.
        gap: pixels between them.
    """
    height, width = images[0].shape[:2]
    share = min(1.0, LARGEST / max(height, width))
    across, down = max(round(width * share), 1), max(round(height * share), 1)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (across + gap) + gap, rows * (down + gap) + gap), (255, 255, 255))
    for i, pixels in enumerate(images):
        picture = Image.fromarray(pixels)
        if share < 1.0:
            picture = picture.resize((across, down), Image.Resampling.LANCZOS)
        sheet.paste(picture, (gap + (i % columns) * (across + gap), gap + (i // columns) * (down + gap)))
    return sheet
