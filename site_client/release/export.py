"""The gate itself: the only code that writes a bundle, and only for tiles whose digests a signed verdict permits."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pixcell_core.contracts.canonical import digest, file_digest, read_bounded
from pixcell_core.contracts.release import BundleFile, BundleListing, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import BadInputError
from pixcell_core.trust.bundle import LISTING_PAYLOAD_TYPE, BundleReport, verify_bundle
from pixcell_core.trust.bundle_files import (
    LISTING,
    MANIFEST,
    MAX_FILE_BYTES,
    PAGE,
    README,
    REPORT,
    REQUEST,
    SHEET,
    SIGNERS,
    VERDICT,
    open_bundle,
    write_archive,
)
from pixcell_core.trust.bundle_rules import (
    certificate_file_name,
    key_file_name,
    require_current,
    require_permission,
    written_papers,
)
from pixcell_core.trust.bundle_terms import Known, check_certificates
from pixcell_core.trust.dsse import Envelope, add_signature, sign_envelope, valid_signers
from pixcell_core.trust.durable import WriteFailedError, sync_folder
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.quorum import Standing, standing
from site_client.release.evidence import refuse_site_only
from site_client.release.failed_audits import require_unfailed
from site_client.release.other_forms import OtherForms
from site_client.release.seal import Seal, require_open, require_seal
from site_client.release.signers import Credentials, require_enrolled_authority, site_certificate
from site_client.release.signing import require_terms
from site_client.release.verdict_file import GateRefusedError, open_verdict
from site_client.release.workspace import ReleaseFolder, ReleaseWorkspace


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
    credentials: Credentials | None = None,
    forms: OtherForms | None = None,
    on_tile: Callable[[], None] = lambda: None,
) -> ExportedBundle:
    """Write the bundle of a signed release to ``out``: one canonical archive for a ``.zip``, else a folder.

    Where nobody wrote down who must sign for the site, the export is the site's own signature: it is put
    under the auditor's verdict. The finished bundle is verified as a stranger would before it appears
    under its name, and the export is an event of the site's log before that too. `forms` asks for the same
    tiles as DICOM or with content credentials besides. Raises a :class:`RefusedError` naming the first thing
    that forbids it.
    """
    release = workspace.require().find(release_id)
    if out.exists() or out.is_symlink():
        raise _out_exists(out)
    if not out.parent.is_dir():
        raise BadInputError(f"There is no folder {out.parent}.", hint="Make it first.", code="out-exists")
    facts = {"release": release.release_id}
    with workspace.recording_refusals("export", facts, now=now), _scratch(out) as scratch:
        require_open(workspace, release)
        manifest = release.manifest()
        envelope, verdict, signers = open_verdict(workspace, release, auditors)
        require_permission(verdict, manifest)
        require_current(verdict, now)
        seal = require_seal(workspace, release)
        require_terms(verdict, seal)
        require_unfailed(workspace, manifest, verdict.predicate.auditor.policy_digest)
        if seal.signers is None:
            envelope = add_signature(envelope, workspace.site_key())
            signers = list(valid_signers(envelope, [*signers, workspace.site_key().verify_key]))
        stands = standing(envelope.key_ids, seal.signers, manifest.site_key_id, at=now).require()
        site_key = workspace.site_key().verify_key
        certificates = release.certificates() | site_certificate(workspace, manifest.site, now)
        require_enrolled_authority(workspace, certificates, site_key, credentials)
        known = _outside_knowledge(workspace, certificates, release, credentials)
        check_certificates(
            certificates,
            stands.given,
            {key.key_id: key for key in (*signers, site_key)},
            seal.signers,
            known,
            [now],
            (manifest.site, site_key.key_id),
        )
        others = _other_forms(forms, release, manifest, scratch / "forms")
        papers = _Papers(
            workspace, release, seal, envelope, verdict, signers, stands, now, others, certificates
        )
        members = papers.members()
        made = scratch / "made" / out.name
        made.parent.mkdir()
        _write(made, release, members, others, as_archive=out.suffix == ".zip", on_tile=on_tile)
        with open_bundle(made) as files:
            report = verify_bundle(files, trusted_keys=signers, threshold=len(signers), now=now, known=known)
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
        _put_in_place(made, out)
    return ExportedBundle(out, release, report, whole)


def _outside_knowledge(
    workspace: ReleaseWorkspace,
    certificates: dict[str, Envelope],
    release: ReleaseFolder,
    credentials: Credentials | None,
) -> Known:
    """The authority and the revocation lists against which certificates are looked at once more."""
    given = credentials or Credentials()
    if not certificates:
        return Known(ca=given.ca, revocations=given.revocations)
    kept = release.revocations()
    lists = (*given.revocations, *(() if kept is None else (kept,)))
    # Whether there must be a certificate is the signers' document's word, or the caller's by --ca.
    return Known(ca=given.ca, revocations=lists)


@dataclass(frozen=True)
class _Papers:
    """Everything in a bundle but its tiles."""

    workspace: ReleaseWorkspace
    release: ReleaseFolder
    seal: Seal
    envelope: Envelope
    verdict: Verdict
    signers: list[VerifyKey]
    stands: Standing
    now: datetime
    others: dict[str, Path]
    certificates: dict[str, Envelope]

    def members(self) -> dict[str, bytes]:
        """Every file of the bundle but the tiles, the signed listing last."""
        manifest, site_key = self.seal.manifest, self.workspace.site_key()
        exported_at = self.now.astimezone(UTC).replace(microsecond=0)
        members = self._sealed_and_signed()
        listed = {f"tiles/{tile.name}": tile.file_digest for tile in manifest.tiles}
        listed |= {name: file_digest(path) for name, path in self.others.items()}
        names = {*members, *listed, LISTING}
        members |= written_papers(
            manifest, self.verdict, self.stands.given, names, exported_at, members[REPORT]
        )
        listed |= {name: digest(data) for name, data in members.items()}
        log = self.workspace.log_state()
        listing = BundleListing(
            site=manifest.site,
            manifest_digest=manifest.digest,
            exported_at=exported_at,
            log_size=log.entries,
            log_root=log.root,
            files=tuple(BundleFile(name=name, file_digest=listed[name]) for name in sorted(listed)),
        )
        members[LISTING] = sign_envelope(LISTING_PAYLOAD_TYPE, listing.to_bytes(), [site_key]).to_bytes()
        return members

    def _sealed_and_signed(self) -> dict[str, bytes]:
        release, seal = self.release, self.seal
        members = {
            name: read_bounded(release.path / name, MAX_FILE_BYTES) for name in (README, SHEET, REPORT, PAGE)
        }
        refuse_site_only(PAGE, members[PAGE])
        members[MANIFEST] = seal.manifest.to_bytes()
        members[VERDICT] = self.envelope.to_bytes()
        asked = release.request()
        if asked is not None:
            members[REQUEST] = asked.to_bytes()
        if seal.signers is not None:
            members[SIGNERS] = seal.signers.to_bytes()
        for key_id, certificate in self.certificates.items():
            members[certificate_file_name(key_id)] = certificate.to_bytes()
        for key in (*self.signers, self.workspace.site_key().verify_key):
            members[key_file_name(key)] = key.to_pem()
        return members


def _write(
    made: Path,
    release: ReleaseFolder,
    members: dict[str, bytes],
    others: dict[str, Path],
    *,
    as_archive: bool,
    on_tile: Callable[[], None],
) -> None:
    manifest = release.manifest()
    sealed = {f"tiles/{tile.name}": tile for tile in manifest.tiles}

    def contents() -> Iterator[tuple[str, bytes]]:
        for name in sorted({*members, *others, *sealed}):
            if name in members:
                yield name, members[name]
                continue
            data = read_bounded(others.get(name, release.path / name), MAX_FILE_BYTES)
            if name in sealed and digest(data) != sealed[name].file_digest:
                raise GateRefusedError(
                    f"{name} is not the tile the verdict permits.",
                    hint="Draft and audit again.",
                    code="tile-swapped",
                )
            yield name, data
            if name in sealed:
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
        raise _cannot_write(error) from error


def _put_in_place(made: Path, out: Path) -> None:
    """Give the finished bundle its name, in one step and over nothing: what came there meanwhile stays as it is."""
    try:
        if made.is_dir():
            out.mkdir()
            made.rename(out)
        else:
            _link(made, out)
        sync_folder(out.parent)
    except FileExistsError as error:
        raise _out_exists(out) from error
    except OSError as error:
        raise (_out_exists(out) if error.errno == errno.ENOTEMPTY else _cannot_write(error)) from error


def _link(made: Path, out: Path) -> None:
    try:
        os.link(made, out)
        made.unlink()
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        # A disk without hard links (a memory stick): hold the name with an empty file of our own, and replace that.
        out.open("xb").close()
        made.replace(out)


def _out_exists(out: Path) -> BadInputError:
    return BadInputError(
        f"{out} exists already.", hint="Give a path where nothing is yet.", code="out-exists"
    )


def _other_forms(
    forms: OtherForms | None, release: ReleaseFolder, manifest: ReleaseManifest, folder: Path
) -> dict[str, Path]:
    try:
        return {} if forms is None else forms.write(release, manifest, folder)
    except OSError as error:
        raise _cannot_write(error) from error


def _cannot_write(error: OSError) -> WriteFailedError:
    return WriteFailedError(
        f"Cannot write the bundle: {error.strerror or error}.",
        hint="Free space where --out points and export again; nothing half-written is left.",
    )


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A private folder on the same file system as ``out``, gone afterwards whatever happens."""
    path = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
