"""What the platform needs of a tile encoder and of a latent autoencoder, whoever made them.

Legend: B batch, H W image pixels, h w latent pixels, n condition tokens, d embedding width, C latent channels.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class ImageEncoder(Protocol):
    """Images to condition tokens, one token per tile, tiles in row-major order."""

    @property
    def name(self) -> str:
        """The registered name; features of two encoders are never mixed."""

    @property
    def embedding_dim(self) -> int:
        """Width d of one token."""

    @property
    def tile_size(self) -> int:
        """Side in pixels of the square tile that makes one token."""

    def tokens(self, height: int, width: int) -> int:
        """Number n of tokens of an image of `height` x `width` pixels; BadInputError where it cannot be cut."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 images (B, 3, H, W) to float32 tokens (B, n, d) on the CPU."""


@runtime_checkable
class LatentCodec(Protocol):
    """Images to latents and back: diffusers' two calls, and two that never forget scale and shift."""

    @property
    def scaling_factor(self) -> float:
        """Factor applied to a shifted latent."""

    @property
    def shift_factor(self) -> float:
        """Number taken from a raw latent before it is scaled."""

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent."""

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel along one side."""

    def encode(self, images: torch.Tensor) -> Any:
        """Images (B, 3, H, W) in [-1, 1]; `.latent_dist` of the result is a distribution over raw latents."""

    def decode(self, latents: torch.Tensor) -> Any:
        """Raw latents (B, C, h, w); `.sample` of the result is images, about [-1, 1]."""

    def to_latents(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images to scaled latents (z - shift_factor) * scaling_factor, which a transformer reads."""

    def to_images(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents back to images, about [-1, 1]."""
