"""A vision transformer with register tokens, as UNI2-h is one: parameters named as in its published file.

Architecture: Dosovitskiy et al. (ICLR 2021); registers: Darcet et al. (ICLR 2024); LayerScale: Touvron et al.
(ICCV 2021); SwiGLU: Shazeer (arXiv 2002.05202). In this form
- positions are added to the patches alone: class token and registers have none;
- the first linear layer of the MLP holds both halves of the gated unit in one matrix, and the activation is applied
  to the first half: SiLU(first) * second;
- the result is the class token after the last norm.

Legend: B batch, N tokens, d width, k heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from pixcell_core.errors import BadInputError


@dataclass(frozen=True)
class VisionTransformerConfig:
    """Sizes; the defaults are UNI2-h's (681,394,176 parameters)."""

    img_size: int = 224
    patch_size: int = 14
    depth: int = 24
    num_heads: int = 24
    embed_dim: int = 1536
    mlp_ratio: float = 5.33334
    init_values: float = 1e-5
    reg_tokens: int = 8
    norm_eps: float = 1e-6

    def build(self) -> RegisterVisionTransformer:
        """A network of these sizes with random weights."""
        return RegisterVisionTransformer(self)


class _PatchEmbedding(nn.Module):
    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, width = tokens.shape
        packed = self.qkv(tokens).reshape(batch, count, 3, self.num_heads, width // self.num_heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))  # type: ignore[no-any-return]


class _GatedMlp(nn.Module):
    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.embed_dim, hidden)
        self.fc2 = nn.Linear(hidden // 2, config.embed_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(gated_unit(self.fc1(tokens)))  # type: ignore[no-any-return]


class _LayerScale(nn.Module):
    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((config.embed_dim,), config.init_values))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * self.gamma


class _Block(nn.Module):
    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = _Attention(config)
        self.ls1 = _LayerScale(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = _GatedMlp(config)
        self.ls2 = _LayerScale(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]


def gated_unit(packed: torch.Tensor) -> torch.Tensor:
    """The gated half of a packed SwiGLU layer: (..., 2m) to (..., m), SiLU on the first half."""
    first, second = packed.chunk(2, dim=-1)
    return F.silu(first) * second


class RegisterVisionTransformer(nn.Module):
    """Normalised images (B, 3, s, s) to one embedding each (B, d): the class token after the last norm."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.config = config
        patches = (config.img_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, config.reg_tokens, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, patches, config.embed_dim) * 0.02)
        self.patch_embed = _PatchEmbedding(config)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed normalised images (B, 3, img_size, img_size) as (B, embed_dim).

        Raises:
            BadInputError: the images have another size than the position table.
        """
        side = self.config.img_size
        if tuple(images.shape[1:]) != (3, side, side):
            raise BadInputError(
                f"The vision transformer got images of shape {list(images.shape[1:])}, expected {[3, side, side]}.",
                hint=f"Resize tiles to {side} px first; the encoder's preprocessing does.",
                code="image-size",
            )
        patches = self.patch_embed(images) + self.pos_embed
        prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(images), -1, -1)
        tokens = torch.cat([prefix, patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])  # type: ignore[no-any-return]
