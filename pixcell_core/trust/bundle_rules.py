"""The rules of a bundle that both its writer and its verifier hold: names, papers, permission, time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from pixcell_core.contracts.audit_facts import AuditFacts
from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.trust.bundle_files import DATASHEET, DATASHEET_PAGE, REPORT, BundleFiles
from pixcell_core.trust.bundle_report import BundleRefusedError
from pixcell_core.trust.datasheet import datasheet
from pixcell_core.trust.full_datasheet import full_datasheet
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.kits import CLOCK_SLACK
from pixcell_core.trust.plain_page import plain_page
from pixcell_core.trust.quorum import NamedSignature
from pixcell_core.trust.ro_crate import METADATA, ro_crate


def written_papers(
    manifest: ReleaseManifest,
    verdict: Verdict,
    signatures: Sequence[NamedSignature],
    names: Iterable[str],
    exported_at: datetime,
    report: bytes,
) -> dict[str, bytes]:
    """The files of a bundle that follow from what was signed: written at export, and again to check them.

    Args:
        names: every other file of the bundle. report: the bytes of the audit report that the verdict names.
    """
    facts = parse_document(AuditFacts, report, name=REPORT)
    sheet = full_datasheet(manifest, verdict, signatures, exported_at, facts)
    return {
        DATASHEET: sheet,
        DATASHEET_PAGE: plain_page(sheet.decode("utf-8")).encode("utf-8"),
        METADATA: ro_crate(manifest, verdict, {*names, DATASHEET, DATASHEET_PAGE}, exported_at),
    }


def papers_of_old(
    manifest: ReleaseManifest,
    verdict: Verdict,
    signatures: Sequence[NamedSignature],
    names: Iterable[str],
    exported_at: datetime,
) -> dict[str, bytes]:
    """The same of bundles written before there was a second wording of the datasheet; they stay good."""
    return {
        DATASHEET: datasheet(manifest, verdict, signatures, exported_at),
        METADATA: ro_crate(manifest, verdict, {*names, DATASHEET}, exported_at),
    }


def require_papers(
    files: BundleFiles,
    manifest: ReleaseManifest,
    verdict: Verdict,
    signatures: Sequence[NamedSignature],
    names: Sequence[str],
    exported_at: datetime,
) -> None:
    """Refuse papers that are not, byte for byte, what follows from what was signed: of this wording or of the first."""
    told = (manifest, verdict, signatures, names, exported_at)
    papers = papers_of_old(*told)
    if DATASHEET_PAGE in names or files.read(DATASHEET) != papers[DATASHEET]:
        papers = written_papers(*told, files.read(REPORT))
    for name, wanted in papers.items():
        if name not in names:
            raise refused(f"The bundle lacks {name}.", "file-missing")
        if files.read(name) != wanted:
            raise refused(f"{name} does not say what was signed.", "bundle-changed")


def certificate_file_name(key_id: str) -> str:
    """Where the certificate behind a signer's key lies in a bundle."""
    return f"certificates/{key_id.removeprefix('sha256:')}.json"


def key_file_name(key: VerifyKey) -> str:
    """Where a public key lies in a bundle."""
    return f"keys/{key.key_id.removeprefix('sha256:')}.pub"


def require_permission(verdict: Verdict, manifest: ReleaseManifest) -> None:
    """Refuse unless the verdict is about exactly this manifest and lets it leave."""
    difference = verdict.difference_from(manifest)
    if difference is not None:
        raise refused(
            f"The verdict does not belong to these tiles: {difference}.",
            "verdict-of-other-tiles",
            hint="Audit exactly the sealed tiles, and sign that audit.",
        )
    if not verdict.predicate.permits_release:
        raise refused(
            f"The verdict is {verdict.predicate.verdict}: these tiles may not leave.",
            "verdict-forbids",
            hint="REVIEW needs a named approver's reason; FAIL and INVALID need other tiles and a new audit.",
        )
    if verdict.predicate.auditor.code_digest is None:
        raise refused(
            "The verdict does not name the code that judged.",
            "code-not-named",
            hint="Sign with `pixcell release sign`, which names its own code by digest.",
        )


def known_code(verdict: Verdict, known: Sequence[str]) -> str:
    """What is to be said of the code that judged; refused where digests are known and its is none of them."""
    judged = str(verdict.predicate.auditor.code_digest)
    if not known:
        return f"NOT COMPARED: no digest of auditing code was given; {judged} judged"
    if judged not in known:
        raise refused(
            f"The tiles were judged by code that is none of the {len(known)} you know: {judged}.",
            "code-unknown",
            hint="Ask the auditor which version judged and compare its published digest, or audit the tiles again.",
        )
    return f"{judged} judged, one of the {len(known)} known"


def require_current(verdict: Verdict, now: datetime) -> None:
    """Refuse a verdict that is not yet, or no longer, valid."""
    predicate = verdict.predicate
    if now < predicate.issued_at - CLOCK_SLACK:
        raise refused(
            f"The verdict was signed on {predicate.issued_at:%Y-%m-%d %H:%M} UTC, and here it is "
            f"{now:%Y-%m-%d %H:%M} UTC.",
            "clock-wrong",
            hint="Set this machine's clock, or ask the auditor to look at theirs and sign again.",
        )
    if now >= predicate.expires_at:
        raise refused(
            f"The verdict holds from {predicate.issued_at:%Y-%m-%d %H:%M} UTC to "
            f"{predicate.expires_at:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC.",
            "verdict-expired",
            hint="Ask for a new audit: attacks improve with time. Check this machine's clock too.",
        )


def refused(message: str, code: str, *, hint: str = "") -> BundleRefusedError:
    """The refusal of a bundle, to be raised."""
    return BundleRefusedError(
        message,
        hint=hint or "Do not use this bundle. Fetch it again from the site that released it.",
        code=code,
    )
