"""How much of a tile an autoencoder keeps: the tile through it and back, PSNR and SSIM per tile.

Both measures compare the 8-bit images a person would see. SSIM: Wang et al., IEEE TIP 13(4), 2004, with its
Gaussian window (11 x 11, deviation 1.5) and constants (0.01, 0.03); the mean over colours and over the places where
the window lies wholly inside the image.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pixcell_core.encoders.protocols import LatentCodec
from pixcell_core.errors import BadInputError

_WINDOW, _DEVIATION = 11, 1.5


def reconstruct(autoencoder: LatentCodec, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 images (B, 3, H, W) through the mean latent and back, uint8 on the CPU."""
    images = autoencoder.to_images(autoencoder.to_latents(pixels))
    return ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).cpu()


def peak_signal_to_noise(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each pair of uint8 images (B, 3, H, W): 10 log10(255^2 / mean squared difference), float64 (B,).

    Equal images have infinity.

    Raises:
        BadInputError: images of different shapes or another type.
    """
    _check(first, second)
    error = (first.double() - second.double()).pow(2).flatten(1).mean(dim=1)
    return 10.0 * torch.log10(255.0**2 / error)


def structural_similarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SSIM of each pair of uint8 images (B, 3, H, W), both sides at least 11 px, float64 (B,), at most 1.

    Raises:
        BadInputError: images of different shapes, another type, or smaller than the window.
    """
    _check(first, second)
    if min(first.shape[2:]) < _WINDOW:
        raise BadInputError(
            f"SSIM got images of {first.shape[2]} x {first.shape[3]} px, expected at least {_WINDOW} px a side.",
            hint="Use larger tiles.",
            code="image-size",
        )
    x, y = first.double(), second.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


def side_by_side(first: torch.Tensor, second: torch.Tensor, gap: int = 4) -> torch.Tensor:
    """One uint8 sheet (3, H', W'): each row an original and what came back, with white gaps between.

    Args:
        first: originals, uint8 (B, 3, H, W).
        second: reconstructions of the same shape.
        gap: white pixels around each image.

    Raises:
        BadInputError: images of different shapes or another type.
    """
    _check(first, second)
    pairs = F.pad(torch.stack([first, second], dim=1), (gap, gap, gap, gap), value=255)
    batch, _, channels, height, width = pairs.shape
    return pairs.permute(2, 0, 3, 1, 4).reshape(channels, batch * height, 2 * width)


def _blur(images: torch.Tensor) -> torch.Tensor:
    places = torch.arange(_WINDOW, dtype=images.dtype) - _WINDOW // 2
    line = torch.exp(-(places**2) / (2 * _DEVIATION**2))
    line = line / line.sum()
    flat = images.flatten(0, 1)[:, None]
    rows = F.conv2d(flat, line[None, None, :, None])
    return F.conv2d(rows, line[None, None, None, :]).unflatten(0, images.shape[:2])[:, :, 0]


def _check(first: torch.Tensor, second: torch.Tensor) -> None:
    for images in (first, second):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape != first.shape:
            raise BadInputError(
                f"Images to compare are {images.dtype} {list(images.shape)}, "
                f"expected torch.uint8 {list(first.shape)} [B, 3, H, W].",
                hint="Compare 8-bit images of one size.",
                code="image-type",
            )
