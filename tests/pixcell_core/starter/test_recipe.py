"""The recipe's corpus: whole slides and patients are held out, by name and by the real files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter.recipe.checkpoint import load_checkpoint, save_checkpoint
from pixcell_core.starter.recipe.corpus import (
    HELD_OUT,
    SLIDES,
    RealTile,
    _group,
    dihedral,
    draw_procedural,
    random_crop,
    read_real,
    read_tiles,
)
from pixcell_core.starter.recipe.measure import reconstruction_quality
from pixcell_core.starter.recipe.run import save_half
from pixcell_core.starter.recipe.train_encoder import contrastive_loss
from pixcell_core.starter.weights import load_folder
from pixcell_core.training.ema import Ema


@pytest.mark.parametrize(
    ("source", "name", "group"),
    [
        ("camelyon16_40x", "tumor_064_68097_138955.png", "camelyon16_40x/tumor_064"),
        ("camelyon16_40x", "normal_012_1_2.png", "camelyon16_40x/normal_012"),
        ("osteosarcoma_10x", "Case-4-C22-29696-31650_120.jpg", "osteosarcoma_10x/Case-4"),
        ("osteosarcoma_10x", "Case-48-P5-C1-1-2.jpg", "osteosarcoma_10x/P5"),
        ("osteosarcoma_10x", "Case-48-1-2.jpg", "osteosarcoma_10x/Case-48"),
        ("osteosarcoma_10x", "P9-B6-5195-29864_106.jpg", "osteosarcoma_10x/P9"),
        ("orion_crc", "C05_15307.png", "orion_crc/C05"),
        ("oral_oscc_400x", "OSCC_400x_477.jpg", "oral_oscc_400x/unknown"),
    ],
)
def test_groups_are_slides_or_patients(source: str, name: str, group: str) -> None:
    assert _group(source, name) == group
    assert RealTile(source, group, "", 0.5, np.zeros((1, 1, 3), np.uint8)).held_out == (group in HELD_OUT)


def test_a_missing_corpus_is_empty(tmp_path: Path) -> None:
    assert read_real(tmp_path) == []


def _paths(folder: Path) -> Iterator[tuple[str, str, Path]]:
    for path in sorted((folder / "tiles").rglob("*")):
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".tif", ".tiff"}:
            yield path.parent.parent.name, path.name, path


def test_held_out_groups_never_appear_in_training_on_the_real_files(shared_data: Path) -> None:
    """Without the module's own regular expressions: a file of a held-out slide or patient carries its name."""
    marks = {
        "camelyon16_40x": ("tumor_073", "tumor_064"),
        "osteosarcoma_10x": ("P9-", "Case-4-"),
        "orion_crc": ("C05_",),
    }
    tiles = list(read_tiles(shared_data))
    files = list(_paths(shared_data))
    assert len(tiles) == len(files) > 500
    held = {tile.pixels.tobytes() for tile in tiles if tile.held_out}
    train = {tile.pixels.tobytes() for tile in tiles if not tile.held_out}
    assert not held & train, "no image stands on both sides"
    by_name = {
        np.asarray(Image.open(path).convert("RGB")).tobytes()
        for source, name, path in files
        if any(name.startswith(mark) or name.startswith(f"Case-48-{mark}") for mark in marks.get(source, ()))
    }
    assert by_name == held and len(held) > 30
    groups = {tile.group for tile in tiles}
    found = {g for g in HELD_OUT if not g.startswith("slides/")}
    assert found <= groups, "a held-out group that does not exist holds nothing out"
    assert not [t for t in tiles if t.held_out and t.group.endswith("unknown")]


def test_a_patient_of_several_slides_is_on_one_side() -> None:
    """Slides of one patient share their group, so none of them can be trained on while another is measured."""
    assert SLIDES["HER2ST-C6.scn"][0] == SLIDES["dicom_HER2ST-C4"][0] == "HER2ST-C"
    sides = {
        f"slides/{group}" in HELD_OUT for _, (group, _) in SLIDES.items() if group.startswith("HER2ST-C")
    }
    assert len(sides) == 1
    assert {g for g in HELD_OUT if g.startswith("slides/")} <= {f"slides/{g}" for g, _ in SLIDES.values()}


def test_drawn_tissue_is_never_held_out_and_repeatable() -> None:
    one, again = (draw_procedural(3, 64, seed=5) for _ in range(2))
    assert all(not tile.held_out and tile.source == "procedural" for tile in one)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(one, again, strict=True))
    assert len({tile.group for tile in one}) == 3


def test_dihedral_gives_the_eight_symmetries() -> None:
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert len({dihedral(pixels, i).tobytes() for i in range(8)}) == 8
    assert np.array_equal(dihedral(pixels, 0), pixels)


def test_random_crops_have_the_size_asked_for() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
    for smallest in (1.0, 0.5):
        for _ in range(20):
            crop = random_crop(rng, pixels, 48, smallest_scale=smallest)
            assert crop.shape == (48, 48, 3) and crop.dtype == np.uint8


def test_contrastive_loss_is_low_where_views_of_one_tile_agree() -> None:
    torch.manual_seed(0)
    views = torch.randn(8, 16)
    together = contrastive_loss(torch.cat([views, views]))
    apart = contrastive_loss(torch.cat([views, views.roll(1, 0)]))
    chance = contrastive_loss(torch.ones(16, 16))
    assert together < 0.2 < apart
    assert chance.item() == pytest.approx(np.log(15), abs=1e-3), "15 others, one of them right"


def test_reconstruction_quality_is_psnr_by_group() -> None:
    grey = RealTile("s", "s/a", "", 0.5, np.full((40, 40, 3), 100, np.uint8))
    other = RealTile("s", "s/b", "", 0.5, np.full((40, 40, 3), 120, np.uint8))
    found = reconstruction_quality(lambda images: images + 10 / 127.5, [grey, grey, other])
    expected = round(float(10 * np.log10(255**2 / 100)), 2)
    assert found == {"s/a": expected, "s/b": expected, "mean over groups": expected}


def test_checkpoints_of_the_recipe_resume(tmp_path: Path) -> None:
    def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer, Ema]:
        model = torch.nn.Linear(2, 2)
        return model, torch.optim.AdamW(model.parameters()), Ema(model, 0.9)

    one, other = parts(), parts()
    assert load_checkpoint(tmp_path / "c.pt", *one) == 0
    one[0](torch.ones(1, 2)).sum().backward()
    one[1].step()
    one[2].update(one[0])
    save_checkpoint(tmp_path / "deep" / "c.pt", *one, step=7)
    assert load_checkpoint(tmp_path / "deep" / "c.pt", *other) == 7
    assert torch.equal(one[0].weight, other[0].weight) and other[2].updates == 1
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["c.pt"]


def test_weights_are_saved_in_half_precision_and_the_model_goes_on_in_single(tmp_path: Path) -> None:
    model = PixCellTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, caption_channels=8
    )
    save_half(model, tmp_path / "m")
    assert model.scale_shift_table.dtype == torch.float32
    loaded = load_folder(PixCellTransformer2DModel, tmp_path / "m")
    assert torch.equal(loaded.scale_shift_table, model.scale_shift_table)
    size = sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors"))
    assert size < 2.2 * sum(t.numel() for t in model.state_dict().values()) + 20_000
