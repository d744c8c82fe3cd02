"""Trains the starter's tile encoder without labels: two views of one tile attract, views of other tiles repel.

The views differ in place, scale, orientation, stain and sharpness, so that what remains is tissue rather than
scanner or dye (contrastive loss NT-Xent: Chen et al. 2020, SimCLR, equation 1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pixcell_core.models.tile_encoder import TileEncoder
from pixcell_core.starter.recipe.checkpoint import load_checkpoint, save_checkpoint
from pixcell_core.starter.recipe.corpus import RealTile, random_crop
from pixcell_core.starter.recipe.train_autoencoder import to_unit
from pixcell_core.training.ema import Ema

# Ruifrok & Johnston 2001: optical density directions of haematoxylin, eosin and a residual.
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def jitter_stain(images: torch.Tensor, strength: float = 0.25) -> torch.Tensor:
    """Scale and shift the stain concentrations of each image, in optical density. Images (B, 3, H, W) in [-1, 1]."""
    count = len(images)
    density = -torch.log(((images + 1) / 2).clamp(1 / 255, 1.0))
    amounts = torch.einsum("bchw,cs->bshw", density, torch.linalg.inv(STAINS))
    scale = 1 + strength * (2 * torch.rand(count, 3, 1, 1) - 1) * 1.6
    shift = strength * 0.3 * (2 * torch.rand(count, 3, 1, 1) - 1)
    tilt = STAINS + 0.06 * torch.randn(count, 3, 3)
    mixed = torch.einsum(
        "bshw,bsc->bchw", amounts * scale + shift * density.mean((1, 2, 3), keepdim=True), tilt
    )
    return torch.exp(-mixed.clamp(min=0)).mul(2).sub(1)


def soften(images: torch.Tensor) -> torch.Tensor:
    """Blur half of the images a little."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    share = torch.rand(len(images), 1, 1, 1) * (torch.rand(len(images), 1, 1, 1) < 0.5)
    return images + share * (blurred - images)


def contrastive_loss(projections: torch.Tensor, temperature: float = 0.15) -> torch.Tensor:
    """NT-Xent over (2B, d) projections whose rows i and i + B are views of one tile."""
    unit = F.normalize(projections, dim=1)
    logits = unit @ unit.T / temperature
    logits.fill_diagonal_(-1e4)
    half = len(unit) // 2
    partner = torch.arange(len(unit)).roll(half)
    return F.cross_entropy(logits, partner)


@torch.inference_mode()
def fit_whitening(
    model: TileEncoder, tiles: Sequence[RealTile], rng: np.random.Generator, size: int = 128
) -> None:
    """Fit centre and whitening projection (principal components, shrunk) on crops of the training tiles."""
    model.eval()
    rows = []
    for start in range(0, len(tiles), 64):
        crops = [random_crop(rng, t.pixels, size) for t in tiles[start : start + 64]]
        rows.append(model.features(to_unit(crops)))
    features = torch.cat(rows).double()
    centre = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((features - centre).T))
    keep = int(model.config["embedding_dim"])
    values, vectors = values[-keep:].flip(0), vectors[:, -keep:].flip(1)
    floor = values[0] * 1e-3
    model.centre.copy_(centre.float())
    # A softened whitening: strong directions keep some of their weight, noise directions are not blown up.
    model.whiten.copy_((vectors / (values + floor).pow(0.35)).float())
    spread = ((features - centre) @ model.whiten.double()).pow(2).mean().sqrt()
    model.whiten.div_(spread.float())


def train_encoder(
    tiles: Sequence[RealTile],
    work: Path,
    *,
    steps: int,
    batch: int = 96,
    crop: int = 96,
    learning_rate: float = 1e-3,
    seed: int = 1,
) -> TileEncoder:
    """Train (or resume) and return the averaged encoder with its whitening fitted."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder = TileEncoder()
    head = nn.Sequential(
        nn.Linear(encoder.feature_dim, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
    )
    both = nn.ModuleDict({"encoder": encoder, "head": head})
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(both.parameters(), lr=learning_rate, weight_decay=1e-2)
    ema = Ema(both, 0.99)
    start = load_checkpoint(work / "encoder.pt", both, optimizer, ema)
    weights = np.array([1.0 / math.sqrt(sum(t.source == s.source for s in tiles)) for t in tiles])
    weights /= weights.sum()
    began = time.monotonic()
    both.train()
    for step in range(start, steps):
        warm, left = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
        for part in optimizer.param_groups:
            part["lr"] = learning_rate * warm * (0.02 + 0.98 * left)
        chosen = rng.choice(len(tiles), size=batch, replace=len(tiles) < batch, p=weights)
        views = [
            random_crop(rng, tiles[i].pixels, crop, smallest_scale=0.6) for _ in range(2) for i in chosen
        ]
        images = soften(jitter_stain(to_unit(views))).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder.features(images)
            projections = head(features)
        loss = contrastive_loss(projections.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update(both)
        if (step + 1) % 50 == 0:
            rate = (step + 1 - start) / (time.monotonic() - began)
            print(f"encoder {step + 1}/{steps} loss {loss.item():.3f} {rate:.2f} steps/s", flush=True)
            save_checkpoint(work / "encoder.pt", both, optimizer, ema, step + 1)
    ema.copy_to(both)
    settle_batch_norm(encoder, tiles, rng, crop)
    fit_whitening(encoder, tiles, rng)
    return encoder


@torch.no_grad()
def settle_batch_norm(
    encoder: TileEncoder, tiles: Sequence[RealTile], rng: np.random.Generator, crop: int
) -> None:
    """Measure the batch statistics again for the averaged weights, on unjittered crops."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    encoder.train()
    for _ in range(20):
        chosen = rng.choice(len(tiles), size=64, replace=len(tiles) < 64)
        encoder.features(to_unit([random_crop(rng, tiles[i].pixels, 128) for i in chosen]))
    for norm in norms:
        norm.momentum = 0.1
    encoder.eval()
