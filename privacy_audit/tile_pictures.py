"""One tile from one picture file: decoded as it would be released, or refused with the reason."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pixcell_core.errors import BadInputError

MAX_TILE_PIXELS = 4096 * 4096
MAX_FILE_BYTES = 256 * 1024 * 1024
MIN_SIDE = 32


class TileError(BadInputError):
    """A folder of tiles cannot be read as the audit needs it."""

    default_code = "bad-tiles"


def decode_tile(path: Path) -> npt.NDArray[np.uint8]:
    """Decode one tile as uint8 (H, W, 3), refusing what is too large, truncated or no image.

    Raises:
        TileError: with the file's name and the reason.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise TileError(
                f"{path.name} has {size} bytes: too large for a tile.",
                hint="Give tiles, not slides.",
                code="tile-too-large",
            )
        with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG", "JPEG", "TIFF")) as image:
            if image.width * image.height > MAX_TILE_PIXELS or min(image.size) < MIN_SIDE:
                raise TileError(
                    f"{path.name} is {image.width}×{image.height}: a tile has sides of {MIN_SIDE} to 4096 pixels.",
                    hint="Cut slides into tiles first.",
                    code="tile-size",
                )
            _refuse_other_pictures(image, path.name)
            return np.array(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TileError(
            f"{path.name} cannot be decoded: it is truncated or no PNG, JPEG or TIFF.",
            hint="Write the tile again, or take it out of the folder.",
            code="tile-unreadable",
        ) from error


def _refuse_other_pictures(image: Image.Image, name: str) -> None:
    """Refuse what would be changed by reading it as 8-bit RGB: another tile than the one released would be judged."""
    what = ""
    if getattr(image, "n_frames", 1) > 1:
        what = f"holds {image.n_frames} pictures"  # type: ignore[attr-defined]
    elif image.mode not in ("1", "L", "P", "RGB", "RGBA"):
        what = f"is of the kind {image.mode}"
    elif _bits(image) > 8:
        what = f"has {_bits(image)} bits per channel"
    elif image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        what = "has transparent parts"
    if what:
        raise TileError(
            f"{name} {what}; a tile is one opaque picture of 8 bits per channel.",
            hint="Write the tile again as 8-bit RGB, and audit what you wrote.",
            code="tile-kind",
        )


def _bits(image: Image.Image) -> int:
    """Bits per channel in the file: the reader silently halves 16-bit colours."""
    if image.format == "PNG":
        stream = getattr(image, "fp", None)
        if stream is not None:
            place = stream.tell()
            stream.seek(24)  # IHDR: signature 8, length 4, type 4, width 4, height 4
            depth = stream.read(1)
            stream.seek(place)
            return depth[0] if depth else 8
    if image.format == "TIFF":
        found = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined] # BitsPerSample
        return int(max(found)) if isinstance(found, tuple) else int(found)
    return 8


def pixel_digest(pixels: npt.NDArray[np.uint8]) -> str:
    """``sha256:<hex>`` over the shape and the decoded pixels (H, W, 3) of one tile."""
    head = f"{pixels.shape[0]}x{pixels.shape[1]}:".encode()
    return "sha256:" + hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()
