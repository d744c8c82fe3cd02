"""The documents agree with the code: commands and options they show, tests they lean on, links, codes of errors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import click
import pytest
import typer

from pixcell_core.cli.main import build
from pixcell_core.error_catalogue import entries

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PAST = {"CHANGELOG.md"}
"""Pages that also tell of what is gone."""


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@lru_cache(maxsize=1)
def tree() -> click.Command:
    return typer.main.get_command(build())


@lru_cache(maxsize=1)
def known_tests() -> dict[str, set[str]]:
    """Names of test functions, and the files they are in."""
    found: dict[str, set[str]] = {}
    for file in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"^\s*def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    return found


def shown_commands(text: str) -> Iterator[str]:
    """Every line of a code block and every `pixcell …` in the text; lines that go on are joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if line.startswith("pixcell "):
                yield line
    yield from re.findall(r"`(pixcell [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def what_is_wrong(line: str) -> str | None:
    """Why a command line cannot be typed as it is shown; None for one that can."""
    words = shlex.split(line.split(" # ")[0].replace("'", '"'), comments=True)[1:]
    here = tree()
    while words and isinstance(here, click.Group) and not words[0].startswith("-"):
        if words[0] in ("…", "..."):
            return None
        alternatives = words.pop(0).split("|")
        unknown = [word for word in alternatives if word not in here.commands]
        if unknown:
            return f"there is no command {unknown[0]}"
        here = here.commands[alternatives[0]]
    options = {o for parameter in here.params for o in [*parameter.opts, *parameter.secondary_opts]}
    given = [word.split("=")[0].strip("[]") for word in words if word.strip("[").startswith("--")]
    wrong = [word for word in given if word not in options | {"--help"}]
    return f"{here.name} has no {wrong[0]}" if wrong else None


@pytest.mark.parametrize("page", names([p for p in PAGES if p.name not in PAST]))
def test_every_command_and_option_that_is_shown_exists(page: str) -> None:
    lines = list(shown_commands((ROOT / page).read_text(encoding="utf-8")))
    assert {line: why for line in lines if (why := what_is_wrong(line))} == {}


@pytest.mark.parametrize("page", names(PAGES))
def test_every_test_that_is_named_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|bench)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in known_tests(), name


@pytest.mark.parametrize("page", names(PAGES))
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", ["docs/coordinator.md", "docs/privacy.md", "docs/secure-aggregation.md"])
def test_every_code_of_a_table_of_errors_is_known(page: str) -> None:
    """The first or second column of a table whose head says code, or what is seen."""
    codes = set()
    for head, rows in re.findall(
        r"^(\|[^\n]*\|)\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", (ROOT / page).read_text(), re.MULTILINE
    ):
        columns = [cell.strip() for cell in head.strip("|").split("|")]
        for at, column in enumerate(columns):
            if column in ("code", "what you see"):
                for row in rows.splitlines():
                    codes |= set(re.findall(r"`([a-z][a-z-]+)`", row.split("|")[at + 1]))
    assert codes, "no table was found: the search is broken"
    assert codes - entries().keys() == set()


def test_the_search_sees_what_is_gone() -> None:
    assert what_is_wrong("pixcell kit add REQUEST") == "there is no command add"
    assert what_is_wrong("pixcell study create --id x --colour red") == "create has no --colour"
    assert what_is_wrong("pixcell kit approve REQUEST --fingerprint 'ab cd' --dir D  # by phone") is None
    assert what_is_wrong("pixcell kit approve|renew|vanish PARTY") == "there is no command vanish"
    text = "a `pixcell hub start` b\n```\npixcell site doctor \\\n   --site-dir D\nother\n```\n"
    assert list(shown_commands(text)) == ["pixcell site doctor     --site-dir D", "pixcell hub start"]
