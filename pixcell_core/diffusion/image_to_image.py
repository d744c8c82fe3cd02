"""Image-to-image: encode a given image, noise it part of the way, and let the sampler finish (SDEdit, Meng et al. 2022).

Legend: B images, C latent channels, h w latent pixels, H W image pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from pixcell_core.errors import BadInputError


def image_tensor(image: Any) -> torch.Tensor:
    """A picture, a list of pictures, or a tensor (B, 3, H, W) in [-1, 1], as such a tensor, float32.

    Raises:
        BadInputError: pictures of different sizes, or a tensor of another shape or range.
    """
    if isinstance(image, Image.Image):
        image = [image]
    if isinstance(image, Sequence):
        sizes = {picture.size for picture in image}
        if len(sizes) != 1:
            raise BadInputError(
                f"The given images have {len(sizes)} different sizes, expected one.",
                hint="Crop the images to one size first.",
                code="init-image-size",
            )
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in image])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    tensor = torch.as_tensor(image)
    if tensor.ndim != 4 or tensor.shape[1] != 3 or not tensor.is_floating_point():
        raise BadInputError(
            f"The given image is a {tensor.dtype} tensor of shape {tuple(tensor.shape)}, "
            "expected floats (images, 3, height, width).",
            hint="Give pictures, or a float tensor in [-1, 1].",
            code="init-image-shape",
        )
    if not bool((tensor.abs() <= 1.0 + 1e-3).all()):
        raise BadInputError(
            f"The given image holds values up to {float(tensor.abs().max()):g}, expected [-1, 1].",
            hint="Scale pixels of 0..255 by x / 127.5 - 1.",
            code="init-image-range",
        )
    return tensor.float()


@torch.inference_mode()
def encode_image(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, C, h, w): (z - shift_factor) * scaling_factor.

    The most likely latent is taken, so that the result does not depend on a draw.
    """
    weight = next(iter(vae.parameters()))
    encoded = vae.encode(images.to(weight.device, weight.dtype))
    plain = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    config = vae.config
    scaled: torch.Tensor = (plain.float() - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]
    return scaled


def start_index(num_inference_steps: int, strength: float) -> int:
    """The first step that is run at a strength in (0, 1]: the last floor(steps * strength) are, at least one."""
    run = math.floor(num_inference_steps * strength + 1e-9)
    return num_inference_steps - min(max(run, 1), num_inference_steps)


def noisy_start(
    scheduler: Any, clean: torch.Tensor, noise: torch.Tensor, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents at the step a strength begins with, and the timesteps left to run.

    Args:
        scheduler: a sampler whose timesteps are set; it is told where the run begins.
        clean: scaled latents (B, C, h, w) of the given images.
        noise: unit Gaussian of the same shape.
        strength: in (0, 1].
    """
    first = start_index(len(scheduler.timesteps), strength)
    left = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.add_noise(clean, noise, left[:1].expand(len(clean))), left
