"""The table beside a set of tiles: which patient, label and source each one has."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.contracts import load_document
from pixcell_core.contracts.release import GenerationRecord
from pixcell_core.errors import BadInputError
from pixcell_core.evaluation.feature_set import UNKNOWN

COLUMNS = ("patient", "label", "source")
KEY = "file"


@dataclass(frozen=True)
class TileTable:
    """Rows by tile name; a tile may be written with or without its folder.

    Columns: `file`, and any of `patient`, `label`, `source` (of a synthetic tile, the real tile it was conditioned on).
    Other columns are allowed and not read.
    """

    path: Path
    rows: dict[str, dict[str, str]]

    @classmethod
    def read(cls, path: Path) -> TileTable:
        """Read a .csv, .tsv or .parquet table.

        Raises:
            BadInputError: no such file, no column `file`, none of the columns it is read for, or a tile listed twice with
                different entries.
        """
        if not path.is_file():
            raise BadInputError(
                f"There is no table {path}.", hint="Give a .csv, .tsv or .parquet file.", code="no-such-table"
            )
        columns, body = _parquet(path) if path.suffix.lower() == ".parquet" else _text(path)
        if KEY not in columns or not {*COLUMNS} & {*columns}:
            raise BadInputError(
                f"{path.name} has the columns {', '.join(columns) or 'none'}; `file` and at least one of "
                f"{', '.join(COLUMNS)} are expected.",
                hint="Name the columns in the first line of the table.",
                code="table-columns",
            )
        rows: dict[str, dict[str, str]] = {}
        for entry in body:
            name = entry[KEY].strip().replace("\\", "/")
            kept = {column: entry.get(column, UNKNOWN).strip() for column in COLUMNS}
            if rows.setdefault(name, kept) != kept:
                raise BadInputError(
                    f"{path.name} lists {name} twice, with different entries; one line per tile is expected.",
                    hint="Remove one of the two lines.",
                    code="tile-listed-twice",
                )
        return cls(path, rows)

    @classmethod
    def of_generation(cls, path: Path) -> TileTable:
        """The labels that a generator wrote beside its surrogates; whom a surrogate followed is not in there.

        Raises:
            BadInputError: no generation record, or one that was edited.
        """
        labels = load_document(GenerationRecord, path).labels
        rows = {
            name: {"patient": UNKNOWN, "label": label or UNKNOWN, "source": UNKNOWN}
            for name, label in labels.items()
        }
        return cls(path, rows)

    def columns_for(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Columns patients, labels and sources for these tiles, in their order.

        Raises:
            BadInputError: a tile that the table does not list.
        """
        found = [self.rows.get(name) or self.rows.get(name.rsplit("/", 1)[-1]) for name in names]
        missing = [name for name, row in zip(names, found, strict=True) if row is None]
        if missing:
            raise BadInputError(
                f"{self.path.name} does not list {len(missing)} of {len(names)} tiles (first: {missing[0]}); a line for "
                "each is expected.",
                hint="Write the tile's name as it stands in the folder into the column `file`.",
                code="tile-not-listed",
            )
        return {f"{column}s": tuple(row[column] if row else UNKNOWN for row in found) for column in COLUMNS}


def _text(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, delimiter=delimiter, restval=UNKNOWN)
            body = [{k: v for k, v in row.items() if isinstance(k, str)} for row in reader]
            return list(reader.fieldnames or []), body
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path) from error


def _parquet(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path) from error
    body = [{k: UNKNOWN if v is None else str(v) for k, v in row.items()} for row in table.to_pylist()]
    return list(table.column_names), body


def _unreadable(path: Path) -> BadInputError:
    return BadInputError(
        f"{path.name} cannot be read as a table; UTF-8 text with commas (.csv), tabs (.tsv), or Parquet is expected.",
        hint="Save the table again in one of these forms.",
        code="table-unreadable",
    )
