"""One way through every latent autoencoder, with scale and shift applied where they belong.

diffusers' convention: a transformer reads (z - shift_factor) * scaling_factor, and what it draws is decoded as
z = latents / scaling_factor + shift_factor. SD3's numbers are 1.5305 and 0.0609. Forgetting the shift gives images
that are only slightly wrong, which is why the two calls `to_latents` and `to_images` exist.
Legend: B batch, C latent channels, H W image pixels, h = H / downscale, w = W / downscale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from pixcell_core.errors import BadInputError


class EncodedImages(NamedTuple):
    """What `encode` returns where the model itself gives no distribution; the field's name is diffusers'."""

    latent_dist: DiagonalGaussianDistribution


class LatentAutoencoder:
    """A `LatentCodec` around a diffusers-style model.

    Args:
        name: the registered name.
        model: `encode(x).latent_dist` and `decode(z).sample`, images in [-1, 1]; its `config` holds both factors, so
            that a pipeline given `model` itself finds them too.
        latent_channels: channels C.
        downscale: image pixels per latent pixel along one side.
        batch_size: images per call in `to_latents` and `to_images`.
    """

    def __init__(
        self, name: str, model: nn.Module, *, latent_channels: int, downscale: int = 8, batch_size: int = 8
    ) -> None:
        self.name = name
        self.model: Any = model.eval().requires_grad_(False)
        self.latent_channels = latent_channels
        self.downscale = downscale
        self.batch_size = batch_size

    @property
    def scaling_factor(self) -> float:
        """Factor applied to a shifted latent."""
        return float(self.model.config["scaling_factor"])

    @property
    def shift_factor(self) -> float:
        """Number taken from a raw latent before it is scaled."""
        return float(self.model.config["shift_factor"])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LatentAutoencoder:
        """Move the model; returns itself."""
        # The plain module's own: diffusers' wrapper warns of modules to keep in float32 where there are none.
        nn.Module.to(self.model, device=device, dtype=dtype)
        return self

    def encode(self, images: torch.Tensor) -> Any:
        """Images (B, 3, H, W) in [-1, 1]; `.latent_dist` of the result is over raw latents (B, C, h, w)."""
        encoded = self.model.encode(images)
        if hasattr(encoded, "latent_dist"):
            return encoded
        # AutoencoderTiny gives latents alone: a distribution without spread.
        moments = torch.cat([encoded.latents, torch.zeros_like(encoded.latents)], dim=1)
        return EncodedImages(DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, latents: torch.Tensor) -> Any:
        """Raw latents (B, C, h, w); `.sample` of the result is images (B, 3, H, W), about [-1, 1]."""
        return self.model.decode(latents)

    @torch.inference_mode()
    def to_latents(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images to scaled latents (B, C, h, w) float32 on the model's device.

        Args:
            images: (B, 3, H, W), uint8, or floating point in [-1, 1].
            generator: draw each latent with it (a generator of the model's device); without one the mean is taken.

        Raises:
            BadInputError: another type, shape, range or size.
        """
        pixels = self._pixels(images)
        parts = []
        for batch in pixels.split(self.batch_size):
            latent = self.encode(self._placed(batch)).latent_dist
            raw = latent.mode() if generator is None else latent.sample(generator)
            parts.append((raw.float() - self.shift_factor) * self.scaling_factor)
        return torch.cat(parts)

    @torch.inference_mode()
    def to_images(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, H, W) float32, about [-1, 1], on the model's device.

        Raises:
            BadInputError: another number of channels, or latents that are NaN.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels or not len(latents):
            raise BadInputError(
                f"{self.name} got latents of shape {list(latents.shape)}, "
                f"expected [B, {self.latent_channels}, h, w] with B of at least 1.",
                hint="Decode latents with the autoencoder that made them.",
                code="latent-shape",
            )
        if not bool(torch.isfinite(latents).all()):
            raise BadInputError(
                f"{self.name} got latents that are NaN or infinite, expected finite numbers.",
                hint="Look at what drew them: half precision overflows before float32 or bfloat16 do.",
                code="latent-not-finite",
            )
        parts = [
            self.decode(self._placed(batch.float() / self.scaling_factor + self.shift_factor)).sample.float()
            for batch in latents.split(self.batch_size)
        ]
        return torch.cat(parts)

    def enable_tiling(self, tile: int = 512) -> None:
        """Decode and encode images larger than `tile` px in overlapping tiles, so that memory does not grow with them.

        Raises:
            BadInputError: the model has no tiling that fits its latents.
        """
        from diffusers import AutoencoderKL

        if not isinstance(self.model, AutoencoderKL):
            raise BadInputError(
                f"{self.name} ({type(self.model).__name__}) has no tiling, expected an AutoencoderKL.",
                hint="It is small: run it without.",
                code="no-tiling",
            )
        model: Any = self.model
        model.enable_tiling()
        # The published SD3 folder names 1024 px as its tile, which would leave a 1024 px image whole.
        model.tile_sample_min_size = tile
        model.tile_latent_min_size = tile // self.downscale

    def _placed(self, batch: torch.Tensor) -> torch.Tensor:
        weight = next(self.model.parameters())
        return batch.to(weight.device, weight.dtype)

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise BadInputError(
                f"{self.name} got images of shape {list(images.shape)}, "
                "expected [B, 3, H, W] with B of at least 1.",
                hint="Give RGB images, channels first.",
                code="image-type",
            )
        if (
            images.shape[2] % self.downscale
            or images.shape[3] % self.downscale
            or not images.shape[2:].numel()
        ):
            raise BadInputError(
                f"{self.name} got images of {images.shape[2]} x {images.shape[3]} px (height x width), "
                f"expected multiples of {self.downscale}.",
                hint="Crop or pad them.",
                code="image-size",
            )
        if images.dtype == torch.uint8:
            return images.float().div(127.5).sub(1.0)
        low, high = float(images.min()), float(images.max())
        # Written so that NaN fails too; decoders overshoot [-1, 1] a little.
        if not images.is_floating_point() or not (low >= -1.5 and high <= 1.5):
            raise BadInputError(
                f"{self.name} got {images.dtype} images between {low:g} and {high:g}, "
                "expected uint8, or floating point in [-1, 1].",
                hint="Divide by 127.5 and take 1 away, or give the uint8 image itself.",
                code="image-type",
            )
        return images
