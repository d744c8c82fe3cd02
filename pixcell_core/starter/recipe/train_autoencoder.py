"""Trains the starter's autoencoder: L1 + L2 on crops, a light pull of the latents towards a unit Gaussian."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pixcell_core.models.autoencoder import TileAutoencoder
from pixcell_core.starter.recipe.checkpoint import load_checkpoint, save_checkpoint
from pixcell_core.starter.recipe.corpus import RealTile, random_crop
from pixcell_core.training.ema import Ema

KL_WEIGHT = 5e-5


def to_unit(crops: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 crops (H, W, 3) to a float batch (B, 3, H, W) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    return batch.float().div_(127.5).sub_(1.0)


def psnr(model: TileAutoencoder, tiles: Sequence[RealTile], size: int = 128) -> dict[str, float]:
    """Mean peak signal-to-noise ratio in dB (images on [0, 255]) per source, over the central crop of each tile."""
    scores: dict[str, list[float]] = {}
    for tile in tiles:
        y, x = ((s - size) // 2 for s in tile.pixels.shape[:2])
        image = to_unit([tile.pixels[y : y + size, x : x + size]])
        with torch.inference_mode():
            shown = ((model(image).clamp(-1, 1) + 1) * 127.5).round()
        error = F.mse_loss(shown, (image + 1) * 127.5)
        scores.setdefault(tile.group, []).append(float(10 * torch.log10(255.0**2 / error)))
    means = {group: float(np.mean(values)) for group, values in scores.items()}
    return {**means, "mean over tiles": float(np.mean([v for values in scores.values() for v in values]))}


def train_autoencoder(
    tiles: Sequence[RealTile],
    held_out: Sequence[RealTile],
    work: Path,
    *,
    steps: int,
    batch: int = 32,
    crop: int = 64,
    learning_rate: float = 1.2e-3,
    seed: int = 0,
) -> TileAutoencoder:
    """Train (or resume) and return the averaged model."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = TileAutoencoder()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    ema = Ema(model, 0.998)
    start = load_checkpoint(work / "autoencoder.pt", model, optimizer, ema)
    weights = (
        np.array([1.0 / math.sqrt(sum(t.source == s.source for s in tiles)) for t in tiles])
        if tiles
        else None
    )
    assert weights is not None
    weights /= weights.sum()
    began = time.monotonic()
    for step in range(start, steps):
        warm, left = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * step / steps))
        for part in optimizer.param_groups:
            part["lr"] = learning_rate * warm * (0.01 + 0.99 * left)
        chosen = rng.choice(len(tiles), size=batch, p=weights)
        images = to_unit([random_crop(rng, tiles[i].pixels, crop, smallest_scale=0.5) for i in chosen])
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.encode(images).latent_dist
            shown = model.decode(latent.sample()).sample
        error = shown.float() - images
        loss = error.abs().mean() + error.pow(2).mean() * 2 + KL_WEIGHT * latent.kl().float().mean() * 16
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        if (step + 1) % 250 == 0:
            with ema.swapped_into(model):
                quality = psnr(model, held_out[:: max(1, len(held_out) // 60)])
            rate = (step + 1 - start) / (time.monotonic() - began)
            print(
                f"autoencoder {step + 1}/{steps} loss {loss.item():.4f} {rate:.2f} steps/s {quality}",
                flush=True,
            )
            save_checkpoint(work / "autoencoder.pt", model, optimizer, ema, step + 1)
    ema.copy_to(model)
    return model
