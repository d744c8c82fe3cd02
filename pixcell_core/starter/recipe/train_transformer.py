"""Trains the starter's transformer on latents and embeddings of crops of the corpus."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pixcell_core.diffusion import drop_condition, training_loss
from pixcell_core.diffusion.loss import velocity_weight
from pixcell_core.models import PixCellTransformer2DModel, TileAutoencoder, TileEncoder
from pixcell_core.starter.recipe.checkpoint import load_checkpoint, save_checkpoint
from pixcell_core.starter.recipe.corpus import RealTile, random_crop
from pixcell_core.starter.recipe.train_autoencoder import to_unit
from pixcell_core.training.ema import Ema

# A short training needs the early, noisy steps to count: see `velocity_weight`.
WEIGHT_CAP = 200.0

CONFIG = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 32,
    "num_layers": 8,
    "cross_attention_dim": 192,
    "sample_size": 16,
    "patch_size": 2,
    "caption_channels": 256,
    "caption_num_tokens": 1,
    "interpolation_scale": 0.25,
}


@dataclass(frozen=True)
class LatentCrops:
    """Encoded crops: latent mean and deviation float16 (N, 16, h, w), embeddings float16 (N, 1, d)."""

    mean: torch.Tensor
    std: torch.Tensor
    embedding: torch.Tensor

    def save(self, path: Path) -> None:
        """Keep the crops for a resumed run."""
        torch.save({"mean": self.mean, "std": self.std, "embedding": self.embedding}, path)

    @classmethod
    def load(cls, path: Path) -> LatentCrops:
        """Read crops kept by `save`."""
        return cls(**torch.load(path, weights_only=True))


@torch.inference_mode()
def encode_crops(
    tiles: Sequence[RealTile],
    autoencoder: TileAutoencoder,
    encoder: TileEncoder,
    *,
    count: int,
    size: int,
    seed: int,
    real_share: float = 0.4,
) -> LatentCrops:
    """Encode `count` random crops of `size` px; `real_share` of them from real tiles."""
    rng = np.random.default_rng(seed)
    real = np.array([t.source != "procedural" for t in tiles], dtype=float)
    by_source = {s: sum(t.source == s for t in tiles) for s in {t.source for t in tiles}}
    spread = np.array([1.0 / math.sqrt(by_source[t.source]) for t in tiles])
    weights = spread * real / max((spread * real).sum(), 1e-9) * real_share
    weights += spread * (1 - real) / max((spread * (1 - real)).sum(), 1e-9) * (1 - real_share)
    weights /= weights.sum()
    means, stds, embeddings = [], [], []
    for _ in range(0, count, 64):
        crops: list[np.ndarray] = []
        while len(crops) < 64:
            tile = tiles[int(rng.choice(len(tiles), p=weights))]
            smallest = 0.5 if tile.mpp <= 0.3 else 0.8
            crop = random_crop(rng, tile.pixels, size, smallest_scale=smallest)
            if crop.std() > 12:  # glass teaches nothing
                crops.append(crop)
        images = to_unit(crops)
        with torch.autocast("cpu", torch.bfloat16):
            latent = autoencoder.encode(images).latent_dist
        means.append(latent.mean.half())
        stds.append(latent.std.half())
        embeddings.append(encoder(images).half())
    return LatentCrops(torch.cat(means), torch.cat(stds), torch.cat(embeddings))


def scaled_sample(
    crops: LatentCrops, rows: torch.Tensor, shift: float, scale: float, generator: torch.Generator
) -> torch.Tensor:
    """Draw latents of the chosen rows afresh and scale them."""
    noise = torch.randn(crops.mean[rows].shape, generator=generator)
    drawn: torch.Tensor = crops.mean[rows].float() + crops.std[rows].float() * noise
    return (drawn - shift) * scale


def train_transformer(
    crops: LatentCrops,
    work: Path,
    *,
    scaling: tuple[float, float],
    steps: int,
    batch: int = 64,
    learning_rate: float = 1.5e-3,
    seed: int = 2,
    large: LatentCrops | None = None,
    minutes: float | None = None,
    compiled: bool = False,
) -> PixCellTransformer2DModel:
    """Train (or resume) with the published loss; every eighth step sees `large` crops where they are given.

    `compiled` fuses the element-wise work (twice as fast on a CPU, after minutes of compiling; needs a C++ compiler).
    With `minutes` the learning rate follows the clock rather than the step count, so that the run ends in time.
    """
    torch.manual_seed(seed)
    model = PixCellTransformer2DModel(**CONFIG)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    ema = Ema(model, 0.999)
    start = load_checkpoint(work / "transformer.pt", model, optimizer, ema)
    generator = torch.Generator().manual_seed(seed + start)
    began, smooth = time.monotonic(), 1.0
    null = model.caption_projection.uncond_embedding
    fast: Any = torch.compile(model) if compiled else model
    for step in range(start, steps):
        done = step / steps
        if minutes is not None:
            done = max(done, (time.monotonic() - began) / 60 / minutes)
        if done >= 1:
            break
        rate = (
            learning_rate * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        )
        for part in optimizer.param_groups:
            part["lr"] = rate
        wide = large is not None and step % 8 == 7
        source = large if wide and large is not None else crops
        rows = torch.randint(0, len(source.mean), (batch // 4 if wide else batch,), generator=generator)
        latents = scaled_sample(source, rows, scaling[0], scaling[1], generator)
        condition = drop_condition(source.embedding[rows].float(), null, 0.1, generator)
        timestep = torch.randint(0, 1000, (len(rows),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            network = model if wide else fast
            weight = velocity_weight(timestep, WEIGHT_CAP)
            loss = training_loss(
                network, latents, condition, timestep=timestep, noise=noise, error_weight=weight
            ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        smooth += 0.02 * (loss.item() - smooth)
        if (step + 1) % 100 == 0:
            speed = (step + 1 - start) / (time.monotonic() - began)
            print(
                f"transformer {step + 1}/{steps} loss {smooth:.4f} {speed:.2f} steps/s lr {rate:.1e}",
                flush=True,
            )
            save_checkpoint(work / "transformer.pt", model, optimizer, ema, step + 1)
    ema.copy_to(model)
    return model.eval()
