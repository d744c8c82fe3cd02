"""What a study prints: scores of both ways of training, their difference with its interval, and what limits it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pixcell_core.evaluation.bootstrap import Interval
from pixcell_core.evaluation.interval_chart import ChartRow, interval_chart
from pixcell_core.evaluation.studies import StudyResult

if TYPE_CHECKING:
    from rich.console import Group

MEASURE = "balanced accuracy on real tiles of held-out patients, 0..1, higher is better"


class StudyLine(BaseModel):
    """One score, or one difference of scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    classifier: str
    trained_on: str
    value: float
    low: float | None
    high: float | None
    per_repeat: tuple[float, ...]


class StudyReport(BaseModel):
    """A finished study for people and for programs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str
    encoder: str
    measure: str = MEASURE
    scores: tuple[StudyLine, ...]
    differences: tuple[StudyLine, ...]
    real_rows: int
    synthetic_rows: int
    patients: int
    labels: tuple[str, ...]
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, result: StudyResult) -> StudyReport:
        """The report of a result."""
        second = result.scores[1].trained_on
        return cls(
            study=result.study,
            encoder=result.encoder,
            scores=tuple(
                _line(s.classifier, s.trained_on, s.score, s.interval, s.per_repeat) for s in result.scores
            ),
            differences=tuple(
                _line(d.classifier, f"{second} - real", d.difference, d.interval, d.per_repeat)
                for d in result.differences
            ),
            real_rows=result.real_rows,
            synthetic_rows=result.synthetic_rows,
            patients=result.patients,
            labels=result.labels,
            settings=asdict(result.settings),
            warnings=result.warnings,
        )

    @property
    def findings(self) -> list[str]:
        """One sentence per classifier; a difference whose interval holds 0 is called undecided."""
        said = []
        for line in self.differences:
            if line.low is None or line.high is None:
                verdict = "no interval"
            elif line.low > 0:
                verdict = "better"
            elif line.high < 0:
                verdict = "worse"
            else:
                verdict = "undecided: the interval holds 0"
            said.append(f"{line.classifier}: {line.trained_on} {line.value:+.4f}, {verdict}")
        return said

    def chart(self) -> str:
        """SVG of the differences around 0."""
        rows = [
            ChartRow(f"{line.classifier}: {line.trained_on}", line.value, line.low, line.high)
            for line in self.differences
        ]
        return interval_chart(
            rows, f"Difference of balanced accuracy, {self.study} (encoder: {self.encoder})", mark=0.0
        )

    def render(self) -> Group:
        """A table for people, findings and warnings below it."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("classifier", "trained on", "value", f"{self.settings['level']:.0%} interval"):
            table.add_column(heading, justify="right" if heading == "value" else "left")
        for line in (*self.scores, *self.differences):
            sign = "+" if line in self.differences else ""
            table.add_row(
                line.classifier,
                line.trained_on,
                f"{line.value:{sign}.4f}",
                f"{line.low:{sign}.4f} .. {line.high:{sign}.4f}" if line.low is not None else "-",
            )
        head = Text(
            f"{self.study}: {self.real_rows:,} real and {self.synthetic_rows:,} synthetic tiles, {self.patients} patients, "
            f"{len(self.labels)} labels; features of encoder: {self.encoder}\n{self.measure}\n"
        )
        return Group(
            head, table, *[Text(line) for line in self.findings], *[Text(f"! {w}") for w in self.warnings]
        )


def _line(
    classifier: str, trained_on: str, value: float, interval: Interval | None, per_repeat: tuple[float, ...]
) -> StudyLine:
    return StudyLine(
        classifier=classifier,
        trained_on=trained_on,
        value=value,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        per_repeat=per_repeat,
    )
