"""Models by name: what is shipped loads, what is not says what to bring, and nothing reaches for a network."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pixcell_core.encoders import (
    AUTOENCODERS,
    TILE_ENCODERS,
    ImageEncoder,
    LatentCodec,
    RegistryEntry,
    TiledEncoder,
    load_latent_autoencoder,
    load_tile_encoder,
    register_encoder,
)
from pixcell_core.encoders.recognition import recognise
from pixcell_core.errors import BadInputError
from pixcell_core.starter import load_autoencoder, load_encoder, load_second_eye

from .conftest import WriteVae
from .test_tiled_encoder import MeanColour
from .test_transformers_folder import save


def test_shipped_encoders_give_what_their_own_classes_give(tiles: torch.Tensor) -> None:
    starter = load_tile_encoder("starter", tile_size=64)
    assert isinstance(starter, ImageEncoder)
    assert torch.allclose(starter.encode(tiles), load_encoder().encode(tiles), atol=1e-5)
    eye = load_tile_encoder("second-eye", tile_size=64)
    assert torch.allclose(eye.encode(tiles)[:, 0], load_second_eye().embed(tiles), atol=1e-5)
    assert str(eye.embedding_dim) in TILE_ENCODERS["second-eye"].summary.replace(",", "")


def test_the_starters_autoencoder_applies_its_own_factors(tiles: torch.Tensor) -> None:
    found, own = load_latent_autoencoder("starter"), load_autoencoder()
    assert isinstance(found, LatentCodec)
    images = tiles.float() / 127.5 - 1
    with torch.inference_mode():
        raw = own.encode(images).latent_dist.mean
    expected = (raw - own.config["shift_factor"]) * own.config["scaling_factor"]
    assert torch.allclose(found.to_latents(tiles), expected, atol=1e-5)
    with torch.inference_mode():
        back = own.decode(raw).sample
    assert torch.allclose(found.to_images(found.to_latents(tiles)), back, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, e in TILE_ENCODERS.items() if e.path == "needed"])
def test_an_encoder_that_is_not_here_says_what_to_bring(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    for spec in (name, f"{name}:", f"{name}:/no/such/folder"):
        with pytest.raises(BadInputError) as refused:
            load_tile_encoder(spec)
        assert refused.value.code == "weights-missing"
        assert TILE_ENCODERS[name].needs in refused.value.message


@pytest.mark.parametrize("name", [n for n, e in AUTOENCODERS.items() if e.path == "needed"])
def test_an_autoencoder_that_is_not_here_says_what_to_bring(name: str) -> None:
    with pytest.raises(BadInputError) as refused:
        load_latent_autoencoder(name)
    assert refused.value.code == "weights-missing" and AUTOENCODERS[name].licence in refused.value.hint


def test_unknown_names_name_the_nearest_and_the_other_kind() -> None:
    with pytest.raises(BadInputError, match="no tile encoder 'uni2h'") as near:
        load_tile_encoder("uni2h:/x")
    assert "uni2-h" in near.value.hint
    with pytest.raises(BadInputError, match="other kind"):
        load_tile_encoder("sd3-vae:/x")
    with pytest.raises(BadInputError, match="takes no path"):
        load_tile_encoder("second-eye:/x")


def test_a_person_can_register_an_encoder(monkeypatch: pytest.MonkeyPatch, tiles: torch.Tensor) -> None:
    monkeypatch.setattr("pixcell_core.encoders.registry.TILE_ENCODERS", dict(TILE_ENCODERS))

    def colour(*, tile_size: int, device: torch.device, dtype: torch.dtype) -> TiledEncoder:
        return TiledEncoder("colour", MeanColour(), 3, tile_size=tile_size, device=device, dtype=dtype)

    entry = RegistryEntry("colour", "encoder", "Mean colour.", "nothing.", "Apache-2.0.", "none", colour)
    register_encoder(entry)
    assert load_tile_encoder("colour", tile_size=64).encode(tiles).shape == (3, 1, 3)
    with pytest.raises(BadInputError, match="taken"):
        register_encoder(entry)
    with pytest.raises(BadInputError, match="kind 'lens'"):
        register_encoder(RegistryEntry("l", "lens", "", "", "", "none", colour))


@pytest.mark.parametrize("load", [load_tile_encoder, load_latent_autoencoder])
def test_a_device_that_is_not_here_is_named(
    load: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for asked, code in (("cuda", "device-missing"), ("gpu", "device-unknown")):
        with pytest.raises(BadInputError) as refused:
            load("starter", device=asked)
        assert refused.value.code == code
    assert load("starter", device="auto")


def test_brought_models_are_recognised_by_their_folders(
    tmp_path: Path, write_vae: WriteVae, tiny_uni2: Path
) -> None:
    save("dinov2", tmp_path / "phikon")
    write_vae("sd35/vae")
    write_vae("flux", scaling_factor=0.3611, shift_factor=0.1159)
    (tmp_path / "nothing").mkdir()
    assert set(recognise(tmp_path)) == {
        ("encoder", f"dinov2:{tmp_path / 'phikon'}"),
        ("encoder", f"uni2-h:{tiny_uni2}"),
        ("autoencoder", f"sd3-vae:{tmp_path / 'sd35' / 'vae'}"),
        ("autoencoder", f"autoencoder-kl:{tmp_path / 'flux'}"),
    }
    with pytest.raises(BadInputError, match="no folder"):
        recognise(tmp_path / "absent")
