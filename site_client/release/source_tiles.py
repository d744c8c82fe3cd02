"""Reading the generator's tiles for a draft: pixels alone come through, names, metadata and order stay behind."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pixcell_core.contracts.canonical import load_document, read_bounded
from pixcell_core.contracts.release import MAX_TILES, GenerationRecord
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.tile_png import MAX_SIDE, MAX_TILE_BYTES

SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg"})
RECORD, TABLE = "generation.json", "tiles.csv"
TABLE_COLUMNS = ("file", "label", "condition", "patient", "site", "scanner")

SITE_ONLY_MARK = "site only"
"""Text by which the audit marks images and pages that show real tiles. Whatever carries it never leaves."""


class SourceTileError(BadInputError):
    """The generator's folder cannot be drafted as it is."""

    default_code = "bad-source-tiles"


class SiteOnlyError(RefusedError):
    """Something marked as for the site's own eyes was about to leave."""

    default_code = "site-only"


@dataclass(frozen=True)
class SourceTile:
    """One tile as the generator wrote it: where it lies, and its label and condition if a table gives them."""

    path: Path
    label: str | None
    condition: str


@dataclass(frozen=True)
class SourceTiles:
    """The generator's tiles and its record of how it made them."""

    record: GenerationRecord
    tiles: tuple[SourceTile, ...]

    def decode(self) -> Iterator[tuple[SourceTile, npt.NDArray[np.uint8]]]:
        """Each tile with its pixels, uint8 (H, W, 3); all of one size."""
        size: tuple[int, ...] | None = None
        for tile in self.tiles:
            pixels = _decode(tile.path)
            if size is not None and pixels.shape != size:
                raise SourceTileError(
                    f"{tile.path.name} has {pixels.shape[1]}×{pixels.shape[0]} pixels, others {size[1]}×{size[0]}.",
                    hint="Release tiles of one size at a time.",
                )
            size = pixels.shape
            yield tile, pixels


def read_source(folder: Path, record_file: Path | None) -> SourceTiles:
    """Find the tiles of a folder and the record of their making."""
    if not folder.is_dir():
        raise SourceTileError(
            f"There is no folder {folder}.", hint="Give the folder that the generator wrote."
        )
    record_path = record_file or folder / RECORD
    if not record_path.is_file():
        raise SourceTileError(
            f"{record_path} is missing: without it nobody can say how these tiles were made.",
            hint="Draft from a folder written by `pixcell site generate`, or give the record with --generation.",
            code="no-generation-record",
        )
    record = load_document(GenerationRecord, record_path)
    paths = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )
    if not paths:
        raise SourceTileError(f"{folder} holds no tiles.", hint="Tiles are PNG, TIFF or JPEG files.")
    if len(paths) > MAX_TILES:
        raise SourceTileError(
            f"{folder} holds {len(paths)} tiles; one release takes at most {MAX_TILES}.",
            hint="Split it into several releases.",
        )
    rows = _table(folder)
    tiles = []
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise SourceTileError(
                f"{path.name} is a link or a special file.", hint="Copy the tile itself into the folder."
            )
        row = rows.get(path.relative_to(folder).as_posix(), {})
        label = row.get("label") or record.labels.get(path.name)
        tiles.append(SourceTile(path, label or None, row.get("condition", "")))
    return SourceTiles(record, tuple(tiles))


def _table(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / TABLE
    if not path.is_file():
        return {}
    try:
        text = read_bounded(path).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        unknown = [name for name in reader.fieldnames or () if name not in TABLE_COLUMNS]
        if "file" not in (reader.fieldnames or ()) or unknown:
            raise SourceTileError(
                f"{TABLE} has {f'the unknown column {unknown[0]!r}' if unknown else 'no column file'}.",
                hint=f"Columns are: {', '.join(TABLE_COLUMNS)}.",
            )
        return {row["file"]: {k: v or "" for k, v in row.items() if k} for row in reader}
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceTileError(f"{TABLE} cannot be read: {error}.", hint="Save it as UTF-8 CSV.") from error


def _decode(path: Path) -> npt.NDArray[np.uint8]:
    data = read_bounded(path, MAX_TILE_BYTES)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
            if max(image.size) > MAX_SIDE:
                raise SourceTileError(f"{path.name} is too large for a tile.", hint="Give tiles, not slides.")
            if any(SITE_ONLY_MARK in str(value).lower() for value in image.info.values()):
                raise SiteOnlyError(
                    f"{path.name} is marked for the site's own eyes: it shows real tiles.",
                    hint="Take it out of the folder. The audit's gallery never leaves the site.",
                )
            return np.array(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SourceTileError(
            f"{path.name} cannot be decoded: it is truncated or not an image.",
            hint="Generate the tile again, or take it out of the folder.",
        ) from error
