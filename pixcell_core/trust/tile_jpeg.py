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
from pixcell_core.trust.tile_png import (
    MARK_KEYWORD,
    MARK_TEXT,
    MAX_SIDE,
    MAX_TILE_BYTES,
    TilePngError,
    decode_tile,
    encode_tile,
)

JPEG_QUALITY = 95

_MARK = f"{MARK_KEYWORD}: {MARK_TEXT}".encode("latin-1")
_JFIF = b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_APP0, _COM, _DQT, _SOF0, _DHT, _SOS = 0xE0, 0xFE, 0xDB, 0xC0, 0xC4, 0xDA
_MAX_TABLES = 4


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


def decode_jpeg_tile(data: bytes, *, name: str = "tile") -> npt.NDArray[np.uint8]:
    """Pixels of a marked tile, uint8 (H, W, 3). Refuses metadata, thumbnails, and tiles without the mark."""
    if len(data) > MAX_TILE_BYTES or not data.startswith(b"\xff\xd8"):
        raise _wrong(name, "it is not a JPEG file of a tile's size")
    seen: list[int] = []
    at = 2
    while not seen or seen[-1] != _SOS:
        kind, length = data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if data[at : at + 1] != b"\xff" or not kind or length < 2 or len(body) != length - 2:
            raise _wrong(name, "it is cut off or damaged")
        _check_segment(kind[0], body, name)
        seen.append(kind[0])
        at += 2 + length
    _check_scan(data[at:], name)
    once = (_APP0, _SOF0, _SOS)
    if seen.count(_COM) != 1:
        raise _wrong(name, "it lacks the one mark that says it is synthetic")
    if any(seen.count(kind) != 1 for kind in once) or max(seen.count(_DQT), seen.count(_DHT)) > _MAX_TABLES:
        raise _wrong(name, "its parts are not those of one baseline picture")
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


def _check_segment(kind: int, body: bytes, name: str) -> None:
    if kind == _APP0:
        fits = body == _JFIF
    elif kind == _COM:
        fits = body == _MARK
    elif kind == _DQT:
        fits = len(body) == 65 and body[0] < _MAX_TABLES
    elif kind == _DHT:
        fits = len(body) >= 17 and len(body) == 17 + sum(body[1:17])
    elif kind == _SOF0:
        height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
        sides = 0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE
        fits = len(body) == 15 and body[0] == 8 and sides and body[5] == 3 and set(body[7::3]) == {0x11}
    elif kind == _SOS:
        fits = len(body) == 10 and body[0] == 3
    else:
        raise _wrong(name, f"it carries a segment of kind {kind:02X}, and metadata may not leave")
    if not fits:
        raise _wrong(name, f"its segment of kind {kind:02X} is not as it is written here")


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
