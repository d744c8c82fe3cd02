"""The starter's tile encoder: a small residual ConvNet whose pooled features condition the generator.

Any encoder that follows `TileEncoderProtocol` can take its place; UNI2-h and others load from a user's own files.
Legend: B batch, H W pixels, n condition tokens, d embedding width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


class TileEncoderProtocol(Protocol):
    """What the platform needs of a tile encoder."""

    @property
    def embedding_dim(self) -> int:
        """Width d of one token."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 tiles (B, 3, H, W) to float32 embeddings (B, n, d)."""


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_first = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_second = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm_second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.norm_first(self.first(x)))
        return F.relu(x + self.norm_second(self.second(inner)))


class _Down(nn.Sequential):
    def __init__(self, source: int, target: int) -> None:
        super().__init__(
            nn.Conv2d(source, target, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(target), nn.ReLU()
        )


class TileEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Tiles to one token of `embedding_dim` numbers.

    `features` pools mean and standard deviation of the three stages; `embedding` is a fixed whitening projection of
    those features, fitted once on the training tiles (buffers `centre` and `whiten`), so that every coordinate has
    about unit variance.
    """

    @register_to_config
    def __init__(
        self,
        widths: tuple[int, int, int] = (64, 160, 256),
        blocks: tuple[int, int, int] = (2, 2, 2),
        embedding_dim: int = 256,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.stages = nn.ModuleList()
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            down = [_Down(widths[i - 1], width)] if i else []
            self.stages.append(nn.Sequential(*down, *[_Block(width) for _ in range(count)]))
        self.feature_dim = 2 * sum(widths)
        self.register_buffer("centre", torch.zeros(self.feature_dim))
        self.register_buffer("whiten", torch.zeros(self.feature_dim, embedding_dim))

    @property
    def embedding_dim(self) -> int:
        """Width d of the token."""
        return int(self.config["embedding_dim"])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to pooled features (B, feature_dim)."""
        x = self.stem(images)
        pooled = []
        for stage in self.stages:
            x = stage(x)
            flat = x.flatten(2).float()
            pooled += [flat.mean(2), (flat.var(2, unbiased=False) + 1e-6).sqrt()]
        return torch.cat(pooled, dim=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] to embeddings (B, 1, d)."""
        return ((self.features(images) - self.centre) @ self.whiten)[:, None, :]

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 tiles (B, 3, H, W), H and W multiples of 16, to float32 embeddings (B, 1, d)."""
        device = self.centre.device
        return self(pixels.to(device).float().div(127.5).sub(1.0)).float()
