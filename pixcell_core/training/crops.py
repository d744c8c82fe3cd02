"""Crops of encoded tiles: one encoded 1024 px tile holds four tiles of 512 px and sixteen of 256 px.

Features are cut, never images. Both cuts follow the real geometry: latents by their height and width, condition
tokens by their number, which is a square grid in row-major order. Neither is ever taken from a channel count, which
agrees with the number of tokens at 1024 px only by chance (16 and 16).
Legend: C latent channels, h w latent pixels, n condition tokens, d embedding width, f crops per side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pixcell_core.errors import BadInputError
from pixcell_core.training.tile_sources import Features, TileSource


@dataclass(frozen=True)
class CropGeometry:
    """How a tile of h x w latent pixels and n tokens falls into factor x factor crops, numbered row by row.

    Raises:
        BadInputError: the latents or the token grid do not divide by the factor.
    """

    height: int
    width: int
    tokens: int
    factor: int

    def __post_init__(self) -> None:
        side = math.isqrt(self.tokens)
        factor = self.factor
        even = factor >= 1 and self.height % factor == 0 and self.width % factor == 0
        if not even or side * side != self.tokens or side % factor:
            raise BadInputError(
                f"Features of {self.height}×{self.width} latent pixels and {self.tokens} condition tokens "
                f"cannot be cut into {factor}×{factor} crops.",
                hint="Height, width and the side of the square token grid must all divide by the crops per side; "
                "train at the features' own resolution, or extract features for this one.",
                code="crop-impossible",
            )

    @property
    def count(self) -> int:
        """Crops in a tile."""
        return self.factor**2

    def latent_block(self, crop: int) -> tuple[slice, slice]:
        """Rows and columns of the latents that crop number `crop` covers."""
        row, column = divmod(crop, self.factor)
        high, wide = self.height // self.factor, self.width // self.factor
        return slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)

    def token_rows(self, crop: int) -> list[int]:
        """Numbers of the tokens that crop number `crop` covers, row-major over its own smaller grid."""
        row, column = divmod(crop, self.factor)
        side = math.isqrt(self.tokens)
        own = side // self.factor
        return [(row * own + y) * side + column * own + x for y in range(own) for x in range(own)]

    def cut(self, whole: Features, crop: int) -> Features:
        """Crop number `crop` of features (C, h, w), (C, h, w), (n, d)."""
        rows, columns = self.latent_block(crop)
        return Features(
            whole.mean[:, rows, columns], whole.std[:, rows, columns], whole.embedding[self.token_rows(crop)]
        )


class CroppedTiles:
    """A source of crops over a source of tiles: item i is crop i % f² of tile i // f²."""

    def __init__(self, whole: TileSource, factor: int) -> None:
        self._whole, self._factor = whole, factor
        self._check(whole.features(0))

    def _check(self, features: Features) -> CropGeometry:
        height, width = features.mean.shape[-2:]
        return CropGeometry(height, width, len(features.embedding), self._factor)

    def __len__(self) -> int:
        return len(self._whole) * self._factor**2

    def features(self, row: int) -> Features:
        """Latents (C, h/f, w/f) and tokens (n/f², d) of one crop."""
        tile, crop = divmod(row, self._factor**2)
        whole = self._whole.features(tile)
        return self._check(whole).cut(whole, crop)


def crops_per_side(features: Features, sample_size: int) -> int:
    """How many crops of `sample_size` latent pixels fit along a side of these features.

    Raises:
        BadInputError: the model's size does not divide the features' height, or is larger than it.
    """
    height = int(features.mean.shape[-2])
    if height < sample_size or height % sample_size:
        raise BadInputError(
            f"The features are {height} latent pixels high, the model is made for {sample_size}.",
            hint="Give features of the model's resolution or a whole multiple of it, or another --resolution.",
            code="resolution-differs",
        )
    return height // sample_size
