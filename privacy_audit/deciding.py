"""Takes a reviewer's signed decisions into a finished audit: judges again from the evidence and rewrites the report."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pixcell_core.contracts import digest
from pixcell_core.errors import RefusedError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import VerifyKey
from privacy_audit.evidence import Evidence
from privacy_audit.judge import judge
from privacy_audit.policy import parse_policy
from privacy_audit.report import EVIDENCE, AuditReport, summarise, timestamp
from privacy_audit.review_queue import read_decisions
from privacy_audit.verify import load_report


def decide(out: Path, envelope: Envelope, reviewer: VerifyKey, now: datetime) -> tuple[AuditReport, bytes]:
    """The audit's report with the human test in it, and the evidence it follows from; nothing is written here.

    Args:
        out: folder of a finished audit with its site/ part. reviewer: the key the decisions must be signed with.

    Raises:
        RefusedError: the evidence is not that of the report.
        ReviewError, EnvelopeError: decisions that cannot be counted.
    """
    report = load_report(out)
    evidence = Evidence.load(out / EVIDENCE)
    if digest((out / EVIDENCE).read_bytes()) != report.evidence_digest:
        raise RefusedError(
            "The evidence is not the one this report was made from.",
            hint="Run the audit again; decisions are added to an untouched audit alone.",
            code="evidence-differs",
        )
    human = read_decisions(out, envelope, reviewer)
    evidence = replace(evidence, parts={**evidence.parts, "human": human})
    policy = parse_policy(report.policy.settings)
    judged = judge(evidence, policy, report.seed)
    packed = evidence.to_bytes()
    tiles = report.subjects.synthetic.tiles
    return (
        report.model_copy(
            update={
                "verdict": judged.verdict,
                "summary": summarise(judged.verdict, judged.tests, len(judged.flagged), tiles),
                "created_at": timestamp(now),
                "tests": judged.tests,
                "flagged": judged.flagged,
                "proven_kinds": judged.proven_kinds,
                "not_tested": judged.not_tested,
                "evidence_digest": digest(packed),
            }
        ),
        packed,
    )
