"""Policies and folders of tiles: what is read, and one clear error for everything that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pixcell_core.training.feature_store import FeatureStoreWriter
from privacy_audit.policy import SHIPPED, PolicyError, load_policy, shipped_policies
from privacy_audit.tiles import StoreTiles, TileError, decode_tile, open_tiles, pixel_digest


def test_shipped_policies_load_and_name_the_source_of_every_number() -> None:
    assert shipped_policies() == ["core", "rehearsal"]
    for line in (SHIPPED / "core.yaml").read_text().splitlines():
        if line.startswith("  ") and any(
            character.isdigit() for character in line.split(":", 1)[-1].split("#")[0]
        ):
            key = line.split(":")[0].strip()
            assert "#" in line or key in EXPLAINED_ABOVE or ":" not in line, f"{key} names no source"


EXPLAINED_ABOVE = {
    "jpeg50", "d4", "exact", "stain", "blur", "noise", "elastic", "shift50", "rot15",  # one comment on `gates`
    "excess_p_review", "power_simulations", "power_permutations", "recoloured_tiles",
}  # fmt: skip


def test_the_digest_follows_values_and_not_comments(tmp_path: Path) -> None:
    text = (SHIPPED / "core.yaml").read_text()
    (tmp_path / "same.yaml").write_text("# another comment\n" + text)
    (tmp_path / "other.yaml").write_text(text.replace("flag_p: 0.001", "flag_p: 0.002"))
    assert load_policy(tmp_path / "same.yaml").digest == load_policy("core").digest
    assert load_policy(tmp_path / "other.yaml").digest != load_policy("core").digest


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (("copies", "flag_q", 0.1), "copies.flag_q", "flag_p"),
        (("self_test", "gates", {"jpeg": 0.9}), "gates", "jpeg50"),
        (("patients", "p_fail", 1.5), "patients.p_fail", "policy show"),
        (("self_test", "gates", {}), "names no kind", "exact"),
    ],
)
def test_a_wrong_key_or_value_is_named(
    tmp_path: Path, change: tuple[str, str, object], message: str, hint: str
) -> None:
    value = yaml.safe_load((SHIPPED / "core.yaml").read_text())
    section, key, new = change
    value[section][key] = new
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(value))
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert message in caught.value.message and hint in caught.value.hint
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00", ""])
def test_what_is_no_policy_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError):
        load_policy(path)
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path / "absent.yaml")


def save(path: Path, side: int = 40, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_the_patient_is_the_first_folder_or_a_column(tmp_path: Path) -> None:
    save(tmp_path / "a" / "p1" / "deep" / "0.png")
    save(tmp_path / "a" / "p2" / "0.tif")
    assert list(open_tiles(tmp_path / "a", name="training", needs_patients=True).patients) == ["p1", "p2"]
    save(tmp_path / "b" / "0.png")
    with pytest.raises(TileError, match="have no patient"):
        open_tiles(tmp_path / "b", name="training", needs_patients=True)
    (tmp_path / "b" / "tiles.csv").write_text("file,patient,label,site\n0.png,p9,tumour,north\n")
    source = open_tiles(tmp_path / "b", name="training", needs_patients=True)
    assert (list(source.patients), list(source.strata)) == (["p9"], ["tumour|north"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,patient\nabsent.png,p\n", "not in the folder"),
        ("file,patient\n../secret.png,p\n", "not in the folder"),
        ("file,person\n0.png,p\n", "unknown column"),
        ("patient\np\n", "no column"),
        ("file,patient\n0.png,p\n0.png,p\n", "twice"),
        ("file,patient\n", "without a row"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, table: str, message: str) -> None:
    folder = tmp_path / "tiles"
    save(folder / "0.png")
    save(tmp_path / "secret.png")
    (folder / "tiles.csv").write_text(table)
    with pytest.raises(TileError, match=message):
        open_tiles(folder, name="training", needs_patients=True)


def test_broken_tiles_are_named(tmp_path: Path) -> None:
    save(tmp_path / "whole.png", 64)
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    save(tmp_path / "small.png", 16)
    for name in ("cut.png", "empty.png", "text.png", "small.png"):
        with pytest.raises(TileError, match=name):
            decode_tile(tmp_path / name)


def test_an_image_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (4_200, 4_200)).save(tmp_path / "bomb.png")
    with pytest.raises(TileError, match=r"bomb.png"):
        decode_tile(tmp_path / "bomb.png")


def test_mixed_sizes_and_empty_folders_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "mixed" / "0.png", 40)
    save(tmp_path / "mixed" / "1.png", 48)
    source = open_tiles(tmp_path / "mixed", name="synthetic", needs_patients=False)
    with pytest.raises(TileError, match="differ in size"):
        source.read(0, 2)
    (tmp_path / "none").mkdir()
    with pytest.raises(TileError, match="no tiles"):
        open_tiles(tmp_path / "none", name="synthetic", needs_patients=False)
    with pytest.raises(TileError, match="does not exist"):
        open_tiles(tmp_path / "nowhere", name="synthetic", needs_patients=False)


def test_a_feature_store_reads_like_a_folder(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "store", {"tile_size": 40})
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 255, (3, 40, 40, 3), dtype=np.uint8) for name in ("b", "a")}
    for name, tiles in pixels.items():
        rows = [
            {"tile": f"{name}-{i}", "slide": name, "label": "tumour" if name == "a" else None}
            for i in range(3)
        ]
        writer.add(name, rows, pixels=torch.from_numpy(tiles).permute(0, 3, 1, 2))
    writer.close()
    source = open_tiles(tmp_path / "store", name="training", needs_patients=True)
    assert isinstance(source, StoreTiles)
    assert list(source.patients) == ["a"] * 3 + ["b"] * 3
    assert list(source.strata) == ["tumour"] * 3 + [""] * 3
    across = source.read(2, 5)  # the last of a, the first two of b
    assert torch.equal(
        across, torch.from_numpy(np.concatenate([pixels["a"][2:], pixels["b"][:2]])).permute(0, 3, 1, 2)
    )
    assert source.file_digests()[0] == pixel_digest(pixels["a"][0])
