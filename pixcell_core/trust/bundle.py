"""Verification of an exported bundle: offline, pure, and it names the first thing that is wrong.

Every byte is covered. The site's signature covers the list of all files; the verdict's signatures cover
the manifest, and through it the site's key, every tile, the report, the page, the request and the rule of
who must sign. The datasheet and the research-object metadata are written again and compared. Signatures
and containers have one byte form each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from pixcell_core.contracts.canonical import digest, parse_document, parse_json
from pixcell_core.contracts.gate import Signers
from pixcell_core.contracts.release import BundleListing, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle_files import (
    FIXED_NAMES,
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
    BundleFiles,
    require_bundle_name,
)
from pixcell_core.trust.bundle_origin import prove_origin, require_enough_keys, told_signers
from pixcell_core.trust.bundle_report import BundleRefusedError, BundleReport, Check, Signer
from pixcell_core.trust.bundle_rules import (
    key_file_name,
    known_code,
    refused,
    require_current,
    require_papers,
    require_permission,
)
from pixcell_core.trust.bundle_terms import (
    Known,
    check_certificates,
    check_request,
    check_withdrawals,
    open_signers,
)
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, valid_signers, verify_envelope
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.kits import CLOCK_SLACK
from pixcell_core.trust.quorum import Standing, standing
from pixcell_core.trust.tile_c2pa import c2pa_name, without_credential
from pixcell_core.trust.tile_dicom import dicom_name, encode_dicom
from pixcell_core.trust.tile_jpeg import decode_named
from pixcell_core.trust.tile_png import pixel_digest, require_png_form

__all__ = [
    "BundleRefusedError",
    "BundleReport",
    "BundleVerifier",
    "Check",
    "Known",
    "Signer",
    "verify_bundle",
]

T = TypeVar("T")

LISTING_PAYLOAD_TYPE = "application/vnd.pixcell.bundle.v1+json"


class BundleVerifier:
    """Runs the checks in order over the files of one bundle."""

    def __init__(
        self,
        files: BundleFiles,
        *,
        trusted_keys: Sequence[VerifyKey] | None,
        threshold: int,
        now: datetime,
        known: Known | None = None,
    ) -> None:
        self._files = files
        self._known = known or Known()
        self._trusted = None if trusted_keys is None else list(trusted_keys)
        self._threshold = threshold
        self._now = now
        self.checks: list[Check] = []

    def run(self, on_tile: Callable[[], None] = lambda: None) -> BundleReport:
        """All checks; the first that fails raises :class:`BundleRefusedError`."""
        require_enough_keys(self._trusted, self._threshold)
        names = self._step("form", self._form)
        keys = self._step("keys", lambda: self._keys(names))
        listing, site_key = self._step("file list", lambda: self._listing(keys))
        self._step("nothing changed", lambda: self._unchanged(listing, names))
        manifest = self._step("manifest", lambda: self._manifest(listing, site_key))
        verdict, signers = self._step("signatures", lambda: self._verdict(keys, site_key))
        self._step("verdict", lambda: self._permits(verdict, manifest))
        self._step("auditing code", lambda: (None, known_code(verdict, self._known.auditing_code)))
        rule, stands = self._step("signers", lambda: self._quorum(verdict, manifest, signers, listing))
        self._step("still valid", lambda: self._current(verdict, listing))
        self._step("withdrawals", lambda: self._withdrawals(manifest, (*signers, site_key), stands))
        vouched = self._step(
            "certificates", lambda: self._certificates(names, keys, rule, stands, verdict, listing, site_key)
        )
        self._step("tiles", lambda: self._tiles(manifest, names, on_tile))
        self._step("audit report", lambda: self._report(verdict, manifest))
        self._step("request", lambda: self._request(verdict, manifest, site_key))
        self._step("datasheet", lambda: self._papers(verdict, manifest, stands, listing, names))
        trusted = self._step(
            "origin", lambda: prove_origin(self._trusted, self._threshold, stands, self._known)
        )
        return BundleReport.of(
            manifest,
            verdict,
            trusted=trusted,
            checks=self.checks,
            signers=told_signers(self._trusted, stands, site_key, vouched, self._known),
            signed=stands.words,
            exported_at=listing.exported_at,
        )

    def _step(self, name: str, work: Callable[[], tuple[T, str]]) -> T:
        try:
            value, detail = work()
        except PixcellError as error:
            self.checks.append(Check(name=name, passed=False, detail=error.message))
            raise BundleRefusedError(error.message, hint=error.hint, code=error.code, check=name) from error
        self.checks.append(Check(name=name, passed=True, detail=detail))
        return value

    def _form(self) -> tuple[list[str], str]:
        names = self._files.names()
        for name in names:
            require_bundle_name(name)
        self._files.check_form()
        for name in FIXED_NAMES:
            if name not in names:
                raise refused(f"The bundle lacks {name}.", "file-missing")
        return names, f"{len(names)} files"

    def _keys(self, names: list[str]) -> tuple[dict[str, VerifyKey], str]:
        keys: dict[str, VerifyKey] = {}
        for name in names:
            if not name.startswith("keys/"):
                continue
            data = self._files.read(name)
            key = VerifyKey.from_pem(data, name=name)
            if key.to_pem() != data or name != key_file_name(key):
                raise refused(f"{name} is not the key its name says.", "bundle-changed")
            keys[key.key_id] = key
        if not keys:
            raise refused("The bundle holds no public key.", "file-missing")
        return keys, f"{len(keys)} public keys"

    def _listing(self, keys: dict[str, VerifyKey]) -> tuple[tuple[BundleListing, VerifyKey], str]:
        envelope = Envelope.from_bytes(self._files.read(LISTING), name=LISTING)
        payload = verify_envelope(envelope, keys.values(), payload_type=LISTING_PAYLOAD_TYPE)
        if len(envelope.signatures) != 1:
            raise refused(f"{LISTING} carries more signatures than the site's.", "bundle-changed")
        listing = parse_document(BundleListing, payload, name=LISTING)
        if listing.to_bytes() != payload:
            raise refused(f"The signed list in {LISTING} is not in canonical form.", "bundle-changed")
        return (listing, keys[envelope.key_ids[0]]), f"signed by {_short(envelope.key_ids[0])}"

    def _unchanged(self, listing: BundleListing, names: list[str]) -> tuple[None, str]:
        expected = {entry.name: entry.file_digest for entry in listing.files}
        for name in names:
            if name != LISTING and name not in expected:
                raise refused(f"{name} was added after export.", "file-added")
        for name, wanted in expected.items():
            if name not in names:
                raise refused(f"{name} was removed after export.", "file-missing")
            if digest(self._files.read(name)) != wanted:
                raise refused(f"{name} was changed after export.", "bundle-changed")
        return None, f"{len(expected)} digests equal"

    def _manifest(self, listing: BundleListing, site_key: VerifyKey) -> tuple[ReleaseManifest, str]:
        data = self._files.read(MANIFEST)
        manifest = parse_document(ReleaseManifest, data, name=MANIFEST)
        if manifest.to_bytes() != data:
            raise refused(f"{MANIFEST} is not in canonical form.", "bundle-changed")
        if listing.manifest_digest != manifest.digest or listing.site != manifest.site:
            raise refused("The site's signature is about another manifest.", "wrong-manifest")
        if manifest.site_key_id != site_key.key_id:
            raise refused(
                "The bundle was exported with another key than its manifest names.", "wrong-site-key"
            )
        for name, wanted in ((SHEET, manifest.sample_sheet_digest), (README, manifest.readme_digest)):
            if digest(self._files.read(name)) != wanted:
                raise refused(f"{name} is not the one that was sealed.", "bundle-changed")
        require_png_form(self._files.read(SHEET), name=SHEET)
        return (
            manifest,
            f"{manifest.tile_count} tiles of {manifest.site}, sealed as {_short(manifest.digest)}"
            + (f"; {manifest.filtered}" if manifest.filtered else ""),
        )

    def _verdict(
        self, keys: dict[str, VerifyKey], site_key: VerifyKey
    ) -> tuple[tuple[Verdict, tuple[VerifyKey, ...]], str]:
        envelope = Envelope.from_bytes(self._files.read(VERDICT), name=VERDICT)
        count = len(envelope.signatures)
        payload = verify_envelope(envelope, keys.values(), count, payload_type=IN_TOTO_PAYLOAD_TYPE)
        verdict = parse_document(Verdict, payload, name=VERDICT)
        if verdict.to_bytes() != payload:
            raise refused("The signed verdict is not in canonical form.", "bundle-changed")
        signers = valid_signers(envelope, keys.values())
        idle = set(keys) - {key.key_id for key in signers} - {site_key.key_id}
        if idle:
            raise refused(
                f"The key {_short(min(idle))} lies in the bundle but signed nothing.", "foreign-file"
            )
        return (verdict, signers), f"{count} of {count} signatures on the verdict are true"

    def _permits(self, verdict: Verdict, manifest: ReleaseManifest) -> tuple[None, str]:
        require_permission(verdict, manifest)
        predicate = verdict.predicate
        by = f", released by {predicate.exception.approver}" if predicate.exception else ""
        return None, f"{predicate.verdict}{by}, about exactly these {manifest.tile_count} tiles"

    def _quorum(
        self,
        verdict: Verdict,
        manifest: ReleaseManifest,
        signers: tuple[VerifyKey, ...],
        listing: BundleListing,
    ) -> tuple[tuple[Signers | None, Standing], str]:
        rule = open_signers(self._optional(SIGNERS), verdict, manifest, self._known)
        ids = [key.key_id for key in signers]
        stands = standing(ids, rule, manifest.site_key_id, at=listing.exported_at).require()
        return (rule, stands), stands.words + (", by the signers' document" if rule else "")

    def _current(self, verdict: Verdict, listing: BundleListing) -> tuple[None, str]:
        require_current(verdict, self._now)
        if listing.exported_at > self._now + CLOCK_SLACK:
            raise refused(
                f"The bundle was exported on {listing.exported_at:%Y-%m-%d %H:%M} UTC, and here it is "
                f"{self._now:%Y-%m-%d %H:%M} UTC.",
                "clock-wrong",
                hint="Set this machine's clock, or ask the site to look at theirs and export again.",
            )
        predicate = verdict.predicate
        if not predicate.issued_at - CLOCK_SLACK <= listing.exported_at < predicate.expires_at:
            raise refused(
                "The bundle says it was exported at a time for which its verdict did not hold.",
                "verdict-expired",
            )
        return None, f"until {verdict.predicate.expires_at:%Y-%m-%d}"

    def _withdrawals(
        self, manifest: ReleaseManifest, keys: tuple[VerifyKey, ...], stands: Standing
    ) -> tuple[None, str]:
        lists = check_withdrawals(self._known, manifest, keys, stands.given, self._now)
        if not lists:
            return None, "no list was given: whether it was taken back since was not checked"
        seen = ", ".join(f"number {found.number} of {found.issued_at:%Y-%m-%d}" for found in lists)
        return None, f"not among those taken back (list {seen})"

    def _certificates(
        self,
        names: list[str],
        keys: dict[str, VerifyKey],
        rule: Signers | None,
        stands: Standing,
        verdict: Verdict,
        listing: BundleListing,
        site_key: VerifyKey,
    ) -> tuple[dict[str, str], str]:
        found = {
            f"sha256:{name[13:-5]}": Envelope.from_bytes(self._files.read(name), name=name)
            for name in names
            if name.startswith("certificates/")
        }
        moments = (verdict.predicate.issued_at, listing.exported_at)
        site = (listing.site, site_key.key_id)
        opened = check_certificates(found, stands.given, keys, rule, self._known, moments, site)
        words = {certificate.key.key_id: str(certificate) for certificate in opened}
        if not words:
            return words, "none: the keys stand for themselves"
        unproven = "" if self._known.ca else "; whose consortium that is was not checked (--ca)"
        fresh = "" if self._known.revocations else "; revocations not checked (--revocations)"
        return words, f"{', '.join(sorted(words.values()))}{unproven}{fresh}"

    def _request(self, verdict: Verdict, manifest: ReleaseManifest, site_key: VerifyKey) -> tuple[None, str]:
        request = check_request(self._optional(REQUEST), verdict, manifest, site_key)
        return None, "none in writing" if request is None else f"asked on {request.requested_at:%Y-%m-%d}"

    def _papers(
        self,
        verdict: Verdict,
        manifest: ReleaseManifest,
        stands: Standing,
        listing: BundleListing,
        names: list[str],
    ) -> tuple[None, str]:
        """The papers for people and machines, written again from what was signed."""
        require_papers(self._files, manifest, verdict, stands.given, names, listing.exported_at)
        return None, "datasheet and research-object metadata say what was signed"

    def _optional(self, name: str) -> bytes | None:
        return self._files.read(name) if name in self._files.names() else None

    def _tiles(
        self, manifest: ReleaseManifest, names: list[str], on_tile: Callable[[], None]
    ) -> tuple[None, str]:
        present = {name for name in names if name.startswith("tiles/")}
        if present != {f"tiles/{tile.name}" for tile in manifest.tiles}:
            raise refused("The tiles in the bundle are not the tiles of the manifest.", "wrong-tiles")
        dicom = self._complete_form(names, "dicom/", {dicom_name(tile) for tile in manifest.tiles})
        marked = self._complete_form(names, "c2pa/", {c2pa_name(tile) for tile in manifest.tiles})
        for number, tile in enumerate(manifest.tiles, start=1):
            data = self._files.read(f"tiles/{tile.name}")
            pixels = decode_named(data, tile.name)
            if digest(data) != tile.file_digest or pixel_digest(pixels) != tile.pixel_digest:
                raise refused(f"{tile.name} is not the tile that was sealed.", "bundle-changed")
            if pixels.shape[:2] != (manifest.height, manifest.width):
                raise refused(f"{tile.name} has another size than the manifest says.", "wrong-tiles")
            if dicom and self._files.read(dicom_name(tile)) != encode_dicom(pixels, manifest, number):
                raise refused(f"{dicom_name(tile)} is not {tile.name} in DICOM form.", "bundle-changed")
            if marked:
                form = c2pa_name(tile)
                if without_credential(self._files.read(form), name=form) != data:
                    raise refused(f"{form} is not {tile.name} with a credential.", "bundle-changed")
            on_tile()
        forms = ", each as DICOM too" * dicom + ", each with content credentials (not read here)" * marked
        return None, f"{manifest.tile_count} tiles: bytes, pixels and synthetic mark{forms}"

    def _complete_form(self, names: list[str], folder: str, expected: set[str]) -> bool:
        """Whether the tiles lie in a further form too: all of them, or none."""
        found = {name for name in names if name.startswith(folder)}
        if found and found != expected:
            raise refused(f"The files under {folder} are not those of the manifest's tiles.", "wrong-tiles")
        return bool(found)

    def _report(self, verdict: Verdict, manifest: ReleaseManifest) -> tuple[None, str]:
        predicate = verdict.predicate
        for name, wanted in ((REPORT, predicate.audit_report_digest), (PAGE, predicate.audit_page_digest)):
            if digest(self._files.read(name)) != wanted:
                raise refused(f"{name} is not the one the verdict rests on.", "bundle-changed")
        report = parse_json(self._files.read(REPORT), name=REPORT, max_bytes=MAX_FILE_BYTES)
        said = report.get("verdict") if isinstance(report, dict) else None
        if said != predicate.verdict:
            raise refused(
                f"{REPORT} says {said!r}, the signed verdict {predicate.verdict}.", "bundle-changed"
            )
        return None, f"the evidence the verdict on {_short(manifest.digest)} rests on"


def verify_bundle(
    files: BundleFiles,
    *,
    trusted_keys: Sequence[VerifyKey] | None,
    now: datetime,
    threshold: int = 1,
    known: Known | None = None,
) -> BundleReport:
    """Check a bundle whole; raises :class:`BundleRefusedError` naming the first thing that is wrong."""
    return BundleVerifier(files, trusted_keys=trusted_keys, threshold=threshold, now=now, known=known).run()


def _short(text: str) -> str:
    return text.removeprefix("sha256:")[:16]
