"""The page on the agent names every trouble of the link and every check of the doctor, in the program's own words."""

from __future__ import annotations

from pathlib import Path

from site_client.agent.link_trouble import LINK_TROUBLES
from site_client.doctor.visit import NAMES

PAGE = (Path(__file__).parents[3] / "docs" / "site-agent.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    part = PAGE.split(f"## {heading}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_every_trouble_stands_on_the_page_as_it_is_said() -> None:
    said = {
        cells[0].strip("`"): (cells[1], cells[2]) for cells in rows("What can be wrong on the way to the hub")
    }
    assert said == LINK_TROUBLES


def test_every_check_stands_on_the_page() -> None:
    assert [cells[0].strip("`") for cells in rows("What `pixcell site doctor` asks")] == list(NAMES.values())
