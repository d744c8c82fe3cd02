"""Shapes, ranges and calls of the starter's autoencoder and tile encoder."""

from __future__ import annotations

import torch

from pixcell_core.models import TileAutoencoder, TileEncoder


def test_autoencoder_is_f8_with_sixteen_channels() -> None:
    model = TileAutoencoder().eval()
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    latent = model.encode(images).latent_dist
    assert latent.mean.shape == latent.std.shape == (2, 16, 8, 12)
    assert model.decode(latent.mode()).sample.shape == images.shape


def test_latent_draws_follow_mean_and_deviation() -> None:
    model = TileAutoencoder().eval()
    latent = model.encode(torch.zeros(1, 3, 64, 64)).latent_dist
    draws = torch.stack([latent.sample(torch.Generator().manual_seed(i)) for i in range(400)])
    assert torch.allclose(draws.mean(0), latent.mean, atol=float(latent.std.max()) * 0.35)
    assert torch.equal(latent.sample(torch.Generator().manual_seed(3)), draws[3])


def test_kl_is_zero_for_the_unit_gaussian_and_positive_elsewhere() -> None:
    from pixcell_core.models.autoencoder import LatentDistribution

    assert LatentDistribution(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).kl().item() == 0.0
    # KL(N(1, 1) || N(0, 1)) = 1/2
    assert abs(LatentDistribution(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).kl().item() - 0.5) < 1e-6


def test_encoder_gives_one_token_and_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    model = TileEncoder().eval()
    model.whiten.normal_()
    tiles = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    together = model.encode(tiles)
    assert together.shape == (5, 1, model.embedding_dim)
    assert together.dtype == torch.float32
    alone = torch.cat([model.encode(tile[None]) for tile in tiles])
    assert torch.allclose(together, alone, atol=1e-3)
