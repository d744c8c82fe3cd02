"""Public candidates: one digest whatever the container, made from public tiles, refused where they could not serve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pixcell_core.encoders.registry import load_tile_encoder
from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.starter import load_encoder
from pixcell_core.training.feature_store import FeatureStore
from site_client.generate import commands
from site_client.generate.candidates import PublicCandidates, candidates_of_study, procedural_tiles

from .conftest import fill_store


def test_the_same_embeddings_have_one_digest_in_every_container(tmp_path: Path) -> None:
    fill_store(tmp_path / "store")
    store = FeatureStore.open(tmp_path / "store")
    together = torch.cat([store.embeddings(p).float() for p in store.patients])
    np.save(tmp_path / "flat.npy", together[:, 0].numpy())
    np.save(tmp_path / "tokens.npy", together.numpy().astype(np.float64))
    PublicCandidates.of(together, "memory").write(tmp_path / "new" / "c.safetensors")
    places = ("store", "flat.npy", "tokens.npy", "new/c.safetensors")
    read = [PublicCandidates.read(tmp_path / place) for place in places]
    assert len({c.digest for c in read}) == 1
    assert all(torch.equal(c.embeddings, together) for c in read)
    assert PublicCandidates.of(together.flip(0), "x").digest != read[0].digest
    assert PublicCandidates.of(together.reshape(10, 2, 8), "x").digest != read[0].digest, (
        "shape is part of it"
    )


class Trap:
    """What a pickle inside an .npy file would run when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def bad_files(folder: Path) -> dict[str, Path]:
    good = torch.randn(4, 1, 8)
    with_nan = good.clone()
    with_nan[2, 0, 3] = float("nan")
    with_zero = good.clone()
    with_zero[1] = 0
    made: dict[str, Path] = {}
    for name, tensors in {
        "candidates-unreadable": {"pixels": good},
        "candidates-shape": {"embeddings": torch.zeros(4, 1, 2, 2)},
        "candidates-shape whole numbers": {"embeddings": torch.ones(4, 1, 8, dtype=torch.int32)},
        "candidates-shape nothing": {"embeddings": torch.empty(0, 1, 8)},
        "candidates-not-finite": {"embeddings": with_nan},
        "candidates-not-finite zero": {"embeddings": with_zero},
    }.items():
        made[name] = folder / f"{name}.safetensors"
        save_file(tensors, made[name])
    made["candidates-unreadable torn"] = folder / "torn.safetensors"
    made["candidates-unreadable torn"].write_bytes(b"torn")
    made["candidates-unreadable npy"] = folder / "torn.npy"
    made["candidates-unreadable npy"].write_bytes(b"\x93NUMPY")
    made["candidates-unreadable pickle"] = folder / "pickle.npy"
    np.save(
        made["candidates-unreadable pickle"],
        np.array([Trap(folder / "sprung")], dtype=object),
        allow_pickle=True,
    )
    made["candidates-unreadable nowhere"] = folder / "nowhere.safetensors"
    return made


def test_what_cannot_be_voted_for_is_an_input_error(tmp_path: Path) -> None:
    for name, path in bad_files(tmp_path).items():
        with pytest.raises(BadInputError) as refused:
            PublicCandidates.read(path)
        assert refused.value.code == name.split()[0] and refused.value.hint, name
    assert not (tmp_path / "sprung").exists(), "nothing inside a file was run"
    with pytest.raises(BadInputError) as refused:
        PublicCandidates.read(tmp_path)
    assert refused.value.code == "no-feature-store"


def test_a_study_gets_its_own_candidates_or_none(tmp_path: Path) -> None:
    mine = PublicCandidates.of(torch.randn(5, 1, 8), "x")
    mine.write(tmp_path / "c.safetensors")
    wanted = {"wanted_digest": mine.digest, "wanted_count": 5, "private_folder": tmp_path / "features"}

    def code(path: Path | None, **changes: Any) -> str:
        with pytest.raises(PixcellError) as refused:
            candidates_of_study(path, **{**wanted, **changes})
        return refused.value.code

    found = candidates_of_study(tmp_path / "c.safetensors", **wanted)  # type: ignore[arg-type]
    assert found.digest == mine.digest
    assert code(None) == "candidates-missing"
    assert code(tmp_path / "c.safetensors", wanted_count=6) == "too-few-candidates"
    assert code(tmp_path / "c.safetensors", wanted_digest="sha256:" + "0" * 64) == "candidates-differ"
    assert code(tmp_path / "c.safetensors", private_folder=tmp_path) == "candidates-are-private"
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "features" / "train.safetensors")
    assert code(tmp_path / "link.safetensors") == "candidates-are-private", "through a link too"


def test_procedural_tiles_are_public_and_the_same_everywhere() -> None:
    batches = list(procedural_tiles(9, tile_size=32, mpp=1.0, seed=1, batch_size=4))
    assert [tuple(b.shape) for b in batches] == [(4, 3, 32, 32), (4, 3, 32, 32), (1, 3, 32, 32)]
    tiles = torch.cat(batches)
    assert tiles.dtype == torch.uint8 and len({t.numpy().tobytes() for t in tiles}) == 9
    assert torch.equal(tiles, torch.cat(list(procedural_tiles(9, tile_size=32, mpp=1.0, seed=1))))
    assert not torch.equal(tiles, torch.cat(list(procedural_tiles(9, tile_size=32, mpp=1.0, seed=2))))


def call(*arguments: object) -> Any:
    root = typer.Typer()
    commands.register(root)
    return CliRunner().invoke(root, ["site", "candidates", "make", *map(str, arguments), "--format", "json"])


def test_the_command_embeds_as_the_sites_features_are_embedded(tmp_path: Path) -> None:
    out = tmp_path / "drawn.safetensors"
    done = call("--draw", 5, "--tile-size", 64, "--out", out)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["data"]
    read = PublicCandidates.read(out)
    assert (said["candidates"], said["digest"]) == (5, read.digest)
    pixels = torch.cat(list(procedural_tiles(5, tile_size=64, mpp=0.5, seed=0)))
    with torch.inference_mode():
        features = load_encoder().encode(pixels)
    assert torch.allclose(read.embeddings, features, atol=1e-4), "as `site features` would have embedded them"

    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for number, tile in enumerate(pixels):
        Image.fromarray(tile.permute(1, 2, 0).numpy()).save(tiles / f"{number}.png")
    again = call("--tiles", tiles, "--tile-size", 64, "--out", tmp_path / "read.safetensors")
    assert again.exit_code == 0, again.output
    assert torch.allclose(
        PublicCandidates.read(tmp_path / "read.safetensors").embeddings, read.embeddings, atol=1e-5
    )


def test_the_command_refuses(tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    (tmp_path / "empty").mkdir()
    for arguments, code in (
        ((), "candidates-source"),
        (("--draw", 4, "--tiles", tmp_path), "candidates-source"),
        (("--tiles", tmp_path / "empty"), "no-images"),
        (("--tiles", tmp_path / "nowhere"), "no-such-folder"),
        (("--draw", 4, "--encoder", "dream"), "encoder-unknown"),
        (("--draw", 4, "--tile-size", 100), "image-size"),
    ):
        refused = call(*arguments, "--out", out)
        assert refused.exit_code == 4, refused.output
        assert json.loads(refused.stdout)["code"] == code and not out.exists()
    assert load_tile_encoder("starter", tile_size=128).tokens(256, 128) == 2
