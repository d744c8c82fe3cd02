"""What a comparison prints: every metric by its name with the encoder in it, its direction, interval and limits."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from pixcell_core.errors import BadInputError

if TYPE_CHECKING:
    from rich.console import Group

LOWER, HIGHER, NEAR_ONE = "lower is better", "higher is better", "1 is best"
READ_WITH_CARE = "higher is nearer the source tile: fidelity, and also what an attacker would look for"
METRICS: dict[str, str] = {
    "frechet": LOWER,
    "frechet-extrapolated": LOWER,
    "kernel": LOWER,
    "kernel-subsets": LOWER,
    "gaussian-kernel": LOWER,
    "precision": HIGHER,
    "recall": HIGHER,
    "density": NEAR_ONE,
    "coverage": HIGHER,
    "similarity": READ_WITH_CARE,
}
SHORT = {LOWER: "lower", HIGHER: "higher", NEAR_ONE: "near 1", READ_WITH_CARE: "see note"}
DEFAULT_METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")
OF_MANIFOLD = ("precision", "recall", "density", "coverage")
INCEPTION = frozenset({"inception-v3", "inception"})


class MetricRow(BaseModel):
    """One number of a report with everything needed to read it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    direction: str
    real_rows: int
    synthetic_rows: int
    details: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class EvaluationReport(BaseModel):
    """All metrics of one comparison, and under which conditions they were taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str
    feature_width: int
    real: str
    synthetic: str
    patients: int
    level: float
    draws: int
    seed: int
    rows: tuple[MetricRow, ...]
    warnings: tuple[str, ...] = ()

    def render(self) -> Group:
        """A table for people, the warnings below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("metric", "value", f"{self.level:.0%} interval", "better"):
            table.add_column(heading, justify="right" if heading == "value" else "left", overflow="fold")
        for row in self.rows:
            interval = f"{row.low:.4g} .. {row.high:.4g}" if row.low is not None else "-"
            table.add_row(row.name, f"{row.value:.4g}", interval, SHORT[row.direction])
        notes = [(row, note) for row in self.rows for note in row.notes]
        notes += [(row, READ_WITH_CARE) for row in self.rows if row.direction == READ_WITH_CARE]
        said = [f"note: {row.metric}: {note}" for row, note in notes]
        said += [f"! {warning}" for warning in self.warnings]
        said += [f"! {row.metric}: {warning}" for row in self.rows for warning in row.warnings]
        counts = {(row.real_rows, row.synthetic_rows) for row in self.rows}
        tiles = "; ".join(f"{real:,} real and {made:,} synthetic tiles" for real, made in sorted(counts))
        head = Text(
            f"{self.synthetic} against {self.real}: {tiles}, {self.patients} patients, encoder: {self.encoder}\n"
        )
        return Group(head, table, *[Text(line) for line in said])


def metric_names(asked: Sequence[str]) -> tuple[str, ...]:
    """These metrics without repeats; `all` names every one, `manifold` four.

    Raises:
        BadInputError: a name that is no metric, or none at all.
    """
    groups = {"all": tuple(METRICS), "manifold": OF_MANIFOLD}
    found: dict[str, None] = {}
    for name in asked:
        if name not in METRICS and name not in groups:
            near = get_close_matches(name, METRICS, 1)
            raise BadInputError(
                f"There is no metric {name!r}; {', '.join(METRICS)}, manifold or all is expected.",
                hint=f"Did you mean {near[0]}?" if near else "Choose among them.",
                code="no-such-metric",
            )
        found |= dict.fromkeys(groups.get(name, (name,)))
    if not found:
        raise BadInputError(
            f"No metric was asked for; at least one of {', '.join(METRICS)} is expected.",
            hint="Leave --metrics out for the usual ones.",
            code="no-metric",
        )
    return tuple(found)


def metric_title(metric: str, encoder: str) -> str:
    """What a metric is called: with the encoder, because the number means nothing without it; FID is of Inception alone."""
    known = encoder in INCEPTION
    titles = {
        "frechet": "FID (Inception)" if known else f"Frechet distance (encoder: {encoder})",
        "frechet-extrapolated": f"Frechet, extrapolated (encoder: {encoder})",
        "kernel": "KID (Inception)" if known else f"Kernel distance, cubic (encoder: {encoder})",
        "kernel-subsets": f"Kernel distance, cubic, by subsets (encoder: {encoder})",
        "gaussian-kernel": f"Kernel distance, Gaussian (encoder: {encoder})",
        "similarity": f"Cosine of pairs (encoder: {encoder})",
    }
    return titles.get(metric, f"{metric.capitalize()} (encoder: {encoder})")
