"""An audit as an event of logs: which tiles, by which policy, with which verdict, in which report. Nothing private.

A run that came out badly stands in the log like one that came out well, so that a site cannot audit until it passes.
"""

from __future__ import annotations

from typing import Any

from pixcell_core.contracts import Digest, Document
from pixcell_core.trust.log import EventLog
from pixcell_core.trust.party_log import append_to_each
from privacy_audit.report import AuditReport

RAN, DECIDED = "audit.run", "audit.decided"


class AuditEvent(Document):
    """What a log says of one audit: digests of public documents, the verdict, and the root over the audited tiles."""

    verdict: str
    tiles_root: Digest
    policy: Digest
    report: Digest
    evidence: Digest
    decisions: Digest | None = None

    @classmethod
    def of(cls, report: AuditReport, report_digest: str, decisions: str | None = None) -> AuditEvent:
        """From a report and the digest of the file it lies in; `decisions`: of a reviewer's that were counted in."""
        return cls(
            verdict=str(report.verdict),
            tiles_root=report.subjects.synthetic.root,
            policy=report.policy.digest,
            report=report_digest,
            evidence=report.evidence_digest,
            decisions=decisions,
        )

    def append_to(self, *logs: EventLog | None) -> int:
        """Make it an event of each of `logs`; returns of how many."""
        kind = RAN if self.decisions is None else DECIDED
        data: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return len(append_to_each(logs, kind, data))
