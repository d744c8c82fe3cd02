"""Reads a feature set from wherever it lies: a folder of tiles, a feature store, a .npz or .safetensors of features."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.feature_set import UNKNOWN, FeatureSet, Floats
from pixcell_core.evaluation.tile_eye import DEFAULT, TileEye, eye_label
from pixcell_core.evaluation.tile_folder import TileFolder
from pixcell_core.evaluation.tile_table import TileTable

TABLE, GENERATION = "tiles.csv", "generation.json"
UNSTATED = "not stated"
COLUMNS = ("names", "patients", "labels", "sources")


@dataclass
class SetReader:
    """Reads sets with one encoder, loaded once and only when pixels have to be looked at.

    Attributes:
        encoder: name of the encoder; None takes what a feature file states, and the second eye for pixels.
        on_tiles: called with the number of tiles after each batch.
        notes: what the person should know about what was read.
    """

    encoder: str | None = None
    device: str = "cpu"
    batch_size: int = 32
    on_tiles: Callable[[int], None] = lambda count: None
    notes: list[str] = field(default_factory=list)
    _eye: TileEye | None = None

    def read(self, path: Path, name: str, table: Path | None = None) -> FeatureSet:
        """The set at `path`: `tiles.csv` inside a folder, or the labels of its `generation.json`, unless a table is given.

        Without a table the patient of a tile is the first sub-folder it lies in.

        Raises:
            BadInputError: nothing there, or nothing that can be read; see the error's code.
        """
        rows = TileTable.read(table) if table is not None else None
        if path.is_dir() and (path / "index.parquet").is_file():
            return self._store(path, name, rows)
        if path.is_dir():
            return self._folder(path, name, rows)
        if path.is_file() and path.suffix in READERS:
            return self._file(path, name, rows)
        raise BadInputError(
            f"There is no set of tiles or features at {path}.",
            hint="Give a folder of tiles, a feature store, or a .npz or .safetensors file of features.",
            code="no-such-set",
        )

    def tiles_to_look_at(self, path: Path) -> int:
        """How many tiles reading `path` will embed, as far as a listing tells."""
        if path.is_dir() and (path / "index.parquet").is_file():
            return 0 if self.encoder == "stored" else _rows_of(path / "index.parquet")
        return len(TileFolder(path).names) if path.is_dir() else 0

    def _look(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        if self._eye is None:
            self._eye = TileEye(self.encoder or DEFAULT, self.device)
        features = self._eye.look(pixels)
        self.on_tiles(len(features))
        return features

    def _folder(self, path: Path, name: str, rows: TileTable | None) -> FeatureSet:
        tiles = TileFolder(path)
        if rows is None and (path / TABLE).is_file():
            rows = TileTable.read(path / TABLE)
        elif rows is None and (path / GENERATION).is_file():
            rows = TileTable.of_generation(path / GENERATION)
        columns: dict[str, tuple[str, ...]] = {}
        if rows is not None:
            columns = rows.columns_for(tiles.names)
        elif any(tiles.top_folders):
            columns = {"patients": tiles.top_folders}
            self.notes.append(
                f"{name}: without a table, the {len({*tiles.top_folders} - {UNKNOWN})} sub-folders are taken for patients"
            )
        features = _stack([self._look(batch) for batch in tiles.batches(self.batch_size)], path)
        if len(tiles.sizes) > 1:
            self.notes.append(f"{name}: tiles have {len(tiles.sizes)} different sizes")
        return FeatureSet(
            name,
            features,
            eye_label(self.encoder or DEFAULT),
            tiles.names,
            **columns,
            file_kinds=tuple(sorted(tiles.file_kinds)),
        )

    def _store(self, path: Path, name: str, rows: TileTable | None) -> FeatureSet:
        from pixcell_core.training.feature_store import FeatureStore

        store = FeatureStore.open(path)
        stored = self.encoder == "stored"
        parts, names, patients, labels = [], [], [], []
        for patient in store.patients:
            if stored:
                parts.append(store.embeddings(patient).double().mean(dim=1).numpy())
            else:
                pixels = store.pixels(patient).permute(0, 2, 3, 1).numpy()
                parts += [
                    self._look(pixels[i : i + self.batch_size])
                    for i in range(0, len(pixels), self.batch_size)
                ]
            names += store.tiles(patient)
            patients += [patient] * len(store.tiles(patient))
            labels += [label or UNKNOWN for label in store.labels(patient)]
        columns = rows.columns_for(names) if rows is not None else {"patients": patients, "labels": labels}
        encoder = (
            f"stored: {store.meta.get('encoder', UNSTATED)}" if stored else eye_label(self.encoder or DEFAULT)
        )
        return FeatureSet(name, _stack(parts, path), encoder, tuple(names), **columns)  # type: ignore[arg-type]

    def _file(self, path: Path, name: str, rows: TileTable | None) -> FeatureSet:
        found = READERS[path.suffix](path)
        encoder = str(found.pop("encoder", "")) or UNSTATED
        if self.encoder is not None and encoder in (UNSTATED, self.encoder.partition(":")[0]):
            encoder = eye_label(self.encoder)
        if self.encoder is not None and encoder != eye_label(self.encoder):
            raise BadInputError(
                f"{path.name} holds features of {encoder}; {self.encoder} was asked for.",
                hint=f"Leave --encoder out, or give --encoder '{encoder}'.",
                code="encoders-differ",
            )
        features = found.pop("features")
        if getattr(features, "ndim", 2) == 3:  # tokens of a tile
            features = np.asarray(features, dtype=np.float64).mean(axis=1)
        given = FeatureSet(
            name, features, encoder, **{k: tuple(map(str, found[k])) for k in COLUMNS if k in found}
        )
        return given if rows is None else given.with_columns(**rows.columns_for(given.names))


def _rows_of(index: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(index).num_rows)
    except (OSError, pa.ArrowException):
        return 0  # opening the store says what is wrong with it


def _stack(parts: Sequence[Floats], path: Path) -> Floats:
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) != 1:
        raise BadInputError(
            f"The encoder gave {path.name} features of widths {', '.join(map(str, widths)) or 'none'}; one is expected.",
            hint="Use tiles of one size.",
            code="widths-differ",
        )
    return np.concatenate(parts)


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, "an .npz of plain arrays (no pickled objects)") from error
    if "features" not in found:
        raise _without_features(path, sorted(found))
    return found


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            keys, noted = list(handle.keys()), handle.metadata() or {}
            if "features" not in keys:
                raise _without_features(path, keys)
            found: dict[str, Any] = {"features": handle.get_tensor("features").double().numpy()}
        found |= {key: json.loads(noted[key]) for key in COLUMNS if key in noted}
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, "safetensors whose text columns are JSON lists in the metadata") from error
    return found | {"encoder": noted.get("encoder", "")}


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {".npz": _npz, ".safetensors": _safetensors}


def _unreadable(path: Path, expected: str) -> BadInputError:
    return BadInputError(
        f"{path.name} cannot be read; {expected} is expected.",
        hint="Write the file again; it may have been cut short.",
        code="features-unreadable",
    )


def _without_features(path: Path, keys: Sequence[str]) -> BadInputError:
    return BadInputError(
        f"{path.name} holds {', '.join(keys) or 'nothing'}; an array `features` is expected.",
        hint="Store the features (rows, width) under that name; `names`, `patients`, `labels`, `sources` may join it.",
        code="features-missing",
    )
