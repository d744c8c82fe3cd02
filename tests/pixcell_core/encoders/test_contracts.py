"""What every tile encoder and every latent autoencoder promises, asked of each that can be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pixcell_core.encoders import (
    AUTOENCODERS,
    TILE_ENCODERS,
    ImageEncoder,
    LatentCodec,
    load_latent_autoencoder,
    load_tile_encoder,
)
from pixcell_core.encoders.uni2 import load_uni2
from pixcell_core.errors import BadInputError

from .conftest import TINY_VIT, WriteVae
from .test_transformers_folder import save

SIDE = 64


@pytest.mark.parametrize("name", list(TILE_ENCODERS))
class TestEveryTileEncoder:
    """`ImageEncoder`'s contract."""

    @pytest.fixture()
    def encoder(self, name: str, tmp_path: Path, tiny_uni2: Path) -> ImageEncoder:
        if name == "uni2-h":
            return load_uni2(tiny_uni2, config=TINY_VIT, tile_size=SIDE)
        if name == "dinov2":
            save("dinov2", tmp_path / "dinov2")
            return load_tile_encoder(f"dinov2:{tmp_path / 'dinov2'}", tile_size=SIDE)
        return load_tile_encoder(name, tile_size=SIDE)

    @pytest.fixture()
    def images(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randint(0, 256, (2, 3, SIDE, 2 * SIDE), dtype=torch.uint8, generator=generator)

    def test_its_name_and_shapes_are_those_it_announces(
        self, name: str, encoder: ImageEncoder, images: torch.Tensor
    ) -> None:
        assert isinstance(encoder, ImageEncoder) and (encoder.name, encoder.tile_size) == (name, SIDE)
        found = encoder.encode(images)
        assert (
            found.shape
            == (2, encoder.tokens(SIDE, 2 * SIDE), encoder.embedding_dim)
            == (2, 2, found.shape[2])
        )
        assert found.dtype == torch.float32 and found.device.type == "cpu" and not found.requires_grad
        assert torch.isfinite(found).all()

    def test_a_token_is_its_tiles_own_whatever_is_beside_it(
        self, encoder: ImageEncoder, images: torch.Tensor
    ) -> None:
        together = encoder.encode(images)
        alone = torch.cat([encoder.encode(half) for half in images.split(SIDE, dim=3)], dim=1)
        assert torch.allclose(together, alone, atol=1e-3)
        other = torch.cat([images[..., :SIDE], 255 - images[..., SIDE:]], dim=3)
        changed = encoder.encode(other)
        assert torch.allclose(changed[:, 0], together[:, 0], atol=1e-3)
        assert not torch.allclose(changed[:, 1], together[:, 1], atol=1e-3)

    def test_it_refuses_scaled_and_odd_sized_images(
        self, encoder: ImageEncoder, images: torch.Tensor
    ) -> None:
        for wrong in (images.float(), images[..., :-1], images[:, :1]):
            with pytest.raises(BadInputError):
                encoder.encode(wrong)


@pytest.mark.parametrize("name", list(AUTOENCODERS))
class TestEveryAutoencoder:
    """`LatentCodec`'s contract."""

    @pytest.fixture()
    def codec(self, name: str, tmp_path: Path, write_vae: WriteVae) -> LatentCodec:
        from diffusers import AutoencoderTiny

        make: dict[str, Callable[[], Path]] = {
            "sd3-vae": write_vae,
            "autoencoder-kl": lambda: write_vae(scaling_factor=0.3611, shift_factor=0.1159),
        }
        if name == "autoencoder-tiny":
            AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "tiny")
            return load_latent_autoencoder(f"{name}:{tmp_path / 'tiny'}")
        return load_latent_autoencoder(f"{name}:{make[name]()}" if name in make else name)

    def test_both_ways_equal_the_two_calls_with_scale_and_shift(
        self, codec: LatentCodec, tiles: torch.Tensor
    ) -> None:
        assert isinstance(codec, LatentCodec)
        latents = codec.to_latents(tiles)
        side = 64 // codec.downscale
        assert latents.shape == (3, codec.latent_channels, side, side) and latents.dtype == torch.float32
        with torch.inference_mode():
            raw = codec.encode(tiles.float() / 127.5 - 1).latent_dist.mode()
            images = codec.decode(raw).sample
        assert torch.allclose(latents, (raw - codec.shift_factor) * codec.scaling_factor, atol=1e-4)
        assert torch.allclose(codec.to_images(latents), images, atol=1e-4)
        assert images.shape == tiles.shape

    def test_a_draw_is_its_generators(self, codec: LatentCodec, tiles: torch.Tensor) -> None:
        draws = [codec.to_latents(tiles, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1])
        assert (codec.latent_channels, torch.isfinite(draws[2]).all()) == (16, True)
