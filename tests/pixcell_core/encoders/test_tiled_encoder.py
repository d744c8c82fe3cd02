"""From images to tokens: row-major order by two independent ways, batches, preprocessing, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from pixcell_core.encoders import ImageEncoder, TiledEncoder, check_embeddings, tiled_encoder
from pixcell_core.encoders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from pixcell_core.encoders.tile_grid import split_tiles, tile_grid
from pixcell_core.errors import BadInputError


class MeanColour(nn.Module):
    """A tile's mean colour: an embedding whose right value anyone can say."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(pixels))
        return pixels.float().mean(dim=(2, 3))


def numbered(rows: int, columns: int, side: int) -> torch.Tensor:
    """One image whose tile (r, c) is filled with 16 r + c."""
    values = torch.arange(rows)[:, None] * 16 + torch.arange(columns)
    big = values.repeat_interleave(side, 0).repeat_interleave(side, 1).to(torch.uint8)
    return big.expand(1, 3, -1, -1).contiguous()


def column_major(images: torch.Tensor, tile_size: int) -> torch.Tensor:
    return split_tiles(images.transpose(2, 3), tile_size).transpose(3, 4)


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_tiles_are_row_major_by_slicing_and_by_unfolding(side: int) -> None:
    images = torch.randint(
        0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = split_tiles(images, 256)
    per_side = side // 256
    assert found.shape == (1, per_side**2, 3, 256, 256)
    sliced = [
        images[:, :, y : y + 256, x : x + 256] for y in range(0, side, 256) for x in range(0, side, 256)
    ]
    unfolded = F.unfold(images.float(), 256, stride=256).transpose(1, 2).reshape(found.shape)
    assert torch.equal(found, torch.stack(sliced, dim=1))
    assert torch.equal(found.float(), unfolded)
    if per_side > 1:
        assert not torch.equal(column_major(images, 256), found)


def test_tokens_follow_the_tiles_and_a_column_major_mutant_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TiledEncoder("colour", MeanColour(), 3, tile_size=8)
    image = numbered(2, 4, 8)
    expected = torch.tensor([0.0, 1, 2, 3, 16, 17, 18, 19])
    assert encoder.tokens(16, 32) == 8
    assert torch.equal(encoder.encode(image)[0, :, 0], expected)
    monkeypatch.setattr(tiled_encoder, "split_tiles", column_major)
    assert not torch.equal(encoder.encode(image)[0, :, 0], expected)


def test_batches_change_nothing_and_are_no_larger_than_asked() -> None:
    network = MeanColour()
    images = torch.cat([numbered(2, 2, 8), 255 - numbered(2, 2, 8), numbered(2, 2, 8)])
    small = TiledEncoder("colour", network, 3, tile_size=8, batch_size=5)
    assert isinstance(small, ImageEncoder)
    found = small.encode(images)
    assert network.calls == [5, 5, 2]
    assert torch.equal(
        found, TiledEncoder("colour", MeanColour(), 3, tile_size=8, batch_size=99).encode(images)
    )
    assert small.encode(images[:0]).shape == (0, 4, 3)


def test_preprocessing_is_pillows_resize_and_imagenets_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tile = torch.from_numpy(
        np.asarray(Image.fromarray(smooth).resize((256, 256), Image.Resampling.BICUBIC)).copy()
    )
    resized = np.asarray(Image.fromarray(tile.numpy()).resize((224, 224), Image.Resampling.BILINEAR))
    # Red, green, blue in this order: (x / 255 - mean) / std.
    expected = (resized / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])

    def distance(preprocessing: Preprocessing) -> float:
        found = preprocessing(tile.permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
        return float(np.abs(found - expected).max())

    # One grey level of rounding between Pillow's 8-bit passes and a resize in float.
    level = 1.01 / 255.0 / min(IMAGENET_STD)
    assert distance(Preprocessing()) < level
    assert distance(Preprocessing(mean=IMAGENET_STD, std=IMAGENET_MEAN)) > 10 * level
    assert distance(Preprocessing(mean=IMAGENET_MEAN[::-1], std=IMAGENET_STD[::-1])) > 5 * level
    monkeypatch.setattr(F, "interpolate", lambda x, size, **_: x[..., : size[0], : size[1]])
    assert distance(Preprocessing()) > 10 * level


def test_a_centre_crop_is_cut_from_the_middle() -> None:
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[:, :, 2:6, 2:6] = 255
    found = Preprocessing(resize=8, crop=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(image)
    assert torch.equal(found, torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("pixels", "code", "words"),
    [
        (torch.zeros(1, 3, 8, 8), "image-type", r"torch\.float32 \[1, 3, 8, 8\], expected torch\.uint8"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "image-type", r"\[1, 1, 8, 8\]"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "image-type", r"\[3, 8, 8\]"),
        (torch.zeros(1, 3, 12, 8, dtype=torch.uint8), "image-size", "12 x 8 px .* tiles of 8 px"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "image-size", "4 x 4 px"),
    ],
)
def test_other_images_are_refused_with_what_was_met(pixels: torch.Tensor, code: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words) as refused:
        TiledEncoder("colour", MeanColour(), 3, tile_size=8).encode(pixels)
    assert refused.value.code == code


def test_a_network_of_another_width_or_with_nan_is_caught() -> None:
    pixels = numbered(1, 1, 8)
    with pytest.raises(BadInputError, match="3 wide, expected 5") as width:
        TiledEncoder("colour", MeanColour(), 5, tile_size=8).encode(pixels)
    assert width.value.code == "embedding-width"

    class Broken(MeanColour):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels).log() * torch.tensor([1.0, float("nan"), 1.0])

    with pytest.raises(BadInputError, match="NaN or infinite") as broken:
        TiledEncoder("colour", Broken(), 3, tile_size=8).encode(pixels)
    assert broken.value.code == "embedding-not-finite"


def test_embeddings_a_model_cannot_read_are_named() -> None:
    good = torch.zeros(2, 4, 6)
    assert check_embeddings(good, embedding_dim=6, tokens=4) is good
    for embeddings, code in (
        (torch.zeros(2, 4, 7), "embedding-width"),
        (torch.zeros(2, 16, 6), "embedding-tokens"),
        (torch.zeros(2, 6), "embedding-shape"),
        (torch.zeros(2, 4, 6, dtype=torch.int64), "embedding-shape"),
        (torch.full((2, 4, 6), torch.inf), "embedding-not-finite"),
    ):
        with pytest.raises(BadInputError) as refused:
            check_embeddings(embeddings, embedding_dim=6, tokens=4)
        assert refused.value.code == code


def test_tile_grid_and_batch_size_refuse_nonsense() -> None:
    assert tile_grid(512, 1024, 256) == (2, 4)
    with pytest.raises(BadInputError):
        tile_grid(0, 256, 256)
    with pytest.raises(BadInputError, match="batch size 0"):
        TiledEncoder("colour", MeanColour(), 3, batch_size=0)
