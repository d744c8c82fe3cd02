"""Takes a reviewer's signed decisions into a finished audit: judges again from the evidence and rewrites the report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from pixcell_core.contracts import digest
from pixcell_core.errors import RefusedError
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import VerifyKey
from privacy_audit import disclosure, review_queue
from privacy_audit.base_twins import nulls_of
from privacy_audit.evidence import Evidence, read_evidence_bytes
from privacy_audit.evidence_parts import HumanEvidence
from privacy_audit.gallery import decoded, match_lines, matching, picture
from privacy_audit.judge import Judgement, judge
from privacy_audit.policy import parse_policy
from privacy_audit.render import Pair, render_page
from privacy_audit.report import EVIDENCE, AuditReport, summarise, timestamp
from privacy_audit.result import Status
from privacy_audit.review_queue import load_key, load_queue, read_decisions
from privacy_audit.verify import load_report


@dataclass(frozen=True)
class Decided:
    """An audit with a reviewer's decisions in it: report, evidence, and the site's own page."""

    report: AuditReport
    evidence: bytes
    site_page: str


def decide(out: Path, envelope: Envelope, reviewer: VerifyKey, now: datetime) -> Decided:
    """The audit's report with the human test in it, and the evidence it follows from; nothing is written here.

    Args:
        out: folder of a finished audit with its site/ part. reviewer: the key the decisions must be signed with.

    Raises:
        RefusedError: the evidence is not that of the report.
        ReviewError, EnvelopeError: decisions that cannot be counted.
    """
    report = load_report(out)
    data = read_evidence_bytes(out / EVIDENCE)
    if digest(data) != report.evidence_digest:
        raise RefusedError(
            "The evidence is not the one this report was made from.",
            hint="Run the audit again; decisions are added to an untouched audit alone.",
            code="evidence-differs",
        )
    evidence = Evidence.from_bytes(data, EVIDENCE)
    read = read_decisions(out, envelope, reviewer)
    earlier = evidence.part(HumanEvidence)
    parts = {**evidence.parts, "human": read.human}
    if read.marks is not None:
        parts["marks"] = read.marks
    evidence = replace(evidence, parts=parts)
    policy = parse_policy(report.policy.settings)
    judged = judge(evidence, policy, report.seed)
    _require_no_softer(report, judged, earlier, reviewer)
    packed = evidence.to_bytes()
    tiles = report.subjects.synthetic.tiles
    decided = report.model_copy(
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
    )
    return Decided(decided, packed, render_page(decided, _pairs(out, decided, evidence)))


def _require_no_softer(
    report: AuditReport, judged: Judgement, earlier: HumanEvidence | None, reviewer: VerifyKey
) -> None:
    """Refuse decisions that would undo another reader's, or a copy that anybody confirmed.

    Whoever holds a key could otherwise read until somebody says that all is well.
    """
    if earlier is None:
        return
    for name in (review_queue.NAME, disclosure.NAME):
        before, after = report.test(name), next((test for test in judged.tests if test.name == name), None)
        if before is None or after is None or after.status.rank >= before.status.rank:
            continue
        if before.status is Status.FAIL or earlier.reviewer != reviewer.key_id:
            raise RefusedError(
                f"An earlier reading of this queue came to {before.status} in '{name}', and this one would make it "
                f"{after.status}.",
                hint="What one reader saw stands. A reader may finish their own reading; where it was a mistake, audit "
                "and read anew, and keep both on record.",
                code="reading-stands",
            )


def _pairs(out: Path, report: AuditReport, evidence: Evidence) -> list[Pair]:
    """The pairs of the queue, nearest first: the tiles themselves need not be at hand to show them again."""
    pictures = {item.id: item for item in load_queue(out).items}
    flagged = {flag.synthetic for flag in report.flagged}
    shown = [item for item in load_key(out).items if item.kind == "pair" and item.id in pictures]
    shown.sort(key=lambda item: (item.left not in flagged, -item.score, item.left))
    p_values = nulls_of(evidence).p_values(np.array([item.score for item in shown]))
    pairs = []
    for item, p in zip(shown, p_values, strict=True):
        released, training = (decoded(uri or "") for uri in (pictures[item.id].left, pictures[item.id].right))
        found = matching(released, training)
        pairs.append(
            Pair(
                synthetic=item.left,
                training_tile=item.training_tile,
                score=item.score,
                p_value=float(p),
                flagged=item.left in flagged,
                alignment="as the reviewer saw it",
                aligned=picture(released),
                released=picture(released),
                training=picture(training),
                lines=match_lines(released, training, found),
                matches=found.inliers,
            )
        )
    return pairs
