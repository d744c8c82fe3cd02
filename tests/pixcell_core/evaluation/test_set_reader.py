"""Reading sets: folders with tables, feature stores, feature files; every unusable one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.feature_set import FeatureSet, require_comparable
from pixcell_core.evaluation.set_reader import SetReader
from pixcell_core.evaluation.tile_eye import TileEye, eye_label
from pixcell_core.evaluation.tile_folder import TileFolder
from pixcell_core.evaluation.tile_table import TileTable
from pixcell_core.starter import load_encoder, load_second_eye
from pixcell_core.training.feature_store import FeatureStoreWriter

RNG = np.random.default_rng(0)
TILES = RNG.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)


def folder_of(path: Path, names: list[str]) -> Path:
    for name, pixels in zip(names, TILES, strict=False):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / name)
    return path


def test_a_folder_with_its_table(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "tiles", ["b.png", "deep/a.jpg", "c.png", ".hidden/d.png"])
    (folder / "tiles.csv").write_text(
        "file,patient,label,source,scanner\nb.png,p1,tumour,r1,x\na.jpg,p2,normal,,x\nc.png,p1,tumour,r2,x\n"
    )
    looked: list[int] = []
    found = SetReader(batch_size=2, on_tiles=looked.append).read(folder, "real")
    assert found.names == ("b.png", "c.png", "deep/a.jpg") and found.patients == ("p1", "p1", "p2")
    assert found.labels == ("tumour", "tumour", "normal") and found.sources == ("r1", "r2", "")
    assert found.file_kinds == ("JPEG", "PNG") and found.encoder == "second-eye" and looked == [2, 1]
    expected = load_second_eye().embed(torch.from_numpy(TILES[[0, 2]]).permute(0, 3, 1, 2))
    assert np.allclose(found.features[:2], expected.double().numpy(), atol=1e-5)


def test_surrogates_bring_their_labels_in_the_generation_record(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "surrogates", ["surrogate-000001.png", "surrogate-000002.png"])
    digest = "sha256:" + "1" * 64
    record = {
        "tiles": 2,
        "tile_size": 64,
        "conditioning_policy": "blend",
        "conditioning_promise": "Each follows three patients.",
        "guidance_scale": 2.0,
        "num_inference_steps": 20,
        "base_digest": digest,
        "adapter_digest": None,
        "study_digest": None,
        "labels": {"surrogate-000001.png": "stroma", "surrogate-000002.png": None},
    }
    (folder / "generation.json").write_text(json.dumps(record))
    found = SetReader().read(folder, "synthetic")
    assert found.labels == ("stroma", "") and found.patients == ("", "")
    (folder / "generation.json").write_text(json.dumps(record | {"surprise": 1}))
    with pytest.raises(BadInputError, match="surprise"):
        SetReader().read(folder, "synthetic")


def test_sub_folders_are_patients_without_a_table_and_that_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["p1/x.png", "p1/y.png", "p2/z.png"])
    reader = SetReader("starter")
    found = reader.read(folder, "real")
    assert found.patients == ("p1", "p1", "p2") and found.features.shape == (3, 256)
    assert "2 sub-folders are taken for patients" in reader.notes[0]
    expected = load_encoder().encode(torch.from_numpy(TILES[:3]).permute(0, 3, 1, 2))[:, 0]
    assert np.allclose(found.features, expected.double().numpy(), atol=1e-4)
    table = tmp_path / "table.tsv"
    table.write_text("file\tpatient\nx.png\tq\ny.png\tq\nz.png\tr\n")
    assert reader.read(folder, "real", table).patients == ("q", "q", "r")


def test_tokens_of_a_large_tile_are_averaged_and_labels_name_no_path() -> None:
    large = RNG.integers(0, 256, (2, 256, 512, 3), dtype=np.uint8)
    eye = TileEye("starter")
    halves = [eye.look(np.ascontiguousarray(large[:, :, i : i + 256])) for i in (0, 256)]
    # Processors round float32 differently; the halves themselves differ by tenths.
    assert np.allclose(eye.look(large), (halves[0] + halves[1]) / 2, atol=1e-4)
    assert np.abs(halves[0] - halves[1]).max() > 0.1
    assert eye_label("uni2-h:/home/someone/uni") == "uni2-h:uni" and eye_label("starter") == "starter"
    with pytest.raises(BadInputError, match="a square"):
        eye.look(np.zeros((1, 64, 80, 3), np.uint8))
    for spec, device, code in (
        ("inception", "cpu", "encoder-unknown"),
        ("starter", "tpu", "device-unknown"),
        ("uni2-h", "cpu", "weights-missing"),
    ):
        with pytest.raises(BadInputError) as refused:
            TileEye(spec, device).look(TILES)
        assert refused.value.code == code


def test_a_feature_store_by_pixels_and_by_stored_embeddings(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "store", {"encoder": "starter"})
    stored = torch.from_numpy(RNG.normal(size=(4, 2, 5))).half()
    for patient, rows in (("p1", [0, 1, 2]), ("p2", [3])):
        writer.add(
            patient,
            [{"tile": f"t{i}", "slide": "s", "label": "a" if i else None} for i in rows],
            pixels=torch.from_numpy(TILES[rows]).permute(0, 3, 1, 2),
            embeddings=stored[rows],
        )
    writer.close()
    seen = SetReader("second-eye").read(tmp_path / "store", "real")
    assert seen.patients == ("p1", "p1", "p1", "p2") and seen.labels == ("", "a", "a", "a")
    assert seen.features.shape == (4, 2864) and seen.names == ("t0", "t1", "t2", "t3")
    kept = SetReader("stored").read(tmp_path / "store", "real")
    assert kept.encoder == "stored: starter" and np.allclose(kept.features, stored.double().mean(1).numpy())


def test_feature_files_state_their_encoder(tmp_path: Path) -> None:
    features = RNG.normal(size=(3, 4)).astype(np.float32)
    np.savez(
        tmp_path / "a.npz",
        features=features,
        patients=["x", "y", "y"],
        labels=["t", "n", "t"],
        encoder="uni2-h",
    )
    columns = {k: json.dumps(v) for k, v in {"patients": ["x", "y", "y"], "labels": ["t", "n", "t"]}.items()}
    save_file(
        {"features": torch.from_numpy(features)}, tmp_path / "a.safetensors", {**columns, "encoder": "uni2-h"}
    )
    found = [SetReader().read(tmp_path / name, "real") for name in ("a.npz", "a.safetensors")]
    for one in found:
        assert np.array_equal(one.features, features.astype(np.float64)) and one.encoder == "uni2-h"
        assert one.patients == ("x", "y", "y") and one.labels == ("t", "n", "t")
    assert SetReader("uni2-h:/somewhere/w").read(tmp_path / "a.npz", "real").encoder == "uni2-h:w"
    with pytest.raises(BadInputError, match="starter was asked for"):
        SetReader("starter").read(tmp_path / "a.npz", "real")
    np.savez(tmp_path / "bare.npz", features=np.stack([features, features + 1], axis=1))
    bare = SetReader().read(tmp_path / "bare.npz", "synthetic")
    assert bare.encoder == "not stated" and np.allclose(bare.features, features + 0.5), "tokens are averaged"
    with pytest.raises(BadInputError, match="one encoder is expected"):
        require_comparable(found[0], bare)
    assert SetReader("uni2-h").read(tmp_path / "bare.npz", "synthetic").encoder == "uni2-h"
    pq.write_table(
        pa.table({"file": ["row-0", "row-1", "row-2"], "patient": [1, 2, None]}), tmp_path / "t.parquet"
    )
    assert SetReader().read(tmp_path / "bare.npz", "s", tmp_path / "t.parquet").patients == ("1", "2", "")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def pickled(path: Path) -> Path:
    np.savez(path, features=np.array([{"a": 1}, {"b": 2}], dtype=object))
    return path


def savez(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda d: d / "nowhere", "no-such-set"),
        (lambda d: write(d / "x.bin", "x"), "no-such-set"),
        (lambda d: d, "no-tiles"),
        (lambda d: write(d / "x.npz", "cut short"), "features-unreadable"),
        (lambda d: pickled(d / "x.npz"), "features-unreadable"),
        (lambda d: write(d / "x.safetensors", "cut short"), "features-unreadable"),
        (lambda d: savez(d / "x.npz", other=np.eye(3)), "features-missing"),
        (lambda d: savez(d / "x.npz", features=np.eye(3), patients=["a"]), "column-length"),
        (lambda d: savez(d / "x.npz", features=np.eye(3), names=["a", "b", "a"]), "tile-named-twice"),
        (lambda d: savez(d / "x.npz", features=np.eye(1)), "too-few-rows"),
        (lambda d: savez(d / "x.npz", features=np.full((3, 2), np.nan)), "features-not-finite"),
        (lambda d: write(d / "x.png", "no image").parent, "tile-unreadable"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], Path], code: str) -> None:
    with pytest.raises(BadInputError) as refused:
        SetReader().read(make(tmp_path), "real")
    assert refused.value.code == code and refused.value.hint


def test_tiles_too_small_and_folders_that_are_not_there_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    with pytest.raises(BadInputError, match="16x16 px"):
        list(TileFolder(tmp_path).batches(2))
    with pytest.raises(BadInputError, match="no folder"):
        TileFolder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("patient,label\np,l\n", "table-columns"),
        ("file,site\na.png,s\n", "table-columns"),
        ("", "table-columns"),
        ("file,patient\na.png,p\na.png,q\n", "tile-listed-twice"),
        ("file,patient\nb.png,p\n", "tile-not-listed"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path: Path, text: str, code: str) -> None:
    with pytest.raises(BadInputError) as refused:
        TileTable.read(write(tmp_path / "t.csv", text)).columns_for(["a.png"])
    assert refused.value.code == code


def test_unreadable_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"file,patient\n\xff\xfe\x00")
    for path, code in (
        (tmp_path / "t.csv", "table-unreadable"),
        (write(tmp_path / "t.parquet", "x"), "table-unreadable"),
        (tmp_path / "none.csv", "no-such-table"),
    ):
        with pytest.raises(BadInputError) as refused:
            TileTable.read(path)
        assert refused.value.code == code


def test_a_set_knows_what_is_missing() -> None:
    some = FeatureSet("tiles", np.eye(3), "eye", patients=("a", "", "a"), labels=("x", "y", "x"))
    assert some.patient_count == 1 and not some.knows_patients and len(some) == 3
    assert some.names == ("row-0", "row-1", "row-2")
    some.require_labels()
