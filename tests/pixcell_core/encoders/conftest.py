"""Tiny models on disk, laid out as the published ones are, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pixcell_core.encoders.vision_transformer import VisionTransformerConfig

TINY_VIT = VisionTransformerConfig(
    img_size=28, patch_size=14, depth=2, num_heads=3, embed_dim=24, reg_tokens=2
)

SD3_VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.29.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def randomise(model: torch.nn.Module, seed: int = 0, spread: float = 0.3) -> torch.nn.Module:
    """Every parameter random, so that no zero start and no LayerScale hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


@pytest.fixture()
def tiles() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture()
def tiny_uni2(tmp_path: Path) -> Path:
    """A folder with `pytorch_model.bin` of the tiny register transformer."""
    folder = tmp_path / "uni2"
    folder.mkdir()
    torch.save(randomise(TINY_VIT.build()).state_dict(), folder / "pytorch_model.bin")
    return folder


WriteVae = Callable[..., Path]


@pytest.fixture()
def write_vae(tmp_path: Path) -> WriteVae:
    """Write a small AutoencoderKL folder whose config is SD3's but for its widths; keywords change the config."""
    from diffusers import AutoencoderKL

    def write(name: str = "vae", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = {
            **SD3_VAE_CONFIG,
            "block_out_channels": [8, 8, 8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            **changes,
        }
        torch.manual_seed(3)
        model = AutoencoderKL.from_config(config).eval()
        config = {k: v for k, v in config.items() if v != "absent"}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(
            model.state_dict(), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"}
        )
        return folder

    return write
