"""Sheets of samples during a training: the averaged weights draw a few tiles into one PNG, always the same ones.

The drawing is a callable, so that a training needs no autoencoder; without one the latents themselves are shown.
Legend: B tiles, C latent channels, h w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pixcell_core.diffusion import default_scheduler
from pixcell_core.models import PixCellTransformer2DModel

Draw = Callable[[PixCellTransformer2DModel], torch.Tensor]
"""From a model to images (B, 3, H, W) in [-1, 1]."""


class SampleSheet:
    """Writes `sheet-<step>.png` every `every` steps."""

    def __init__(self, folder: Path, every: int, draw: Draw) -> None:
        self._folder, self._every, self._draw = folder, every, draw

    def due(self, step: int) -> bool:
        """Whether a sheet belongs to this step."""
        return self._every > 0 and step % self._every == 0

    def write(self, step: int, model: PixCellTransformer2DModel) -> Path:
        """Draw with `model`, leave it in the mode it was in, and write the sheet beside its place first."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                images = self._draw(model)
        finally:
            model.train(training)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"sheet-{step:08d}.png"
        partial = path.with_suffix(".partial")
        Image.fromarray(grid(images)).save(partial, format="PNG")
        partial.replace(path)
        return path


def grid(images: torch.Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] as one uint8 picture, row by row on a nearly square grid."""
    count, _, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    shown = ((images.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    for i, image in enumerate(shown.permute(0, 2, 3, 1).numpy()):
        y, x = (i // columns) * height, (i % columns) * width
        sheet[y : y + height, x : x + width] = image
    return sheet


def latent_preview(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as images (B, 3, h, w): three channels, each stretched over [-1, 1] by 2 deviations."""
    three = latents[:, :3].float()
    mean, deviation = three.mean((0, 2, 3), keepdim=True), three.std((0, 2, 3), keepdim=True)
    return ((three - mean) / (2 * deviation).clamp(min=1e-6)).clamp(-1, 1)


def sampling_draw(
    condition: torch.Tensor,
    *,
    seed: int,
    decode: Callable[[torch.Tensor], torch.Tensor] = latent_preview,
    num_inference_steps: int = 12,
    guidance_scale: float = 2.0,
) -> Draw:
    """A drawing of one tile per condition (B, n, d) with DPM-Solver++; `decode` takes scaled latents to images."""

    def draw(model: PixCellTransformer2DModel) -> torch.Tensor:
        side, channels = int(model.config["sample_size"]), int(model.config["in_channels"])
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(len(condition), channels, side, side, generator=generator).to(model.device)
        null = model.unconditional(len(condition)).to(model.device, torch.float32)
        both = torch.cat([null, condition.to(model.device, torch.float32)])
        scheduler: Any = default_scheduler()
        scheduler.set_timesteps(num_inference_steps)
        for timestep in scheduler.timesteps:
            times = timestep.to(model.device)
            found = model(torch.cat([latents] * 2), both, times, return_dict=False)[0][:, :channels].float()
            without, given = found.chunk(2)
            noise = without + guidance_scale * (given - without)
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return decode(latents)

    return draw
