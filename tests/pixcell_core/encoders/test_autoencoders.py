"""Latent autoencoders a person brings: SD3's numbers, never a forgotten shift, folders as published, bad folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from pixcell_core.encoders import LatentAutoencoder, LatentCodec, load_latent_autoencoder
from pixcell_core.encoders.autoencoder_folders import (
    load_autoencoder_kl,
    load_autoencoder_tiny,
)
from pixcell_core.errors import BadInputError

from .conftest import SD3_VAE_CONFIG, WriteVae


def test_the_published_config_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = AutoencoderKL.from_config(SD3_VAE_CONFIG)
    assert sum(p.numel() for p in model.parameters()) == 83_819_683


def errors(autoencoder: LatentAutoencoder, folder: Path, images: torch.Tensor) -> tuple[float, float]:
    """Largest difference to the plain formula with SD3's own numbers: of the latents, and of the images."""
    stock = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).double().eval()
    with torch.inference_mode():
        raw = stock.encode(images.double() / 127.5 - 1).latent_dist.mean
        scaled = (raw - 0.0609) * 1.5305
        drawn = torch.randn(scaled.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        shown = stock.decode(drawn / 1.5305 + 0.0609).sample
    first = (autoencoder.to_latents(images).double() - scaled).abs().max()
    second = (autoencoder.to_images(drawn.float()).double() - shown).abs().max()
    return float(first), float(second)


def test_latents_and_images_follow_the_plain_formula(write_vae: WriteVae, tiles: torch.Tensor) -> None:
    folder = write_vae()
    autoencoder = load_latent_autoencoder(f"sd3-vae:{folder}")
    assert isinstance(autoencoder, LatentCodec)
    assert (autoencoder.scaling_factor, autoencoder.shift_factor) == (1.5305, 0.0609)
    assert (autoencoder.latent_channels, autoencoder.downscale) == (16, 8)
    assert max(errors(autoencoder, folder, tiles)) < 1e-4
    # A pipeline is given the model itself and reads the same numbers from it.
    assert autoencoder.model.config["shift_factor"] == 0.0609


@pytest.mark.parametrize("mutant", ["shift forgotten", "shift after scale", "scale forgotten"])
def test_a_wrong_scale_or_shift_is_seen(
    mutant: str, write_vae: WriteVae, tiles: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_vae()
    autoencoder = load_latent_autoencoder(f"sd3-vae:{folder}")
    wrong = {"shift forgotten": (1.5305, 0.0), "shift after scale": (1.5305, 0.0609 / 1.5305)}
    scale, shift = wrong.get(mutant, (1.0, 0.0609))
    monkeypatch.setattr(LatentAutoencoder, "scaling_factor", property(lambda self: scale))
    monkeypatch.setattr(LatentAutoencoder, "shift_factor", property(lambda self: shift))
    assert min(errors(autoencoder, folder, tiles)) > 1e-4


def test_batches_and_draws(write_vae: WriteVae, tiles: torch.Tensor) -> None:
    autoencoder = load_latent_autoencoder(f"autoencoder-kl:{write_vae()}")
    whole = autoencoder.to_latents(tiles)
    assert whole.shape == (3, 16, 8, 8) and whole.dtype == torch.float32
    autoencoder.batch_size = 2
    assert torch.allclose(autoencoder.to_latents(tiles), whole, atol=1e-5)
    assert torch.allclose(autoencoder.to_latents(tiles.float() / 127.5 - 1), whole, atol=1e-5)
    drawn = autoencoder.to_latents(tiles, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, autoencoder.to_latents(tiles, torch.Generator().manual_seed(1)))
    assert not torch.allclose(drawn, whole, atol=1e-3)


def test_the_folder_may_be_the_pipelines_and_may_hold_half_precision(
    write_vae: WriteVae, tmp_path: Path, tiles: torch.Tensor
) -> None:
    folder = write_vae("pipeline/vae")
    expected = load_latent_autoencoder(f"sd3-vae:{folder}").to_latents(tiles)
    assert torch.equal(
        load_latent_autoencoder(f"sd3-vae:{tmp_path / 'pipeline'}").to_latents(tiles), expected
    )
    file = folder / "diffusion_pytorch_model.safetensors"
    half = {k: v.half() for k, v in load_file(file).items()}
    file.unlink()
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    again = load_latent_autoencoder(f"sd3-vae:{folder}")
    assert next(again.model.parameters()).dtype == torch.float32
    assert torch.allclose(again.to_latents(tiles), expected, atol=0.05)


@pytest.mark.parametrize("shift", [None, "absent"])
def test_sixteen_channels_without_a_shift_are_refused_unless_it_is_given(
    shift: str | None, write_vae: WriteVae
) -> None:
    folder = write_vae()
    config = json.loads((folder / "config.json").read_text())
    config["shift_factor"] = None
    if shift == "absent":
        del config["shift_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match=r"16 latent channels and has no shift_factor") as refused:
        load_latent_autoencoder(f"autoencoder-kl:{folder}")
    assert refused.value.code == "autoencoder-shift-missing" and "0.0609" in refused.value.hint
    given = load_autoencoder_kl(folder, shift_factor=0.0609, published=True)
    assert given.shift_factor == 0.0609
    four = write_vae("four", latent_channels=4, shift_factor=None, scaling_factor=0.18215)
    assert load_autoencoder_kl(four).shift_factor == 0.0


def test_sd3_by_name_refuses_another_latent_space(write_vae: WriteVae) -> None:
    other = write_vae("other", scaling_factor=0.3611, shift_factor=0.1159)
    with pytest.raises(
        BadInputError, match=r"scale 0\.3611 and shift 0\.1159; .* 1\.5305 and 0\.0609"
    ) as refused:
        load_latent_autoencoder(f"sd3-vae:{other}")
    assert refused.value.code == "autoencoder-foreign"
    assert load_latent_autoencoder(f"autoencoder-kl:{other}").shift_factor == 0.1159


def test_bad_folders_are_named(write_vae: WriteVae, tmp_path: Path) -> None:
    folder = write_vae()
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)

    def refused(path: Path, words: str, code: str) -> None:
        with pytest.raises(BadInputError, match=words) as error:
            load_latent_autoencoder(f"sd3-vae:{path}")
        assert error.value.code == code

    file.write_bytes(file.read_bytes()[:-64])
    refused(folder, r"holds \d+ of the \d+ bytes", "weights-truncated")
    save_file(
        {k: v for k, v in state.items() if not k.startswith("decoder.conv_out")}, file, {"format": "pt"}
    )
    refused(folder, "lacks 2 of .*decoder.conv_out", "checkpoint-missing-keys")
    save_file(state | {"quant_conv.bias": torch.zeros(32)}, file, {"format": "pt"})
    refused(folder, "1 tensors .*quant_conv", "checkpoint-extra-keys")
    save_file(state | {"decoder.conv_in.weight": torch.zeros(4, 16, 3, 3)}, file, {"format": "pt"})
    refused(folder, r"shape \(4, 16, 3, 3\), expected \(8, 16", "checkpoint-wrong-shape")
    save_file(state | {"decoder.conv_in.bias": torch.full((8,), torch.nan)}, file, {"format": "pt"})
    refused(folder, "NaN or infinite values in decoder.conv_in.bias", "weights-not-finite")
    file.unlink()
    refused(folder, "no .safetensors file", "weights-missing")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    refused(folder, "class UNet2DModel, expected AutoencoderKL", "weights-of-another-model")
    (folder / "config.json").write_text("[1")
    refused(folder, "no JSON", "weights-damaged")
    shutil.rmtree(folder)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither config.json nor vae/config.json", "weights-missing")
    scaled = write_vae("scaled", scaling_factor=-1.0)
    with pytest.raises(BadInputError, match=r"scaling_factor is -1\.0, expected a finite number above 0"):
        load_latent_autoencoder(f"autoencoder-kl:{scaled}")


def test_wrong_images_and_latents_are_refused(write_vae: WriteVae) -> None:
    autoencoder = load_latent_autoencoder(f"sd3-vae:{write_vae()}")
    for images, code in (
        (torch.zeros(1, 3, 60, 64, dtype=torch.uint8), "image-size"),
        (torch.zeros(1, 1, 64, 64, dtype=torch.uint8), "image-type"),
        (torch.full((1, 3, 64, 64), 200.0), "image-type"),
        (torch.full((1, 3, 64, 64), torch.nan), "image-type"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int32), "image-type"),
    ):
        with pytest.raises(BadInputError) as refused:
            autoencoder.to_latents(images)
        assert refused.value.code == code
    with pytest.raises(BadInputError, match=r"\[1, 4, 8, 8\], expected \[B, 16, h, w\]"):
        autoencoder.to_images(torch.zeros(1, 4, 8, 8))
    with pytest.raises(BadInputError, match="NaN"):
        autoencoder.to_images(torch.full((1, 16, 8, 8), torch.nan))


def test_tiling_bounds_what_is_decoded_at_once(write_vae: WriteVae, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = load_latent_autoencoder(f"sd3-vae:{write_vae()}")
    autoencoder.enable_tiling(64)
    sides: list[int] = []
    right = autoencoder.model.decoder.forward
    monkeypatch.setattr(
        autoencoder.model.decoder, "forward", lambda z, *a: sides.append(max(z.shape[2:])) or right(z, *a)
    )
    assert autoencoder.to_images(torch.zeros(1, 16, 24, 24)).shape == (1, 3, 192, 192)
    assert len(sides) > 4 and max(sides) == 8
    with pytest.raises(BadInputError, match="no tiling"):
        load_latent_autoencoder("starter").enable_tiling()


def test_the_tiny_autoencoder_is_in_scaled_space_already(tmp_path: Path, tiles: torch.Tensor) -> None:
    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    stock = AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=widths, decoder_block_out_channels=widths
    ).eval()
    stock.save_pretrained(tmp_path / "taesd3")
    found = load_latent_autoencoder(f"autoencoder-tiny:{tmp_path / 'taesd3'}")
    assert (found.scaling_factor, found.shift_factor, found.downscale) == (1.0, 0.0, 8)
    with torch.inference_mode():
        latents = stock.encode(tiles.float() / 127.5 - 1).latents
        images = stock.decode(latents).sample
    assert torch.equal(found.to_latents(tiles), latents)
    assert torch.equal(found.to_latents(tiles, torch.Generator().manual_seed(0)), latents)
    assert torch.allclose(found.to_images(latents), images, atol=1e-6)
    with pytest.raises(BadInputError, match="expected AutoencoderKL"):
        load_latent_autoencoder(f"sd3-vae:{tmp_path / 'taesd3'}")


def test_the_real_taesd3_brings_real_tiles_back(shared_data: Path) -> None:
    from pixcell_core.encoders.image_folder import list_images, read_image
    from pixcell_core.encoders.reconstruction import peak_signal_to_noise, reconstruct

    autoencoder = load_autoencoder_tiny(shared_data / "weights" / "taesd3_f8e4m3.safetensors")
    assert sum(p.numel() for p in autoencoder.model.parameters()) == 2_458_899
    folder = next(p.parent for p in sorted((shared_data / "tiles").rglob("*.jpg")))
    tile = read_image(list_images(folder)[0])[None, :, :128, :128]
    assert float(peak_signal_to_noise(tile, reconstruct(autoencoder, tile))) > 20.0
