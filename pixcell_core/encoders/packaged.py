"""The tile encoders that are always at hand: the starter's own, and the audit's second eye."""

from __future__ import annotations

from pathlib import Path

import torch

from pixcell_core.encoders.tile_networks import SecondEyeNetwork, StarterNetwork
from pixcell_core.encoders.tiled_encoder import TILE_SIZE, TiledEncoder
from pixcell_core.errors import BadInputError


def load_starter_encoder(
    folder: Path | None = None,
    *,
    tile_size: int = TILE_SIZE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TiledEncoder:
    """The starter's tile encoder: the shipped one, or one of the same class from a folder.

    Raises:
        BadInputError: no such model, or a tile size that is no multiple of 16.
    """
    from pixcell_core.models import TileEncoder
    from pixcell_core.starter import load_encoder
    from pixcell_core.starter.weights import load_folder

    if tile_size % 16:
        raise BadInputError(
            f"The starter's encoder got tiles of {tile_size} px, expected a multiple of 16.",
            hint="Give another tile size.",
            code="image-size",
        )
    model = load_encoder() if folder is None else load_folder(TileEncoder, folder)
    return TiledEncoder(
        "starter", StarterNetwork(model), model.embedding_dim, tile_size=tile_size, device=device, dtype=dtype
    )


def load_second_eye_encoder(
    *,
    tile_size: int = TILE_SIZE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TiledEncoder:
    """EfficientNet-Lite0 (ImageNet): for measuring, never for conditioning what is then audited.

    Raises:
        BadInputError: its package is not installed, or another type than float32 is asked for.
    """
    from pixcell_core.starter import load_second_eye

    if dtype != torch.float32:
        raise BadInputError(
            f"The second eye runs in float32 only, not in {dtype}.",
            hint="Leave the precision at float32.",
            code="precision",
        )
    model = load_second_eye()
    return TiledEncoder(
        "second-eye", SecondEyeNetwork(model), model.embedding_dim, tile_size=tile_size, device=device
    )
