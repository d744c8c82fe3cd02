"""The examiner's eye: any embedding that is not the generator's own conditioning encoder."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Eye(Protocol):
    """Turns tiles into vectors; its name stands in the report and in the cache."""

    name: str
    device: torch.device  # where tiles are looked at

    def embed(self, pixels: Tensor) -> Tensor:
        """Embed uint8 (B, 3, H, W), wherever they lie, as (B, d) float32 in the processor's memory."""


_AT_ONCE = 32  # tiles: the activations of more do not stay in a processor's cache
_AT_ONCE_ELSEWHERE = 256


class SecondEye:
    """EfficientNet-Lite0 features of tiles reduced to a fixed side."""

    def __init__(self, side: int, device: torch.device | str = "cpu") -> None:
        from pixcell_core.models.efficientnet_lite import EfficientNetLite

        self.name = f"efficientnet-lite0/blocks-4-10-head/{side}px"
        self._side = side
        self.device = torch.device(device)
        self._net = EfficientNetLite.from_package().fold_batch_norms().to(self.device)

    def embed(self, pixels: Tensor) -> Tensor:
        """Reduce by area averaging, then embed; (B, d) float32."""
        at_once = _AT_ONCE if self.device.type == "cpu" else _AT_ONCE_ELSEWHERE
        if len(pixels) > at_once:
            return torch.cat([self.embed(part) for part in pixels.split(at_once)])
        pixels = pixels.to(self.device)
        if pixels.shape[-2:] != (self._side, self._side):
            reduced = F.interpolate(pixels.float(), size=(self._side, self._side), mode="area")
            pixels = reduced.round().clamp(0, 255).to(torch.uint8)
        # In full precision everywhere: ten bits of mantissa are not what thresholds were measured with.
        with torch.backends.cudnn.flags(allow_tf32=False):
            return self._net.embed(pixels).to("cpu")
