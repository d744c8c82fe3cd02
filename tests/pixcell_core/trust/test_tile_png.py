"""Tiles leave as marked PNG without metadata, with their pixels unchanged."""

from __future__ import annotations

import io
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pixcell_core.trust.tile_png import (
    MARK_TEXT,
    TilePngError,
    decode_tile,
    encode_tile,
    pixel_digest,
    require_png_form,
)


def tile(seed: int = 1, height: int = 40, width: int = 33) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_pixels_survive(height: int, width: int, seed: int) -> None:
    pixels = tile(seed, height, width)
    data = encode_tile(pixels)
    assert np.array_equal(decode_tile(data), pixels)
    assert encode_tile(pixels) == data
    with Image.open(io.BytesIO(data)) as image:
        assert image.info == {"Synthetic": MARK_TEXT}


def test_pixel_digest_sees_shape_and_every_pixel() -> None:
    pixels = tile()
    other = pixels.copy()
    other[3, 4, 1] ^= 1
    assert pixel_digest(pixels) == pixel_digest(pixels[::1].copy())
    assert len({pixel_digest(p) for p in (pixels, other, pixels.reshape(33, 40, 3))}) == 3
    assert pixel_digest(np.asfortranarray(pixels)) == pixel_digest(pixels)


def test_everything_else_is_refused() -> None:
    good = encode_tile(tile())
    end = chunk(b"IEND", b"")
    plain = io.BytesIO()
    Image.fromarray(tile()).save(plain, format="PNG")
    double = PngImagePlugin.PngInfo()
    double.add_text("Synthetic", MARK_TEXT)
    double.add_text("Synthetic", MARK_TEXT)
    other_words = PngImagePlugin.PngInfo()
    other_words.add_text("Synthetic", "no")
    mutants = {
        "no mark": plain.getvalue(),
        "grey": _saved(Image.fromarray(tile()).convert("L")),
        "alpha": _saved(Image.fromarray(tile()).convert("RGBA")),
        "resolution": _saved(Image.fromarray(tile()), dpi=(96, 96)),
        "two marks": _saved(Image.fromarray(tile()), info=double),
        "other words": _saved(Image.fromarray(tile()), info=other_words),
        "jpeg": _saved(Image.fromarray(tile()), form="JPEG"),
        "trailing": good + b"\0",
        "second end": good + end,
        "private chunk": good.replace(end, chunk(b"prVt", b"patient 7") + end),
        "time": good.replace(end, chunk(b"tIME", b"\x07\xea\x03\x01\x00\x00\x00") + end),
        "exif": good.replace(end, chunk(b"eXIf", b"II*\0") + end),
        "no end": good.removesuffix(end),
        "half": good[: len(good) // 2],
        "empty": b"",
        "huge": good.replace(good[16:24], (2**31 - 1).to_bytes(4, "big") * 2),
        "no pixels": good[: good.index(b"IDAT") - 4] + end,
    }
    for name, data in mutants.items():
        with pytest.raises(TilePngError):
            decode_tile(data, name=name)


HIDDEN = np.random.default_rng(7).bytes(18_000)
END = chunk(b"IEND", b"")


def rebuilt(parts: list[bytes], before: bytes = b"", end: bytes = END) -> bytes:
    """The tile with other pixel chunks: what a writer of one's own would leave."""
    good = encode_tile(tile())
    head = good[: good.index(b"IDAT") - 4]
    return head + before + b"".join(chunk(b"IDAT", part) for part in parts) + end


def rows(pixels: npt.NDArray[np.uint8]) -> bytes:
    """The bytes below the compression: a filter byte (none) before each row (PNG, 9.2)."""
    plain = pixels.reshape(pixels.shape[0], -1)
    return np.concatenate([np.zeros((plain.shape[0], 1), np.uint8), plain], axis=1).tobytes()


def test_the_same_rows_in_another_stream_are_a_tile() -> None:
    assert np.array_equal(decode_tile(rebuilt([zlib.compress(rows(tile()))])), tile())


def test_nothing_hides_beside_the_pixels() -> None:
    """Every picture reader shows these as the tile that was audited; each holds bytes that no reader looks at."""
    raw = rows(tile())
    stream = zlib.compress(raw)
    empty_blocks = stream[:2] + b"\x00\x00\x00\xff\xff" * 3000 + stream[2:]
    mutants = {
        "a chunk after the stream's end": rebuilt([stream, HIDDEN]),
        "bytes after the stream's end": rebuilt([stream + HIDDEN]),
        "a second stream": rebuilt([stream + zlib.compress(HIDDEN)]),
        "rows below the picture": rebuilt([zlib.compress(raw + HIDDEN)]),
        "a bomb below the picture": rebuilt([zlib.compress(raw + bytes(30_000_000))]),
        "blocks that hold nothing": rebuilt([empty_blocks]),
        "an end with a body": rebuilt([stream], end=chunk(b"IEND", HIDDEN)),
        "cuts that spell": rebuilt([stream[at : at + 7] for at in range(0, len(stream), 7)]),
        "empty chunks": rebuilt([stream, b"", b""]),
        "two ends": rebuilt([stream], end=END + END),
        "a header twice": rebuilt([stream], before=encode_tile(tile())[8:33]),
        "too few rows": rebuilt([zlib.compress(raw[:-1])]),
        "no checksum": rebuilt([stream[:-1]]),
    }
    for name, data in mutants.items():
        with pytest.raises(TilePngError):
            decode_tile(data, name=name)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (256, 256), (300, 1000), (33, 5000)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_written_here_is_in_the_form(height: int, width: int, seed: int) -> None:
    noise = tile(seed, height, width)
    for pixels in (noise, noise // 16, np.zeros_like(noise)):
        assert require_png_form(encode_tile(pixels)) == (height, width)


def _saved(
    image: Image.Image,
    *,
    form: str = "PNG",
    info: PngImagePlugin.PngInfo | None = None,
    dpi: tuple[int, int] | None = None,
) -> bytes:
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Synthetic", MARK_TEXT)
    out = io.BytesIO()
    options: dict[str, object] = {"pnginfo": info or mark} if form == "PNG" else {}
    if dpi:
        options["dpi"] = dpi
    image.save(out, format=form, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_only_rgb_bytes_are_encoded(pixels: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(TilePngError):
        encode_tile(pixels)
