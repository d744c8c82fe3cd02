"""Recomputes an audit from its evidence: a verdict nobody can recompute is worth nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pixcell_core.contracts import digest, load_document
from pixcell_core.contracts.release import tiles_root
from privacy_audit.evidence import Evidence, read_evidence_bytes
from privacy_audit.judge import judge
from privacy_audit.policy import parse_policy
from privacy_audit.render import render_page
from privacy_audit.report import (
    EVIDENCE,
    MAX_REPORT_BYTES,
    PAGE,
    REPORT,
    AuditReport,
    stated,
    summarise,
)
from privacy_audit.result import worst
from privacy_audit.tiles import open_tiles


class Check(BaseModel):
    """One thing that was compared."""

    name: str
    ok: bool | None
    words: str


class Verification(BaseModel):
    """Outcome of `audit verify`; `ok` None in a check means that it could not be made here."""

    verdict: str
    verified: bool
    complete: bool
    checks: list[Check]

    @property
    def exit_code(self) -> int:
        """1 when anything differs from what the report says."""
        return 0 if self.verified else 1

    def __str__(self) -> str:
        marks = {True: "ok      ", False: "DIFFERS ", None: "not here"}
        lines = [f"{marks[check.ok]}  {check.name}: {check.words}" for check in self.checks]
        word = (
            "verified"
            if self.verified and self.complete
            else "partly verified"
            if self.verified
            else "NOT verified"
        )
        return "\n".join([*lines, f"{word}: the report's verdict is {self.verdict}"])


def load_report(out: Path) -> AuditReport:
    """Read `OUT/report.json` strictly."""
    return load_document(AuditReport, out / REPORT, MAX_REPORT_BYTES)


def verify_audit(out: Path, synthetic: Path | None = None) -> Verification:
    """Compare a report with its policy, its page, its evidence and, if given, the tiles."""
    report = load_report(out)
    policy = parse_policy(dict(report.policy.settings), "the report's policy")
    checks = [
        _check(
            "policy",
            (policy.digest, policy.name, policy.words)
            == (report.policy.digest, report.policy.name, report.policy.words),
            "its settings have the digest and the name that the report gives",
        ),
        _check(
            "verdict",
            worst(t.status for t in report.tests if t.gating) is report.verdict,
            "it is the worst of its tests",
        ),
        _check(
            "tile digests",
            tiles_root(report.subjects.synthetic.sorted_sha256) == report.subjects.synthetic.root
            and sorted(file.sha256 for file in report.subjects.synthetic.files)
            == list(report.subjects.synthetic.sorted_sha256),
            "their root is the one the report names",
        ),
        _page(out, report),
        *_evidence(out, report, policy),
    ]
    if synthetic is not None:
        checks.append(_tiles(synthetic, report))
    return Verification(
        verdict=str(report.verdict),
        verified=all(check.ok is not False for check in checks),
        complete=all(check.ok for check in checks),
        checks=checks,
    )


def _check(name: str, ok: bool, words: str) -> Check:
    return Check(name=name, ok=ok, words=words)


def _page(out: Path, report: AuditReport) -> Check:
    path = out / PAGE
    if not path.is_file():
        return Check(
            name="page", ok=None, words=f"{PAGE} is not here; write it again with `pixcell audit report`"
        )
    same = path.read_bytes() == render_page(report).encode()
    return _check("page", same, f"{PAGE} is what the evidence renders to")


def _evidence(out: Path, report: AuditReport, policy: Any) -> list[Check]:
    path = out / EVIDENCE
    if not path.is_file():
        words = "the evidence stays at the site: tests were not computed again"
        return [Check(name="evidence", ok=None, words=words)]
    data = read_evidence_bytes(path)
    if digest(data) != report.evidence_digest:
        return [_check("evidence", False, "it is not the evidence the report was made from")]
    evidence = Evidence.from_bytes(data, path.name)
    again = judge(evidence, policy, report.seed)
    wanted = {test.name: _plain(test) for test in report.tests}
    found = {test.name: _plain(test) for test in again.tests}
    different = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    return [
        _check("evidence", True, "it has the digest the report names"),
        _check(
            "tests",
            not different,
            f"all {len(wanted)} come out the same"
            if not different
            else "they differ: " + ", ".join(different),
        ),
        _check("recomputed verdict", again.verdict is report.verdict, f"the evidence gives {again.verdict}"),
        _check(
            "flagged tiles",
            [_plain(flag) for flag in again.flagged] == [_plain(flag) for flag in report.flagged],
            f"{len(again.flagged)} tiles",
        ),
        _check(
            "coverage",
            (again.proven_kinds, again.not_tested) == (report.proven_kinds, report.not_tested),
            "what it covers and what not follows from the evidence",
        ),
        _check(
            "words",
            report.summary
            == summarise(again.verdict, again.tests, len(again.flagged), report.subjects.synthetic.tiles),
            "the summary follows from the tests",
        ),
        _check(
            "what was looked at",
            stated(report.subjects.train, report.subjects.holdout, report.tool) == dict(evidence.stated),
            "training, holdout and program are those of the evidence",
        ),
    ]


def _tiles(folder: Path, report: AuditReport) -> Check:
    source = open_tiles(folder, name="synthetic", needs_patients=False)
    here = dict(zip(source.ids, source.file_digests(), strict=True))
    audited = {file.name: file.sha256 for file in report.subjects.synthetic.files}
    changed = sorted(name for name in {*here, *audited} if here.get(name) != audited.get(name))
    words = (
        f"all {len(audited)} are unchanged"
        if not changed
        else f"{len(changed)} differ, the first is {changed[0]}"
    )
    return _check("tiles", not changed, words)


def _plain(model: BaseModel) -> str:
    return json.dumps(model.model_dump(mode="json"), sort_keys=True)
