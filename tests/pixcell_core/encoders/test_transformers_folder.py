"""DINOv2-style folders: class token of the library's own model, its preprocessing file, and folders of other kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from pixcell_core.encoders import load_tile_encoder
from pixcell_core.encoders.preprocessing import Preprocessing
from pixcell_core.errors import BadInputError

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 14,
}


def save(kind: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module
    if kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**SIZES))
    elif kind == "dinov2_with_registers":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES))
    else:
        model = ViTModel(ViTConfig(**SIZES, intermediate_size=48))
    model.save_pretrained(folder)
    return model.eval()


def write_preprocessing(folder: Path, **changes: object) -> None:
    content = {
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "vit"])
def test_the_token_is_the_models_class_token(kind: str, tmp_path: Path, tiles: torch.Tensor) -> None:
    model = save(kind, tmp_path / kind)
    write_preprocessing(tmp_path / kind)
    encoder = load_tile_encoder(f"dinov2:{tmp_path / kind}", tile_size=32)
    assert encoder.embedding_dim == 24
    found = encoder.encode(tiles)
    assert found.shape == (3, 4, 24)
    quarter = tiles[:, :, :32, 32:].float() / 255
    pixels = quarter[:, :, 2:30, 2:30] - torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    pixels = pixels / torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert torch.allclose(found[:, 1], expected, atol=1e-5)


def test_a_folder_without_preprocessing_takes_imagenets_at_224(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    save("dinov2", folder)
    assert Preprocessing.from_folder(folder, Preprocessing()) == Preprocessing(224, 224)
    assert load_tile_encoder(f"dinov2:{folder}").encode(
        torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    ).shape == (
        1,
        1,
        24,
    )


def test_old_pickled_weights_load_and_pickles_with_code_do_not(tmp_path: Path, tiles: torch.Tensor) -> None:
    from .test_weight_files import RunsCode

    model = save("dinov2", tmp_path / "d")
    expected = load_tile_encoder(f"dinov2:{tmp_path / 'd'}", tile_size=64).encode(tiles)
    (tmp_path / "d" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "d" / "pytorch_model.bin")
    assert torch.allclose(load_tile_encoder(f"dinov2:{tmp_path / 'd'}", tile_size=64).encode(tiles), expected)
    torch.save({"x": RunsCode(tmp_path / "ran")}, tmp_path / "d" / "pytorch_model.bin")
    with pytest.raises(BadInputError) as refused:
        load_tile_encoder(f"dinov2:{tmp_path / 'd'}")
    assert refused.value.code == "pickle-with-code" and not (tmp_path / "ran").exists()


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    save("dinov2", folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(words: str, code: str) -> None:
        with pytest.raises(BadInputError, match=words) as error:
            load_tile_encoder(f"dinov2:{folder}")
        assert error.value.code == code

    def write(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))

    write(model_type="bert")
    refused("type 'bert', expected one of dinov2", "weights-of-another-model")
    write(hidden_size=48)
    refused("does not load as dinov2", "weights-foreign")
    write(num_hidden_layers=3)
    refused("tensors are missing", "weights-foreign")
    write(auto_map={"AutoModel": "evil.Model"}, model_type="evil")
    refused("type 'evil'", "weights-of-another-model")
    write()
    write_preprocessing(folder, image_std=[0.1, 0.2])
    refused("three deviations|has mean", "preprocessing-unknown")
    write_preprocessing(folder, resample=1)
    refused("no preprocessing this program knows", "preprocessing-unknown")
    (folder / "preprocessor_config.json").unlink()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-8])
    refused("bytes its header promises", "weights-truncated")
    (folder / "model.safetensors").unlink()
    refused("holds no weights", "weights-missing")
    (folder / "config.json").unlink()
    refused("no config.json in", "weights-missing")
