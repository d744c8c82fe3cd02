"""Runs `pixcell demo` as a person would and reads what it said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIXCELL = [sys.executable, "-m", "pixcell_core.cli.main"]


@dataclass(frozen=True)
class Demonstration:
    """Where a demonstration ran and what it said at the end."""

    out: Path
    arguments: list[str]
    returncode: int
    envelope: dict[str, Any]
    said: str

    @property
    def sites(self) -> dict[str, dict[str, Any]]:
        """Outcome of each site by its name."""
        return {site["name"]: site for site in self.envelope["data"]["sites"]}

    @property
    def honest(self) -> list[str]:
        """The sites that did not cheat."""
        return [name for name, site in self.sites.items() if not site["planted"]]


def run_pixcell(*arguments: str | Path, timeout: float = 900.0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end as a person would, in a process of its own."""
    return subprocess.run(
        [*PIXCELL, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run_demo(arguments: list[str]) -> Demonstration:
    """Run `pixcell demo` and read its envelope."""
    out = Path(arguments[arguments.index("--out") + 1])
    done = run_pixcell("demo", *arguments, "--format", "json")
    assert done.stdout.strip(), done.stderr
    return Demonstration(out, arguments, done.returncode, json.loads(done.stdout), done.stderr)
