"""Tiny checkpoints laid out exactly like the published ones, written by the tests' own code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pixcell_core.models import PixCellTransformer2DModel

WIDTH, HEAD_DIM, DEPTH, CHANNELS = 16, 8, 2, 12
#: Keys of the published config.json that no class knows.
DEAD = {
    "double_self_attention": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "_name_or_path": "pixart_1024/transformer",
}


def config_of(tokens: int, sample_size: int = 16, scale: float = 0.5) -> dict[str, Any]:
    """The published configuration, shrunk; written out by hand, as the files are."""
    return {
        "_class_name": "PixCellTransformer2DModel",
        "_diffusers_version": "0.32.2",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": HEAD_DIM,
        "attention_type": "default",
        "caption_channels": CHANNELS,
        "caption_num_tokens": tokens,
        "cross_attention_dim": WIDTH,
        "dropout": 0.0,
        "in_channels": 16,
        "interpolation_scale": scale,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": WIDTH // HEAD_DIM,
        "num_embeds_ada_norm": 1000,
        "num_layers": DEPTH,
        "out_channels": 32,
        "patch_size": 2,
        "sample_size": sample_size,
        "upcast_attention": False,
        "use_additional_conditions": False,
        **DEAD,
    }


def table_of(width: int, rows: int, *, base: int, scale: float, phase: float = 0.0) -> torch.Tensor:
    """The sine-cosine table, entry by entry from the specification: column first, then row; sine, then cosine."""
    quarter = width // 4
    table = np.zeros((rows * rows, width))
    for i in range(rows):
        for j in range(rows):
            for half, place in enumerate((j, i)):
                at = place / (rows / base) / scale + phase
                for k in range(quarter):
                    angle = at / 10000 ** (k / quarter)
                    table[i * rows + j, half * 2 * quarter + k] = math.sin(angle)
                    table[i * rows + j, half * 2 * quarter + quarter + k] = math.cos(angle)
    return torch.from_numpy(table).float()


def original_state_of(tokens: int, sample_size: int = 16, scale: float = 0.5) -> dict[str, torch.Tensor]:
    """Random weights under the original names, with its tables."""
    draw = torch.Generator().manual_seed(tokens + sample_size)
    d = WIDTH

    def layer(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        weight = torch.randn(rows, columns, generator=draw) / columns**0.5
        return {f"{name}.weight": weight, f"{name}.bias": torch.randn(rows, generator=draw) * 0.2}

    side = sample_size // 2
    state = {
        "pos_embed": table_of(d, side, base=side, scale=scale)[None],
        "x_embedder.proj.weight": torch.randn(d, 16, 2, 2, generator=draw) / 8,
        "x_embedder.proj.bias": torch.randn(d, generator=draw) * 0.2,
        **layer("t_embedder.mlp.0", d, 256),
        **layer("t_embedder.mlp.2", d, d),
        **layer("t_block.1", 6 * d, d),
        "y_embedder.y_embedding": torch.randn(tokens, CHANNELS, generator=draw) / CHANNELS**0.5,
        **layer("y_embedder.y_proj.fc1", d, CHANNELS),
        **layer("y_embedder.y_proj.fc2", d, d),
        **layer("final_layer.linear", 128, d),
        "final_layer.scale_shift_table": torch.randn(2, d, generator=draw) * 0.3,
    }
    if tokens > 1:
        grid = math.isqrt(tokens)
        table = table_of(CHANNELS, grid, base=side, scale=scale, phase=side // tokens)
        state["y_pos_embed"] = table[None]
    for n in range(DEPTH):
        state[f"blocks.{n}.scale_shift_table"] = torch.randn(6, d, generator=draw) * 0.3
        for name, rows, columns in (
            ("attn.qkv", 3 * d, d),
            ("attn.proj", d, d),
            ("cross_attn.q_linear", d, d),
            ("cross_attn.kv_linear", 2 * d, d),
            ("cross_attn.proj", d, d),
            ("mlp.fc1", 4 * d, d),
            ("mlp.fc2", d, 4 * d),
        ):
            state |= layer(f"blocks.{n}.{name}", rows, columns)
    return state


@pytest.fixture
def published_config() -> Callable[..., dict[str, Any]]:
    """`config_of`."""
    return config_of


@pytest.fixture
def position_table() -> Callable[..., torch.Tensor]:
    """`table_of`."""
    return table_of


@pytest.fixture
def original_state() -> Callable[..., dict[str, torch.Tensor]]:
    """`original_state_of`."""
    return original_state_of


@pytest.fixture
def tiny() -> Callable[..., PixCellTransformer2DModel]:
    """A tiny transformer with no weight left at zero."""

    def make(tokens: int = 1, seed: int = 0) -> PixCellTransformer2DModel:
        torch.manual_seed(seed)
        config = {k: v for k, v in config_of(tokens).items() if k not in DEAD and not k.startswith("_")}
        model = PixCellTransformer2DModel(**config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) / max(parameter.shape[-1], 4) ** 0.5)
        return model

    return make


@pytest.fixture
def write_folder() -> Callable[..., Path]:
    """Write a model folder as it is published: config.json with its dead keys, one safetensors file or shards."""

    def write(
        folder: Path,
        model: PixCellTransformer2DModel,
        *,
        shards: int = 1,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(int(model.config["caption_num_tokens"])) | changes
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        state = {k: v.detach().to(dtype).contiguous() for k, v in model.state_dict().items()}
        if shards == 1:
            save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
            return folder
        names, weight_map = sorted(state), {}
        for n in range(shards):
            file = f"diffusion_pytorch_model-{n + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: state[name] for name in names[n::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def inputs() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Latents, condition tokens and timesteps for a tiny transformer."""

    def make(tokens: int = 1, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(3)
        latents = torch.randn(2, 16, size, size, generator=draw)
        return latents, torch.randn(2, tokens, CHANNELS, generator=draw), torch.tensor([3.0, 700.0])

    return make
