"""The examiner's eye: any embedding that is not the generator's own conditioning encoder."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Eye(Protocol):
    """Turns tiles into vectors; its name stands in the report and in the cache."""

    name: str

    def embed(self, pixels: Tensor) -> Tensor:
        """Embed uint8 (B, 3, H, W) as (B, d) float32."""


_AT_ONCE = 32  # tiles: the activations of more do not stay in a processor's cache


class SecondEye:
    """EfficientNet-Lite0 features of tiles reduced to a fixed side."""

    def __init__(self, side: int) -> None:
        from pixcell_core.models.efficientnet_lite import EfficientNetLite

        self.name = f"efficientnet-lite0/blocks-4-10-head/{side}px"
        self._side = side
        self._net = EfficientNetLite.from_package().fold_batch_norms()

    def embed(self, pixels: Tensor) -> Tensor:
        """Reduce by area averaging, then embed; (B, d) float32."""
        if len(pixels) > _AT_ONCE:
            return torch.cat([self.embed(part) for part in pixels.split(_AT_ONCE)])
        if pixels.shape[-2:] != (self._side, self._side):
            reduced = F.interpolate(pixels.float(), size=(self._side, self._side), mode="area")
            pixels = reduced.round().clamp(0, 255).to(torch.uint8)
        return self._net.embed(pixels)
