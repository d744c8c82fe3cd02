"""The JPEG form of a tile: one mark, no metadata, the same pixels each time; everything else is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixcell_core.errors import PixcellError
from pixcell_core.trust.tile_jpeg import (
    _MARK,
    decode_jpeg_tile,
    decode_named,
    encode_as,
    encode_jpeg_tile,
)
from pixcell_core.trust.tile_png import TilePngError, encode_tile

RNG = np.random.default_rng(4)
PIXELS = np.kron(RNG.integers(0, 255, (6, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
DATA = encode_jpeg_tile(PIXELS)


def segments(data: bytes) -> list[int]:
    """Kinds of the segments before the coded picture, read with nothing of ours."""
    at, kinds = 2, []
    while data[at + 1] != 0xDA:
        kinds.append(data[at + 1])
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return kinds


def test_pixels_come_back_nearly_and_the_mark_is_the_only_text() -> None:
    decoded = decode_jpeg_tile(DATA)
    assert decoded.shape == PIXELS.shape
    assert np.abs(decoded.astype(int) - PIXELS).mean() < 3
    with Image.open(io.BytesIO(DATA)) as image:
        assert image.info["comment"] == _MARK and not image.getexif()
        assert np.array_equal(np.asarray(image), decoded)
    assert set(segments(DATA)) == {0xE0, 0xFE, 0xDB, 0xC0, 0xC4}


def test_the_same_pixels_give_the_same_bytes_and_each_form_its_own_decoder() -> None:
    assert encode_jpeg_tile(PIXELS) == DATA == encode_as(PIXELS, "jpg")
    assert np.array_equal(decode_named(encode_as(PIXELS, "png"), "00001.png"), PIXELS)
    for data, name in ((DATA, "00001.png"), (encode_tile(PIXELS), "00001.jpg")):
        with pytest.raises(TilePngError):
            decode_named(data, name)


def saved(**options: object) -> bytes:
    out = io.BytesIO()
    settings_ = {"quality": 95, "subsampling": 0, "comment": _MARK, **options}
    Image.fromarray(PIXELS).save(out, format="JPEG", **settings_)
    return out.getvalue()


def with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "patient 7"
    return saved(exif=exif)


def grey() -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS[:, :, 0]).save(out, format="JPEG", comment=_MARK)
    return out.getvalue()


def cmyk() -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).convert("CMYK").save(out, format="JPEG", comment=_MARK)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        saved(comment=b"patient 7"),
        saved(comment=None),
        with_exif(),
        saved(dpi=(300, 300)),
        saved(icc_profile=b"x" * 200),
        saved(progressive=True),
        saved(subsampling=2),
        saved(restart_marker_blocks=1),
        grey(),
        cmyk(),
        DATA + b"hidden",
        DATA + DATA,
        DATA[:-2],
        DATA[:200],
        b"\xff\xd8",
        b"",
        DATA[:2] + b"\xff\xfe" + (len(_MARK) + 2).to_bytes(2, "big") + _MARK + DATA[2:],
        DATA[:2] + b"\xff\xe1\x00\x08secret" + DATA[2:],
        DATA[:-2] + b"\xff\xd0" + DATA[-2:],
    ],
)
def test_other_files_are_not_tiles(data: bytes) -> None:
    with pytest.raises(TilePngError):
        decode_jpeg_tile(data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_bytes_crash_the_decoder(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(DATA)))
    piece = data.draw(st.binary(max_size=6))
    mutant = DATA[:at] + piece + DATA[at + data.draw(st.integers(0, 6)) :]
    try:
        decoded = decode_jpeg_tile(mutant)
    except PixcellError:
        return
    assert decoded.dtype == np.uint8 and decoded.shape[2] == 3
    with Image.open(io.BytesIO(mutant)) as image:
        assert image.info["comment"] == _MARK, "whatever decodes carries the mark"


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3)])
def test_what_is_no_tile(shape: tuple[int, ...]) -> None:
    with pytest.raises(TilePngError):
        encode_jpeg_tile(np.zeros(shape, np.uint8))
