"""The starter's latent autoencoder: f8, 16 channels, small enough for a CPU.

All convolutions run at a quarter of the image's resolution or below (pixel unshuffle by 4 on the way in, shuffle on
the way out), because full-resolution convolutions dominate the cost of the usual autoencoders on a CPU.
Legend: B batch, H W image pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


class LatentDistribution:
    """A diagonal Gaussian over latents: `mean` and `std`, each (B, 16, h, w)."""

    def __init__(self, mean: torch.Tensor, logvar: torch.Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(-20.0, 4.0)
        self.std = torch.exp(0.5 * self.logvar)

    def mode(self) -> torch.Tensor:
        """The most likely latent."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """One draw."""
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise

    def kl(self) -> torch.Tensor:
        """KL divergence to the unit Gaussian, one value per latent entry, in nats."""
        return 0.5 * (self.mean.pow(2) + self.logvar.exp() - 1.0 - self.logvar)


class EncoderOutput(NamedTuple):
    """What `encode` returns; the name of the field is diffusers' own."""

    latent_dist: LatentDistribution


class DecoderOutput(NamedTuple):
    """What `decode` returns; the name of the field is diffusers' own."""

    sample: torch.Tensor


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class TileAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Encode tiles to (B, 16, H/8, W/8) latents and back.

    The calls are diffusers': `encode(x).latent_dist`, `decode(z).sample`, images in [-1, 1];
    scaled latents are `(z - shift_factor) * scaling_factor`.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        width: int = 96,
        deep_width: int = 160,
        encoder_blocks: tuple[int, int] = (3, 2),
        decoder_blocks: tuple[int, int] = (4, 3),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, width, 3, padding=1),
            *[_Residual(width) for _ in range(encoder_blocks[0])],
            nn.Conv2d(width, deep_width, 3, stride=2, padding=1),
            *[_Residual(deep_width) for _ in range(encoder_blocks[1])],
            nn.Conv2d(deep_width, 2 * latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, deep_width, 3, padding=1),
            *[_Residual(deep_width) for _ in range(decoder_blocks[1])],
            nn.Conv2d(deep_width, 4 * width, 1),
            nn.PixelShuffle(2),
            *[_Residual(width) for _ in range(decoder_blocks[0])],
            nn.Conv2d(width, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def encode(self, images: torch.Tensor) -> EncoderOutput:
        """Images (B, 3, H, W) in [-1, 1], H and W multiples of 8, to a distribution over (B, 16, H/8, W/8)."""
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        return EncoderOutput(LatentDistribution(mean, logvar))

    def decode(self, latents: torch.Tensor) -> DecoderOutput:
        """Unscaled latents (B, 16, h, w) to images (B, 3, 8h, 8w), about [-1, 1]."""
        return DecoderOutput(self.decoder(latents))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstruct images through the mean latent."""
        return self.decode(self.encode(images).latent_dist.mean).sample
