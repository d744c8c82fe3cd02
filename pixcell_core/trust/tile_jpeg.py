"""The smaller form in which a surrogate tile may leave: baseline JPEG, no metadata but the synthetic mark.

Colour is never subsampled, so that decoding is the integer transform alone and gives the same pixels everywhere.
Segments as in ITU-T T.81, annex B.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from pixcell_core.contracts.release import TileFormat
from pixcell_core.trust.tile_jpeg_scan import jpeg_header, scan_is_whole
from pixcell_core.trust.tile_png import (
    MARK_KEYWORD,
    MARK_TEXT,
    MAX_SIDE,
    MAX_TILE_BYTES,
    TilePngError,
    decode_tile,
    encode_tile,
    require_png_form,
)

JPEG_QUALITY = 95

_MARK = f"{MARK_KEYWORD}: {MARK_TEXT}".encode("latin-1")
_APP0, _COM, _DQT, _SOF0, _DHT, _SOS = 0xE0, 0xFE, 0xDB, 0xC0, 0xC4, 0xDA
_KINDS = frozenset({_APP0, _COM, _DQT, _SOF0, _DHT, _SOS})


class TileJpegError(TilePngError):
    """A file is not a JPEG tile in the form that leaves."""


def encode_jpeg_tile(pixels: npt.NDArray[np.uint8]) -> bytes:
    """JPEG bytes of one tile, uint8 (H, W, 3), quality 95, with the mark as its only comment."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise TileJpegError(
            f"A tile is uint8 (H, W, 3), this is {pixels.dtype} {pixels.shape}.",
            hint="Give decoded RGB pixels.",
        )
    out = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(out, format="JPEG", quality=JPEG_QUALITY, subsampling=0, comment=_MARK)
    return out.getvalue()


def require_jpeg_form(data: bytes, *, name: str = "tile") -> tuple[int, int]:
    """Height and width (px) of a file that holds one coded picture and the mark, in the form written here, and no more.

    Every byte before the coded part follows from the size, and the coded part ends with its last block.
    """
    if len(data) > MAX_TILE_BYTES or not data.startswith(b"\xff\xd8"):
        raise _wrong(name, "it is not a JPEG file of a tile's size")
    height = width = 0
    kind, at = 0, 2
    while kind != _SOS:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if data[at : at + 1] != b"\xff" or length < 2 or len(body) != length - 2:
            raise _wrong(name, "it is cut off or damaged")
        kind = data[at + 1]
        if kind not in _KINDS:
            raise _wrong(name, f"it carries a segment of kind {kind:02X}, and metadata may not leave")
        if kind == _SOF0:
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        at += 2 + length
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise _wrong(name, "it is not of a tile's size")
    if data[:at] != jpeg_header(height, width, _MARK):
        raise _wrong(name, "its mark, tables or parts are not as they are written here")
    scan = data[at:]
    _check_scan(scan, name)
    if not scan_is_whole(scan[:-2], height, width):
        raise _wrong(name, "its coded part holds less than its pixels, or bytes besides")
    return height, width


def decode_jpeg_tile(data: bytes, *, name: str = "tile") -> npt.NDArray[np.uint8]:
    """Pixels of a marked tile, uint8 (H, W, 3). Refuses metadata, tiles without the mark, and hidden bytes."""
    require_jpeg_form(data, name=name)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.mode != "RGB":
                raise _wrong(name, "it is not RGB")
            return np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _wrong(name, "its pixels cannot be decoded") from error


def encode_as(pixels: npt.NDArray[np.uint8], form: TileFormat) -> bytes:
    """One tile, uint8 (H, W, 3), in the form asked for."""
    return encode_jpeg_tile(pixels) if form == "jpg" else encode_tile(pixels)


def decode_named(data: bytes, name: str) -> npt.NDArray[np.uint8]:
    """Pixels of a tile in the form its name says, uint8 (H, W, 3)."""
    if name.endswith(".jpg"):
        return decode_jpeg_tile(data, name=name)
    return decode_tile(data, name=name)


def require_named_form(data: bytes, name: str) -> tuple[int, int]:
    """Height and width (px) of a tile in the one form that its name says; refuses whatever else the file holds."""
    if name.endswith(".jpg"):
        return require_jpeg_form(data, name=name)
    return require_png_form(data, name=name)


def _check_scan(scan: bytes, name: str) -> None:
    """The coded picture ends with the file, and no other marker stands in it."""
    if not scan.endswith(b"\xff\xd9"):
        raise _wrong(name, "it is cut off, or bytes follow its end")
    coded = np.frombuffer(scan[:-2], np.uint8)
    marked = np.flatnonzero(coded == 0xFF) + 1
    if marked.size and (marked[-1] >= coded.size or coded[marked].any()):
        raise _wrong(name, "another picture or marker stands in its coded part")


def _wrong(name: str, why: str) -> TileJpegError:
    return TileJpegError(
        f"{name} is not a releasable tile: {why}.", hint="Draft the release again from its tiles."
    )
