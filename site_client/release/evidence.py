"""Reading the audit's output for the gate: what it judged, how, and whether it can be computed again
from its evidence.

A report is a file anyone could write. The gate believes it only where the evidence beside it gives the
same verdict again, and where the tiles it names are, byte for byte, the sealed ones.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pixcell_core.contracts.artifacts import AUDITING_CODE, code_digest
from pixcell_core.contracts.canonical import digest, parse_document, read_bounded
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.errors import RefusedError
from privacy_audit.evidence import MAX_EVIDENCE_BYTES
from privacy_audit.report import EVIDENCE, PAGE, REPORT, AuditReport
from privacy_audit.request import seed_of
from privacy_audit.result import worst
from site_client.release.source_tiles import SITE_ONLY_MARK, SiteOnlyError

MAX_REPORT_BYTES = 64 * 1024 * 1024

_EMBEDDED_PHOTO = re.compile(rb"data:image/(?!svg)", re.IGNORECASE)


class EvidenceError(RefusedError):
    """The audit's output cannot carry a verdict."""

    default_code = "bad-evidence"


AuditCheck = Callable[[Path, Path], None]
"""Takes an audit's output and the sealed tiles; raises :class:`EvidenceError` where the audit does not hold."""


@dataclass(frozen=True)
class Evidence:
    """An audit's output, read once: the bytes that are signed are the bytes that were judged here."""

    report: AuditReport
    report_bytes: bytes
    page_bytes: bytes

    @property
    def report_digest(self) -> str:
        """``sha256:<hex>`` of report.json."""
        return digest(self.report_bytes)

    @property
    def page_digest(self) -> str:
        """``sha256:<hex>`` of the shareable page."""
        return digest(self.page_bytes)


@contextmanager
def held_audit(folder: Path) -> Iterator[Path]:
    """A private copy of what an audit's output says, for as long as it is examined.

    The folder may lie where others write, on a disk of their own. What is read once for the signature and once for the
    recomputation must be the same bytes.
    """
    with tempfile.TemporaryDirectory(prefix="pixcell-audit-") as room:  # mode 700
        for name, limit in (
            (REPORT, MAX_REPORT_BYTES),
            (PAGE, MAX_REPORT_BYTES),
            (EVIDENCE, MAX_EVIDENCE_BYTES),
        ):
            source, target = folder / name, Path(room) / name
            if source.is_file():
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(read_bounded(source, limit))
        yield Path(room)


def require_same_code(evidence: Evidence) -> None:
    """Refuse an audit that was measured by other code than judges it again here."""
    here, measured = code_digest(AUDITING_CODE), evidence.report.tool.code
    if measured != here:
        raise EvidenceError(
            f"The audit was measured by the code {measured or 'of an older version'}, and this is {here}.",
            hint="Audit with the installation that signs: `pixcell audit code` prints its digest.",
            code="audited-by-other-code",
        )


def require_own_seed(evidence: Evidence) -> None:
    """Refuse an audit whose seed somebody chose: of enough seeds one passes."""
    report = evidence.report
    if report.seed != seed_of(report.subjects.synthetic.root, report.policy.digest):
        raise EvidenceError(
            "The audit was run with a seed that was chosen; the one that counts follows from the tiles and the policy.",
            hint="Run it again without --seed.",
            code="seed-chosen",
        )


def read_evidence(folder: Path) -> Evidence:
    """Read an audit's output folder; refuse one whose verdict does not follow from its tests."""
    report_bytes = read_bounded(folder / REPORT, MAX_REPORT_BYTES)
    page_bytes = read_bounded(folder / PAGE, MAX_REPORT_BYTES)
    refuse_site_only(PAGE, page_bytes)
    report = parse_document(AuditReport, report_bytes, name=REPORT)
    gating = [test for test in report.tests if test.gating]
    decided = worst(test.status for test in gating)
    if report.verdict is not decided:
        culprits = ", ".join(test.name for test in gating if test.status is decided) or "no test at all"
        raise EvidenceError(
            f"The report says {report.verdict}, its tests say {decided} ({culprits}).",
            hint="The report was edited. Run the audit again.",
            code="report-contradicts-itself",
        )
    return Evidence(report, report_bytes, page_bytes)


def recompute_from_evidence(audit: Path, tiles: Path) -> None:
    """Compute the whole verdict again from the evidence beside the report, and compare the tiles."""
    from privacy_audit.verify import verify_audit

    checked = verify_audit(audit, tiles)
    wrong = next((check for check in checked.checks if check.ok is not True), None)
    if wrong is None:
        return
    if wrong.ok is None:
        raise EvidenceError(
            f"The audit cannot be computed again here: {wrong.name}: {wrong.words}.",
            hint="Give the whole output folder of `pixcell audit run`, with its site/ part.",
            code="evidence-missing",
        )
    raise EvidenceError(
        f"The audit does not come out the same from its evidence: {wrong.name}: {wrong.words}.",
        hint="Its files were changed, or the tiles were. Run the audit again on the sealed tiles.",
        code="evidence-differs",
    )


def require_known_policy(evidence: Evidence, accepted: str | None) -> None:
    """Refuse an audit by other thresholds than the shipped default, unless the signer names that policy.

    ``accepted`` is a policy's digest, the name of one that ships, or a policy file.
    """
    from privacy_audit.policy import load_policy

    found = evidence.report.policy.digest
    named = accepted if accepted is None or accepted.startswith("sha256:") else load_policy(accepted).digest
    if found not in (named, load_policy().digest):
        raise EvidenceError(
            f"The audit was run by another policy than the default: {evidence.report.policy.name}, {found}.",
            hint="Read its thresholds in the report. If you stand by them: --accept-policy FILE or that digest.",
            code="unknown-policy",
        )


def require_same_tiles(evidence: Evidence, manifest: ReleaseManifest) -> None:
    """Refuse unless the audit looked at exactly the sealed tiles, each by its bytes."""
    files = evidence.report.subjects.synthetic.files
    audited = {file.name: file.sha256 for file in files}
    if len(audited) != len(files):
        raise EvidenceError(
            "The report names one tile twice.", hint="Run the audit again on the sealed tiles."
        )
    for tile in manifest.tiles:
        if tile.name not in audited:
            raise _other_tiles(f"it did not look at {tile.name}")
        if audited.pop(tile.name) != tile.file_digest:
            raise _other_tiles(f"it looked at another {tile.name}")
    if audited:
        raise _other_tiles(f"it also looked at {min(audited)}, which is not sealed")
    if evidence.report.subjects.synthetic.root != manifest.tiles_root:
        raise _other_tiles("its root over the tiles is another")


def require_filtering_stated(evidence: Evidence, manifest: ReleaseManifest) -> None:
    """Refuse a filtered release whose audit did not know that it was one, or knew of another filtering."""
    from privacy_audit.report import FILTERED

    test, filtered = evidence.report.test(FILTERED), manifest.filtered
    stated = test and (test.details["first_report"], test.details["withheld"], test.details["of"])
    wanted = filtered and (filtered.audit_report_digest, filtered.withheld, filtered.of)
    if stated != wanted:
        raise EvidenceError(
            "This release is what an audit left over, and its own audit was not told so."
            if filtered
            else "The audit is about a filtered release, and this one was not filtered.",
            hint="Run: pixcell audit run … --filtered-from FIRST_AUDIT on the tiles that `release withhold` printed.",
            code="filtering-not-stated",
        )


def refuse_site_only(name: str, data: bytes) -> None:
    """Refuse a page that is marked for the site's own eyes or that embeds photographs."""
    if SITE_ONLY_MARK.encode() in data.lower() or _EMBEDDED_PHOTO.search(data):
        raise SiteOnlyError(
            f"{name} is for the site's own eyes: it is marked so, or it embeds pictures of tiles.",
            hint="Only the shareable page (numbers and hashes) leaves. Run the audit again if it is missing.",
        )


def _other_tiles(why: str) -> EvidenceError:
    return EvidenceError(
        f"This audit is not about the sealed tiles: {why}.",
        hint="Audit the release's own tiles folder (printed by `pixcell release draft`), then sign.",
        code="audit-of-other-tiles",
    )
