"""Crops: block k of a numbered grid is the right block for every k, and never because 16 channels equal 16 tokens."""

from __future__ import annotations

import math

import pytest
import torch

from pixcell_core.errors import BadInputError
from pixcell_core.training import crops
from pixcell_core.training.crops import CropGeometry, CroppedTiles, crops_per_side
from pixcell_core.training.tile_sources import EncodedTiles, Features

CASES = [
    # channels, latent side, tokens, crops per side
    (16, 128, 16, 4),
    (16, 128, 16, 2),
    (16, 128, 16, 1),
    (16, 64, 4, 2),
    (16, 32, 1, 1),
    (16, 96, 36, 3),
    (16, 96, 36, 6),
    (8, 32, 16, 4),
    (4, 24, 144, 3),
]


def numbered(channels: int, side: int, tokens: int, tiles: int = 2) -> EncodedTiles:
    """Every latent pixel and every token carries its own number; tiles differ by a million."""
    pixel = torch.arange(side * side, dtype=torch.float64).view(1, 1, side, side)
    tile = torch.arange(tiles, dtype=torch.float64) * 1e6
    mean = (pixel + tile.view(-1, 1, 1, 1)).expand(-1, channels, -1, -1)
    token = torch.arange(tokens, dtype=torch.float64).view(1, -1, 1) + tile.view(-1, 1, 1)
    return EncodedTiles(mean, mean + 0.5, token.expand(-1, -1, 3))


def check(channels: int, side: int, tokens: int, factor: int) -> int:
    """Oracle: cut the numbered pixel grid and token grid into blocks by reshaping, a way of its own.

    Returns how many crops were compared.
    """
    whole = numbered(channels, side, tokens)
    cropped = CroppedTiles(whole, factor)
    assert len(cropped) == 2 * factor**2

    def blocks(length: int) -> torch.Tensor:
        grid = torch.arange(length * length, dtype=torch.float64)
        own = length // factor
        cut = grid.view(factor, own, factor, own).permute(0, 2, 1, 3)
        return cut.reshape(factor**2, own, own)

    latents, grids = blocks(side), blocks(math.isqrt(tokens))
    for row in range(len(cropped)):
        tile, k = divmod(row, factor**2)
        found = cropped.features(row)
        assert found.mean.shape == (channels, side // factor, side // factor)
        assert torch.equal(found.mean, (latents[k] + tile * 1e6).expand(channels, -1, -1))
        assert torch.equal(found.std, found.mean + 0.5)
        assert torch.equal(found.embedding, (grids[k].reshape(-1, 1) + tile * 1e6).expand(-1, 3))
    return len(cropped)


@pytest.mark.parametrize(("channels", "side", "tokens", "factor"), CASES)
def test_every_crop_is_the_right_block(channels: int, side: int, tokens: int, factor: int) -> None:
    assert check(channels, side, tokens, factor) == 2 * factor**2


def fails(channels: int, side: int, tokens: int, factor: int) -> bool:
    try:
        check(channels, side, tokens, factor)
    except (AssertionError, IndexError, RuntimeError, ValueError, BadInputError):
        return True
    return False


def test_mutant_the_channel_count_in_place_of_the_token_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes where 16 channels meet 16 tokens, which is why it was never noticed, and fails everywhere else."""

    def by_channels(self: CroppedTiles, features: Features) -> CropGeometry:
        channels, height, width = features.mean.shape
        return CropGeometry(height, width, channels, self._factor)

    monkeypatch.setattr(CroppedTiles, "_check", by_channels)
    assert not fails(16, 128, 16, 4)
    for case in ((16, 64, 4, 2), (16, 96, 36, 3), (8, 32, 16, 4), (4, 24, 144, 3)):
        assert fails(*case), case


def test_mutant_column_major_tokens_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CropGeometry.token_rows

    def turned(self: CropGeometry, crop: int) -> list[int]:
        row, column = divmod(crop, self.factor)
        return right(self, column * self.factor + row)

    monkeypatch.setattr(crops.CropGeometry, "token_rows", turned)
    assert fails(16, 128, 16, 4) and fails(16, 64, 4, 2)


@pytest.mark.parametrize(
    ("side", "tokens", "factor"),
    [(128, 1, 2), (128, 4, 4), (30, 16, 4), (32, 5, 1), (32, 16, 3), (32, 16, 0)],
)
def test_features_that_cannot_be_cut_are_refused(side: int, tokens: int, factor: int) -> None:
    with pytest.raises(BadInputError) as refused:
        CroppedTiles(numbered(2, side, tokens), factor)
    assert refused.value.code == "crop-impossible"
    assert f"{tokens} condition tokens" in refused.value.message and f"{side}×{side}" in refused.value.message


def test_crops_per_side_follow_the_latents_alone() -> None:
    assert [crops_per_side(numbered(16, 128, 16, 1).features(0), side) for side in (32, 64, 128)] == [4, 2, 1]
    for side in (256, 48, 96):
        with pytest.raises(BadInputError) as refused:
            crops_per_side(numbered(16, 128, 16, 1).features(0), side)
        assert refused.value.code == "resolution-differs" and str(side) in refused.value.message
