"""Reading the audit's output for the gate: what it judged, how, and whether its parts agree with one another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pixcell_core.contracts.canonical import digest, parse_document, read_bounded
from pixcell_core.contracts.release import MAX_TILES, ReleaseManifest
from pixcell_core.errors import RefusedError
from site_client.release.source_tiles import SITE_ONLY_MARK, SiteOnlyError

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
MAX_REPORT_BYTES = 32 * 1024 * 1024

Status = Literal["PASS", "REVIEW", "FAIL", "INVALID"]
_RANK = {"PASS": 0, "REVIEW": 1, "FAIL": 2, "INVALID": 3}
_EMBEDDED_PHOTO = re.compile(rb"data:image/(?!svg)", re.IGNORECASE)


class EvidenceError(RefusedError):
    """The audit's output cannot carry a verdict."""

    default_code = "bad-evidence"


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class AuditedTile(_Part):
    """One tile the audit looked at."""

    name: str
    sha256: Annotated[str, Field(pattern=r"^(sha256:)?[0-9a-f]{64}$")]

    @property
    def file_digest(self) -> str:
        """``sha256:<hex>`` of the tile's bytes."""
        return "sha256:" + self.sha256.removeprefix("sha256:")


class AuditTest(_Part):
    """One test's outcome, as far as the gate must know it."""

    name: str
    status: Status
    gating: bool = True


class AuditReport(_Part):
    """What the gate reads of ``report.json``."""

    verdict: Status
    tests: Annotated[tuple[AuditTest, ...], Field(min_length=1)]
    subjects: Annotated[tuple[AuditedTile, ...], Field(min_length=1, max_length=MAX_TILES)]
    policy_digest: str
    tool_version: str
    proven_kinds: tuple[str, ...] = ()


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


def read_evidence(folder: Path) -> Evidence:
    """Read an audit's output folder; refuse one whose verdict does not follow from its tests."""
    report_bytes = read_bounded(folder / REPORT_FILE, MAX_REPORT_BYTES)
    page_bytes = read_bounded(folder / PAGE_FILE, MAX_REPORT_BYTES)
    refuse_site_only(PAGE_FILE, page_bytes)
    report = parse_document(AuditReport, report_bytes, name=REPORT_FILE)
    gating = [test for test in report.tests if test.gating]
    worst = max((test.status for test in gating), key=_RANK.__getitem__, default="INVALID")
    if _RANK[report.verdict] < _RANK[worst]:
        culprit = next(test.name for test in gating if test.status == worst)
        raise EvidenceError(
            f"The report says {report.verdict}, but its test '{culprit}' says {worst}.",
            hint="The report was edited. Run the audit again.",
            code="report-contradicts-itself",
        )
    return Evidence(report, report_bytes, page_bytes)


def require_same_tiles(evidence: Evidence, manifest: ReleaseManifest) -> None:
    """Refuse unless the audit looked at exactly the sealed tiles, each by its bytes."""
    audited = {tile.name.rsplit("/", 1)[-1]: tile.file_digest for tile in evidence.report.subjects}
    if len(audited) != len(evidence.report.subjects):
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
