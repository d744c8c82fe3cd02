"""UNI2-h from a person's own copy of its weights: 681,394,176 parameters, 1536 numbers per tile.

The weights are given out by their makers on request and under their own licence (CC BY-NC-ND 4.0); this program
ships none. Sizes and preprocessing are the published ones.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pixcell_core.checkpoints.folders import compare_shapes
from pixcell_core.encoders.preprocessing import Preprocessing
from pixcell_core.encoders.tile_networks import NormalisedNetwork
from pixcell_core.encoders.tiled_encoder import TILE_SIZE, TiledEncoder
from pixcell_core.encoders.vision_transformer import VisionTransformerConfig
from pixcell_core.encoders.weight_files import read_tensors
from pixcell_core.errors import BadInputError

UNI2_FILES = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")


def load_uni2(
    path: Path,
    *,
    config: VisionTransformerConfig | None = None,
    tile_size: int = TILE_SIZE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TiledEncoder:
    """UNI2-h from its weights file, or from the folder that holds it.

    Args:
        path: `pytorch_model.bin` or a safetensors file with the same names, or their folder.
        config: sizes of the network; UNI2-h's own where absent.
        tile_size: side in pixels of the tile that makes one token.
        device: where to run.
        dtype: type of the weights.

    Raises:
        BadInputError: no weights there, a damaged or unsafe file, or another model's weights.
    """
    config = config or VisionTransformerConfig()
    file = weights_file(path)
    tensors = read_tensors(file)
    with torch.device("meta"):
        network = config.build()
    compare_shapes(
        {name: tuple(value.shape) for name, value in network.state_dict().items()},
        {name: tuple(value.shape) for name, value in tensors.items()},
        f"{file.name} as UNI2-h",
    )
    network.load_state_dict({k: v.to(dtype) for k, v in tensors.items()}, strict=True, assign=True)
    preprocessing = Preprocessing(resize=config.img_size, crop=config.img_size)
    return TiledEncoder(
        "uni2-h",
        NormalisedNetwork(network, preprocessing),
        config.embed_dim,
        tile_size=tile_size,
        device=device,
        dtype=dtype,
    )


def weights_file(path: Path) -> Path:
    """The weights file at `path`, or in the folder `path`.

    Raises:
        BadInputError: neither a file nor a folder with one of the known names.
    """
    if path.is_file():
        return path
    for name in UNI2_FILES:
        if (path / name).is_file():
            return path / name
    raise BadInputError(
        f"{path} holds no UNI2-h weights; expected one of {', '.join(UNI2_FILES)}.",
        hint="Bring the file published as MahmoodLab/UNI2-h: its makers give it out on request, under "
        "CC BY-NC-ND 4.0. Then name its folder: uni2-h:/path/to/folder.",
        code="weights-missing",
    )
