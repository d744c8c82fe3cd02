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
    "gaussian-kernel": LOWER,
    "precision": HIGHER,
    "recall": HIGHER,
    "density": NEAR_ONE,
    "coverage": HIGHER,
    "similarity": READ_WITH_CARE,
}
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
        for heading in ("metric", "value", f"{self.level:.0%} interval", "direction", "real", "synthetic"):
            table.add_column(
                heading, justify="right" if heading in ("value", "real", "synthetic") else "left"
            )
        for row in self.rows:
            table.add_row(
                row.name,
                f"{row.value:.4g}",
                f"{row.low:.4g} .. {row.high:.4g}" if row.low is not None else "-",
                row.direction,
                f"{row.real_rows:,}",
                f"{row.synthetic_rows:,}",
            )
        said = dict.fromkeys([*self.warnings, *(f"{r.name}: {w}" for r in self.rows for w in r.warnings)])
        head = Text(
            f"{self.synthetic} against {self.real}; {self.patients} patients; features of encoder: {self.encoder}\n"
        )
        return Group(head, table, *[Text(f"! {line}") for line in said])


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
        "frechet-extrapolated": f"Frechet distance at infinitely many tiles (encoder: {encoder})",
        "kernel": "KID (Inception)" if known else f"Kernel distance, cubic (encoder: {encoder})",
        "gaussian-kernel": f"Kernel distance, Gaussian (encoder: {encoder})",
        "similarity": f"Cosine of pairs (encoder: {encoder})",
    }
    return titles.get(metric, f"{metric.capitalize()} (encoder: {encoder})")
