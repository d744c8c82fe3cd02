"""The shipped weights: small, half precision on disk, float32 in memory; absent or damaged ones are input errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixcell_core.errors import BadInputError
from pixcell_core.models import PixCellTransformer2DModel, TileEncoder
from pixcell_core.starter import (
    STARTER,
    load_autoencoder,
    load_encoder,
    load_transformer,
    starter_digest,
)
from pixcell_core.starter.weights import load_folder, save_folder, weights_digest

LOADERS: dict[str, Callable[..., Any]] = {
    "autoencoder": load_autoencoder,
    "encoder": load_encoder,
    "transformer": load_transformer,
}
MOST_BYTES = 30_000_000


def test_all_shipped_weights_together_are_small() -> None:
    files = [p for p in STARTER.rglob("*") if p.is_file()]
    assert {p.parent.name for p in files if p.suffix == ".safetensors"} == set(LOADERS)
    assert sum(p.stat().st_size for p in files) <= MOST_BYTES
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md"}, "no pickles are shipped"


@pytest.mark.parametrize("kind", LOADERS)
def test_half_precision_on_disk_float32_frozen_and_in_evaluation_in_memory(kind: str) -> None:
    (weights,) = (STARTER / kind).glob("*.safetensors")
    with safe_open(weights, framework="pt") as handle:
        kinds = {name: handle.get_tensor(name).dtype for name in handle.keys()}  # noqa: SIM118
    assert {d for d in kinds.values() if d.is_floating_point} == {torch.float16}
    model = LOADERS[kind]()
    floating = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    assert floating and all(t.dtype == torch.float32 for t in floating)
    assert all(torch.isfinite(t).all() for t in floating)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert starter_digest(kind).startswith("sha256:")


@pytest.mark.parametrize("kind", LOADERS)
def test_no_path_of_a_machine_is_shipped(kind: str) -> None:
    config = json.loads((STARTER / kind / "config.json").read_text())
    assert not [v for v in config.values() if isinstance(v, str) and v.startswith(("/", "~", "C:\\"))]


def test_the_three_models_fit_together() -> None:
    encoder, transformer, autoencoder = load_encoder(), load_transformer(), load_autoencoder()
    pixels = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    embedding = encoder.encode(pixels)
    latents = autoencoder.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    assert latents.shape == (2, 16, 16, 16)
    with torch.no_grad():
        output = transformer(latents, embedding, torch.tensor([10, 900]), return_dict=False)[0]
    assert output.shape == (2, 32, 16, 16) and torch.isfinite(output).all()
    assert int(transformer.config["sample_size"]) == 16, "tiles of 128 px"


@pytest.mark.parametrize("kind", LOADERS)
def test_missing_or_damaged_weights_are_input_errors(kind: str, tmp_path: Path) -> None:
    def code() -> str | None:
        with pytest.raises(BadInputError) as refused:
            LOADERS[kind](tmp_path)
        assert refused.value.hint
        return refused.value.code

    assert code() == "weights-missing"
    shutil.copytree(STARTER / kind, tmp_path / kind)
    (weights,) = (tmp_path / kind).glob("*.safetensors")
    weights.rename(tmp_path / "kept")
    assert code() == "weights-missing", "a configuration alone is no model"
    weights.write_bytes((tmp_path / "kept").read_bytes()[:1000])
    assert code() == "weights-damaged"
    weights.write_bytes((tmp_path / "kept").read_bytes())
    LOADERS[kind](tmp_path)
    (tmp_path / kind / "config.json").write_text("{")
    assert code() == "weights-damaged"


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(BadInputError):
        load_folder(TileEncoder, STARTER / "nothing")
    with pytest.raises(BadInputError) as refused:
        load_folder(TileEncoder, STARTER / "transformer")
    assert refused.value.code == "weights-damaged"


def test_tensors_that_are_missing_are_never_left_at_their_random_start(tmp_path: Path) -> None:
    shutil.copytree(STARTER / "encoder", tmp_path / "encoder")
    (weights,) = (tmp_path / "encoder").glob("*.safetensors")
    tensors = load_file(weights)
    tensors.pop("stem.1.weight")
    save_file(tensors, weights)
    with pytest.raises(BadInputError) as refused:
        load_encoder(tmp_path)
    assert refused.value.code == "weights-damaged"


def test_saving_replaces_the_folder_and_the_digest_follows_content_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PixCellTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, caption_channels=8
    )
    save_folder(model, tmp_path / "a" / "m")
    (tmp_path / "a" / "m" / "stale.safetensors").write_bytes(b"old")
    save_folder(model, tmp_path / "a" / "m")
    assert not (tmp_path / "a" / "m" / "stale.safetensors").exists()
    again = load_folder(PixCellTransformer2DModel, tmp_path / "a" / "m")
    save_folder(again, tmp_path / "b")
    digest = weights_digest(tmp_path / "a" / "m")
    assert weights_digest(tmp_path / "b") == digest
    (tmp_path / "b" / "README.md").write_text("words")
    assert weights_digest(tmp_path / "b") == digest, "a card is no weight"
    with torch.no_grad():
        again.scale_shift_table[0, 0] += 1e-3
    save_folder(again, tmp_path / "b")
    assert weights_digest(tmp_path / "b") != digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"], "nothing half is left"
