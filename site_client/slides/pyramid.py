"""Writes a tiled pyramidal TIFF of JPEG tiles that OpenSlide opens with microns per pixel set.

Written out by hand because tifffile demands a codec package even when it is handed finished JPEG tiles, and
finished tiles are what is wanted: given RGB arrays with photometric YCbCr it stores them unconverted and
every reader shows magenta. Only baseline TIFF 6.0 with its JPEG supplement (technical note 2) is used.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

TILE = 256
JPEG_QUALITY = 90

_SHORT, _LONG, _RATIONAL = 3, 4, 5
_WIDTHS = {_SHORT: 2, _LONG: 4, _RATIONAL: 8}
_LETTERS = {_SHORT: "H", _LONG: "I", _RATIONAL: "II"}
_JPEG, _YCBCR, _CENTIMETRE = 7, 6, 3


@dataclass(frozen=True)
class _Field:
    """One directory entry; rationals are flat pairs of numerator and denominator."""

    tag: int
    kind: int
    values: Sequence[int]

    def packed(self) -> bytes:
        return struct.pack(f"<{len(self.values)}{_LETTERS[self.kind][0]}", *self.values)

    @property
    def count(self) -> int:
        return len(self.packed()) // _WIDTHS[self.kind]


def _jpeg_tiles(level: Image.Image) -> Iterator[bytes]:
    """The level's tiles, row by row, as whole JPEG streams (YCbCr 4:2:0), padded by repeating the border."""
    pixels = np.asarray(level)
    padded = np.pad(pixels, ((0, -level.height % TILE), (0, -level.width % TILE), (0, 0)), mode="edge")
    for top in range(0, padded.shape[0], TILE):
        for left in range(0, padded.shape[1], TILE):
            stream = io.BytesIO()
            part = np.ascontiguousarray(padded[top : top + TILE, left : left + TILE])
            Image.fromarray(part).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
            yield stream.getvalue()


def _write_level(out: BinaryIO, level: Image.Image, mpp: float, reduced: bool, link_at: int) -> int:
    """Append a level, hook its directory into the chain at `link_at`; return where the next link goes."""
    offsets, lengths = [], []
    for tile in _jpeg_tiles(level):
        offsets.append(out.tell())
        lengths.append(len(tile))
        out.write(tile)
    per_centimetre = (round(1e4 / mpp * 1000), 1000)
    fields = [
        _Field(254, _LONG, [1 if reduced else 0]),
        _Field(256, _LONG, [level.width]),
        _Field(257, _LONG, [level.height]),
        _Field(258, _SHORT, [8, 8, 8]),
        _Field(259, _SHORT, [_JPEG]),
        _Field(262, _SHORT, [_YCBCR]),
        _Field(277, _SHORT, [3]),
        _Field(282, _RATIONAL, per_centimetre),
        _Field(283, _RATIONAL, per_centimetre),
        _Field(284, _SHORT, [1]),
        _Field(296, _SHORT, [_CENTIMETRE]),
        _Field(322, _LONG, [TILE]),
        _Field(323, _LONG, [TILE]),
        _Field(324, _LONG, offsets),
        _Field(325, _LONG, lengths),
        _Field(530, _SHORT, [2, 2]),
    ]
    entries = b""
    for field in fields:
        body = field.packed()
        if len(body) > 4:
            where = out.tell()
            out.write(body)
            body = struct.pack("<I", where)
        entries += struct.pack("<HHI", field.tag, field.kind, field.count) + body.ljust(4, b"\0")
    out.write(b"\0" * (out.tell() % 2))
    directory = out.tell()
    out.write(struct.pack("<H", len(fields)) + entries)
    next_link = out.tell()
    out.write(struct.pack("<I", 0))
    out.seek(link_at)
    out.write(struct.pack("<I", directory))
    out.seek(0, io.SEEK_END)
    return next_link


def write_pyramid(path: Path, rgb: npt.NDArray[np.uint8], mpp: float) -> None:
    """Write `rgb` (H, W, 3) uint8 with halved levels down to one tile; in place, not atomically.

    Args:
        mpp: microns per pixel of level 0; stored as pixels per centimetre, each level its own.

    Raises:
        OSError: the disk refused (ENOSPC and kin).
        ValueError: the picture would pass the 4 GiB of classic TIFF.
    """
    if rgb.size > 3 * 32_768**2:
        raise ValueError("classic TIFF ends at 4 GiB; draw a smaller slide")
    level = Image.fromarray(rgb)
    with path.open("wb") as out:
        out.write(b"II*\0" + struct.pack("<I", 0))
        link, number = 4, 0
        while True:
            link = _write_level(out, level, mpp * 2**number, number > 0, link)
            if max(level.size) <= TILE:
                return
            level = level.reduce(2)
            number += 1
