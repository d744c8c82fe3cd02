"""Cuts images into square tiles in row-major order: the order a transformer's condition tokens have.

PixCell reads an image of 256, 512 or 1024 px as 1, 2x2 or 4x4 tiles of 256 px; a token's place in the sequence is
the only thing that says where its tile lies, so the order is part of the model.
"""

from __future__ import annotations

import torch

from pixcell_core.errors import BadInputError


def tile_grid(height: int, width: int, tile_size: int) -> tuple[int, int]:
    """Rows and columns of tiles in an image of `height` x `width` pixels.

    Raises:
        BadInputError: the image is not a whole number of tiles.
    """
    if height < tile_size or width < tile_size or height % tile_size or width % tile_size:
        raise BadInputError(
            f"An image of {height} x {width} px (height x width) is no whole number of tiles of {tile_size} px.",
            hint=f"Expected sides that are multiples of {tile_size}: crop or resize the image, or give another "
            "tile size.",
            code="image-size",
        )
    return height // tile_size, width // tile_size


def split_tiles(images: torch.Tensor, tile_size: int) -> torch.Tensor:
    """Images (B, C, H, W) to tiles (B, rows * columns, C, tile_size, tile_size), row by row from the top left.

    Raises:
        BadInputError: the image is not a whole number of tiles.
    """
    batch, channels, height, width = images.shape
    rows, columns = tile_grid(height, width, tile_size)
    cut = images.reshape(batch, channels, rows, tile_size, columns, tile_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels, tile_size, tile_size)
