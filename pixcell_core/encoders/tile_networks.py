"""Adapters that give every network one call: uint8 tiles (b, 3, t, t) on its device to embeddings (b, d)."""

from __future__ import annotations

import torch
from torch import nn

from pixcell_core.encoders.preprocessing import Preprocessing
from pixcell_core.models import EfficientNetLite, TileEncoder


class NormalisedNetwork(nn.Module):
    """A network on normalised images, behind its preprocessing; (b, d) from the network is returned as it is."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Embed uint8 tiles (b, 3, t, t); pixels are prepared in float32, then take the weights' type."""
        weight = next(self.network.parameters())
        return self.network(self.preprocessing(tiles).to(weight.dtype))  # type: ignore[no-any-return]


class ClassTokenNetwork(nn.Module):
    """The first token of a transformers vision model's last hidden state."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed normalised images (b, 3, s, s)."""
        return self.network(pixel_values=images).last_hidden_state[:, 0]  # type: ignore[no-any-return]


class StarterNetwork(nn.Module):
    """The starter's own tile encoder."""

    def __init__(self, network: TileEncoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Embed uint8 tiles (b, 3, t, t), t a multiple of 16."""
        images = tiles.float().div(127.5).sub(1.0).to(self.network.centre.dtype)
        return self.network(images)[:, 0]  # type: ignore[no-any-return]


class SecondEyeNetwork(nn.Module):
    """EfficientNet-Lite0's pooled features."""

    def __init__(self, network: EfficientNetLite) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """Embed uint8 tiles (b, 3, t, t)."""
        return self.network.embed(tiles)
