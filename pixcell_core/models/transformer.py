"""PixCell's diffusion transformer: PixArt's blocks, conditioned on tile embeddings (arXiv 2506.05127).

The module names are those of the published Diffusers checkpoints, so their files load as they are.
Legend: B batch, C latent channels, H W latent pixels, n condition tokens, d transformer width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin  # type: ignore[attr-defined]
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import nn

from pixcell_core.models.block_forward import run_block, run_block_at_one_time
from pixcell_core.models.positions import sincos_table
from pixcell_core.models.prepared import PreparedCondition, prepare_condition


class _PatchEmbedding(nn.Module):
    """Patches to tokens, plus the fixed position table, rebuilt for other sizes with the same base."""

    pos_embed: torch.Tensor

    def __init__(self, channels: int, width: int, patch: int, sample_size: int, scale: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self._width, self._base, self._scale = width, sample_size // patch, scale
        self._tables: dict[tuple[int, int], torch.Tensor] = {}
        self.register_buffer("pos_embed", self._table(self._base, self._base), persistent=False)

    def _table(self, height: int, width: int) -> torch.Tensor:
        return sincos_table(self._width, height, width, base=self._base, scale=self._scale)[None]

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        patches = self.proj(latents)
        height, width = patches.shape[-2:]
        table = self.pos_embed
        if (height, width) != (self._base, self._base):
            table = self._tables.setdefault((height, width), self._table(height, width))
        return patches.flatten(2).transpose(1, 2) + table.to(patches)


class _ConditionProjection(PixArtAlphaTextProjection):
    """Condition tokens to the transformer's width; keeps the fixed, never trained null condition."""

    uncond_embedding: torch.Tensor

    def __init__(self, channels: int, width: int, tokens: int) -> None:
        super().__init__(in_features=channels, hidden_size=width)
        self.register_buffer("uncond_embedding", torch.randn(tokens, channels) / math.sqrt(channels))


class _ConditionPositions(nn.Module):
    """The table added to a square grid of condition tokens, centred on the tiles they describe."""

    y_pos_embed: torch.Tensor

    def __init__(self, channels: int, tokens: int, base: int, scale: float) -> None:
        super().__init__()
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError("condition tokens must form a square grid")
        phase = base // tokens if tokens else 0
        table = sincos_table(channels, side, side, base=base, scale=scale, phase=phase)
        self.register_buffer("y_pos_embed", table[None])

    def forward(self, condition: torch.Tensor) -> torch.Tensor:
        return condition + self.y_pos_embed.to(condition)


class PixCellTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Predicts noise (and the variance's interpolation) of a latent tile, given the embeddings it should show.

    Keys, shapes and behaviour follow the published Diffusers form; unknown keys of its configuration are ignored.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock"]  # type: ignore[assignment] # noqa: RUF012 - diffusers reads a list

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 16,
        out_channels: int | None = 32,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = 0.5,
        use_additional_conditions: bool = False,
        caption_channels: int = 1536,
        caption_num_tokens: int = 1,
        attention_type: str = "default",
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        scale = interpolation_scale if interpolation_scale is not None else max(sample_size // 64, 1)
        self.out_channels = out_channels or in_channels
        self.pos_embed = _PatchEmbedding(in_channels, width, patch_size, sample_size, scale)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                cross_attention_dim=cross_attention_dim,
                activation_fn=activation_fn,
                num_embeds_ada_norm=num_embeds_ada_norm,
                attention_bias=attention_bias,
                upcast_attention=upcast_attention,
                norm_type=norm_type,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
                attention_type=attention_type,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size * patch_size * self.out_channels)
        self.adaln_single = AdaLayerNormSingle(width, use_additional_conditions=False)
        self.caption_projection = _ConditionProjection(caption_channels, width, caption_num_tokens)
        self.y_pos_embed: nn.Module | None = None
        if caption_num_tokens > 1:
            self.y_pos_embed = _ConditionPositions(
                caption_channels, caption_num_tokens, sample_size // 2, scale
            )
        self.gradient_checkpointing = False

    def unconditional(self, batch: int) -> torch.Tensor:
        """The null condition (batch, n, caption_channels)."""
        return self.caption_projection.uncond_embedding[None].expand(batch, -1, -1)

    def prepare(self, condition: torch.Tensor) -> PreparedCondition:
        """Compute once what no step changes about condition tokens (B, n, caption_channels).

        Give the result to `forward` in their place. It holds the weights and adapters of this moment.
        """
        return prepare_condition(list(self.transformer_blocks), self._project(condition))

    def _project(self, condition: torch.Tensor) -> torch.Tensor:
        if self.y_pos_embed is not None:
            condition = self.y_pos_embed(condition)
        projected: torch.Tensor = self.caption_projection(condition)
        return projected

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | PreparedCondition,
        timestep: torch.Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Run the transformer.

        Args:
            hidden_states: noisy latents (B, C, H, W), H and W multiples of the patch size.
            encoder_hidden_states: condition tokens (B, n, caption_channels), or what `prepare` made of them. Prepared
                conditions may be k times as many as the latents, which then are repeated k times (guidance: k = 2).
            timestep: (B,) or a scalar, integer or fractional, in 0..999. A scalar is the fast case of sampling.
            return_dict: return an object with `.sample`, else a one-tuple.

        Returns:
            (B, out_channels, H, W): the first half of the channels is the noise, the second half the variance value.
        """
        tokens, embedded = self._run(hidden_states, encoder_hidden_states, timestep)
        batch, height, width = len(tokens), *hidden_states.shape[-2:]
        patch = int(self.config["patch_size"])
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        tokens = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        rows, columns = height // patch, width // patch
        image = tokens.reshape(batch, rows, columns, patch, patch, self.out_channels)
        output = image.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)
        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)

    def _run(
        self, latents: torch.Tensor, condition: torch.Tensor | PreparedCondition, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, T, d) after all blocks, and the embedded time (B or 1, d).

        Condition tokens without gradients take diffusers' own block, to the last bit; everything else takes ours.
        """
        if torch.is_grad_enabled() and not isinstance(condition, PreparedCondition):
            condition = self.prepare(condition)
        tokens = self.pos_embed(latents)
        if isinstance(condition, PreparedCondition) and condition.weights and timestep.ndim == 0:
            modulation, embedded = self._time(timestep[None], tokens.dtype)
            return self._run_at_one_time(tokens, condition, modulation), embedded
        if isinstance(condition, PreparedCondition) and len(tokens) != len(condition):
            tokens = tokens.repeat(len(condition) // len(tokens), 1, 1)
        modulation, embedded = self._time(timestep.expand(len(tokens)), tokens.dtype)
        if not isinstance(condition, PreparedCondition):
            condition = self._project(condition)
            for block in self.transformer_blocks:
                tokens = block(tokens, encoder_hidden_states=condition, timestep=modulation)
            return tokens, embedded
        recomputed = torch.is_grad_enabled() and self.gradient_checkpointing
        checkpoint: Any = self._gradient_checkpointing_func
        run: Any = partial(checkpoint, run_block) if recomputed else run_block
        for number, block in enumerate(self.transformer_blocks):
            tokens = run(block, tokens, condition.cross(number), modulation)
        return tokens, embedded

    def _run_at_one_time(
        self, tokens: torch.Tensor, prepared: PreparedCondition, modulation: torch.Tensor
    ) -> torch.Tensor:
        heads = int(self.config["num_attention_heads"])
        for number, block in enumerate(self.transformer_blocks):
            table: Any = block.scale_shift_table
            weights = prepared.weights[number]
            tokens = run_block_at_one_time(weights, table, heads, tokens, prepared.cross(number), modulation)
        return tokens

    def _time(self, times: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Modulation (B, 6 d) and embedded time (B, d) of times (B,)."""
        extra = {"resolution": None, "aspect_ratio": None}
        found: tuple[torch.Tensor, torch.Tensor] = self.adaln_single(
            times, extra, batch_size=len(times), hidden_dtype=dtype
        )
        return found
