"""What the auditor's commands print: the summary of a report, and the code that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from privacy_audit.report import AuditReport


class AuditSummary(BaseModel):
    """What `audit run` and `audit report` print; the whole report lies in `report`."""

    verdict: str
    summary: str
    report: Path
    page: Path
    site_page: Path
    flagged: list[dict[str, Any]]
    tests: list[dict[str, Any]]
    proven_kinds: list[str]
    withholding_answers: bool

    @classmethod
    def of(cls, out: Path, found: AuditReport) -> AuditSummary:
        """What to print of a report in a folder."""
        from privacy_audit.filtering import withholding_answers
        from privacy_audit.report import PAGE, REPORT, SITE_PAGE

        return cls(
            verdict=str(found.verdict),
            summary=found.summary,
            report=out / REPORT,
            page=out / PAGE,
            site_page=out / SITE_PAGE,
            flagged=[flag.model_dump(mode="json") for flag in found.flagged],
            tests=[
                {
                    key: value
                    for key, value in test.model_dump(mode="json").items()
                    if key
                    in (
                        "name",
                        "statistic",
                        "value",
                        "interval",
                        "threshold",
                        "direction",
                        "p",
                        "p_adjusted",
                        "status",
                        "tested",
                        "gating",
                        "why",
                    )
                }
                for test in found.tests
            ],
            proven_kinds=list(found.proven_kinds),
            withholding_answers=withholding_answers(found),
        )

    @property
    def exit_code(self) -> int:
        """1 when the release is refused (FAIL, INVALID), else 0."""
        return 1 if self.verdict in ("FAIL", "INVALID") else 0

    def render(self) -> Any:
        """A table for the terminal."""
        from rich.console import Group as Lines
        from rich.table import Table
        from rich.text import Text

        colour = {"PASS": "green", "REVIEW": "yellow", "FAIL": "red", "INVALID": "magenta"}
        table = Table(title=None, box=None, pad_edge=False)
        for column in ("test", "value", "threshold", "p", "status"):
            table.add_column(column)
        for test in self.tests:
            p = test["p_adjusted"] if test["p_adjusted"] is not None else test["p"]
            table.add_row(
                test["name"],
                _short(test["value"]),
                _short(test["threshold"]),
                _short(p),
                _outcome(test, colour),
            )
        head = Text(f"{self.verdict}  ", style=f"bold {colour[self.verdict]}") + Text(
            self.summary, style="default"
        )
        where = Text(f"share: {self.page}\nthe site's own: {self.site_page}")
        if self.withholding_answers:
            where += Text(
                f"\nthe flagged tiles may be left out: pixcell release withhold --audit {self.report.parent}"
            )
        return Lines(head, Text(), table, Text(), where)


class InstalledCode(BaseModel):
    """What `audit code` prints: the digest that every verdict signed with this installation names."""

    digest: str
    version: str
    covers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.digest}\n  auditing code of pixcell {self.version}: {', '.join(self.covers)}"


def _outcome(test: dict[str, Any], colour: dict[str, str]) -> Any:
    from rich.text import Text

    if not test["tested"]:
        return Text("not tested", style="dim")
    if not test["gating"]:
        return Text("context", style="dim")
    return Text(test["status"], style=colour[test["status"]])


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
