"""The seal of a release: tiles, manifest, request, policy and evidence are what they were, or the release is unsealed."""

from __future__ import annotations

from dataclasses import dataclass

from pixcell_core.contracts.canonical import digest, file_digest, parse_document, read_bounded
from pixcell_core.contracts.gate import REQUEST_PAYLOAD_TYPE, ReleaseRequest, Signers
from pixcell_core.contracts.release import ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import RefusedError
from pixcell_core.trust.bundle_files import MAX_FILE_BYTES, PAGE, README, REPORT, REQUEST, SHEET, VERDICT
from pixcell_core.trust.dsse import verify_envelope
from pixcell_core.trust.tile_jpeg import require_named_form
from site_client.release.evidence import refuse_site_only
from site_client.release.workspace import POLICY, ReleaseFolder, ReleaseWorkspace

SEALINGS = ("release.sealed", "release.filtered")
"""Kinds of the events by which a manifest stands in the site's log: of a draft, and of what was left after withholding."""


FILINGS = ("release.audited", "release.signed")
"""Kinds of the events that name the report and the page which were put into the release's folder."""


class UnsealedError(RefusedError):
    """Something under the seal was changed."""

    default_code = "unsealed"


class ClosedError(RefusedError):
    """A signer said no, or the release was taken back: nothing more happens with it."""

    default_code = "release-refused"


@dataclass(frozen=True)
class Seal:
    """What a whole seal holds. `request` and `signers` are None where the site did not ask in writing."""

    manifest: ReleaseManifest
    request: ReleaseRequest | None
    signers: Signers | None


def require_seal(workspace: ReleaseWorkspace, release: ReleaseFolder) -> Seal:
    """The seal, if nothing under it was changed; else the refusal that names the first thing that was.

    Codes: `manifest-changed`, `sealed-tile-changed`, `unsealed`, `site-only` for a page with pictures of real tiles.
    """
    manifest = release.manifest()
    _require_sealing(workspace, release, manifest)
    require_sealed_tiles(release, manifest)
    for name, wanted in ((SHEET, manifest.sample_sheet_digest), (README, manifest.readme_digest)):
        _require_file(release, name, wanted)
    request, signers = _require_request(workspace, release, manifest)
    _require_evidence(workspace, release)
    return Seal(manifest, request, signers)


def require_open(workspace: ReleaseWorkspace, release: ReleaseFolder) -> None:
    """Refuse a release that a signer refused (`release-refused`) or that was taken back (`release-withdrawn`).

    Both are read from a log that was verified here, and from the files beside it; either is enough. Raises `log-broken`
    where the log was changed, or cut off behind a head that the coordinator anchored.
    """
    workspace.log_state()
    if workspace.withdrawn(release):
        raise ClosedError(
            f"Release {release.release_id} was withdrawn.",
            hint="Draft other tiles and have them audited.",
            code="release-withdrawn",
        )
    if workspace.declined(release):
        raise ClosedError(
            f"Release {release.release_id} was refused by a signer, or its very tiles were under another name.",
            hint="Read the reason: pixcell release show. A refusal stands; draft other tiles.",
        )


def require_sealed_tiles(release: ReleaseFolder, manifest: ReleaseManifest) -> None:
    """Refuse when a sealed tile is missing, no longer the file that was sealed, or not in the form that may leave."""
    for tile in manifest.tiles:
        path = release.tiles / tile.name
        if not path.is_file() or path.is_symlink() or file_digest(path) != tile.file_digest:
            raise UnsealedError(
                f"{tile.name} is not the tile that was sealed.",
                hint="The release folder was changed. Draft again from the generator's tiles, and audit that.",
                code="sealed-tile-changed",
            )
        require_named_form(read_bounded(path, MAX_FILE_BYTES), tile.name)


def _require_sealing(workspace: ReleaseWorkspace, release: ReleaseFolder, manifest: ReleaseManifest) -> None:
    """The manifest is unsigned until the export: what says that this site sealed it, and so, is the signed log."""
    sealed = {entry.data.get("manifest") for entry in workspace.events_of(release) if entry.kind in SEALINGS}
    if manifest.digest not in sealed:
        raise _unsealed("the site's log does not say that this manifest was sealed")


def _require_request(
    workspace: ReleaseWorkspace, release: ReleaseFolder, manifest: ReleaseManifest
) -> tuple[ReleaseRequest | None, Signers | None]:
    envelope, signers = release.request(), release.signers()
    asked = [entry for entry in workspace.events_of(release) if entry.kind == "release.requested"]
    if envelope is None:
        if asked:
            raise _unsealed("its request is gone")
        return None, None
    payload = verify_envelope(envelope, [workspace.site_key().verify_key], payload_type=REQUEST_PAYLOAD_TYPE)
    request = parse_document(ReleaseRequest, payload, name=REQUEST)
    if not asked or asked[-1].data.get("request") != request.digest:
        raise _unsealed("the request is not the one in the site's log")
    if (request.manifest_digest, request.tiles_root) != (manifest.digest, manifest.tiles_root):
        raise _unsealed("the request is about other tiles")
    if request.signers_digest != (None if signers is None else signers.digest):
        raise _unsealed("the signers' document is not the one of the request")
    from privacy_audit.policy import load_policy

    if load_policy(str(release.path / POLICY)).digest != request.policy_digest:
        raise _unsealed("the audit policy is not the one of the request")
    return request, signers


def _require_evidence(workspace: ReleaseWorkspace, release: ReleaseFolder) -> None:
    """The filed report and page are those that were signed, or those the log says were filed.

    Signing writes the log, then report and page, then the verdict: one that was interrupted left files the log names.
    """
    if release.page.exists():
        refuse_site_only(PAGE, read_bounded(release.page, MAX_FILE_BYTES))
    envelope, files = release.verdict(), {"report": release.report, "page": release.page}
    if envelope is not None:
        predicate = parse_document(Verdict, envelope.unsafe_unverified_payload(), name=VERDICT).predicate
        _require_file(release, REPORT, predicate.audit_report_digest)
        _require_file(release, PAGE, predicate.audit_page_digest)
        return
    filed = [entry.data for entry in workspace.events_of(release) if entry.kind in FILINGS]
    for what, path in files.items():
        if path.exists() and not filed:
            raise _unsealed("an audit lies here that was never filed")
        if path.exists() and digest(read_bounded(path, MAX_FILE_BYTES)) not in {d.get(what) for d in filed}:
            raise _unsealed(f"{path.name} was changed")


def _require_file(release: ReleaseFolder, name: str, wanted: str) -> None:
    if digest(read_bounded(release.path / name, MAX_FILE_BYTES)) != wanted:
        raise _unsealed(f"{name} was changed")


def _unsealed(why: str) -> UnsealedError:
    return UnsealedError(
        f"The seal of this release is broken: {why}.",
        hint="Draft the release again from the generator's tiles, request it and have that audited.",
    )
