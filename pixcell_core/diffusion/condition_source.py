"""Where the conditions of a sampling run come from: a folder of images, a feature store, or the null condition.

Legend: R S rows and columns of condition tokens an image needs, d their width, t side of the tile behind one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixcell_core.errors import BadInputError


@dataclass(frozen=True)
class ConditionSource:
    """The conditions of a run, asked for one at a time.

    Args:
        kind: "images", "features" or "unconditional".
        names: what each condition is called in the manifest. A feature store's tiles are private: they are counted.
        grid: condition number i as a grid of tokens (rows, columns, d), float32.
    """

    kind: str
    names: list[str]
    grid: Callable[[int], torch.Tensor]

    def fitted(self, number: int, shape: tuple[int, int]) -> torch.Tensor:
        """Condition `number` as (R, S, d): cut at the right and below, or continued by repeating its tiles."""
        grid = self.grid(number % len(self.names))
        rows, columns = (torch.arange(n) % have for n, have in zip(shape, grid.shape[:2], strict=True))
        fitted: torch.Tensor = grid[rows][:, columns]
        return fitted


def from_images(folder: Path, encoder: Any, tile_size: int, shape: tuple[int, int]) -> ConditionSource:
    """Every image of a folder, cut into tiles of t px from its upper left corner and embedded.

    Args:
        folder: png, jpg or tif files.
        encoder: `encode(uint8 (B, 3, H, W))` gives tokens (B, rows * columns, d), row by row.
        tile_size: t.
        shape: (R, S); tiles beyond it are not embedded.

    Raises:
        BadInputError: no such folder, no image in it, or one that is smaller than a tile.
    """
    from pixcell_core.encoders.image_folder import list_images, read_image

    paths = list_images(folder)

    def grid(number: int) -> torch.Tensor:
        pixels = read_image(paths[number])
        rows, columns = (min(side // tile_size, n) for side, n in zip(pixels.shape[1:], shape, strict=True))
        if rows == 0 or columns == 0:
            raise BadInputError(
                f"{paths[number].name} has {pixels.shape[2]} x {pixels.shape[1]} pixels, "
                f"expected at least one tile of {tile_size} x {tile_size}.",
                hint="Give larger images at the magnification the model was trained at.",
                code="image-too-small",
            )
        cut = pixels[:, : rows * tile_size, : columns * tile_size]
        tokens = encoder.encode(cut[None])[0].float()
        return tokens.reshape(rows, columns, tokens.shape[-1])

    return ConditionSource("images", [path.name for path in paths], grid)


def from_features(folder: Path, seed: int, tokens: int) -> ConditionSource:
    """Every tile of a feature store, in an order the seed decides.

    Args:
        folder: a finished store.
        seed: of the order.
        tokens: n the transformer expects per tile, a square number.

    Raises:
        BadInputError: no finished store, one without tiles, or one with another number of tokens.
    """
    from pixcell_core.training.feature_store import FeatureStore

    store = FeatureStore.open(folder)
    tiles = [(patient, row) for patient in store.patients for row in range(len(store.tiles(patient)))]
    if not tiles:
        raise BadInputError(
            f"The feature store {folder} holds no tile, expected at least one.",
            hint="Run `pixcell site features` on a site that has tiles.",
            code="no-features",
        )
    order = np.random.default_rng(seed).permutation(len(tiles))

    def grid(number: int) -> torch.Tensor:
        patient, row = tiles[order[number]]
        found = store.embeddings(patient)[row].float()
        if len(found) != tokens:
            raise BadInputError(
                f"The store's tiles have {len(found)} token(s) each, this transformer expects {tokens}.",
                hint="Extract the features at the tile size this transformer was trained for.",
                code="condition-tokens",
            )
        return as_square(found)

    return ConditionSource("features", [f"tile {i + 1}" for i in range(len(tiles))], grid)


def unconditional(null: torch.Tensor) -> ConditionSource:
    """The null condition (n, d) for every image."""
    square = as_square(null.float())
    return ConditionSource("unconditional", ["null"], lambda number: square)


def as_square(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (n, d) of a square image, row by row, as a grid (side, side, d)."""
    side = math.isqrt(len(tokens))
    return tokens.reshape(side, side, tokens.shape[-1])
