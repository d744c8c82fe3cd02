"""Nothing hides in a JPEG tile: its header follows from its size, and its coded part ends with its last block."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixcell_core.trust.tile_jpeg import _MARK, decode_jpeg_tile, encode_jpeg_tile, require_jpeg_form
from pixcell_core.trust.tile_jpeg_scan import jpeg_header, scan_is_whole
from pixcell_core.trust.tile_png import TilePngError

RNG = np.random.default_rng(11)
PIXELS = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)
DATA = encode_jpeg_tile(PIXELS)
HEAD = jpeg_header(40, 56, _MARK)
HIDDEN = RNG.integers(0, 255, 7000, dtype=np.uint8).tobytes()  # no 0xFF: no marker in it


def shown(data: bytes) -> bytes:
    """What a picture reader shows."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).tobytes()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (9, 17), (64, 64), (256, 200)])
def test_what_is_written_here_is_in_the_form(height: int, width: int) -> None:
    noise = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    for pixels in (noise, noise // 32, np.zeros_like(noise), np.full_like(noise, 255)):
        data = encode_jpeg_tile(pixels)
        assert data.startswith(jpeg_header(height, width, _MARK))
        assert require_jpeg_form(data) == (height, width)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 7), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_every_tile_ends_where_its_blocks_do(height: int, width: int, shift: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = encode_jpeg_tile(noise >> shift)
    assert require_jpeg_form(data) == (height, width)
    for more in (b"\x00", b"\xff\x00", b"\x55"):
        with pytest.raises(TilePngError):
            require_jpeg_form(data[:-2] + more + data[-2:])


def test_seven_kilobytes_before_the_end_are_seen() -> None:
    """A reader shows the very same picture: it stops at the last block."""
    mutant = DATA[:-2] + HIDDEN + DATA[-2:]
    assert shown(mutant) == shown(DATA)
    with pytest.raises(TilePngError, match="bytes besides"):
        decode_jpeg_tile(mutant)


def test_a_table_that_no_block_uses_is_seen() -> None:
    table = b"\xff\xdb\x00\x43\x02" + HIDDEN[:64]
    at = DATA.index(b"\xff\xc0")
    mutant = DATA[:at] + table + DATA[at:]
    assert shown(mutant) == shown(DATA)
    with pytest.raises(TilePngError, match="tables"):
        decode_jpeg_tile(mutant)


def test_other_tables_are_another_writer() -> None:
    out = io.BytesIO()
    options = {"quality": 95, "subsampling": 0, "comment": _MARK, "optimize": True}
    Image.fromarray(PIXELS).save(out, format="JPEG", **options)
    with pytest.raises(TilePngError, match="tables"):
        decode_jpeg_tile(out.getvalue())


def coded(*blocks: str, fill: str = "1") -> bytes:
    bits = "".join(blocks)
    bits += fill * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")


FLAT = ("00" + "1010", "00" + "00", "00" + "00")
"""One block of each component: no step from the block before, then its end (tables K.3 to K.6)."""
ZEROS = "11111111001"


@pytest.mark.parametrize(
    ("scan", "whole"),
    [
        (coded(*FLAT), True),
        (coded(*FLAT, fill="0"), False),
        (coded(*FLAT[:2]), False),
        (coded(*FLAT, "11111111"), False),
        (coded("00" + ZEROS + "1010", *FLAT[1:]), False),
        (coded("00" + ZEROS * 3 + "1010", *FLAT[1:]), False),
        (coded("00" + ZEROS * 4, *FLAT[1:]), False),
        (coded("00" + ZEROS * 3 + "001" * 14 + "1010", *FLAT[1:]), True),
        (coded("00" + "001" * 63, *FLAT[1:]), True),
        (coded("00" + "001" * 64, *FLAT[1:]), False),
        (coded("1" * 16), False),
        (b"", False),
    ],
)
def test_a_scan_by_hand(scan: bytes, whole: bool) -> None:
    assert scan_is_whole(scan, 8, 8) is whole
    if whole:
        assert decode_jpeg_tile(jpeg_header(8, 8, _MARK) + scan + b"\xff\xd9").shape == (8, 8, 3)


def test_a_small_scan_under_a_large_size_costs_little() -> None:
    assert not scan_is_whole(coded(*FLAT), 16_384, 16_384)
