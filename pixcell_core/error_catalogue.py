"""The numbered list of every error a person can meet: stable numbers, what each means, what to do.

Usage, from a checkout:
    python -m pixcell_core.error_catalogue --missing            lines for codes that have no entry yet
    python -m pixcell_core.error_catalogue --add                put them into the table, for you to fill in
    python -m pixcell_core.error_catalogue --write docs/exits.md
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("error_catalogue.yaml")
RETIRED = "retired"
FIRST_OF_PACKAGE = {
    "pixcell_core": 1000,
    "privacy_audit": 3000,
    "site_client": 4000,
    "server": 5000,
    "deploy": 6000,
}
ROOM_SIZE = 100

EXIT_WORDS = {
    1: "the job failed, or a rule refused it",
    2: "no connection, or not let in",
    3: "waited as long as was allowed",
    4: "an argument or a file cannot be used",
    5: "a bug of ours",
}
EXITS_OF_THE_COMMAND_LINE = {"bug": {5}, "interrupted": {1}, "bad-arguments": {4}}
"""Errors that are raised outside of the tree of errors, with their exit codes."""


@dataclass(frozen=True)
class Entry:
    """One error: its number for people, its code for programs, the room that raises it first."""

    number: int
    code: str
    room: str
    means: str
    remedy: str

    @property
    def name(self) -> str:
        """`PX-1203`."""
        return f"PX-{self.number}"


def parse_table(text: str) -> dict[str, Entry]:
    """The entries of a table by code.

    Raises `ValueError` for a number or a code that stands twice, a retired number, or a line that is no entry.
    """
    rooms_named = re.findall(r"^([a-z_/]+):", text, flags=re.MULTILINE)
    if twice := {room for room in rooms_named if rooms_named.count(room) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} stands twice: YAML would forget the first")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    rooms = yaml.load(text, Loader=loader)
    retired = set(rooms.pop(RETIRED, None) or [])
    entries: dict[str, Entry] = {}
    numbers: dict[int, str] = {}
    for room, lines in rooms.items():
        for line in lines:
            number, code, means, remedy = line
            if not (isinstance(number, int) and all(isinstance(t, str) and t for t in (code, means, remedy))):
                raise ValueError(f"{line} is no [number, code, meaning, remedy]")
            if number in numbers or number in retired:
                raise ValueError(
                    f"PX-{number} is given twice: {code} and {numbers.get(number, 'a retired error')}"
                )
            if code in entries:
                raise ValueError(f"{code} has two entries")
            numbers[number] = code
            entries[code] = Entry(number, code, room, means, remedy)
    return entries


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """The installed table, by code."""
    return parse_table(TABLE.read_text(encoding="utf-8"))


def number_of(code: str) -> str | None:
    """`PX-1203` for a code; None for one without an entry, such as a code a peer made up."""
    try:
        found = entries().get(code)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return None  # an error message must never fail for want of its number
    return found.name if found else None


def missing_lines(root: Path) -> list[str]:
    """Lines to fill in for codes of the source below `root` that have no entry, under their rooms."""
    return [line for room, lines in _missing(root).items() for line in (f"{room}:", *lines)]


def with_missing(text: str, root: Path) -> str:
    """The table's text with the missing lines in their rooms, still to be filled in."""
    for room, lines in _missing(root).items():
        added = "".join(f"{line}\n" for line in lines)
        found = re.search(rf"^{re.escape(room)}:\n(?:  - .*\n)*", text, flags=re.MULTILINE)
        if found:
            text = text[: found.end()] + added + text[found.end() :]
        else:
            text = text.replace(f"{RETIRED}:", f"{room}:\n{added}{RETIRED}:")
    return text


def _missing(root: Path) -> dict[str, list[str]]:
    from pixcell_core.error_sources import codes_in

    taken: dict[str, int] = {}
    for entry in entries().values():
        taken[entry.room] = max(taken.get(entry.room, 0), entry.number)
    wanted: dict[str, list[str]] = {}
    for code, found in codes_in(root).items():
        if code not in entries():
            wanted.setdefault(found.rooms[0], []).append(code)
    lines: dict[str, list[str]] = {}
    for room, codes in sorted(wanted.items()):
        number = taken.get(room) or _free_block(room, taken)
        lines[room] = [
            f'  - [{number + k}, {code}, "MEANING.", "REMEDY."]'
            for k, code in enumerate(sorted(codes), start=1)
        ]
        taken[room] = number + len(codes)
    return lines


def _free_block(room: str, taken: dict[str, int]) -> int:
    """The first number of the next block that no room of this package uses."""
    package = room.split("/")[0]
    first = FIRST_OF_PACKAGE[package]
    used = [number for other, number in taken.items() if other.split("/")[0] == package]
    return max([first, *(number // ROOM_SIZE * ROOM_SIZE + ROOM_SIZE for number in used)])


def page(root: Path) -> str:
    """The page of exits, in Markdown: every code of the source below `root`, by room.

    Raises `ValueError` where a code has no entry, or an entry no code.
    """
    from pixcell_core.error_sources import codes_in

    codes, known = codes_in(root), entries()
    if absent := sorted(codes.keys() - known.keys()):
        raise ValueError(f"without an entry: {', '.join(absent)}")
    if gone := sorted(known.keys() - codes.keys()):
        raise ValueError(f"entries of codes that are raised nowhere: {', '.join(gone)}")
    parts = [_HEAD, "| exit | meaning |", "|---|---|", "| 0 | done |"]
    parts += [f"| {code} | {words} |" for code, words in EXIT_WORDS.items()]
    for room in dict.fromkeys(entry.room for entry in known.values()):
        parts += [
            "",
            f"## `{room}`",
            "",
            "| number | code | exit | what it means | what to do |",
            "|---|---|---|---|---|",
        ]
        for entry in sorted((e for e in known.values() if e.room == room), key=lambda e: e.number):
            found = EXITS_OF_THE_COMMAND_LINE.get(entry.code) or codes[entry.code].exits
            exits = ", ".join(map(str, sorted(found))) or "–"
            cells = (entry.name, f"`{entry.code}`", exits, _cell(entry.means), _cell(entry.remedy))
            parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


_HEAD = """# All errors, by number

Every error has a number that never changes its meaning, a code for programs, and an exit code. A command shows it as
`error [hub-down] PX-5401: …` with what to do on the next line; with `--format json` the envelope holds `code`,
`number`, `message` and `hint`. A dash for the exit stands for what is no command's end: a line in a site's or a job's
state, a reason why a reply did not count, or a check of a bundle that its own command reports with exit 1.

This page is written by `python -m pixcell_core.error_catalogue --write docs/exits.md` from the table in
`pixcell_core/error_catalogue.yaml` and the source; a test fails where one of the three differs.
"""


def main(arguments: list[str]) -> int:
    """Print missing lines, or write the page."""
    parser = argparse.ArgumentParser(prog="python -m pixcell_core.error_catalogue")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--missing", action="store_true", help="lines for codes without an entry; exit 1 if any"
    )
    what.add_argument("--add", action="store_true", help="put these lines into the table")
    what.add_argument("--write", type=Path, metavar="FILE", help="write the page of exits")
    given = parser.parse_args(arguments)
    if given.missing:
        lines = missing_lines(given.root)
        print("\n".join(lines) if lines else "every code has an entry")
        return 1 if lines else 0
    if given.add:
        TABLE.write_text(with_missing(TABLE.read_text(encoding="utf-8"), given.root), encoding="utf-8")
        return 0
    try:
        text = page(given.root)
    except ValueError as error:
        print(f"not written: {error}", file=sys.stderr)
        return 1
    given.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
