"""Signing a verdict, by role: on exactly the sealed tiles, exactly the evidence that was read, exactly what was asked.

An auditor comes first and signs what the audit says; the site and others sign the very same statement after.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pixcell_core.contracts.canonical import digest
from pixcell_core.contracts.gate import SignerRole
from pixcell_core.contracts.verdict import (
    MAX_VERDICT_DAYS,
    Audience,
    Auditor,
    Subject,
    Verdict,
    VerdictException,
    VerdictPredicate,
)
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.bundle_files import VERDICT
from pixcell_core.trust.bundle_rules import require_current, require_permission
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, add_signature, sign_envelope
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.kits import CLOCK_SLACK
from pixcell_core.trust.log import EventLog
from pixcell_core.trust.quorum import Standing, standing
from site_client.release.evidence import (
    AuditCheck,
    Evidence,
    held_audit,
    read_evidence,
    recompute_from_evidence,
    require_filtering_stated,
    require_known_policy,
    require_own_seed,
    require_same_code,
    require_same_tiles,
)
from site_client.release.failed_audits import require_unfailed
from site_client.release.seal import Seal, require_open, require_seal
from site_client.release.signers import Credentials, check_credentials, keep_credentials, require_signer
from site_client.release.verdict_file import open_verdict
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace

DEFAULT_DAYS = 365
SHOWN_FLAGS = 20


class SigningRefusedError(RefusedError):
    """This verdict may not be signed."""

    default_code = "signing-refused"


@dataclass(frozen=True)
class SignedVerdict:
    """What stands in the release folder after signing."""

    release: ReleaseFolder
    verdict: Verdict
    envelope: Envelope
    standing: Standing


def sign_release(
    workspace: ReleaseWorkspace,
    audit: Path | None,
    key: SigningKey,
    *,
    now: datetime,
    role: SignerRole = "auditor",
    release_id: str | None = None,
    exception: VerdictException | None = None,
    days: int = DEFAULT_DAYS,
    audience: Audience | None = None,
    accepted_policy: str | None = None,
    credentials: Credentials | None = None,
    check_audit: AuditCheck = recompute_from_evidence,
    own_log: EventLog | None = None,
) -> SignedVerdict:
    """Sign as auditor what the audit says of a sealed release, or add a signature to what an auditor signed.

    PASS is signed as it is; REVIEW only with a named approver's reason, which is signed with it; FAIL
    and INVALID never. Without `audience` the request's holds. Raises a :class:`RefusedError` that says
    why. Signature and refusal are events of the site's log, and of `own_log`, the signer's.
    """
    if not 1 <= days <= MAX_VERDICT_DAYS:
        raise BadInputError(
            f"A verdict holds 1 to {MAX_VERDICT_DAYS} days, not {days}.",
            hint="Attacks improve: re-audit instead.",
        )
    if role == "auditor" and audit is None:
        raise BadInputError(
            "An auditor signs what an audit says, and none was given.",
            hint="Give the output folder of your own `pixcell audit run`: --audit OUT.",
            code="no-audit",
        )
    release = workspace.require().find(release_id)
    facts = {"release": release.release_id, "key": key.key_id}
    with workspace.recording_refusals("sign", facts, now=now, own=own_log):
        require_open(workspace, release)
        seal = require_seal(workspace, release)
        require_signer(workspace, seal, key.verify_key, role, now)
        certificate = check_credentials(workspace, release, seal, key.verify_key, role, credentials, now)
        evidence: Evidence | None = None
        if role == "auditor" and audit is not None:
            evidence = examine(seal, audit, release.tiles, accepted_policy, check_audit)
            verdict = _verdict(release, seal, evidence, exception, audience, now, days)
            require_permission(verdict, seal.manifest)
            require_unfailed(workspace, seal.manifest, evidence.report.policy.digest, own_log)
            envelope, verdict = _signed(workspace, release, seal, verdict, key, now)
        else:
            envelope, verdict = _countersigned(workspace, release, seal, key, now)
            require_unfailed(workspace, seal.manifest, verdict.predicate.auditor.policy_digest, own_log)
        signed = envelope.to_bytes()
        # The events first: a signature that stands nowhere in a log must not exist, and a log that cannot be written
        # must leave the release as it was.
        workspace.note(
            "release.signed",
            {
                **facts,
                "site": seal.manifest.site,
                "role": role,
                "verdict": verdict.predicate.verdict,
                "exception": verdict.predicate.exception is not None,
                "manifest": seal.manifest.digest,
                "tiles_root": seal.manifest.tiles_root,
                "policy": verdict.predicate.auditor.policy_digest,
                "report": verdict.predicate.audit_report_digest,
                "page": verdict.predicate.audit_page_digest,
                "envelope": digest(signed),
                "signatures": len(envelope.signatures),
            },
            now=now,
            own=own_log,
        )
        workspace.record_signer(release, key.verify_key)
        if certificate is not None and credentials is not None:
            keep_credentials(release, key.verify_key, credentials)
        if evidence is not None:
            write_evidence(release, evidence)
        write_whole(release.path / VERDICT, signed)
    stands = standing(envelope.key_ids, seal.signers, seal.manifest.site_key_id, at=now)
    return SignedVerdict(release, verdict, envelope, stands)


def examine(
    seal: Seal, audit: Path, tiles: Path, accepted_policy: str | None, check_audit: AuditCheck
) -> Evidence:
    """The evidence of an audit, if it is about the sealed tiles, by the policy asked for, and comes out the same."""
    with held_audit(audit) as held:
        return _examine(seal, held, tiles, accepted_policy, check_audit)


def _examine(
    seal: Seal, held: Path, tiles: Path, accepted_policy: str | None, check_audit: AuditCheck
) -> Evidence:
    evidence = read_evidence(held)
    require_same_tiles(evidence, seal.manifest)
    require_filtering_stated(evidence, seal.manifest)
    found = evidence.report.policy.digest
    if seal.request is not None and seal.request.policy_digest != found:
        raise SigningRefusedError(
            f"The request asks for an audit by the policy {seal.request.policy_digest}, this one was run by {found}.",
            hint="Audit with --policy and the policy.yaml of the release's folder.",
            code="policy-not-requested",
        )
    require_known_policy(evidence, accepted_policy)
    require_same_code(evidence)
    require_own_seed(evidence)
    check_audit(held, tiles)
    return evidence


def write_evidence(release: ReleaseFolder, evidence: Evidence) -> None:
    """Keep the judged bytes with the release, so that what ships is what was signed."""
    release.report.parent.mkdir(exist_ok=True)
    write_whole(release.report, evidence.report_bytes)
    write_whole(release.page, evidence.page_bytes)


def _countersigned(
    workspace: ReleaseWorkspace, release: ReleaseFolder, seal: Seal, key: SigningKey, now: datetime
) -> tuple[Envelope, Verdict]:
    """The auditor's verdict with one more signature: the same words, nothing added."""
    envelope, verdict, _ = open_verdict(workspace, release)
    require_permission(verdict, seal.manifest)
    require_current(verdict, now)
    require_terms(verdict, seal)
    return add_signature(envelope, key), verdict


def require_terms(verdict: Verdict, seal: Seal) -> None:
    """Refuse a verdict that answers another request, or names other signers, than lie under the seal."""
    asked = None if seal.request is None else seal.request.digest
    rule = None if seal.signers is None else seal.signers.digest
    if (verdict.predicate.request_digest, verdict.predicate.signers_digest) != (asked, rule):
        raise SigningRefusedError(
            "The verdict answers another request than the one under this seal.",
            hint="Draft the release again, request it and have that audited.",
            code="wrong-request",
        )


def _verdict(
    release: ReleaseFolder,
    seal: Seal,
    evidence: Evidence,
    exception: VerdictException | None,
    audience: Audience | None,
    now: datetime,
    days: int,
) -> Verdict:
    status = evidence.report.verdict.value
    if status in ("FAIL", "INVALID"):
        tests = [test.name for test in evidence.report.tests if test.status.value == status and test.gating]
        failing = ", ".join(tests)
        raise SigningRefusedError(
            f"The audit says {status} ({failing or 'as a whole'}): no key can release these tiles."
            + _flagged(release, evidence),
            hint="No exception covers FAIL or INVALID. Read the audit's report, make other tiles, audit again.",
            code="verdict-forbids",
        )
    if status == "REVIEW" and exception is None:
        raise SigningRefusedError(
            "The audit says REVIEW: a person has to answer for this release.",
            hint='Give the reason and who answers: --exception "TEXT" --approver NAME. Both are signed.',
            code="review-needs-exception",
        )
    if status == "PASS" and exception is not None:
        raise BadInputError("The audit says PASS: no exception is needed.", hint="Leave --exception out.")
    manifest, asked = seal.manifest, seal.request
    if asked is not None and audience not in (None, asked.audience):
        raise SigningRefusedError(
            f"The site asked for {asked.audience} use, not for {audience}.",
            hint="Leave --audience out. Another audience is another request.",
            code="audience-not-requested",
        )
    issued = now.astimezone(UTC).replace(microsecond=0)
    generator = manifest.generator
    return Verdict(
        subject=tuple(Subject.of(tile.name, tile.file_digest) for tile in manifest.tiles),
        predicate=VerdictPredicate(
            verdict="PASS" if status == "PASS" else "REVIEW",
            exception=exception,
            audience=asked.audience if asked is not None else audience or "agreement",
            site=manifest.site,
            manifest_digest=manifest.digest,
            tile_count=manifest.tile_count,
            tiles_root=manifest.tiles_root,
            study_digest=manifest.study_digest,
            base_digest=generator.base_digest,
            adapter_digest=generator.adapter_digest,
            conditioning=generator.conditioning,
            privacy=manifest.privacy,
            ledger_head=manifest.ledger_head,
            auditor=Auditor(
                name=evidence.report.tool.name,
                version=evidence.report.tool.version,
                code_digest=evidence.report.tool.code,
                policy_digest=evidence.report.policy.digest,
            ),
            audit_report_digest=evidence.report_digest,
            audit_page_digest=evidence.page_digest,
            proven_kinds=evidence.report.proven_kinds,
            signers_digest=None if seal.signers is None else seal.signers.digest,
            request_digest=None if asked is None else asked.digest,
            issued_at=issued,
            expires_at=issued + timedelta(days=days),
        ),
    )


def _flagged(release: ReleaseFolder, evidence: Evidence) -> str:
    """The flagged tiles with the generator's files they came from; the worst first, at most twenty."""
    flags = sorted(evidence.report.flagged, key=lambda flag: flag.p_value)
    if not flags:
        return ""
    named = [f"{flag.synthetic} (was {release.origin_of(flag.synthetic) or 'unknown'})" for flag in flags]
    more = f" and {len(named) - SHOWN_FLAGS} more" if len(named) > SHOWN_FLAGS else ""
    return f" Flagged: {', '.join(named[:SHOWN_FLAGS])}{more}."


def _signed(
    workspace: ReleaseWorkspace,
    release: ReleaseFolder,
    seal: Seal,
    verdict: Verdict,
    key: SigningKey,
    now: datetime,
) -> tuple[Envelope, Verdict]:
    """A new envelope, or the existing one with one more signature where it rests on the same evidence.

    The file lies in the site's folder: what stands on it beyond this signer's own words is looked at before it is
    signed, its signatures and its dates.
    """
    if release.verdict() is None:
        return sign_envelope(IN_TOTO_PAYLOAD_TYPE, verdict.to_bytes(), [key]), verdict
    existing, before, _ = open_verdict(workspace, release, (key.verify_key,))
    same = {"issued_at": verdict.predicate.issued_at, "expires_at": verdict.predicate.expires_at}
    if before.predicate.model_copy(update=same) != verdict.predicate or before.subject != verdict.subject:
        raise SigningRefusedError(
            "Another verdict on these tiles is signed already.",
            hint="A second auditor signs the same audit with the same words. Otherwise draft the release again.",
            code="already-signed",
        )
    require_current(before, now)
    if before.predicate.expires_at > verdict.predicate.expires_at + CLOCK_SLACK:
        raise SigningRefusedError(
            f"The verdict that lies here holds until {before.predicate.expires_at:%Y-%m-%d}, "
            f"you asked for {verdict.predicate.expires_at:%Y-%m-%d}.",
            hint="If you stand by the longer time: --days. Otherwise draft the release again and sign first.",
            code="holds-too-long",
        )
    if before.predicate.issued_at < seal.manifest.created_at - CLOCK_SLACK:
        raise SigningRefusedError(
            "The verdict that lies here says that it is older than the tiles it is about.",
            hint="Nobody could have signed it then. Draft the release again and have that audited.",
            code="already-signed",
        )
    return add_signature(existing, key), before
