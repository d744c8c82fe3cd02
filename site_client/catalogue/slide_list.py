"""Reads slides.csv: which file belongs to which patient, optional label; every mistake named by line."""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.errors import BadInputError

REQUIRED = ("file", "patient")
OPTIONAL = ("label",)
COLUMNS = REQUIRED + OPTIONAL
_EXAMPLE = "file,patient,label\nslide-001.svs,P01,tumor"


@dataclass(frozen=True)
class SlideEntry:
    """One line of slides.csv; `path` is absolute, `line` counts from 1 with the header as line 1."""

    path: Path
    patient: str
    label: str | None
    line: int


def _check_columns(csv_path: Path, names: list[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.0)[0]
            raise BadInputError(
                f"{csv_path} has the unknown column '{name}'.",
                hint=f"Did you mean '{near}'? Known columns are {', '.join(COLUMNS)}.",
                code="csv-unknown-column",
            )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise BadInputError(
            f"{csv_path} lacks the column{'s' if len(missing) > 1 else ''} {' and '.join(missing)}.",
            hint=f"The first line names the columns, for example:\n{_EXAMPLE}",
            code="csv-missing-column",
        )
    if len(set(names)) != len(names):
        raise BadInputError(
            f"{csv_path} names a column twice.", hint="Keep one of them.", code="csv-repeated-column"
        )


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def read_slide_list(csv_path: Path, root: Path) -> list[SlideEntry]:
    """Read and check a slide list.

    Args:
        csv_path: the file; UTF-8 with or without byte-order mark; comma or semicolon.
        root: folder that relative file names start from.

    Raises:
        BadInputError: `csv-missing`, `csv-unreadable`, `csv-unknown-column`, `csv-missing-column`,
            `csv-repeated-column`, `csv-empty`, `csv-bad-row`, `slide-missing`, `csv-repeated-file`,
            `slide-two-patients`. Patients are named by line, never by identifier.
    """
    if not csv_path.is_file():
        raise BadInputError(
            f"The slide list {csv_path} does not exist.",
            hint=f"Write it (one line per slide), for example:\n{_EXAMPLE}\nor name another with --csv.",
            code="csv-missing",
        )
    try:
        text = csv_path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise BadInputError(
            f"{csv_path} cannot be read as UTF-8 text.",
            hint="Save it as CSV with UTF-8 encoding.",
            code="csv-unreadable",
        ) from error
    lines = text.splitlines()
    delimiter = ";" if lines and lines[0].count(";") > lines[0].count(",") else ","
    reader = csv.reader(lines, delimiter=delimiter)
    header = next(reader, None)
    if header is None:
        raise BadInputError(f"{csv_path} is empty.", hint=f"Write for example:\n{_EXAMPLE}", code="csv-empty")
    names = [name.strip() for name in header]
    _check_columns(csv_path, names)
    entries: list[SlideEntry] = []
    for line, cells in enumerate(reader, start=2):
        if not any(cell.strip() for cell in cells):
            continue
        entries.append(_entry(csv_path, root, names, cells, line))
    if not entries:
        raise BadInputError(
            f"{csv_path} names no slide.", hint=f"Write for example:\n{_EXAMPLE}", code="csv-empty"
        )
    _check_repeats(csv_path, entries)
    return entries


def _entry(csv_path: Path, root: Path, names: list[str], cells: list[str], line: int) -> SlideEntry:
    if len(cells) != len(names):
        raise BadInputError(
            f"Line {line} of {csv_path} has {len(cells)} fields, the header has {len(names)}.",
            hint="Put a comma between fields, and quotes around a name that contains one.",
            code="csv-bad-row",
        )
    row = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
    for name in REQUIRED:
        if not row[name]:
            raise BadInputError(
                f"Line {line} of {csv_path} has no {name}.",
                hint="Fill it in or delete the line.",
                code="csv-bad-row",
            )
    path = Path(row["file"])
    path = (path if path.is_absolute() else root / path).absolute()
    if not path.exists():
        raise BadInputError(
            f"Line {line} of {csv_path} names the slide {path}, which does not exist.",
            hint="Relative names start from the folder of the slides." + _nearest_file(path),
            code="slide-missing",
        )
    return SlideEntry(path, row["patient"], row.get("label") or None, line)


def _check_repeats(csv_path: Path, entries: list[SlideEntry]) -> None:
    first: dict[Path, SlideEntry] = {}
    for entry in entries:
        other = first.setdefault(entry.path.resolve(), entry)
        if other is entry:
            continue
        if other.patient != entry.patient:
            raise two_patients_error(f"lines {other.line} and {entry.line} of {csv_path}")
        raise BadInputError(
            f"Lines {other.line} and {entry.line} of {csv_path} name the same slide.",
            hint="Delete one of them.",
            code="csv-repeated-file",
        )


def two_patients_error(where: str) -> BadInputError:
    """The one error for one slide under two patients; it names places, not people."""
    return BadInputError(
        f"The same slide stands under two patients ({where}).",
        hint="One of them is wrong. Correct it before training: a person counted twice, or split "
        "between train "
        "and holdout, would break the privacy unit and the audit.",
        code="slide-two-patients",
    )
