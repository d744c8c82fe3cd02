"""Latents to images in pieces, so that the memory of a decode does not grow with the image.

Legend: B images, C latent channels, h w latent pixels, H W image pixels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

WHOLE_LATENTS = 64
"""Latents of at most this side are decoded whole (512 px at a factor of 8)."""
PIXELS_PER_CALL = 4 * WHOLE_LATENTS**2
"""Latent pixels decoded together: 64 tiles of 128 px, 16 of 256 px or 4 of 512 px."""


@dataclass(frozen=True)
class DecodeTiling:
    """How a large decode is cut, in latent pixels.

    Args:
        core: side of the square each piece contributes on its own.
        feather: width, on each side of a border, over which two neighbouring pieces are blended.
        halo: context decoded around the core and cut away; the result is exact where
            halo - feather reaches as far as the decoder looks.
    """

    core: int = 64
    feather: int = 4
    halo: int = 16


def plain_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents to the autoencoder's own: z / scaling_factor + shift_factor."""
    config = vae.config
    return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)


def _pieces(length: int, tiling: DecodeTiling) -> list[tuple[int, int, int, int]]:
    """Along one axis: (first and last + 1 decoded, first and last + 1 kept), neighbours overlapping by 2 feather."""
    count = -(-length // tiling.core)
    cuts = [round(i * length / count) for i in range(count + 1)]
    return [
        (
            max(a - tiling.halo, 0),
            min(b + tiling.halo, length),
            max(a - tiling.feather, 0),
            min(b + tiling.feather, length),
        )
        for a, b in itertools.pairwise(cuts)
    ]


def _ramp(kept: tuple[int, int], length: int, overlap: int, factor: int) -> torch.Tensor:
    """Weight of a piece over its kept pixels: linear over the overlaps, so that neighbours add up to one."""
    first, last = kept
    weight = torch.ones((last - first) * factor)
    if overlap:
        rise = (torch.arange(overlap * factor) + 0.5) / (overlap * factor)
        if first > 0:
            weight[: len(rise)] = rise
        if last < length:
            weight[-len(rise) :] = 1 - rise
    return weight


def decode_tiled(vae: Any, plain: torch.Tensor, tiling: DecodeTiling) -> torch.Tensor:
    """Decode unscaled latents (B, C, h, w) piece by piece into images (B, 3, H, W), float32, clamped to [-1, 1].

    A decoder that looks no further than `halo - feather` latent pixels gives exactly the plain decode; one with
    statistics over the whole image (group norms, attention) gives slightly different pieces, blended linearly.
    """
    if not 0 <= 2 * tiling.feather <= tiling.core or tiling.halo < tiling.feather:
        raise ValueError("a feather is at most half a core and at most the halo")
    height, width = plain.shape[-2:]
    images: torch.Tensor | None = None
    for image in range(len(plain)):
        for y0, y1, top, bottom in _pieces(height, tiling):
            for x0, x1, left, right in _pieces(width, tiling):
                piece = vae.decode(plain[image : image + 1, :, y0:y1, x0:x1]).sample[0]
                factor = piece.shape[-1] // (x1 - x0)
                if images is None:
                    # The canvas is kept where the latents are; it is small beside what a decoder needs.
                    images = piece.new_zeros(
                        (len(plain), 3, height * factor, width * factor), dtype=torch.float32
                    )
                inner = piece[
                    :,
                    (top - y0) * factor : (bottom - y0) * factor,
                    (left - x0) * factor : (right - x0) * factor,
                ]
                down = _ramp((top, bottom), height, 2 * tiling.feather, factor).to(images)
                across = _ramp((left, right), width, 2 * tiling.feather, factor).to(images)
                box = images[image, :, top * factor : bottom * factor, left * factor : right * factor]
                box += inner.float().clamp(-1, 1) * down[:, None] * across[None, :]
    if images is None:
        raise ValueError("no latents to decode")
    return images


@torch.inference_mode()
def decode_latents(vae: Any, latents: torch.Tensor, tiling: DecodeTiling | None = None) -> torch.Tensor:
    """Scaled latents (B, C, h, w) to images (B, 3, H, W), float32 in [-1, 1], with bounded memory.

    Small latents are decoded whole, a bounded number of images at a time; large ones in overlapping pieces.

    Args:
        vae: an autoencoder with `decode(z).sample` and `scaling_factor` / `shift_factor` in its configuration.
        latents: scaled latents.
        tiling: cut every image this way whatever its size; by size when absent.
    """
    plain = plain_latents(vae, latents).to(vae.dtype)
    height, width = plain.shape[-2:]
    if tiling is not None or max(height, width) > WHOLE_LATENTS:
        return decode_tiled(vae, plain, tiling or DecodeTiling())
    together = max(PIXELS_PER_CALL // (height * width), 1)
    return torch.cat([vae.decode(rows).sample.float().clamp(-1, 1) for rows in plain.split(together)])
