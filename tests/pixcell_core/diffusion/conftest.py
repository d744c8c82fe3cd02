"""Tiny models of the pipeline's tests, with weights at random."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL

from pixcell_core.models import PixCellTransformer2DModel

Builder = Callable[..., PixCellTransformer2DModel]


@pytest.fixture(scope="session")
def tiny_transformer() -> Builder:
    """A function that makes a tiny transformer with so many condition tokens."""

    def build(tokens: int = 1, sample_size: int = 16, seed: int = 0) -> PixCellTransformer2DModel:
        torch.manual_seed(seed)
        return PixCellTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=sample_size,
            caption_channels=12,
            caption_num_tokens=tokens,
            interpolation_scale=2.0,
        ).eval()

    return build


@pytest.fixture(scope="session")
def tiny_vae() -> AutoencoderKL:
    """An autoencoder of SD3's kind: 16 channels, a factor of 8, its scale and shift."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
