"""Draws surrogate tiles in batches, resumable, each from a seed of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict

from pixcell_core.diffusion import PixCellPipeline
from site_client.generate.conditions import Condition


class GenerationRecord(BaseModel):
    """What a release says about how its tiles were made; holds nothing private."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tiles: int
    tile_size: int
    conditioning_policy: str
    conditioning_promise: str
    guidance_scale: float
    num_inference_steps: int
    base_digest: str
    adapter_digest: str | None
    study_digest: str | None
    labels: dict[str, str | None]
    pixel_digests: dict[str, str]

    def __str__(self) -> str:
        return f"{self.tiles} surrogate tiles of {self.tile_size} px, policy {self.conditioning_policy}"


def file_name(number: int) -> str:
    """Name of a surrogate: a number, never anything derived from a patient."""
    return f"surrogate-{number:06d}.png"


def tile_generator(seed: int, number: int) -> torch.Generator:
    """The random source of one surrogate, so that a tile does not depend on the batch it was drawn in."""
    own = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(own[:8], "big") >> 1)


def save_tile(image: np.ndarray, path: Path) -> None:
    """Write a tile beside its place and rename it there; PNG, pixels only."""
    partial = path.with_suffix(".partial")
    Image.fromarray(image).save(partial, format="PNG", compress_level=3)
    partial.replace(path)


def draw_surrogates(
    pipeline: PixCellPipeline,
    conditions: Sequence[Condition],
    out: Path,
    *,
    seed: int,
    guidance_scale: float,
    num_inference_steps: int,
    latent_size: tuple[int, int],
    batch_size: int = 32,
    on_tiles: Callable[[int], None] = lambda count: None,
) -> None:
    """Draw one tile per condition into `out`; tiles that exist already are kept."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [i for i in range(len(conditions)) if not (out / file_name(i + 1)).exists()]
    on_tiles(len(conditions) - len(missing))
    for start in range(0, len(missing), batch_size):
        rows = missing[start : start + batch_size]
        drawn: Any = pipeline(
            uni_embeds=torch.stack([conditions[i].vector for i in rows]),
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=[tile_generator(seed, i) for i in rows],
            latent_size=latent_size,
            output_type="np",
        )
        for row, image in zip(rows, drawn.images, strict=True):
            save_tile(image, out / file_name(row + 1))
        on_tiles(len(rows))


def contact_sheet(tiles: Sequence[np.ndarray], columns: int = 8, gap: int = 4) -> Image.Image:
    """A sheet of tiles (each (H, W, 3) uint8) for people to look at."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = tile
    return Image.fromarray(sheet)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON record beside its place and rename it there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1, sort_keys=True))
    partial.replace(path)
