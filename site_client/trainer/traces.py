"""What a site may know of its own training: losses, gradient norms and clipped fractions, step by step, at home.

They depend on patients and carry no noise, so they lie under ``SITE/private/``, for the owner alone, and nothing that
talks to the network reads them. They help to choose C for the next study: where nearly every patient is clipped, C is
small against the gradients; where nobody is, more noise is added than needed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pixcell_core.errors import BadInputError
from pixcell_core.private.parameters import LocalStepTrace

MAX_TRACE_BYTES = 256 * 1024 * 1024


class StepShown(BaseModel):
    """One step of one round. Norms are in units of C."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str
    round: int
    step: int
    mean_loss: float | None
    mean_gradient_norm: float | None
    clipped_fraction: float | None
    discarded: int


class TraceBook:
    """The traces of one site: one JSON line a step."""

    def __init__(self, site_dir: Path) -> None:
        self._file = Path(site_dir) / "private" / "training-traces.jsonl"

    def add(self, study: str, number: int, max_grad_norm: float, trace: LocalStepTrace) -> None:
        """Append one step's diagnostics. A trace that cannot be written stops no training."""
        values = asdict(trace)
        norm = values["mean_gradient_norm"] / max_grad_norm
        shown = StepShown(
            study=study,
            round=number,
            step=trace.step,
            mean_loss=_number(values["mean_loss"]),
            mean_gradient_norm=_number(norm),
            clipped_fraction=_number(values["clipped_fraction"]),
            discarded=trace.discarded,
        )
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, shown.model_dump_json().encode() + b"\n")
        finally:
            os.close(descriptor)

    def steps(self, study: str | None = None) -> list[StepShown]:
        """Return the steps of a study, or of all, oldest first.

        Raises:
            BadInputError: a line is none of ours.
        """
        if not self._file.is_file():
            return []
        if self._file.stat().st_size > MAX_TRACE_BYTES:
            raise _unreadable("is too large")
        return [s for s in _parse(self._file.read_bytes().splitlines()) if study in (None, s.study)]


class TracesShown(BaseModel):
    """Result of `pixcell site traces`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Sequence[StepShown]

    def render(self) -> object:
        """A table of steps."""
        from rich.console import Group
        from rich.table import Table

        if not self.steps:
            return "No step was traced at this site yet."
        table = Table("study", "round", "step", "mean loss", "mean norm / C", "clipped", "discarded")
        for s in self.steps:
            clipped = "-" if s.clipped_fraction is None else f"{s.clipped_fraction:.0%}"
            table.add_row(
                s.study,
                str(s.round),
                str(s.step),
                _shown(s.mean_loss),
                _shown(s.mean_gradient_norm),
                clipped,
                str(s.discarded),
            )
        return Group(
            table, "These figures depend on patients and carry no noise: they must not leave this site."
        )


def _parse(lines: Iterable[bytes]) -> list[StepShown]:
    found = []
    for line in lines:
        try:
            found.append(StepShown.model_validate(json.loads(line)))
        except (ValueError, ValidationError) as error:
            raise _unreadable("holds a line that this version did not write") from error
    return found


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _unreadable(what: str) -> BadInputError:
    return BadInputError(
        f"The site's file of training traces {what}.",
        hint="Move private/training-traces.jsonl away; a new one is begun. No charge depends on it.",
        code="traces-unreadable",
    )
