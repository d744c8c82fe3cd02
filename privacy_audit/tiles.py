"""Where tiles come from: a feature store or a folder of images, behind one small protocol."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from privacy_audit.tile_pictures import TileError as TileError
from privacy_audit.tile_pictures import decode_tile as decode_tile
from privacy_audit.tile_pictures import pixel_digest as pixel_digest

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})
TABLE = "tiles.csv"
TABLE_COLUMNS = ("file", "patient", "site", "scanner", "label", "condition")
UNKNOWN = ""


class TileSource(Protocol):
    """A set of equally large tiles. All sequences have one entry per tile, in one fixed order."""

    name: str

    @property
    def ids(self) -> Sequence[str]:
        """Tile names, unique inside the source."""

    @property
    def patients(self) -> Sequence[str]:
        """Patient of each tile; empty text where unknown (synthetic tiles)."""

    @property
    def strata(self) -> Sequence[str]:
        """Label, site and scanner of each tile in one text; empty where unknown."""

    @property
    def classes(self) -> Sequence[str]:
        """Class (diagnosis, label) of each tile; empty text where unknown."""

    @property
    def folder(self) -> Path:
        """Where the tiles lie; evidence about them is searched beside it."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Pixels of tiles start..stop-1, uint8 (B, 3, H, W)."""

    def file_digests(self) -> list[str]:
        """``sha256:<hex>`` of each tile's file, or of its decoded pixels where it has no file of its own."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    tile: str
    patient: str
    stratum: str
    condition: str
    label: str = UNKNOWN


class ImageFolder:
    """PNG, JPEG or TIFF tiles in a folder; the patient is a column of `tiles.csv` or else the first sub-folder.

    `patients` maps tiles to patients where neither of these does; see `read_patients`.
    """

    def __init__(
        self, folder: Path, *, name: str, needs_patients: bool, patients: Mapping[str, str] | None = None
    ) -> None:
        self.name, self._folder = name, folder
        table = _read_table(folder / TABLE) if (folder / TABLE).is_file() else None
        self._entries = _table_entries(folder, table) if table is not None else _walk(folder)
        if patients is not None:
            self._entries = [_with_patient(entry, folder, patients) for entry in self._entries]
        if not self._entries:
            raise TileError(
                f"The {name} folder {folder} holds no tiles.",
                hint="Put PNG, JPEG or TIFF tiles into it (in one sub-folder per patient), or give a feature store.",
                code="no-tiles",
            )
        if needs_patients and any(not entry.patient for entry in self._entries):
            raise TileError(
                f"Some tiles of the {name} folder have no patient.",
                hint=f"Sort them into one sub-folder per patient, or add {TABLE} with the columns file,patient.",
                code="no-patients",
            )
        self._shape: tuple[int, ...] | None = None

    @property
    def ids(self) -> Sequence[str]:
        """Paths of the tiles inside the folder."""
        return [entry.tile for entry in self._entries]

    @property
    def patients(self) -> Sequence[str]:
        """Patient of each tile."""
        return [entry.patient for entry in self._entries]

    @property
    def strata(self) -> Sequence[str]:
        """Label, site and scanner of each tile."""
        return [entry.stratum for entry in self._entries]

    @property
    def classes(self) -> Sequence[str]:
        """Label of each tile in `tiles.csv`."""
        return [entry.label for entry in self._entries]

    @property
    def folder(self) -> Path:
        """The folder itself."""
        return self._folder

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Decode tiles start..stop-1 as uint8 (B, 3, H, W)."""
        tiles = []
        for entry in self._entries[start:stop]:
            pixels = decode_tile(entry.path)
            if self._shape is None:
                self._shape = pixels.shape
            if pixels.shape != self._shape:
                raise TileError(
                    f"Tiles of the {self.name} folder differ in size: {entry.path.name} has "
                    f"{pixels.shape[1]}×{pixels.shape[0]} pixels, others {self._shape[1]}×{self._shape[0]}.",
                    hint="Audit tiles of one size at a time.",
                    code="mixed-tile-sizes",
                )
            tiles.append(torch.from_numpy(pixels).permute(2, 0, 1))
        return torch.stack(tiles)

    def file_digests(self) -> list[str]:
        """SHA-256 of each file's bytes."""
        return ["sha256:" + hashlib.sha256(entry.path.read_bytes()).hexdigest() for entry in self._entries]


class StoreTiles:
    """Tiles of a feature store, read patient by patient from memory-mapped shards."""

    def __init__(self, folder: Path, *, name: str) -> None:
        from pixcell_core.training.feature_store import FeatureStore

        self.name, self._folder = name, folder
        self._store = FeatureStore.open(folder)
        self._ids: list[str] = []
        self._patients: list[str] = []
        self._strata: list[str] = []
        self._places: list[tuple[str, int]] = []
        for patient in self._store.patients:
            labels = self._store.labels(patient)
            for row, tile in enumerate(self._store.tiles(patient)):
                self._ids.append(f"{patient}/{tile}")
                self._patients.append(patient)
                self._strata.append(labels[row] or UNKNOWN)
                self._places.append((patient, row))
        if not self._ids:
            raise TileError(
                f"The {name} store {folder} holds no tiles.",
                hint="Extract features again and look at what was skipped.",
                code="no-tiles",
            )

    @property
    def ids(self) -> Sequence[str]:
        """Patient and tile name."""
        return self._ids

    @property
    def patients(self) -> Sequence[str]:
        """Patient of each tile."""
        return self._patients

    @property
    def strata(self) -> Sequence[str]:
        """Label of each tile."""
        return self._strata

    @property
    def classes(self) -> Sequence[str]:
        """Label of each tile."""
        return self._strata

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self._folder

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Pixels of tiles start..stop-1 as uint8 (B, 3, H, W)."""
        parts: list[torch.Tensor] = []
        at = start
        while at < min(stop, len(self._places)):
            patient, row = self._places[at]
            pixels = self._store.pixels(patient)
            take = min(len(pixels) - row, stop - at)
            parts.append(pixels[row : row + take])
            at += take
        return torch.cat(parts)

    def file_digests(self) -> list[str]:
        """SHA-256 of each tile's decoded pixels: tiles of a store have no file of their own."""
        out: list[str] = []
        for start in range(0, len(self._ids), 256):
            out += [pixel_digest(tile) for tile in self.read(start, start + 256).permute(0, 2, 3, 1).numpy()]
        return out


def open_tiles(
    folder: Path | str, *, name: str, needs_patients: bool, patients: Mapping[str, str] | None = None
) -> TileSource:
    """Open a feature store (it has `index.parquet`) or a folder of images.

    Args:
        patients: tiles to patients, for folders alone; see `read_patients`.

    Raises:
        TileError: no such folder, no tiles, tiles without a patient where one is needed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise TileError(
            f"The {name} folder {path} does not exist.",
            hint="Give a folder of tiles or a feature store.",
            code="no-folder",
        )
    if (path / "index.parquet").is_file():
        return StoreTiles(path, name=name)
    return ImageFolder(path, name=name, needs_patients=needs_patients, patients=patients)


def require_one_size(*sources: TileSource) -> None:
    """Refuse groups of tiles whose first tiles differ in size: their fields and their copies cannot be compared.

    Raises:
        TileError: with both sizes.
    """
    sizes = {source.name: tuple(source.read(0, 1).shape[-2:]) for source in sources}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {width}×{height}" for name, (height, width) in sizes.items())
        raise TileError(
            f"The groups of tiles differ in size: {said} pixels.",
            hint="Cut or resize all tiles to one size and one resolution before the audit.",
            code="mixed-tile-sizes",
        )


def read_patients(path: Path) -> dict[str, str]:
    """Read a CSV with the columns `file,patient`.

    `file` is a tile's path inside its folder, with the folder's own name before it where two folders have tiles
    of one path (`train/0.png`, `holdout/0.png`).

    Raises:
        TileError: no such columns, an empty cell, or a file named twice.
    """
    found: dict[str, str] = {}
    for row in _read_table(path):
        file, patient = Path(row["file"]).as_posix(), row.get("patient", "")
        if not row["file"] or not patient or file in found:
            raise TileError(
                f"{path.name} has a row without a patient, or names {file!r} twice.",
                hint="Give one row per tile: file,patient.",
                code="bad-table",
            )
        found[file] = patient
    if not found:
        raise TileError(f"{path.name} names no tile.", hint="Give rows: file,patient.", code="bad-table")
    return found


def _walk(folder: Path) -> list[_Entry]:
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        inside = path.relative_to(folder)
        patient = inside.parts[0] if len(inside.parts) > 1 else UNKNOWN
        entries.append(_Entry(path, inside.as_posix(), patient, UNKNOWN, UNKNOWN))
    return entries


def _with_patient(entry: _Entry, folder: Path, patients: Mapping[str, str]) -> _Entry:
    patient = patients.get(f"{folder.resolve().name}/{entry.tile}", patients.get(entry.tile, UNKNOWN))
    return replace(entry, patient=patient)


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = reader.fieldnames or []
            unknown = [c for c in columns if c not in TABLE_COLUMNS]
            if "file" not in columns or unknown:
                what = f"the unknown column `{unknown[0]}`" if unknown else "no column `file`"
                raise TileError(
                    f"{path.name} has {what}.",
                    hint=f"Columns are: {', '.join(TABLE_COLUMNS)}; only `file` is needed.",
                    code="bad-table",
                )
            return [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TileError(
            f"{path.name} cannot be read: {error}.", hint="Save it as UTF-8 CSV.", code="bad-table"
        ) from error


def _table_entries(folder: Path, rows: list[dict[str, str]]) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    root = folder.resolve()
    for row in rows:
        path = folder / row["file"]
        if not path.resolve().is_relative_to(root) or not path.is_file():
            raise TileError(
                f"{TABLE} names {row['file']}, which is not in the folder.",
                hint="Mend the table or put the tile back.",
                code="table-missing-file",
            )
        tile = path.relative_to(folder).as_posix()
        if tile in entries:
            raise TileError(
                f"{TABLE} names {row['file']} twice.", hint="Keep one row per tile.", code="table-duplicate"
            )
        stratum = "|".join(row.get(key, "") for key in ("label", "site", "scanner")).strip("|")
        entries[tile] = _Entry(
            path, tile, row.get("patient", ""), stratum, row.get("condition", ""), row.get("label", "")
        )
    left = [entry.tile for entry in _walk(folder) if entry.tile not in entries]
    if left:
        raise TileError(
            f"{len(left)} tiles lie in {folder.name} without a row in {TABLE}, the first is {left[0]}.",
            hint="Every tile that would be released is audited: add the rows or remove the files.",
            code="table-incomplete",
        )
    return [entries[tile] for tile in sorted(entries)]
