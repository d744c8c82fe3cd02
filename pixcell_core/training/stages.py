"""The stages a model grows through, 256 -> 512 -> 1024 px: the weights are carried, the tables are made anew.

All stages share the shapes of their parameters. What differs are buffers: the table of latent positions, the table
of condition tokens and the null condition, whose sizes follow from sample size, scale and token count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel

PIXELS_PER_LATENT = 8
NULL = "caption_projection.uncond_embedding"
TABLE = "y_pos_embed.y_pos_embed"


@dataclass(frozen=True)
class Stage:
    """One stage: image side in pixels, latent side, scale of the position tables, condition tokens."""

    resolution: int
    sample_size: int
    interpolation_scale: float
    caption_num_tokens: int


STAGES = {
    256: Stage(256, 32, 0.5, 1),
    512: Stage(512, 64, 1.0, 4),
    1024: Stage(1024, 128, 2.0, 16),
}


def published_config(resolution: int) -> dict[str, Any]:
    """Configuration of the published transformer (608,072,960 parameters) at 256, 512 or 1024 px.

    Raises:
        BadInputError: no such stage.
    """
    if resolution not in STAGES:
        raise BadInputError(
            f"There is no published stage of {resolution} px.",
            hint="Give 256, 512 or 1024, or a configuration of your own.",
            code="unknown-stage",
        )
    stage = STAGES[resolution]
    return {
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 16,
        "out_channels": 32,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "patch_size": 2,
        "caption_channels": 1536,
        "sample_size": stage.sample_size,
        "interpolation_scale": stage.interpolation_scale,
        "caption_num_tokens": stage.caption_num_tokens,
    }


def resolution_of(model: PixCellTransformer2DModel) -> int:
    """Image side in pixels that a model is made for."""
    return int(model.config["sample_size"]) * PIXELS_PER_LATENT


def grown_config(config: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """The configuration of a stage `factor` times as large per side: all positions keep the range they had."""
    scale = config["interpolation_scale"]
    size = int(config["sample_size"])
    known = {k: v for k, v in config.items() if not k.startswith("_")}
    return {
        **known,
        "sample_size": size * factor,
        "interpolation_scale": factor * (max(size // 64, 1) if scale is None else scale),
        "caption_num_tokens": int(config["caption_num_tokens"]) * factor**2,
    }


def drawn_null(tokens: int, channels: int, seed: int) -> torch.Tensor:
    """A null condition (tokens, channels): N(0, 1) / sqrt(channels), drawn once and never trained."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator) / math.sqrt(channels)


def new_model(config: Mapping[str, Any], seed: int) -> PixCellTransformer2DModel:
    """A model with fresh weights from `seed`; the global generator is left as it was.

    The last layer starts at zero, as is usual for diffusion transformers (Peebles & Xie 2023, section 3.2).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PixCellTransformer2DModel(**config)
    for parameter in model.proj_out.parameters():
        nn.init.zeros_(parameter)
    _draw_null(model, seed)
    return model


def _set_null(model: PixCellTransformer2DModel, null: torch.Tensor) -> None:
    own = model.caption_projection.uncond_embedding
    if null.shape != own.shape:
        raise BadInputError(
            f"The null condition has shape {tuple(null.shape)}; this stage needs {tuple(own.shape)}.",
            hint="Give one vector per condition token, of the encoder's width.",
            code="null-shape-differs",
        )
    with torch.no_grad():
        own.copy_(null)


def _draw_null(model: PixCellTransformer2DModel, seed: int) -> None:
    tokens, channels = model.caption_projection.uncond_embedding.shape
    _set_null(model, drawn_null(tokens, channels, seed))


def next_stage(
    model: PixCellTransformer2DModel, resolution: int, *, seed: int, null: torch.Tensor | None = None
) -> PixCellTransformer2DModel:
    """A model of `resolution` px that starts from another stage's weights.

    All parameters are carried bit for bit. The tables of positions are rebuilt. The null condition is carried where
    the number of tokens stays; where it changes it is `null` if given, else drawn anew from `seed`.

    Args:
        model: the finished stage.
        resolution: image side of the new stage, a whole multiple of the old one's.
        seed: seed of a null condition to be drawn.
        null: null condition (n, caption_channels) of the new stage.

    Raises:
        BadInputError: the resolution is no multiple of the old one, or the null does not fit.
    """
    before = resolution_of(model)
    if resolution < before or resolution % before:
        raise BadInputError(
            f"A stage of {resolution} px cannot start from one of {before} px.",
            hint=f"Give a whole multiple of {before} px, e.g. {2 * before}.",
            code="stage-impossible",
        )
    config = grown_config(model.config, resolution // before)
    with torch.random.fork_rng(devices=[]):
        grown = PixCellTransformer2DModel(**config)
    same_tokens = config["caption_num_tokens"] == model.config["caption_num_tokens"]
    rebuilt = {TABLE} if same_tokens else {TABLE, NULL}
    carried = {k: v for k, v in model.state_dict().items() if k not in rebuilt}
    report = grown.load_state_dict(carried, strict=False)
    odd = (set(report.missing_keys) - rebuilt) | set(report.unexpected_keys)
    if odd:
        raise BadInputError(
            f"{len(odd)} tensors do not fit the new stage, e.g. {sorted(odd)[0]}.",
            hint="Start from a whole model of an earlier stage.",
            code="stage-mismatch",
        )
    if null is not None:
        _set_null(grown, null)
    elif not same_tokens:
        _draw_null(grown, seed)
    return grown
