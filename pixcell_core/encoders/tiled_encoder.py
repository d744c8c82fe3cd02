"""One way from images to condition tokens for every encoder: check, cut row-major, embed in batches, check again."""

from __future__ import annotations

import torch
from torch import nn

from pixcell_core.encoders.embedding_check import check_embeddings
from pixcell_core.encoders.tile_grid import split_tiles, tile_grid
from pixcell_core.errors import BadInputError
from pixcell_core.models.devices import send

TILE_SIZE = 256


class TiledEncoder:
    """An `ImageEncoder` around any network from tiles to vectors.

    Args:
        name: the registered name.
        network: uint8 tiles (b, 3, t, t) on its device to embeddings (b, d); its preprocessing is part of it.
        embedding_dim: width d.
        tile_size: side t of the tile that makes one token; 256 is what published PixCell weights expect.
        batch_size: tiles per call of the network.
        device: where the network runs.
        dtype: type of the network's weights; tokens are float32 whatever it is.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        embedding_dim: int,
        *,
        tile_size: int = TILE_SIZE,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if tile_size < 1 or batch_size < 1:
            raise BadInputError(
                f"The encoder got tile size {tile_size} and batch size {batch_size}.",
                hint="Expected whole numbers of at least 1.",
                code="bad-batch",
            )
        self.name = name
        self.network = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.embedding_dim = embedding_dim
        self.tile_size = tile_size
        self.batch_size = batch_size
        self.device = torch.device(device)

    def tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image of `height` x `width` pixels.

        Raises:
            BadInputError: the image is not a whole number of tiles.
        """
        rows, columns = tile_grid(height, width, self.tile_size)
        return rows * columns

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) to float32 tokens (B, n, d) on the CPU, tiles in row-major order.

        Raises:
            BadInputError: another type or shape than that, a size that is no whole number of tiles, or an embedding
                that is NaN, infinite or of another width.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise BadInputError(
                f"{self.name} got {pixels.dtype} {list(pixels.shape)}, expected torch.uint8 [B, 3, H, W].",
                hint="Give 8-bit RGB images as they were decoded, neither scaled nor normalised.",
                code="image-type",
            )
        count = self.tokens(pixels.shape[2], pixels.shape[3])
        tiles = split_tiles(pixels, self.tile_size).flatten(0, 1)
        parts = [self._embed(batch) for batch in tiles.split(self.batch_size)] if len(tiles) else []
        flat = torch.cat(parts) if parts else torch.empty(0, self.embedding_dim)
        embedded = flat.reshape(len(pixels), count, flat.shape[-1])
        return check_embeddings(embedded, embedding_dim=self.embedding_dim, tokens=count, source=self.name)

    def _embed(self, tiles: torch.Tensor) -> torch.Tensor:
        return self.network(send(tiles, self.device)).float().cpu()  # type: ignore[no-any-return]
