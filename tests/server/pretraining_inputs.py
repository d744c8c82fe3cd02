"""What a pretraining starts from, as small as can be: a few public pictures, and a base as wide as the starter's encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter.weights import save_folder


def picture(path: Path, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """Write a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_inputs(root: Path) -> None:
    """Six pictures in `root/tiles` and a tiny base in `root/base`, the same each time."""
    for number in range(6):
        picture(root / "tiles" / f"{number}.png", seed=number)
    torch.manual_seed(0)
    model = PixCellTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=4,
        caption_channels=256,
    )
    save_folder(model, root / "base")
