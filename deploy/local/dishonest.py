"""The dishonest hospital: real tiles hidden among its surrogates, some of them dressed up.

The demonstration plants them to show that the gate sees them; it also keeps its own record of what it planted, so
that anyone can compare the audit's findings with the truth.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pixcell_core.training.feature_store import FeatureStore
from pixcell_core.trust.tile_png import pixel_digest


def _dress_up(tile: Image.Image, kind: str) -> Image.Image:
    if kind == "jpeg":
        buffer = io.BytesIO()
        tile.save(buffer, format="JPEG", quality=60)
        return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    if kind == "mirrored":
        return ImageOps.mirror(tile)
    if kind == "turned":
        return tile.transpose(Image.Transpose.ROTATE_90)
    return tile


def plant_real_tiles(site_dir: Path, surrogates: Path, count: int, seed: int, record: Path) -> dict[str, str]:
    """Replace `count` surrogates by private tiles of the site; returns which, and how each was dressed up.

    The generator's record is made to fit: it is the site's own file, and a draft refuses tiles that are not in it.
    """
    if record.exists():
        kept: dict[str, str] = json.loads(record.read_text())
        return kept
    rng = np.random.default_rng(seed)
    store = FeatureStore.open(site_dir / "features" / "train")
    names = sorted(p.name for p in surrogates.glob("surrogate-*.png"))
    victims = sorted(names[i] for i in rng.choice(len(names), size=count, replace=False))
    kinds = ("unchanged", "jpeg", "mirrored", "turned")
    planted, digests = {}, {}
    for i, victim in enumerate(victims):
        patient = store.patients[int(rng.integers(len(store.patients)))]
        pixels = store.pixels(patient)
        order = np.argsort([-float(p.float().std()) for p in pixels])
        tile = pixels[int(order[int(rng.integers(max(1, len(order) // 2)))])]
        image = Image.fromarray(tile.permute(1, 2, 0).numpy())
        dressed = _dress_up(image, kinds[i % len(kinds)])
        dressed.save(surrogates / victim, format="PNG")
        digests[victim] = pixel_digest(np.asarray(dressed))
        planted[victim] = kinds[i % len(kinds)]
    generation = surrogates / "generation.json"
    said = json.loads(generation.read_text())
    generation.write_text(json.dumps(said | {"pixel_digests": said["pixel_digests"] | digests}))
    record.write_text(json.dumps(planted, indent=1))
    return planted
