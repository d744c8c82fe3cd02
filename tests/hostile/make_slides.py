"""Writes the hostile slides listed in README.md from procedural tissue: `python tests/hostile/make_slides.py DIR`."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from pixcell_core.procedural import TissueClass, patient_look, render_field, site_look
from site_client.slides.pyramid import write_pyramid

TILE_OFFSETS, X_RESOLUTION, Y_RESOLUTION = 324, 282, 283


def good_slide(path: Path, *, seed: int = 1, size: int = 640, mpp: float = 0.5) -> None:
    """A slide that every test starts from."""
    field = render_field(
        size,
        size,
        mpp=mpp,
        site=site_look(seed),
        patient=patient_look(seed, 0),
        tissue=TissueClass.tumor,
        seed=seed,
    )
    write_pyramid(path, field.rgb, mpp)


def picture(path: Path) -> None:
    """A photograph in a striped TIFF: TIFF yes, slide no."""
    Image.fromarray(np.full((300, 400, 3), 120, dtype=np.uint8)).save(path)


def cut(source: Path, path: Path, share: float) -> None:
    """The first `share` of the bytes of `source`."""
    body = source.read_bytes()
    path.write_bytes(body[: int(len(body) * share)])


def _entries(body: bytes) -> list[tuple[int, int, int]]:
    """(tag, position of the entry, count) of the first directory of a little-endian TIFF."""
    (start,) = struct.unpack_from("<I", body, 4)
    (count,) = struct.unpack_from("<H", body, start)
    found = []
    for number in range(count):
        at = start + 2 + 12 * number
        tag, _, values = struct.unpack_from("<HHI", body, at)
        found.append((tag, at, values))
    return found


def tiles_past_end(source: Path, path: Path) -> None:
    """Level 0's tile offsets moved behind the end: what a copy cut off inside the pixels looks like."""
    body = bytearray(source.read_bytes())
    _, at, count = next(e for e in _entries(body) if e[0] == TILE_OFFSETS)
    (where,) = struct.unpack_from("<I", body, at + 8)
    struct.pack_into(f"<{count}I", body, where, *[len(body) + 1000 * i for i in range(count)])
    path.write_bytes(bytes(body))


def broken_tile(source: Path, path: Path) -> None:
    """The first tile's bytes replaced by noise of the same length."""
    body = bytearray(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages.first
        offset, length = page.dataoffsets[0], page.databytecounts[0]
    body[offset : offset + length] = np.random.default_rng(0).bytes(length)
    path.write_bytes(bytes(body))


def no_mpp(source: Path, path: Path) -> None:
    """Resolution tags of every level renamed to a private tag, so the scale is unknown."""
    body = bytearray(source.read_bytes())
    for wanted in (X_RESOLUTION, Y_RESOLUTION):
        for start in range(8, len(body) - 12):
            if body[start : start + 8] == struct.pack("<HHI", wanted, 5, 1):
                # The tag numbers must stay in ascending order, so only the kind becomes unknown.
                struct.pack_into("<HH", body, start, wanted, 13)
    path.write_bytes(bytes(body))


def glass(path: Path, *, tinted: bool, size: int = 1600) -> None:
    """Glass without tissue; tinted: a pink cast that grows to one corner and a printed grid of soft spots."""
    rng = np.random.default_rng(3)
    rgb = np.full((size, size, 3), 244.0)
    if tinted:
        y, x = np.mgrid[0:size, 0:size] / size
        cast = np.clip(x + y - 0.6, 0, None)[..., None] ** 2
        rgb = np.array([222.0, 205.0, 226.0]) - cast * np.array([2.0, 26.0, 12.0])
        spots = (np.sin(x * 2 * np.pi * 8) * np.sin(y * 2 * np.pi * 8)).clip(0.6, None) - 0.6
        rgb -= spots[..., None] * np.array([14.0, 6.0, 4.0])
    noisy = rgb + rng.normal(0, 1.5, rgb.shape)
    write_pyramid(path, noisy.clip(0, 255).astype(np.uint8), 0.5)


def make_all(folder: Path) -> None:
    """Write every slide of the table, and the good one they came from."""
    folder.mkdir(parents=True, exist_ok=True)
    good = folder / "good.tiff"
    good_slide(good)
    picture(folder / "picture.tiff")
    cut(good, folder / "truncated.tiff", 0.6)
    tiles_past_end(good, folder / "tiles_past_end.tiff")
    broken_tile(good, folder / "broken_tile.tiff")
    no_mpp(good, folder / "no_mpp.tiff")
    good_slide(folder / "absurd_mpp.tiff", size=512)
    with (folder / "absurd_mpp.tiff").open("r+b") as handle:
        body = bytearray(handle.read())
        for tag, at, _ in _entries(body):
            if tag in (X_RESOLUTION, Y_RESOLUTION):
                (where,) = struct.unpack_from("<I", body, at + 8)
                struct.pack_into("<II", body, where, 5, 1)
        handle.seek(0)
        handle.write(body)
    glass(folder / "blank_glass.tiff", tinted=False)
    glass(folder / "tinted_spots.tiff", tinted=True)
    (folder / "empty_folder").mkdir(exist_ok=True)


if __name__ == "__main__":
    make_all(Path(sys.argv[1]))
