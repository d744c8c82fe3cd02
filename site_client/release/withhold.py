"""Withholding: a second draft without the tiles that an audit flagged, allowed once, and said wherever it shows.

It answers a REVIEW by the near-copy screen alone: flags that chance explains. The draft must be audited again, with
`pixcell audit run --filtered-from`; the gate asks for that.
"""

from __future__ import annotations

import csv
import io
import shutil
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.canonical import canonical_bytes, digest
from pixcell_core.contracts.release import FilteredFrom, ReleasedTile, ReleaseManifest, tile_name, tiles_root
from pixcell_core.errors import RefusedError
from pixcell_core.trust.bundle_files import MANIFEST, README, SHEET
from pixcell_core.trust.durable import sync_folder, write_whole
from privacy_audit.filtering import withholding_answers
from site_client.release.draft import drafting_folder, sheet_of
from site_client.release.evidence import (
    AuditCheck,
    Evidence,
    read_evidence,
    recompute_from_evidence,
    require_same_tiles,
)
from site_client.release.failed_audits import require_unfailed
from site_client.release.seal import require_open, require_seal
from site_client.release.sheet import Terms, readme
from site_client.release.source_tiles import TABLE
from site_client.release.workspace import ORIGINS, ReleaseFolder, ReleaseWorkspace, release_id_of


class NothingToWithholdError(RefusedError):
    """This audit does not call for withholding tiles."""

    default_code = "withholding-refused"


def withhold_flagged(
    workspace: ReleaseWorkspace,
    audit: Path,
    *,
    now: datetime,
    release_id: str | None = None,
    check_audit: AuditCheck = recompute_from_evidence,
) -> ReleaseFolder:
    """Seal a second draft: the audited release without its flagged tiles. The first draft stays as it is.

    Raises a :class:`RefusedError` where the audit does not come out the same from its evidence, says anything but a
    REVIEW by the near-copy screen alone, flags nothing, is about other tiles or failed before; where the release was
    filtered before, refused, withdrawn, or changed under its seal.
    """
    release = workspace.require().find(release_id)
    with workspace.recording_refusals("withhold", {"release": release.release_id}, now=now):
        require_open(workspace, release)
        manifest = require_seal(workspace, release).manifest
        evidence = read_evidence(audit)
        require_same_tiles(evidence, manifest)
        flagged = _flagged(evidence, manifest)
        require_unfailed(workspace, manifest, evidence.report.policy.digest)
        # A report is a file anyone can write: which tiles it flags is believed only where the evidence says the same.
        check_audit(audit, release.tiles)
        kept = [tile for tile in manifest.tiles if tile.name not in flagged]
        with drafting_folder(workspace.releases) as folder:
            remainder = _reseal(release, manifest, kept, evidence, folder, now)
            filtered = ReleaseFolder(workspace.releases / release_id_of(remainder))
            if filtered.path.exists():
                return filtered
            # The event first, as in drafting.
            workspace.log().append(
                "release.filtered",
                {
                    "release": filtered.release_id,
                    "from": release.release_id,
                    "manifest": remainder.digest,
                    "tiles": remainder.tile_count,
                    "tiles_root": remainder.tiles_root,
                    "withheld": len(flagged),
                    "report": evidence.report_digest,
                },
                now=now,
            )
            folder.rename(filtered.path)
            sync_folder(workspace.releases)
    return filtered


def _flagged(evidence: Evidence, manifest: ReleaseManifest) -> set[str]:
    """Names of the tiles to withhold, or the refusal."""
    verdict = evidence.report.verdict.value
    if manifest.filtered is not None:
        raise NothingToWithholdError(
            "This release was filtered before.",
            hint="A release is filtered once, not until it passes. Draw other tiles and draft those.",
            code="filtered-before",
        )
    if verdict != "REVIEW":
        raise NothingToWithholdError(
            f"The audit says {verdict}: withholding answers a REVIEW only.",
            hint="PASS: sign as it is. FAIL or INVALID: the generator or the audit must change, not the choice of tiles.",
        )
    flagged = {flag.synthetic for flag in evidence.report.flagged}
    if not flagged or len(flagged) >= manifest.tile_count:
        raise NothingToWithholdError(
            f"The audit flags {len(flagged)} of {manifest.tile_count} tiles: there is nothing to withhold, or nothing left.",
            hint="Its REVIEW has another reason. Read the report: a named person may answer for it.",
        )
    if not withholding_answers(evidence.report):
        raise NothingToWithholdError(
            "The audit's REVIEW has other reasons than the near-copy screen: withholding tiles does not answer them.",
            hint="Read the report: a named person may answer for it, or draw other tiles.",
        )
    return flagged


def _reseal(
    release: ReleaseFolder,
    manifest: ReleaseManifest,
    kept: list[ReleasedTile],
    evidence: Evidence,
    folder: Path,
    now: datetime,
) -> ReleaseManifest:
    """Write the second draft into `folder`: the kept files, numbered anew in the same order."""
    (folder / "tiles").mkdir()
    renamed = {
        tile.name: tile_name(number, manifest.tile_format) for number, tile in enumerate(kept, start=1)
    }
    for old, new in renamed.items():
        shutil.copyfile(release.tiles / old, folder / "tiles" / new)
    tiles = tuple(tile.model_copy(update={"name": renamed[tile.name]}) for tile in kept)
    filtered = FilteredFrom(
        manifest_digest=manifest.digest,
        audit_report_digest=evidence.report_digest,
        withheld=manifest.tile_count - len(kept),
        of=manifest.tile_count,
    )
    sheet = sheet_of(folder / "tiles", list(tiles))
    words = readme(
        manifest.site,
        manifest.generator,
        manifest.privacy,
        Terms(licence=manifest.licence, usage=manifest.usage),
        tiles=len(tiles),
        width=manifest.width,
        height=manifest.height,
        filtered=filtered,
    )
    remainder = ReleaseManifest.model_validate(
        {
            **dict(manifest),
            "created_at": now.astimezone(UTC).replace(microsecond=0),
            "tile_count": len(tiles),
            "tiles_root": tiles_root(tile.file_digest for tile in tiles),
            "tiles": tiles,
            "filtered": filtered,
            "sample_sheet_digest": digest(sheet),
            "readme_digest": digest(words),
        }
    )
    write_whole(folder / SHEET, sheet)
    write_whole(folder / README, words)
    write_whole(folder / MANIFEST, remainder.to_bytes())
    origins = {new: release.origin_of(old) or "unknown" for old, new in renamed.items()}
    write_whole(folder / ORIGINS, canonical_bytes(origins), mode=0o600)
    table = release.tiles / TABLE
    if table.is_file():
        write_whole(folder / "tiles" / TABLE, _table(table.read_text("utf-8"), renamed))
    return remainder


def _table(text: str, renamed: dict[str, str]) -> bytes:
    """The audit's table of labels and conditions, for the kept tiles under their new names."""
    head, *rows = csv.reader(io.StringIO(text))
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([renamed[name], *rest] for name, *rest in rows if name in renamed)
    return out.getvalue().encode("utf-8")
