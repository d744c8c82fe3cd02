"""A folder of image tiles, read in batches of equal size.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pixcell_core.errors import BadInputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})
MAX_TILE_PIXELS = 4096 * 4096
MIN_SIDE = 32


class TileFolder:
    """The PNG, JPEG and TIFF tiles below a folder, sorted by name; names are paths inside it with forward slashes.

    `file_kinds` and `sizes` are known once the tiles have been read: formats met, and (height, width) met.

    Raises:
        BadInputError: no such folder, or no tile in it.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise BadInputError(
                f"There is no folder {folder}.", hint="Give a folder of tiles.", code="no-such-folder"
            )
        self.folder = folder
        paths = sorted(
            p
            for p in folder.rglob("*")
            if p.suffix.lower() in SUFFIXES
            and p.is_file()
            and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        )
        if not paths:
            raise BadInputError(
                f"{folder} holds no tile; files ending in {', '.join(sorted(SUFFIXES))} are expected.",
                hint="Give the folder the tiles lie in.",
                code="no-tiles",
            )
        self.names = tuple(p.relative_to(folder).as_posix() for p in paths)
        self._paths = paths
        self.file_kinds: set[str] = set()
        self.sizes: set[tuple[int, int]] = set()

    @property
    def top_folders(self) -> tuple[str, ...]:
        """First sub-folder of each tile; empty text for tiles that lie in the folder itself."""
        return tuple(name.split("/", 1)[0] if "/" in name else "" for name in self.names)

    def batches(self, batch_size: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Pixels (B, H, W, 3) uint8 in the order of `names`; a batch ends where the size changes.

        Raises:
            BadInputError: a file that is no image, or one too small or too large for a tile.
        """
        pending: list[npt.NDArray[np.uint8]] = []
        for path in self._paths:
            pixels = self._read(path)
            if pending and (len(pending) == batch_size or pending[0].shape != pixels.shape):
                yield np.stack(pending)
                pending = []
            pending.append(pixels)
        if pending:
            yield np.stack(pending)

    def _read(self, path: Path) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(path) as image:
                width, height = image.size
                if min(width, height) < MIN_SIDE or width * height > MAX_TILE_PIXELS:
                    raise BadInputError(
                        f"{path.name} is {width}x{height} px; a tile of {MIN_SIDE} px a side to {MAX_TILE_PIXELS} px in "
                        "all is expected.",
                        hint="Cut tiles first.",
                        code="tile-size",
                    )
                compression = str(image.info.get("compression", "")).lower()
                inside = "/JPEG" if image.format == "TIFF" and "jpeg" in compression else ""
                pixels = np.asarray(image.convert("RGB"))
                self.file_kinds.add(f"{image.format}{inside}")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise BadInputError(
                f"{path.name} cannot be read as an image; PNG, JPEG or TIFF is expected.",
                hint="Copy the file again, or take it out of the folder.",
                code="tile-unreadable",
            ) from error
        self.sizes.add((height, width))
        return pixels
