"""The journal of a training: one JSON object per step, each step once, also after a resume."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """What one optimiser step did.

    `loss` is `noise_error` (mean squared error of the noise) plus `variance_bound` (bits per entry); all three are
    means over every process. `grad_norm` is before clipping. `images_per_second` counts all processes;
    `memory_bytes` is the peak of the leading one.
    """

    step: int
    epoch: int
    loss: float
    noise_error: float
    variance_bound: float
    learning_rate: float
    grad_norm: float
    images_per_second: float
    memory_bytes: int


class Journal:
    """Appends reports to a JSONL file; opened at a step, it drops what a killed run had written beyond it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def reopen(self, step: int) -> None:
        """Keep the lines up to `step`; torn or later ones go, the run is about to write them again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(row) for row in self.rows() if int(row["step"]) <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(self.path)

    def note(self, report: StepReport) -> None:
        """Append one line."""
        values = asdict(report)
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a") as handle:
            handle.write(json.dumps(clean) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                found.append(row)
        return found
