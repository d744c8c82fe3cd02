"""Public tiles: drawn, or read from a folder of images that anybody may see."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixcell_core.errors import BadInputError

# Whatever the imaging library raises at files that are cut, garbled or hostile.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})


def draw_public_tiles(folder: Path, count: int, size: int, seed: int, on_tile: Callable[[int], None]) -> None:
    """Draw `count` procedural tiles of `size` px into `folder`; those that exist are kept."""
    from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look

    folder.mkdir(parents=True, exist_ok=True)
    classes = list(TissueClass)
    side = 4
    for field_number in range(-(-count // side**2)):
        names = [folder / f"public-{field_number * side**2 + i:06d}.png" for i in range(side**2)]
        names = names[: count - field_number * side**2]
        if not all(n.exists() for n in names):
            site_seed = seed + field_number % 16
            drawn = render_field(
                side * size,
                side * size,
                mpp=0.5,
                site=site_look(site_seed),
                patient=patient_look(site_seed, seed + 5000 + field_number),
                tissue=classes[field_number % len(classes)],
                seed=seed + field_number,
            )
            for i, name in enumerate(names):
                y, x = (i // side) * size, (i % side) * size
                partial = name.with_suffix(".partial")
                Image.fromarray(drawn.rgb[y : y + size, x : x + size]).save(
                    partial, format="PNG", compress_level=1
                )
                partial.replace(name)
        on_tile(len(names))


def read_public_tiles(folder: Path, size: int) -> torch.Tensor:
    """Read every image below `folder` as centre crops, uint8 (N, 3, size, size).

    Raises:
        BadInputError: no image, an unreadable one, or one smaller than a tile.
    """
    images = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except UNREADABLE as error:
            raise BadInputError(
                f"{path.name} is no image we can read.",
                hint="Take it out of the folder of public tiles, or repair it.",
                code="unreadable-tile",
            ) from error
        y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        if y < 0 or x < 0:
            raise BadInputError(
                f"{path.name} is {pixels.shape[1]}×{pixels.shape[0]} px, smaller than a tile of {size} px.",
                hint="Give tiles of at least the study's tile size.",
                code="tile-too-small",
            )
        images.append(torch.from_numpy(pixels[y : y + size, x : x + size].copy()).permute(2, 0, 1))
    if not images:
        raise BadInputError(
            f"There is no image in {folder.name}.",
            hint="Put public tiles there, or let `--draw N` draw procedural ones.",
            code="no-public-tiles",
        )
    return torch.stack(images)
