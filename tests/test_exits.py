"""The list of all errors is whole: every code has a number, a meaning and a remedy, and the page says the same."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import typer

from pixcell_core import error_catalogue, error_sources
from pixcell_core.cli import contract, main
from pixcell_core.error_catalogue import entries, missing_lines, number_of, page, parse_table, with_missing
from pixcell_core.error_sources import codes_in
from pixcell_core.errors import BadInputError, PixcellError

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pixcell_core/errors.py", "server/hub", "server/pretraining/worker.py", "server/studies/book.py")


@pytest.fixture(scope="module")
def source() -> dict[str, error_sources.Found]:
    return codes_in(ROOT)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of a part of the source in which a fault can be planted."""
    for part in PARTS:
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    return tmp_path


def test_every_code_has_an_entry_and_every_entry_a_code(source: dict[str, error_sources.Found]) -> None:
    """Where this fails: python -m pixcell_core.error_catalogue --missing"""
    assert sorted(source.keys() - entries().keys()) == [], missing_lines(ROOT)
    assert sorted(entries().keys() - source.keys()) == []


def test_the_page_is_written_from_the_table_and_the_source() -> None:
    """Where this fails: python -m pixcell_core.error_catalogue --write docs/exits.md"""
    assert (ROOT / "docs" / "exits.md").read_text(encoding="utf-8") == page(ROOT)


PLANTED = [
    'raise RefusedError("No.", hint="Stop.", code="planted-code")',
    'raise RefusedError("No.", hint="Stop.", code="study-exists" if known else "planted-code")',
    'class PlantedError(RefusedError):\n    default_code = "planted-code"',
    'def refuse(words: str, code: str):\n    raise RefusedError(words, hint="", code=code)\nrefuse("No.", "planted-code")',
    'def refuse(message: str, code: str = "planted-code"):\n    raise RefusedError(message, hint="", code=code)',
    'class Answer:\n    code: str\n    reason: str\nAnswer("planted-code", "no reason")',
    'def ready():\n    return "planted-code", "it is not"',
    'def check():\n    for code, words in [("planted-code", "no")]:\n        raise RefusedError(words, hint="", code=code)',
    'write_failure(job, 1, "planted-code", "It ended.")',
    'envelope = fail("x", hint="", code=str(body.get("code", "planted-code")))',
]


@pytest.mark.parametrize("planted", PLANTED)
def test_mutant_a_code_nobody_described_is_found_wherever_it_stands(copy: Path, planted: str) -> None:
    (copy / "server" / "hub" / "planted.py").write_text(planted + "\n")
    found = codes_in(copy)
    assert found.keys() - entries().keys() == {"planted-code"}
    assert found["planted-code"].rooms == ["server/hub"]
    (line,) = [line for line in missing_lines(copy) if "planted-code" in line]
    number = int(re.search(r"\[(\d+), planted-code", line).group(1))  # type: ignore[union-attr]
    assert 5200 < number < 5300 and f"PX-{number}" not in {e.name for e in entries().values()}
    with pytest.raises(ValueError, match="without an entry: planted-code"):
        page(copy)
    text = error_catalogue.TABLE.read_text(encoding="utf-8")
    assert "planted-code" in parse_table(text.replace("server/hub:\n", f"server/hub:\n{line}\n")), (
        "a one-line edit"
    )


def test_mutant_an_entry_whose_code_is_gone_is_found(copy: Path) -> None:
    before, book = codes_in(copy).keys(), copy / "server" / "studies" / "book.py"
    book.write_text(book.read_text().replace('code="study-exists"', 'code="unknown-study"'))
    assert before - codes_in(copy).keys() == {"study-exists"}
    with pytest.raises(ValueError, match=r"raised nowhere: .*study-exists"):
        page(copy)


def test_a_room_that_is_new_gets_a_block_of_its_own(copy: Path) -> None:
    (copy / "server" / "observatory").mkdir()
    (copy / "server" / "observatory" / "a.py").write_text(
        'raise BadInputError("x", hint="y", code="newer-base")\n'
    )
    lines = missing_lines(copy)
    assert lines[0] == "server/observatory:" and re.match(r"  - \[(\d+)", lines[1])
    number = int(re.findall(r"\[(\d+)", lines[1])[0])
    assert number % 100 == 1 and number < 6000
    text = with_missing(error_catalogue.TABLE.read_text(encoding="utf-8"), copy)
    assert parse_table(text)["newer-base"].room == "server/observatory"


def test_a_table_with_a_number_twice_or_a_retired_one_is_refused() -> None:
    good = 'a/b:\n  - [1, one, "m", "r"]\n  - [2, two, "m", "r"]\nretired: [3]\n'
    assert parse_table(good)["two"].name == "PX-2"
    for bad in (
        good.replace("[2,", "[1,"),
        good.replace("two", "one"),
        good.replace("[2,", "[3,"),
        good.replace('"m"', '""'),
        good.replace("[2,", '["2",'),
        good + 'a/b:\n  - [4, four, "m", "r"]\n',
    ):
        with pytest.raises(ValueError):
            parse_table(bad)


def test_numbers_lie_in_the_block_of_their_package_and_texts_are_sentences() -> None:
    for entry in entries().values():
        package = entry.room.split("/")[0]
        first = error_catalogue.FIRST_OF_PACKAGE[package]
        assert first <= entry.number < first + (2000 if package == "pixcell_core" else 1000), entry
        for text in (entry.means, entry.remedy):
            assert len(text) > 8 and text[-1] in ".%)`" and not text.startswith(" "), entry
        assert entry.means != entry.remedy and "MEANING" not in entry.means


def test_exit_codes_come_from_the_classes(source: dict[str, error_sources.Found]) -> None:
    for code, exits in {
        "hub-down": {2},
        "timed-out": {3},
        "bad-document": {4},
        "study-exists": {1},
        "unknown-study": {1, 4},
        "training-diverged": {1},
        "stale": set(),
        "weights-truncated": {4},
    }.items():
        assert source[code].exits == exits, code


def test_every_command_named_in_a_remedy_exists() -> None:
    """`pixcell a b` in a remedy is a command of the tree, not one that was renamed long ago."""
    import click

    root = typer.main.get_command(main.build())
    for entry in entries().values():
        for said in re.findall(r"`pixcell ([a-z -]+)", entry.means + entry.remedy):
            here: click.Command = root
            for word in said.split():
                if word.startswith("-") or not isinstance(here, click.Group):
                    break
                found = here.commands.get(word)
                assert found is not None, f"{entry.name}: there is no `pixcell {said}`"
                here = found


def test_an_error_shows_its_number_in_the_line_and_in_the_envelope(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contract.command
    def fails(format: contract.OutputFormat) -> None:
        raise BadInputError("The slide is upside down.", hint="Turn it.", code=code)

    for code, number in (("bad-document", number_of("bad-document")), ("made-up-by-a-peer", None)):
        with pytest.raises(SystemExit) as left:
            fails(format=contract.OutputFormat.JSON)
        said = capsys.readouterr()
        assert left.value.code == 4 and json.loads(said.out)["number"] == number
        shown = f" {number}" if number else ""
        assert f"error [{code}]{shown}: The slide is upside down.\n" in said.err


def test_an_error_is_said_even_where_the_table_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for text in (None, "a: [", "a/b:\n  - [1]\n"):
        monkeypatch.setattr(error_catalogue, "TABLE", tmp_path / "table.yaml")
        if text is not None:
            (tmp_path / "table.yaml").write_text(text)
        entries.cache_clear()
        assert number_of("bad-document") is None
    monkeypatch.undo()
    entries.cache_clear()
    assert number_of("bad-document") is not None


def test_numbers_that_were_given_keep_their_meaning() -> None:
    """A few of each package, pinned: a number in somebody's notes must mean the same next year."""
    pinned = {
        "bad-input": 1005,
        "bug": 1011,
        "bad-document": 1203,
        "signature-refused": 1905,
        "disk-full": 3103,
        "not-enrolled": 4106,
        "ledger-rewound": 4522,
        "not-initialised": 5001,
        "job-altered": 5312,
        "hub-down": 5401,
        "stage-failed": 6004,
    }
    assert {code: entries()[code].number for code in pinned} == pinned


def test_the_base_classes_have_entries_of_their_own() -> None:
    for kind in (PixcellError, *PixcellError.__subclasses__()):
        assert kind.default_code in entries(), kind


def test_the_command_lists_what_is_missing_and_writes_no_page_without_it(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "server" / "hub" / "planted.py").write_text(PLANTED[0] + "\n")
    assert error_catalogue.main(["--missing", "--root", str(copy)]) == 1
    assert "planted-code" in capsys.readouterr().out
    assert error_catalogue.main(["--write", str(copy / "page.md"), "--root", str(copy)]) == 1
    assert "planted-code" in capsys.readouterr().err and not (copy / "page.md").exists()
    assert error_catalogue.main(["--missing"]) == 0
    assert error_catalogue.main(["--write", str(copy / "page.md")]) == 0
    assert (copy / "page.md").read_bytes() == (ROOT / "docs" / "exits.md").read_bytes()
