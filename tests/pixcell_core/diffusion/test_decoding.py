"""Decoding in pieces: exact where the decoder looks no further than the halo, close elsewhere."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from pixcell_core.diffusion import DecodeTiling, decode_latents
from pixcell_core.diffusion.decoding import _pieces, decode_tiled
from pixcell_core.models import TileAutoencoder
from pixcell_core.starter import load_autoencoder


@pytest.fixture(scope="module")
def convolutional() -> TileAutoencoder:
    torch.manual_seed(0)
    vae = TileAutoencoder(
        width=8,
        deep_width=8,
        encoder_blocks=(1, 1),
        decoder_blocks=(1, 1),
        scaling_factor=1.3,
        shift_factor=-0.2,
    ).eval()
    with torch.no_grad():
        for block in vae.modules():
            if hasattr(block, "second"):
                torch.nn.init.normal_(block.second.weight, std=0.1)
    return vae


def _plain(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    config = vae.config
    with torch.inference_mode():
        return vae.decode(latents / config["scaling_factor"] + config["shift_factor"]).sample.clamp(-1, 1)


@pytest.mark.parametrize("size", [(40, 40), (33, 70), (12, 50), (8, 8)])
def test_pieces_equal_the_whole_where_the_halo_is_wide_enough(
    convolutional: TileAutoencoder, size: tuple[int, int]
) -> None:
    latents = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(0)) * 0.3
    found = decode_latents(convolutional, latents, DecodeTiling(core=16, feather=2, halo=8))
    assert torch.allclose(found, _plain(convolutional, latents), atol=1e-5)


def test_a_narrow_halo_is_seen(convolutional: TileAutoencoder) -> None:
    latents = torch.randn(1, 16, 40, 40, generator=torch.Generator().manual_seed(0)) * 0.3
    found = decode_latents(convolutional, latents, DecodeTiling(core=16, feather=0, halo=0))
    assert float((found - _plain(convolutional, latents)).abs().max()) > 1e-2


def test_a_decoder_with_global_statistics_is_blended_without_a_step(tiny_vae: Any) -> None:
    latents = torch.randn(1, 16, 40, 40, generator=torch.Generator().manual_seed(0))
    whole = _plain(tiny_vae, latents)
    steps = []
    for feather in (0, 4):
        wrong = decode_latents(tiny_vae, latents, DecodeTiling(core=20, feather=feather, halo=8)) - whole
        assert float(wrong.abs().mean()) < 0.1 * float(whole.std())
        steps.append(float((wrong[..., 160] - wrong[..., 159]).abs().mean()))
    assert steps[1] < 0.75 * steps[0]


def test_small_latents_are_decoded_whole_and_large_ones_in_pieces(
    convolutional: TileAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    right = convolutional.decode
    monkeypatch.setattr(convolutional, "decode", lambda z: (seen.append(tuple(z.shape)), right(z))[1])
    decode_latents(convolutional, torch.zeros(70, 16, 16, 16))
    assert seen == [(64, 16, 16, 16), (6, 16, 16, 16)]
    seen.clear()
    decode_latents(convolutional, torch.zeros(1, 16, 128, 128))
    assert len(seen) == 4 and max(shape[2] * shape[3] for shape in seen) <= 80 * 80
    seen.clear()
    decode_latents(convolutional, torch.zeros(1, 16, 256, 32))
    assert max(shape[2] for shape in seen) <= 96


@pytest.mark.parametrize("length", [5, 64, 65, 128, 200, 512])
def test_pieces_cover_everything_once_outside_the_feathers(length: int) -> None:
    tiling = DecodeTiling()
    pieces = _pieces(length, tiling)
    assert pieces[0][2] == 0 and pieces[-1][3] == length
    assert all(a[3] - b[2] == 2 * tiling.feather for a, b in itertools.pairwise(pieces))
    assert max(b - a for a, b, _, _ in pieces) <= tiling.core + 2 * tiling.halo


def test_settings_that_cannot_work() -> None:
    for tiling in (DecodeTiling(core=4, feather=3, halo=4), DecodeTiling(core=8, feather=2, halo=1)):
        with pytest.raises(ValueError, match="feather"):
            decode_tiled(None, torch.zeros(1, 16, 8, 8), tiling)


def test_the_starters_decoder_is_exact_at_the_default_tiling() -> None:
    vae = load_autoencoder()
    latents = torch.randn(1, 16, 24, 100, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(decode_latents(vae, latents), _plain(vae, latents), atol=1e-5)
