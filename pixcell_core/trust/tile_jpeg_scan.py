"""The one byte form of a JPEG tile: its header follows from its size, and its coded part ends with its last block.

A decoder shows the picture whatever lies behind its last block, so the coded part is walked code by code (ITU-T T.81,
annex F.2.2). The tables are those of annex K, which the tile's encoder always writes; quantisation is quality 95's.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_DC_SYMBOLS = bytes(range(12))
_DC_LUMINANCE = bytes.fromhex("00010501010101010100000000000000")
"""How many codes there are of 1 to 16 bits (table K.3); the symbols above follow in their order."""
_DC_CHROMINANCE = bytes.fromhex("00030101010101010101010000000000")
"""Table K.4."""
_AC_LUMINANCE = bytes.fromhex("0002010303020403050504040000017d")
"""Table K.5, and its symbols: a run of zeros and a size of 4 bits each."""
_AC_LUMINANCE_SYMBOLS = bytes.fromhex(
    "01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728292a3435363738"
    "393a434445464748494a535455565758595a636465666768696a737475767778797a838485868788898a92939495969798999aa2a3a4a5"
    "a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
)
_AC_CHROMINANCE = bytes.fromhex("00020102040403040705040400010277")
"""Table K.6."""
_AC_CHROMINANCE_SYMBOLS = bytes.fromhex(
    "000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a162434e125f11718191a262728292a353637"
    "38393a434445464748494a535455565758595a636465666768696a737475767778797a82838485868788898a92939495969798999aa2a3"
    "a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"
)
_QUANTISATION = (
    bytes.fromhex(
        "0201010101010201010102020202020403020202020504040304060506060605"
        "060606070908060709070606080b08090a0a0a0a0a06080b0c0b0a0c090a0a0a"
    ),
    bytes.fromhex(
        "020202020202050303050a0706070a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a"
        "0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a"
    ),
)
"""Of luminance and chrominance, 64 steps each in zigzag order: tables K.1 and K.2, scaled to quality 95."""

_COVERS, _ZEROS = 6, 1 << 11
"""A step holds the bits to skip, above them the coefficients it covers, and whether it is a run of 16 zeros alone."""
_CHUNK, _BLOCK_BYTES = 1 << 13, 256
"""Bytes looked at together, and more than a block can take: 20 bits, and 63 times 26."""


def jpeg_header(height: int, width: int, mark: bytes) -> bytes:
    """Every byte before the coded part of a tile of this size in pixels, with the mark as its comment."""
    frame = (
        b"\x08"
        + height.to_bytes(2, "big")
        + width.to_bytes(2, "big")
        + b"\x03\x01\x11\x00\x02\x11\x01\x03\x11\x01"
    )
    codes = (
        (b"\x00", _DC_LUMINANCE, _DC_SYMBOLS),
        (b"\x10", _AC_LUMINANCE, _AC_LUMINANCE_SYMBOLS),
        (b"\x01", _DC_CHROMINANCE, _DC_SYMBOLS),
        (b"\x11", _AC_CHROMINANCE, _AC_CHROMINANCE_SYMBOLS),
    )
    return b"".join(
        [
            b"\xff\xd8",
            _segment(0xE0, b"JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"),
            _segment(0xFE, mark),
            *(_segment(0xDB, bytes([number]) + table) for number, table in enumerate(_QUANTISATION)),
            _segment(0xC0, frame),
            *(_segment(0xC4, b"".join(parts)) for parts in codes),
            _segment(0xDA, b"\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"),
        ]
    )


def scan_is_whole(coded: bytes, height: int, width: int) -> bool:
    """Whether the coded part of a tile, its end marker taken off, holds all its blocks and not a bit besides.

    Blocks stand one of each component in turn, 8 x 8 pixels. The last byte is filled with ones. A run of zeros
    before the end of a block, which shows nothing, is refused as well.
    """
    plain = coded.replace(b"\xff\x00", b"\xff")
    total = 8 * len(plain)
    luminance, chrominance = _tables()
    low, at = 0, 0  # the byte the words begin at, and the next bit from there
    words = _words(plain, low)
    for _ in range(-(-height // 8) * -(-width // 8)):
        for first, rest in (luminance, chrominance, chrominance):
            if at >> 3 > _CHUNK - _BLOCK_BYTES:
                low, at = low + (at >> 3), at & 7
                words = _words(plain, low)
            step = first[words[at >> 3] >> 8 - (at & 7) & 0xFFFF]
            if not step:
                return False
            at += step & 63
            covered, zeros = 1, 0
            while covered < 64:
                step = rest[words[at >> 3] >> 8 - (at & 7) & 0xFFFF]
                at += step & 63
                if step < 64:  # no code at all, or the end of the block
                    if not step or zeros:
                        return False
                    break
                covered += step >> _COVERS & 31
                zeros = step & _ZEROS
            else:
                if covered > 64 or zeros:
                    return False
        if 8 * low + at > total:
            return False
    left = total - 8 * low - at
    filled = (1 << left) - 1
    return left < 8 and (not left or plain[-1] & filled == filled)


def _segment(kind: int, body: bytes) -> bytes:
    return bytes([0xFF, kind]) + (len(body) + 2).to_bytes(2, "big") + body


def _words(plain: bytes, start: int) -> list[int]:
    """For each of the next bytes, that byte and the two behind it as one number; zeros behind the end."""
    length = _CHUNK + 2
    piece = np.frombuffer(plain[start : start + length].ljust(length, b"\0"), np.uint8).astype(np.int64)
    words: list[int] = (piece[:-2] << 16 | piece[1:-1] << 8 | piece[2:]).tolist()
    return words


@lru_cache(maxsize=1)
def _tables() -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """Steps by the next 16 bits: for the first coefficient and the others, of luminance and of chrominance."""
    return (
        (_steps(_DC_LUMINANCE, _DC_SYMBOLS), _steps(_AC_LUMINANCE, _AC_LUMINANCE_SYMBOLS)),
        (_steps(_DC_CHROMINANCE, _DC_SYMBOLS), _steps(_AC_CHROMINANCE, _AC_CHROMINANCE_SYMBOLS)),
    )


def _steps(counts: bytes, symbols: bytes) -> list[int]:
    """What each 16 bits begin with (annex C): the bits of the code and of the number behind it, and what it covers."""
    steps: npt.NDArray[np.int64] = np.zeros(1 << 16, np.int64)
    left, code = iter(symbols), 0
    for length, count in enumerate(counts, start=1):
        for _ in range(count):
            symbol = next(left)
            run, size = symbol >> 4, symbol & 15
            covers = run + 1 if symbol else 0  # 0 ends the block; of a first coefficient nobody asks
            zeros = _ZEROS if run == 15 and not size else 0
            steps[code << 16 - length : code + 1 << 16 - length] = length + size | covers << _COVERS | zeros
            code += 1
        code <<= 1
    found: list[int] = steps.tolist()
    return found
