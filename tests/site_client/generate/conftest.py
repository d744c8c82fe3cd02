"""A site with a small feature store, and a tiny random transformer that fits its embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.training.feature_store import FeatureStoreWriter
from site_client.generate.request import GenerationRequest

PATIENTS = tuple(f"secret-patient-{name}" for name in ("ada", "bea", "cleo", "dora", "eve"))
LABELS = ("stroma", "tumour")
WIDTH = 8


def fill_store(folder: Path, patients: tuple[str, ...] = PATIENTS, tiles: int = 4) -> None:
    """Random embeddings; tiles alternate between two labels."""
    writer = FeatureStoreWriter(folder, {"part": "train", "tile_size": 64, "mpp": 1.0})
    generator = torch.Generator().manual_seed(3)
    for patient in patients:
        rows: list[dict[str, Any]] = [
            {"tile": f"hidden-tile-{patient[-4:]}-{i}", "slide": "hidden-slide", "label": LABELS[i % 2]}
            for i in range(tiles)
        ]
        writer.add(
            patient,
            rows,
            pixels=torch.zeros(tiles, 3, 64, 64, dtype=torch.uint8),
            embeddings=torch.randn(tiles, 1, WIDTH, generator=generator),
        )
    writer.close()


def tiny_base(folder: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    PixCellTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=WIDTH,
    ).save_pretrained(str(folder))
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    fill_store(tmp_path / "site" / "features" / "train")
    return tmp_path / "site"


@pytest.fixture
def ask(site: Path, tmp_path: Path) -> Callable[..., GenerationRequest]:
    """A request with quick settings; keywords replace some of them."""
    plain = GenerationRequest(
        site_dir=site,
        out=tmp_path / "surrogates",
        count=6,
        adapter=None,
        base=tiny_base(tmp_path / "tiny"),
        study=None,
        policy=None,
        blend_k=None,
        guidance_scale=2.0,
        num_inference_steps=2,
        batch_size=4,
        seed=11,
        device="cpu",
        threads=1,
    )
    return lambda **changes: replace(plain, **changes)
