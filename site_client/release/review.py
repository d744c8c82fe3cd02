"""Looking at a sealed release before signing: the audit is checked against the seal and filed with the release."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pixcell_core.contracts.verdict import VerdictStatus
from site_client.release.evidence import AuditCheck, Evidence, recompute_from_evidence
from site_client.release.failed_audits import AUDITED
from site_client.release.progress import Progress, progress_of
from site_client.release.seal import Seal, require_open, require_seal
from site_client.release.signing import SigningRefusedError, examine, write_evidence
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace


@dataclass(frozen=True)
class Reviewed:
    """A release as a signer sees it: what is under the seal, what the audit says (None before one), what is next."""

    release: ReleaseFolder
    seal: Seal
    evidence: Evidence | None
    progress: Progress


def review_release(
    workspace: ReleaseWorkspace,
    audit: Path | None,
    *,
    now: datetime,
    release_id: str | None = None,
    accepted_policy: str | None = None,
    check_audit: AuditCheck = recompute_from_evidence,
) -> Reviewed:
    """Look at a release; with `audit`, check that it holds for the sealed tiles and file its report. Signs nothing.

    FAIL and INVALID are filed too: what was found stays with the release. A signed release keeps the audit it was
    signed on.
    """
    release = workspace.require().find(release_id)
    if audit is None:
        return Reviewed(release, require_seal(workspace, release), None, progress_of(workspace, release, now))
    with workspace.recording_refusals("review", {"release": release.release_id}, now=now):
        require_open(workspace, release)
        seal = require_seal(workspace, release)
        if release.verdict() is not None:
            raise SigningRefusedError(
                "Another verdict on these tiles is signed already.",
                hint="Look without --audit; a second auditor signs with their own audit: pixcell release sign.",
                code="already-signed",
            )
        evidence = examine(seal, audit, release.tiles, accepted_policy, check_audit)
        status: VerdictStatus = evidence.report.verdict.value
        workspace.log().append(
            AUDITED,
            {
                "release": release.release_id,
                "tiles_root": seal.manifest.tiles_root,
                "verdict": status,
                "report": evidence.report_digest,
                "page": evidence.page_digest,
                "policy": evidence.report.policy.digest,
            },
            now=now,
        )
        write_evidence(release, evidence)
    return Reviewed(release, seal, evidence, progress_of(workspace, release, now))
