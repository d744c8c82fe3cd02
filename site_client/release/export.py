"""The gate itself: the only code that writes a bundle, and only for tiles whose digests a signed verdict permits."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.canonical import digest, file_digest, parse_document, read_bounded
from pixcell_core.contracts.release import BundleFile, BundleListing, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.bundle import (
    LISTING_PAYLOAD_TYPE,
    BundleReport,
    key_file_name,
    require_current,
    require_permission,
    verify_bundle,
)
from pixcell_core.trust.bundle_files import (
    LISTING,
    MANIFEST,
    MAX_FILE_BYTES,
    PAGE,
    README,
    REPORT,
    SHEET,
    VERDICT,
    open_bundle,
    write_archive,
)
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.durable import WriteFailedError, sync_folder
from pixcell_core.trust.keys import VerifyKey
from site_client.release.evidence import refuse_site_only
from site_client.release.signing import require_sealed_tiles
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace


class GateRefusedError(RefusedError):
    """The gate stays shut."""

    default_code = "gate-refused"


@dataclass(frozen=True)
class ExportedBundle:
    """A bundle that was written, and what a stranger finds when checking it."""

    path: Path
    release: ReleaseFolder
    report: BundleReport
    digest: str


def export_release(
    workspace: ReleaseWorkspace,
    out: Path,
    *,
    now: datetime,
    auditors: tuple[VerifyKey, ...] = (),
    release_id: str | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> ExportedBundle:
    """Write the bundle of a signed release to ``out``: one canonical archive for a ``.zip``, else a folder.

    The finished bundle is verified as a stranger would before it appears under its name, and the export
    is an event of the site's log before that too. Raises a :class:`RefusedError` naming the first thing
    that forbids it.
    """
    release = workspace.require().find(release_id)
    if out.exists() or out.is_symlink():
        raise BadInputError(
            f"{out} exists already.", hint="Give a path where nothing is yet.", code="out-exists"
        )
    if not out.parent.is_dir():
        raise BadInputError(f"There is no folder {out.parent}.", hint="Make it first.", code="out-exists")
    facts = {"release": release.release_id}
    with workspace.recording_refusals("export", facts, now=now), _scratch(out) as scratch:
        manifest = release.manifest()
        envelope, verdict, signers = _open_verdict(workspace, release, auditors)
        require_permission(verdict, manifest)
        require_current(verdict, now)
        require_sealed_tiles(release, manifest)
        members = _members(workspace, release, manifest, envelope, signers, now)
        made = scratch / out.name
        _write(made, release, members, as_archive=out.suffix == ".zip", on_tile=on_tile)
        with open_bundle(made) as files:
            report = verify_bundle(files, trusted_keys=signers, threshold=len(signers), now=now)
        whole = file_digest(made) if made.is_file() else digest(members[LISTING])
        workspace.log().append(
            "release.exported",
            {
                **facts,
                "manifest": manifest.digest,
                "tiles": manifest.tile_count,
                "verdict": verdict.predicate.verdict,
                "signers": [key.key_id for key in signers],
                "bundle": whole,
                "form": "archive" if made.is_file() else "folder",
            },
            now=now,
        )
        made.rename(out)
        sync_folder(out.parent)
    return ExportedBundle(out, release, report, whole)


def _open_verdict(
    workspace: ReleaseWorkspace, release: ReleaseFolder, auditors: tuple[VerifyKey, ...]
) -> tuple[Envelope, Verdict, list[VerifyKey]]:
    """The verdict, if every signature on it is true and by an auditor this site accepts."""
    envelope = release.verdict()
    if envelope is None:
        raise GateRefusedError(
            f"Release {release.release_id} has no signed verdict.",
            hint="Audit its tiles, then: pixcell release sign --site-dir DIR --audit OUT --key KEY",
            code="no-verdict",
        )
    accepted = workspace.accepted_auditors()
    known = {key.key_id: key for key in (*workspace.recorded_signers(release), *auditors)}
    keys = known if accepted is None else accepted
    missing = [key_id for key_id in envelope.key_ids if key_id not in keys]
    if missing:
        raise GateRefusedError(
            f"The verdict is signed by {missing[0]}, which this site does not accept.",
            hint="Sign with `pixcell release sign` at this site, by an auditor it accepts.",
            code="unknown-auditor",
        )
    if workspace.site_key().key_id in envelope.key_ids:
        raise GateRefusedError(
            "The verdict is signed by the site itself.", hint="An auditor signs.", code="auditor-is-site"
        )
    signers = [keys[key_id] for key_id in envelope.key_ids]
    payload = verify_envelope(envelope, signers, len(signers), payload_type=IN_TOTO_PAYLOAD_TYPE)
    return envelope, parse_document(Verdict, payload, name=VERDICT), signers


def _members(
    workspace: ReleaseWorkspace,
    release: ReleaseFolder,
    manifest: ReleaseManifest,
    envelope: Envelope,
    signers: list[VerifyKey],
    now: datetime,
) -> dict[str, bytes]:
    """Every file of the bundle but the tiles, the signed listing last."""
    site_key = workspace.site_key()
    members = {
        name: read_bounded(release.path / name, MAX_FILE_BYTES) for name in (README, SHEET, REPORT, PAGE)
    }
    refuse_site_only(PAGE, members[PAGE])
    members[MANIFEST] = manifest.to_bytes()
    members[VERDICT] = envelope.to_bytes()
    for key in (*signers, site_key.verify_key):
        members[key_file_name(key)] = key.to_pem()
    listed = {name: digest(data) for name, data in members.items()}
    listed |= {f"tiles/{tile.name}": tile.file_digest for tile in manifest.tiles}
    log = workspace.log_state()
    listing = BundleListing(
        site=manifest.site,
        manifest_digest=manifest.digest,
        exported_at=now.astimezone(UTC).replace(microsecond=0),
        log_size=log.entries,
        log_root=log.root,
        files=tuple(BundleFile(name=name, file_digest=listed[name]) for name in sorted(listed)),
    )
    members[LISTING] = sign_envelope(LISTING_PAYLOAD_TYPE, listing.to_bytes(), [site_key]).to_bytes()
    return members


def _write(
    made: Path,
    release: ReleaseFolder,
    members: dict[str, bytes],
    *,
    as_archive: bool,
    on_tile: Callable[[], None],
) -> None:
    manifest = release.manifest()
    sealed = {f"tiles/{tile.name}": tile for tile in manifest.tiles}

    def contents() -> Iterator[tuple[str, bytes]]:
        for name in sorted({*members, *sealed}):
            if name in members:
                yield name, members[name]
                continue
            data = read_bounded(release.path / name, MAX_FILE_BYTES)
            if digest(data) != sealed[name].file_digest:
                raise GateRefusedError(
                    f"{name} is not the tile the verdict permits.",
                    hint="Draft and audit again.",
                    code="tile-swapped",
                )
            yield name, data
            on_tile()

    try:
        if as_archive:
            with made.open("xb") as stream:
                write_archive(stream, contents())
                stream.flush()
                os.fsync(stream.fileno())
            return
        for name, data in contents():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    except OSError as error:
        raise WriteFailedError(
            f"Cannot write the bundle: {error.strerror or error}.",
            hint="Free space where --out points and export again; nothing half-written is left.",
        ) from error


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A private folder on the same file system as ``out``, gone afterwards whatever happens."""
    path = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
