"""slides.csv: every mistake is named by its line and answered with what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixcell_core.errors import BadInputError
from site_client.catalogue.slide_list import read_slide_list

HOSTILE = Path(__file__).resolve().parents[2] / "hostile"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("slide-0001.tiff", "slide-0002.tiff"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def refuse(path: Path, root: Path) -> BadInputError:
    with pytest.raises(BadInputError) as caught:
        read_slide_list(path, root)
    assert caught.value.exit_code == 4 and caught.value.hint
    return caught.value


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "slides.csv"
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize("separator", [",", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_reads_what_spreadsheets_write(folder: Path, separator: str, encoding: str) -> None:
    text = "file,patient,label\nslide-0001.tiff,Pé1,tumor\n\nslide-0002.tiff, P2 ,\n".replace(",", separator)
    first, second = read_slide_list(write(folder, text, encoding), folder)
    assert (first.path, first.patient, first.label, first.line) == (
        folder / "slide-0001.tiff",
        "Pé1",
        "tumor",
        2,
    )
    assert (second.patient, second.label, second.line) == ("P2", None, 4)


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("unknown_column.csv", "csv-unknown-column", "'patient'"),
        ("missing_file.csv", "slide-missing", "'slide-0001.tiff'"),
        ("missing_column.csv", "csv-missing-column", "file,patient,label"),
        ("ragged_row.csv", "csv-bad-row", "quotes"),
    ],
)
def test_hostile_lists_are_refused_with_the_cure(folder: Path, name: str, code: str, said: str) -> None:
    error = refuse(Path(shutil.copy(HOSTILE / name, folder)), folder)
    assert error.code == code and said in error.hint


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "csv-empty"),
        ("file,patient\n", "csv-empty"),
        ("file,file,patient\n", "csv-repeated-column"),
        ("file,patient\n,P1\n", "csv-bad-row"),
        ("file,patient\nslide-0001.tiff,\n", "csv-bad-row"),
        ("file,patient\nslide-0001.tiff,P1\nslide-0001.tiff,P1\n", "csv-repeated-file"),
        ("file,patient\nslide-0001.tiff,P1\n./slide-0001.tiff,P2\n", "slide-two-patients"),
    ],
)
def test_other_mistakes(folder: Path, text: str, code: str) -> None:
    assert refuse(write(folder, text), folder).code == code


def test_a_missing_or_binary_list(folder: Path) -> None:
    assert refuse(folder / "none.csv", folder).code == "csv-missing"
    (folder / "slides.csv").write_bytes(b"\xff\xfe\x00file")
    assert refuse(folder / "slides.csv", folder).code == "csv-unreadable"


def test_patients_are_named_by_line_only(folder: Path) -> None:
    error = refuse(
        write(folder, "file,patient\nslide-0001.tiff,SECRET-A\n./slide-0001.tiff,SECRET-B\n"), folder
    )
    assert "SECRET" not in str(error) and "lines 2 and 3" in error.message


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_is_read_or_refused_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "slides.csv").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        read_slide_list(folder / "slides.csv", folder)
    except BadInputError as error:
        assert error.code
