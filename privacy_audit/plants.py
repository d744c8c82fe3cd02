"""Planted copies: what a leaking generator could emit, made from training tiles with a seed, kind by kind."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Tile = npt.NDArray[np.uint8]
Maker = Callable[[Tile, Tile, np.random.Generator], Tile]

JPEG_QUALITY = 50
BLUR_SIGMA_SHARE = 0.01  # of the side: 1.3 pixels at 128
NOISE_SD = 12.0  # of 255
STAIN_SPREAD = 0.2  # relative change of each optical density
ELASTIC_SHARE = 6 / 256  # largest displacement, of the side
ELASTIC_SIGMA = 0.08  # of the side: how smooth the warp is
ZOOM = 0.7  # of the side is cut out and enlarged to the whole
DEGREES = 15.0
PATCH_PIXELS = (128, 64)
PATCH_SHARES = (4 / 7, 2 / 7)  # of tiles smaller than 224 pixels


@dataclass(frozen=True)
class CopyKind:
    """One kind of copy: its key in the policy, its words in the report, and how it is made.

    `make(tile, filler, rng)` takes and returns uint8 (H, W, 3); `filler` is a tile of an unrelated patient.
    """

    key: str
    words: str
    make: Maker


def exact(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """The tile itself."""
    return tile.copy()


def jpeg(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """Compressed once at quality 50."""
    stream = io.BytesIO()
    Image.fromarray(tile).save(stream, "JPEG", quality=JPEG_QUALITY)
    return np.array(Image.open(stream).convert("RGB"))


def dihedral(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """Turned or mirrored, never left as it is."""
    which = int(rng.integers(1, 8))
    turned = np.rot90(tile, which % 4)
    return np.ascontiguousarray(turned[:, ::-1] if which >= 4 else turned)


def stain(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """Each channel's optical density scaled and the background tinted, as another batch of stain would."""
    density = -np.log((tile.astype(np.float64) + 1.0) / 256.0)
    scaled = density * rng.uniform(1 - STAIN_SPREAD, 1 + STAIN_SPREAD, size=3) + rng.uniform(0, 0.05, size=3)
    return _to_pixels(256.0 * np.exp(-scaled) - 1.0)


def blur(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """Out of focus."""
    radius = max(BLUR_SIGMA_SHARE * tile.shape[0], 0.8)
    return np.array(Image.fromarray(tile).filter(ImageFilter.GaussianBlur(radius)))


def noise(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """Gaussian noise on every channel."""
    return _to_pixels(tile + rng.normal(0.0, NOISE_SD, size=tile.shape))


def shift(share: float) -> Maker:
    """Part of the tile moved out along one axis; what comes in belongs to someone else."""

    def make(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
        out = filler.copy()
        step = round(share * tile.shape[0])
        which = int(rng.integers(4))
        source, target = np.rot90(tile, which), np.rot90(out, which)
        target[step:] = source[: source.shape[0] - step]
        return out

    return make


def elastic(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """Warped smoothly, as tissue is when it is cut and floated."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    side = tile.shape[:2]
    fields = [
        gaussian_filter(rng.normal(size=side), ELASTIC_SIGMA * side[0], mode="reflect") for _ in range(2)
    ]
    largest = max(np.abs(field).max() for field in fields)
    y, x = (
        place + ELASTIC_SHARE * side[0] * field / largest
        for place, field in zip(np.mgrid[: side[0], : side[1]], fields, strict=True)
    )
    planes = [
        map_coordinates(tile[..., c].astype(np.float64), (y, x), order=1, mode="reflect") for c in range(3)
    ]
    return _to_pixels(np.stack(planes, axis=-1))


def zoom(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """A part of the tile, anywhere in it, enlarged to the whole."""
    side = round(ZOOM * tile.shape[0])
    top, left = (int(v) for v in rng.integers(0, tile.shape[0] - side + 1, size=2))
    part = Image.fromarray(tile[top : top + side, left : left + side])
    return np.array(part.resize((tile.shape[1], tile.shape[0]), Image.Resampling.BICUBIC))


def turn(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """Turned by fifteen degrees one way or the other; the corners belong to someone else."""
    angle = DEGREES * float(rng.choice([-1.0, 1.0]))
    turned = Image.fromarray(tile).rotate(angle, Image.Resampling.BICUBIC)
    inside = Image.new("L", turned.size, 255).rotate(angle)
    return np.array(Image.composite(turned, Image.fromarray(filler), inside))


def blend(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
    """Half this tile, half another patient's."""
    return _to_pixels(0.5 * tile.astype(np.float64) + 0.5 * filler)


def patch(which: int) -> Maker:
    """A square of the tile pasted somewhere into another patient's tile."""

    def make(tile: Tile, filler: Tile, rng: np.random.Generator) -> Tile:
        out = filler.copy()
        side = min(PATCH_PIXELS[which], round(PATCH_SHARES[which] * tile.shape[0]))
        (y, x), (top, left) = rng.integers(0, tile.shape[0] - side + 1, size=(2, 2))
        out[top : top + side, left : left + side] = tile[y : y + side, x : x + side]
        return out

    return make


KINDS = (
    CopyKind("exact", "exact copy", exact),
    CopyKind("jpeg50", "compressed (JPEG, quality 50)", jpeg),
    CopyKind("d4", "turned by quarter turns or mirrored", dihedral),
    CopyKind("stain", "recoloured by ±20 % of each stain density", stain),
    CopyKind("blur", "blurred (1 % of the side)", blur),
    CopyKind("noise", "with noise (standard deviation 12 of 255)", noise),
    CopyKind("elastic", "warped by up to 2 % of the side", elastic),
    CopyKind("shift25", "shifted by a quarter of the side", shift(0.25)),
    CopyKind("shift50", "shifted by half of the side", shift(0.5)),
    CopyKind("zoom07", "a part of 0.7 of the side, enlarged", zoom),
    CopyKind("rot15", "turned by fifteen degrees", turn),
    CopyKind("blend", "blended half and half with another patient's tile", blend),
    CopyKind("patch128", "a patch of 128 pixels (4/7 of a small tile's side) pasted elsewhere", patch(0)),
    CopyKind("patch64", "a patch of 64 pixels (2/7 of a small tile's side) pasted elsewhere", patch(1)),
)


def recolour(tile: Tile, model: Tile) -> Tile:
    """Give a tile the colours of another: mean and spread of each optical density (Reinhard et al. 2001)."""
    density = -np.log((tile.astype(np.float64) + 1.0) / 256.0)
    wanted = -np.log((model.astype(np.float64) + 1.0) / 256.0)
    axes = (0, 1)
    scale = wanted.std(axis=axes) / np.maximum(density.std(axis=axes), 1e-3)
    moved = (density - density.mean(axis=axes)) * np.clip(scale, 0.3, 3.0) + wanted.mean(axis=axes)
    return _to_pixels(256.0 * np.exp(-moved) - 1.0)


def _to_pixels(values: npt.NDArray[np.float64]) -> Tile:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
