"""Signing a verdict: an auditor's key on exactly the sealed tiles and exactly the evidence that was read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pixcell_core.contracts.canonical import digest, file_digest, parse_document
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.contracts.verdict import (
    Audience,
    Auditor,
    Subject,
    Verdict,
    VerdictException,
    VerdictPredicate,
)
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.bundle import require_permission
from pixcell_core.trust.bundle_files import VERDICT
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, add_signature, sign_envelope
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey
from site_client.release.evidence import (
    AuditCheck,
    Evidence,
    read_evidence,
    recompute_from_evidence,
    require_filtering_stated,
    require_known_policy,
    require_same_tiles,
)
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace

DEFAULT_DAYS, MAX_DAYS = 365, 1095
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


def sign_release(
    workspace: ReleaseWorkspace,
    audit: Path,
    key: SigningKey,
    *,
    now: datetime,
    release_id: str | None = None,
    exception: VerdictException | None = None,
    days: int = DEFAULT_DAYS,
    audience: Audience = "agreement",
    accepted_policy: str | None = None,
    check_audit: AuditCheck = recompute_from_evidence,
) -> SignedVerdict:
    """Sign the audit's verdict on a sealed release, or add a second auditor's signature to it.

    PASS is signed as it is; REVIEW only with a named approver's reason, which is signed with it; FAIL
    and INVALID never. Raises a :class:`RefusedError` that says why; the refusal is an event of the
    site's log.
    """
    if not 1 <= days <= MAX_DAYS:
        raise BadInputError(
            f"A verdict holds 1 to {MAX_DAYS} days, not {days}.", hint="Attacks improve: re-audit instead."
        )
    release = workspace.require().find(release_id)
    facts = {"release": release.release_id, "key": key.key_id}
    with workspace.recording_refusals("sign", facts, now=now):
        _require_auditor(workspace, key)
        manifest = release.manifest()
        require_sealed_tiles(release, manifest)
        evidence = read_evidence(audit)
        require_same_tiles(evidence, manifest)
        require_filtering_stated(evidence, manifest)
        require_known_policy(evidence, accepted_policy)
        check_audit(audit, release.tiles)
        verdict = _verdict(release, manifest, evidence, exception, audience, now, days)
        require_permission(verdict, manifest)
        envelope, verdict = _signed(release, verdict, key)
        write_evidence(release, evidence)
        workspace.record_signer(release, key.verify_key)
        signed = envelope.to_bytes()
        # The event first: a signature that stands nowhere in the log must not exist.
        workspace.log().append(
            "release.signed",
            {
                **facts,
                "verdict": verdict.predicate.verdict,
                "exception": exception is not None,
                "manifest": manifest.digest,
                "report": evidence.report_digest,
                "envelope": digest(signed),
                "signatures": len(envelope.signatures),
            },
            now=now,
        )
        write_whole(release.path / VERDICT, signed)
    return SignedVerdict(release, verdict, envelope)


def require_sealed_tiles(release: ReleaseFolder, manifest: ReleaseManifest) -> None:
    """Refuse when a sealed tile is missing or is no longer the file that was sealed."""
    for tile in manifest.tiles:
        path = release.tiles / tile.name
        if not path.is_file() or path.is_symlink() or file_digest(path) != tile.file_digest:
            raise SigningRefusedError(
                f"{tile.name} is not the tile that was sealed.",
                hint="The release folder was changed. Draft again from the generator's tiles, and audit that.",
                code="sealed-tile-changed",
            )


def write_evidence(release: ReleaseFolder, evidence: Evidence) -> None:
    """Keep the judged bytes with the release, so that what ships is what was signed."""
    release.report.parent.mkdir(exist_ok=True)
    write_whole(release.report, evidence.report_bytes)
    write_whole(release.page, evidence.page_bytes)


def _require_auditor(workspace: ReleaseWorkspace, key: SigningKey) -> None:
    if key.key_id == workspace.site_key().key_id:
        raise SigningRefusedError(
            "The site's own release key cannot sign the verdict on its own release.",
            hint="The auditor signs with a key of their own: pixcell key new FILE.",
            code="auditor-is-site",
        )
    accepted = workspace.accepted_auditors()
    if accepted is not None and key.key_id not in accepted:
        raise SigningRefusedError(
            f"{key.key_id} is not among the auditors this site accepts.",
            hint=f"Accepted auditors' public keys lie in {workspace.auditors}.",
            code="unknown-auditor",
        )


def _verdict(
    release: ReleaseFolder,
    manifest: ReleaseManifest,
    evidence: Evidence,
    exception: VerdictException | None,
    audience: Audience,
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
    issued = now.astimezone(UTC).replace(microsecond=0)
    generator = manifest.generator
    return Verdict(
        subject=tuple(Subject.of(tile.name, tile.file_digest) for tile in manifest.tiles),
        predicate=VerdictPredicate(
            verdict="PASS" if status == "PASS" else "REVIEW",
            exception=exception,
            audience=audience,
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
                policy_digest=evidence.report.policy.digest,
            ),
            audit_report_digest=evidence.report_digest,
            audit_page_digest=evidence.page_digest,
            proven_kinds=evidence.report.proven_kinds,
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


def _signed(release: ReleaseFolder, verdict: Verdict, key: SigningKey) -> tuple[Envelope, Verdict]:
    """A new envelope, or the existing one with one more signature where it rests on the same evidence."""
    existing = release.verdict()
    if existing is None:
        return sign_envelope(IN_TOTO_PAYLOAD_TYPE, verdict.to_bytes(), [key]), verdict
    before = parse_document(Verdict, existing.unsafe_unverified_payload(), name=VERDICT)
    same = {"issued_at": verdict.predicate.issued_at, "expires_at": verdict.predicate.expires_at}
    if before.predicate.model_copy(update=same) != verdict.predicate or before.subject != verdict.subject:
        raise SigningRefusedError(
            "Another verdict on these tiles is signed already.",
            hint="A second auditor signs the same audit with the same words. Otherwise draft the release again.",
            code="already-signed",
        )
    return add_signature(existing, key), before
