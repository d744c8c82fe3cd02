"""What an encoder expects of its pixels: size, interpolation, mean and deviation.

The published features of PixCell come from tiles of 256 px resized to 224 (bilinear, antialiased) and normalised
with ImageNet's mean and deviation. The resize is done in float, on whichever device the encoder is on; a resize
of 8-bit images rounds in between and differs by no more than one grey level.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pixcell_core.errors import BadInputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Pillow's numbers of the two filters a preprocessor file may name.
_FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """Resize to `resize` px, cut the middle `crop` px, then (x / 255 - mean) / std per channel (red, green, blue)."""

    resize: int = 224
    crop: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 square tiles (B, 3, s, s) to normalised float32 (B, 3, crop, crop) on the same device."""
        pixels = tiles.float() / 255.0
        if pixels.shape[-1] != self.resize or pixels.shape[-2] != self.resize:
            pixels = F.interpolate(
                pixels,
                size=(self.resize, self.resize),
                mode=self.interpolation,
                antialias=True,
                align_corners=False,
            ).clamp(0.0, 1.0)
        start = (self.resize - self.crop) // 2
        pixels = pixels[..., start : start + self.crop, start : start + self.crop]
        mean = pixels.new_tensor(self.mean)[:, None, None]
        std = pixels.new_tensor(self.std)[:, None, None]
        return (pixels - mean) / std

    @classmethod
    def from_folder(cls, folder: Path, default: Preprocessing) -> Preprocessing:
        """Read `preprocessor_config.json` of a model folder; `default` where the folder has none.

        Raises:
            BadInputError: the file asks for something other than a resize, a centre crop and a normalisation.
        """
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            return default
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            resize = (
                _side(found.get("size"), default.resize) if found.get("do_resize", True) else default.resize
            )
            crop = _side(found.get("crop_size"), resize) if found.get("do_center_crop", False) else resize
            mean, std = (tuple(float(v) for v in found.get(k, d)) for k, d in _statistics(default))
            interpolation = _FILTERS[int(found.get("resample", 2))]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInputError(
                f"{path} holds no preprocessing this program knows ({type(error).__name__}: {error}).",
                hint="Expected size, crop_size, image_mean, image_std with three numbers each, and resample 2 "
                "(bilinear) or 3 (bicubic).",
                code="preprocessing-unknown",
            ) from error
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or not 0 < crop <= resize:
            raise BadInputError(
                f"{path} has mean {mean}, std {std}, size {resize} and crop {crop}.",
                hint="Expected three means, three deviations above 0 and a crop no larger than the size.",
                code="preprocessing-unknown",
            )
        return cls(resize, crop, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), interpolation)


def _statistics(default: Preprocessing) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("image_mean", default.mean), ("image_std", default.std)


def _side(size: Any, default: int) -> int:
    """One side from the ways a preprocessor file writes a size: 224, {shortest_edge}, or {height, width}."""
    if size is None:
        return default
    if isinstance(size, dict):
        if "height" in size and size["height"] != size.get("width"):
            raise ValueError(f"size {size} is not square")
        return int(size["shortest_edge"] if "shortest_edge" in size else size["height"])
    return int(size)
