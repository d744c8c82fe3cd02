"""Measures the starter on real tiles: reconstruction against TAESD3, tissue probes against the named baselines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pixcell_core.evaluation.probes import colour_histogram, probe
from pixcell_core.models import EfficientNetLite, TileEncoder
from pixcell_core.starter.recipe.corpus import RealTile


def _centre(tile: RealTile, size: int) -> torch.Tensor:
    side = min(size, *tile.pixels.shape[:2]) // 16 * 16
    y, x = ((s - side) // 2 for s in tile.pixels.shape[:2])
    return torch.from_numpy(tile.pixels[y : y + side, x : x + side].copy()).permute(2, 0, 1)[None]


def reconstruction_quality(
    reconstruct: Callable[[torch.Tensor], torch.Tensor], tiles: Sequence[RealTile], size: int = 256
) -> dict[str, float]:
    """Mean PSNR in dB per held-out slide or patient, over centre crops; the last entry is the mean of those means."""
    scores: dict[str, list[float]] = defaultdict(list)
    for tile in tiles:
        image = _centre(tile, size).float()
        with torch.inference_mode():
            shown = ((reconstruct(image / 127.5 - 1).clamp(-1, 1) + 1) * 127.5).round()
        scores[tile.group].append(float(10 * torch.log10(255.0**2 / F.mse_loss(shown, image))))
    means = {group: round(float(np.mean(v)), 2) for group, v in sorted(scores.items())}
    return {**means, "mean over groups": round(float(np.mean(list(means.values()))), 2)}


def taesd3(weights: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """TAESD3 as a function on images in [-1, 1], from its safetensors (fp8 weights are widened)."""
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    model: Any = AutoencoderTiny(latent_channels=16)
    model.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    model.eval()
    return lambda images: model.decode(model.encode(images).latents).sample


PROBED = ("crc_val_he_7k", "camelyon16_40x", "oral_oscc_400x", "osteosarcoma_10x", "orion_crc")


def spot_tiles(folder: Path, size: int = 224) -> list[RealTile]:
    """Tiles around the labelled spots (cancer, immune) of the HER2ST slides of two patients."""
    import csv

    import openslide

    listing = folder / "slides" / "her2st_spots.csv"
    if not listing.exists():
        return []
    with listing.open() as handle:
        rows = [r for r in csv.DictReader(handle) if r["label"] in {"cancer", "immune"}]
    slides: dict[str, openslide.OpenSlide] = {}
    tiles = []
    for row in rows:
        path = folder / "slides" / row["slide"]
        if not path.is_file():
            continue
        slide = slides.setdefault(row["slide"], openslide.OpenSlide(str(path)))
        x, y = (round(float(row[k])) - size // 2 for k in ("level0_x", "level0_y"))
        region = slide.read_region((x, y), 0, (size, size)).convert("RGB")
        tiles.append(
            RealTile("her2st_spots", f"her2st/{row['section'][0]}", row["label"], 0.69, np.asarray(region))
        )
    return tiles


def tissue_probes(
    encoder: TileEncoder, eye: EfficientNetLite, tiles: Sequence[RealTile]
) -> dict[str, dict[str, object]]:
    """Probe the starter's embeddings, EfficientNet-Lite0 features and a colour histogram on every labelled set.

    Groups are slides or patients; where a set has none, its tiles stand for themselves and `groups` equals `tiles`.
    """
    by_source: dict[str, list[RealTile]] = defaultdict(list)
    for tile in tiles:
        if tile.source in (*PROBED, "her2st_spots"):
            by_source[tile.source].append(tile)
    table: dict[str, dict[str, object]] = {}
    for source, members in by_source.items():
        pixels = [_centre(t, 512) for t in members]
        with torch.inference_mode():
            features = {
                "starter": torch.cat([encoder.encode(p).flatten(1) for p in pixels]).numpy(),
                "EfficientNet-Lite0": torch.cat([eye.embed(p) for p in pixels]).numpy(),
                "colour histogram": np.stack([colour_histogram(t.pixels) for t in members]),
            }
        known = not all(t.group.endswith("/unknown") for t in members)
        groups = [t.group if known else f"{t.group}/{i}" for i, t in enumerate(members)]
        labels = [t.label for t in members]
        table[source] = {name: asdict(probe(f, labels, groups)) for name, f in features.items()}
    return table
