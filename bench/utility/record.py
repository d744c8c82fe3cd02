"""Results, one JSON line per run: what was done is never done again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utility.setting import Setting


@dataclass(frozen=True)
class Record:
    """A file of results. A line holds `setting`, `seed`, `group` (which question it answers) and figures."""

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        """All results so far; a line cut short by a kill is left out, and its run is done again."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                found.append(dict(json.loads(line)))
            except ValueError:
                continue
        return found

    def has(self, setting: Setting, seed: int) -> bool:
        """Whether this run is done."""
        key = setting.key()
        return any(row["setting"] == key and row["seed"] == seed for row in self.rows())

    def of(self, setting: Setting) -> list[dict[str, Any]]:
        """The results of a setting, over all seeds."""
        key = setting.key()
        return [row for row in self.rows() if row["setting"] == key]

    def add(self, setting: Setting, seed: int, figures: dict[str, Any]) -> None:
        """Append one result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"setting": setting.key(), "seed": seed, **figures}) + "\n")
