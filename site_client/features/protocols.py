"""What feature extraction needs of an autoencoder and an encoder, and how their weights are named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from pixcell_core.models import TileEncoderProtocol

__all__ = ["LatentEncoder", "TileEncoderProtocol", "weights_digest"]


class LatentMoments(Protocol):
    """A diagonal Gaussian over latents; `mean` and `std` (B, 16, h, w), unscaled."""

    mean: Any
    std: Any


class LatentEncoding(Protocol):
    """What an autoencoder's `encode` returns, under diffusers' own name."""

    @property
    def latent_dist(self) -> Any:
        """A `LatentMoments`."""


class LatentEncoder(Protocol):
    """The encoding half of an autoencoder: the starter's own, or any diffusers VAE with 16 channels."""

    def encode(self, images: torch.Tensor, /) -> LatentEncoding:
        """Images (B, 3, H, W) in [-1, 1] to a distribution over latents."""


def weights_digest(model: object) -> str:
    """SHA-256 over the names and bytes of a model's weights, so that stores of two models never mix."""
    state = getattr(model, "state_dict", None)
    tensors: Mapping[str, torch.Tensor] = state() if callable(state) else {}
    digest = hashlib.sha256(type(model).__name__.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(
            tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return f"sha256:{digest.hexdigest()}"
