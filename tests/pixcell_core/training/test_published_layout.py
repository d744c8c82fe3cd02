"""The published layout: read as laid out by hand, written and converted back and forth, hostile and torn files named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel
from pixcell_core.starter import STARTER
from pixcell_core.training import published_layout
from pixcell_core.training.feature_store import FeatureStore, FeatureStoreWriter, shard_name
from pixcell_core.training.layout_conversion import layout_to_store, store_to_layout
from pixcell_core.training.published_layout import METADATA, TRIES, PublishedLayout, PublishedLayoutWriter
from pixcell_core.training.settings import TrainingSettings
from pixcell_core.training.tile_sources import EncodedTiles, StoreTiles
from pixcell_core.training.trainer import Trainer

NAMES = {
    "gtex_1024": [b"g/0", b"g/1"],
    "tcga_1024": [b"slide a/x1.jpeg", b"slide a/x2.jpeg", b"slide b/x3.jpeg"],
}
"""As published: bytes, one key per source; the first source here has no suffix."""

ORDER = ["g/0", "g/1", "slide a/x1", "slide a/x2", "slide b/x3"]


def by_hand(root: Path, names: dict[str, list[bytes]] | None = None, side: int = 8, tokens: int = 16) -> Path:
    """A folder in the layout written without our code; tile i holds i in its mean, i + 0.5 in its deviation."""
    (root / METADATA).parent.mkdir(parents=True)
    with h5py.File(root / METADATA, "w") as file:
        for key, values in (names or NAMES).items():
            file[key] = values
        file["small_256"] = [b"not/for/us"]
    for i, name in enumerate(ORDER):
        place = root / "features" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.arange(side * side).reshape(side, side) / 64
        latents = np.stack([pixels + i] * 16 + [pixels + i + 0.5] * 16).astype(np.float16)
        np.save(f"{place}_sd3_vae.npy", latents)
        np.save(f"{place}_uni.npy", (np.arange(tokens * 6).reshape(tokens, 6) / 8 + i).astype(np.float16))
    return root


def test_it_reads_what_was_laid_out_by_hand(tmp_path: Path) -> None:
    layout = PublishedLayout(by_hand(tmp_path))
    assert len(layout) == layout.tiles == 5
    assert [layout.name(i) for i in range(5)] == ORDER, "sources by name, other tile sizes left out"
    for i in range(5):
        found = layout.features(i)
        assert found.mean.shape == found.std.shape == (16, 8, 8) and found.embedding.shape == (16, 6)
        assert found.mean[0, 0, 0].item() == i and found.std[15, 0, 0].item() == i + 0.5
        assert found.embedding[0, 0].item() == i
    assert layout.scaling == {"shift_factor": 0.0609, "scaling_factor": 1.5305}
    assert (layout.replaced, layout.unreadable) == (0, {})


@pytest.mark.parametrize(("factor", "tokens"), [(2, 16), (4, 16), (2, 4)])
def test_crops_of_files_are_the_blocks_of_the_whole(tmp_path: Path, factor: int, tokens: int) -> None:
    root = by_hand(tmp_path, tokens=tokens)
    whole, cropped = PublishedLayout(root).features(3), PublishedLayout(root, factor=factor)
    assert len(cropped) == 5 * factor**2
    side, grid = 8 // factor, int(tokens**0.5) // factor
    tokens_whole = whole.embedding.view(grid * factor, grid * factor, 6)
    for k in range(factor**2):
        row, column = divmod(k, factor)
        found = cropped.features(3 * factor**2 + k)
        y, x = row * side, column * side
        assert torch.equal(found.mean, whole.mean[:, y : y + side, x : x + side])
        assert torch.equal(found.std, whole.std[:, y : y + side, x : x + side])
        block = tokens_whole[row * grid : (row + 1) * grid, column * grid : (column + 1) * grid]
        assert torch.equal(found.embedding, block.reshape(-1, 6))


def test_files_are_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, seen, load = by_hand(tmp_path), [], np.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        seen.append((isinstance(found, np.memmap), kwargs.get("allow_pickle")))
        return found

    monkeypatch.setattr(published_layout.np, "load", watched)
    PublishedLayout(root, factor=4).features(7)
    assert seen and set(seen) == {(True, False)}


@pytest.mark.parametrize(
    "name",
    [
        b"../secret",
        b"a/../../secret",
        b"/etc/passwd",
        b"a//b",
        b"",
        b"a\\..\\b",
        b"./a",
        b"a/\xff\xfe",
        b"..",
        b"a/./b",
    ],
)
def test_a_path_out_of_the_folder_is_refused_and_never_opened(
    tmp_path: Path, name: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = by_hand(tmp_path / "data")
    with h5py.File(root / METADATA, "r+") as file:
        del file["tcga_1024"]
        file["tcga_1024"] = np.array([b"slide a/x1", name], dtype="S40")
    layout = PublishedLayout(root)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(published_layout.np, "load", never)
    with pytest.raises(BadInputError) as refused:
        layout.features(3)
    assert refused.value.code == "unsafe-path"
    with pytest.raises(BadInputError):
        PublishedLayoutWriter(tmp_path / "out").add(
            "s", name, latents=torch.zeros(2, 1, 1), embedding=torch.zeros(1, 1)  # type: ignore[arg-type]
        )  # fmt: skip


def spoil(path: Path, how: str) -> None:
    if how == "absent":
        path.unlink()
    elif how == "torn":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif how == "shape":
        np.save(path, np.zeros((32, 4, 4), dtype=np.float16))
    elif how == "whole numbers":
        np.save(path, np.zeros((32, 8, 8), dtype=np.int32))
    else:
        array = np.load(path)
        array[..., 0] = np.nan
        np.save(path, array)


@pytest.mark.parametrize(
    "how", ["absent", "torn", "empty", "pickle", "shape", "whole numbers", "not a number"]
)
def test_an_unreadable_tile_is_reported_once_counted_and_replaced_by_the_next(
    tmp_path: Path, how: str
) -> None:
    root, said = by_hand(tmp_path), []
    spoil(root / "features" / "slide a" / "x1_sd3_vae.npy", how)
    spoil(root / "features" / "slide a" / "x2_uni.npy", "absent")
    layout = PublishedLayout(root, on_unreadable=lambda name, reason: said.append(name))
    for _ in range(3):
        assert torch.equal(layout.features(2).mean, layout.features(4).mean)
    assert layout.replaced == 3
    assert said == list(layout.unreadable) == ["slide a/x1", "slide a/x2"]


def test_ten_replacements_are_tried_and_no_more(tmp_path: Path) -> None:
    names = {"s_1024": [b"g/0"] + [b"missing/%d" % i for i in range(TRIES + 5)]}
    layout = PublishedLayout(by_hand(tmp_path, names))
    with pytest.raises(BadInputError) as refused:
        layout.features(1)
    assert refused.value.code == "features-unreadable" and "missing/0" in refused.value.message
    assert len(layout.unreadable) == 1 + TRIES
    assert layout.features(TRIES + 5 + 1 - TRIES).mean[0, 0, 0].item() == 0, (
        "the tenth try succeeds, around the end"
    )


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda root: (root / METADATA).unlink(), "no-published-layout"),
        (lambda root: (root / METADATA).write_bytes(b"no hdf5"), "published-layout-damaged"),
        (lambda root: h5py.File(root / METADATA, "w").close(), "no-tiles"),
        (lambda root: shutil.rmtree(root / "features"), "features-unreadable"),
    ],
)
def test_a_folder_that_is_not_in_the_layout_is_named(tmp_path: Path, break_it: Any, code: str) -> None:
    break_it(by_hand(tmp_path))
    with pytest.raises(BadInputError) as refused:
        PublishedLayout(tmp_path)
    assert refused.value.code == code


def store(path: Path, meta: dict[str, Any]) -> FeatureStore:
    writer = FeatureStoreWriter(path, meta)
    for patient, count in (("Ada", 3), ("Grace", 2)):
        generator = torch.Generator().manual_seed(count)
        rows = [{"tile": f"{patient}{i}", "slide": "s", "x": 0, "y": 0, "level": 0} for i in range(count)]
        writer.add(
            patient,
            rows,
            pixels=torch.zeros(count, 3, 16, 16),
            latents=torch.randn(count, 32, 4, 4, generator=generator),
            embeddings=torch.randn(count, 1, 5, generator=generator),
        )
    writer.close()
    return FeatureStore.open(path)


def test_a_store_becomes_a_layout_and_a_store_again(tmp_path: Path) -> None:
    ours = store(tmp_path / "store", {"shift_factor": 0.25, "scaling_factor": 3.0})
    assert store_to_layout(ours, tmp_path / "layout", source="site") == 5
    with h5py.File(tmp_path / "layout" / METADATA) as file:
        assert list(file) == ["site_1024"] and file["site_1024"].dtype.kind == "S"
    written = np.load(tmp_path / "layout" / "features" / shard_name("Ada") / "000000_sd3_vae.npy")
    assert written.dtype == np.float16 and written.shape == (32, 4, 4)
    everything = "".join(str(p) for p in (tmp_path / "layout").rglob("*"))
    assert "Ada" not in everything and "Grace" not in everything, "no file is named after a patient"
    layout = PublishedLayout(tmp_path / "layout")
    assert layout.scaling == {"shift_factor": 0.25, "scaling_factor": 3.0}
    back = layout_to_store(tmp_path / "layout", tmp_path / "back")
    for patient in ours.patients:
        assert torch.equal(back.latents(shard_name(patient)), ours.latents(patient))
        assert torch.equal(back.embeddings(shard_name(patient)), ours.embeddings(patient))
    named = layout_to_store(tmp_path / "layout", tmp_path / "one", patient_of=lambda name: "everyone")
    assert named.patients == ["everyone"] and len(named.tiles("everyone")) == 5
    assert StoreTiles(named).scaling == layout.scaling


def test_a_damaged_tile_never_gets_into_a_store_as_another_one(tmp_path: Path) -> None:
    root = by_hand(tmp_path / "layout")
    spoil(root / "features" / "g" / "1_uni.npy", "absent")
    with pytest.raises(BadInputError) as refused:
        layout_to_store(root, tmp_path / "store")
    assert refused.value.code == "features-unreadable" and "g/1" in refused.value.message


def test_rows_of_a_store_are_those_of_its_patients_in_order(tmp_path: Path) -> None:
    ours = store(tmp_path / "store", {})
    tiles = StoreTiles(ours)
    assert len(tiles) == 5
    latents = torch.cat([ours.latents(p) for p in ours.patients])
    embeddings = torch.cat([ours.embeddings(p) for p in ours.patients])
    for row in (4, 0, 3, 2, 1):
        found = tiles.features(row)
        assert torch.equal(torch.cat([found.mean, found.std]), latents[row])
        assert torch.equal(found.embedding, embeddings[row])


def test_a_store_says_how_its_latents_are_scaled_or_is_asked(tmp_path: Path) -> None:
    from pixcell_core.starter import starter_digest

    assert (STARTER / "autoencoder").is_dir()
    plain = StoreTiles(store(tmp_path / "a", {})).scaling
    known = StoreTiles(store(tmp_path / "b", {"autoencoder": starter_digest("autoencoder")})).scaling
    assert plain == known and set(plain) == {"shift_factor", "scaling_factor"}
    with pytest.raises(BadInputError) as refused:
        _ = StoreTiles(store(tmp_path / "c", {"autoencoder": "sha256:other"})).scaling
    assert refused.value.code == "scaling-unknown" and "--scaling-factor" in refused.value.hint


def test_a_store_without_latents_or_with_a_torn_shard_is_named(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "holdout", {})
    row = {"tile": "t", "slide": "s", "x": 0, "y": 0, "level": 0}
    writer.add("p", [row], pixels=torch.zeros(1, 3, 4, 4), embeddings=torch.zeros(1, 1, 5))
    writer.close()
    with pytest.raises(BadInputError) as refused:
        StoreTiles(FeatureStore.open(tmp_path / "holdout")).features(0)
    assert refused.value.code == "feature-missing"
    (tmp_path / "holdout" / "shards" / f"{shard_name('p')}.safetensors").write_bytes(b"torn")
    with pytest.raises(BadInputError) as refused:
        StoreTiles(FeatureStore.open(tmp_path / "holdout")).features(0)
    assert refused.value.code == "feature-store-damaged"


def test_training_from_memory_a_store_or_the_layout_is_the_same_training(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    ours = store(tmp_path / "store", {"shift_factor": 0.1, "scaling_factor": 1.5})
    store_to_layout(ours, tmp_path / "layout")
    # The layout lists tiles in the order they were written, patient after patient, as the store does.
    latents = torch.cat([ours.latents(p) for p in ours.patients])
    mean, std = latents.chunk(2, dim=1)
    memory = EncodedTiles(mean, std, torch.cat([ours.embeddings(p) for p in ours.patients]))
    settings = TrainingSettings(steps=3, batch_size=2, shift_factor=0.1, scaling_factor=1.5)
    ends = []
    for source in (memory, StoreTiles(ours), PublishedLayout(tmp_path / "layout")):
        torch.manual_seed(0)
        model = PixCellTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=1,
            cross_attention_dim=8,
            sample_size=4,
            caption_channels=5,
        )
        Trainer(model, source, settings).run(None)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][k], other[k]) for other in ends[1:] for k in ends[0])
