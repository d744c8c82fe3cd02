"""The auditor's commands: `pixcell audit run | report | verify | policy show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from pixcell_core.cli.contract import FormatOption, OutputFormat, command
from pixcell_core.cli.main import group


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
                Text(test["status"], style=colour[test["status"]]),
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


class PolicyView(BaseModel):
    """What `audit policy show` prints."""

    name: str
    digest: str
    source: str
    settings: dict[str, Any]
    text: str

    def __str__(self) -> str:
        return f"# effective digest {self.digest}\n# from {self.source}\n{self.text}"


def register(root: typer.Typer) -> None:
    """Add the auditor's commands to the root command."""
    audit = group(root, "audit")
    audit.command("run")(run)
    audit.command("report")(report)
    audit.command("verify")(verify)
    group(root, "audit", "policy").command("show")(policy_show)


PolicyOption = Annotated[
    str | None, typer.Option("--policy", help="Policy file, or a shipped name: core (default), rehearsal.")
]


@command
def run(
    train: Annotated[Path, typer.Option("--train", help="Training tiles: feature store or image folder.")],
    holdout: Annotated[Path, typer.Option("--holdout", help="Tiles of patients kept out of training.")],
    synthetic: Annotated[Path, typer.Option("--synthetic", help="The tiles that would be released.")],
    out: Annotated[Path, typer.Option("--out", help="Where report.json, report.html and site/ are written.")],
    policy: PolicyOption = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=2**31 - 1, help="Repeat a run; else drawn and recorded."),
    ] = None,
    filtered_from: Annotated[
        Path | None,
        typer.Option("--filtered-from", help="First audit, after which `release withhold` left tiles out."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> AuditSummary:
    """May these tiles leave? Exit 0 for PASS and REVIEW, 1 for FAIL and INVALID.

    Writes OUT/report.json and OUT/report.html (numbers and hashes, made to be shared) and OUT/site/ (real tiles and
    distances, never to be exported).
    """
    from privacy_audit.policy import load_policy
    from privacy_audit.run import AuditRequest, run_audit

    request = AuditRequest(train, holdout, synthetic, out, load_policy(policy), seed, filtered_from)
    return _summary(out, run_audit(request))


@command
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a finished audit.")],
    format: FormatOption = OutputFormat.TEXT,
) -> AuditSummary:
    """Write report.html again from report.json and show the summary."""
    from privacy_audit.run import write_report
    from privacy_audit.verify import load_report

    found = load_report(out)
    write_report(out, found)
    return _summary(out, found)


@command
def verify(
    out: Annotated[Path, typer.Argument(help="Folder of a finished audit.")],
    synthetic: Annotated[
        Path | None,
        typer.Option("--synthetic", help="Also compare the released tiles with the report's digests."),
    ] = None,
    format: FormatOption = OutputFormat.TEXT,
) -> Any:
    """Compute the verdict again from the evidence and compare; exit 1 when anything differs."""
    from privacy_audit.verify import verify_audit

    return verify_audit(out, synthetic)


@command
def policy_show(policy: PolicyOption = None, format: FormatOption = OutputFormat.TEXT) -> PolicyView:
    """Show a policy with the source of every number."""
    from privacy_audit.policy import load_policy, policy_path

    loaded, path = load_policy(policy), policy_path(policy)
    return PolicyView(
        name=loaded.name,
        digest=loaded.digest,
        source=path.name,
        settings=loaded.model_dump(mode="json"),
        text=path.read_text(encoding="utf-8"),
    )


def _summary(out: Path, found: Any) -> AuditSummary:
    from privacy_audit.filtering import withholding_answers
    from privacy_audit.report import PAGE, REPORT, SITE_PAGE

    return AuditSummary(
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
                    "why",
                )
            }
            for test in found.tests
        ],
        proven_kinds=list(found.proven_kinds),
        withholding_answers=withholding_answers(found),
    )


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
