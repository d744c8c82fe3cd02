"""Verification of an exported bundle: offline, pure, and it names the first thing that is wrong.

Every byte is covered. The site's signature covers the list of all files; the auditor's signature covers
the manifest, and through it the site's key, every tile, the report and the page. Signatures and
containers have one byte form each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from pixcell_core.contracts.canonical import digest, parse_document, parse_json
from pixcell_core.contracts.release import BundleListing, PrivacyStatement, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.trust.bundle_files import (
    LISTING,
    MANIFEST,
    MAX_FILE_BYTES,
    PAGE,
    README,
    REPORT,
    SHEET,
    VERDICT,
    BundleFiles,
    is_bundle_name,
)
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, valid_signers, verify_envelope
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.tile_png import decode_tile, pixel_digest

T = TypeVar("T")

LISTING_PAYLOAD_TYPE = "application/vnd.pixcell.bundle.v1+json"


class BundleRefusedError(RefusedError):
    """A bundle does not verify. ``check`` names the check that failed."""

    default_code = "bundle-refused"

    def __init__(self, message: str, *, hint: str, code: str | None = None, check: str = "") -> None:
        super().__init__(message, hint=hint, code=code)
        self.check = check


class Check(BaseModel):
    """One check that was made, and what it found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    passed: bool
    detail: str


class Signer(BaseModel):
    """One key whose signature was checked and is true."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    key_id: str
    trusted: bool


class BundleReport(BaseModel):
    """A bundle that verifies. ``trusted`` says whether keys given by the caller signed the verdict."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trusted: bool
    checks: tuple[Check, ...]
    signers: tuple[Signer, ...]
    site: str
    study_digest: str | None
    manifest_digest: str
    tiles: int
    verdict: str
    audience: str
    policy_digest: str
    exception: str | None
    approver: str | None
    proven_kinds: tuple[str, ...]
    privacy: PrivacyStatement | None
    issued_at: datetime
    expires_at: datetime


class BundleVerifier:
    """Runs the checks in order over the files of one bundle."""

    def __init__(
        self,
        files: BundleFiles,
        *,
        trusted_keys: Sequence[VerifyKey] | None,
        threshold: int,
        now: datetime,
    ) -> None:
        self._files = files
        self._trusted = None if trusted_keys is None else list(trusted_keys)
        self._threshold = threshold
        self._now = now
        self.checks: list[Check] = []

    def run(self, on_tile: Callable[[], None] = lambda: None) -> BundleReport:
        """All checks; the first that fails raises :class:`BundleRefusedError`."""
        if self._threshold < 1 or (self._trusted is not None and len(self._trusted) < self._threshold):
            raise BadInputError(
                f"{self._threshold} trusted signatures were asked for with fewer trusted keys given.",
                hint="Give one --trust file for each signature you require.",
            )
        names = self._step("form", self._form)
        keys = self._step("keys", lambda: self._keys(names))
        listing, site_key = self._step("file list", lambda: self._listing(keys))
        self._step("nothing changed", lambda: self._unchanged(listing, names))
        manifest = self._step("manifest", lambda: self._manifest(listing, site_key))
        verdict, signers = self._step("signatures", lambda: self._verdict(keys, site_key))
        self._step("verdict", lambda: self._permits(verdict, manifest))
        self._step("still valid", lambda: self._current(verdict))
        self._step("tiles", lambda: self._tiles(manifest, names, on_tile))
        self._step("audit report", lambda: self._report(verdict, manifest))
        trusted = self._step("origin", lambda: self._origin(signers))
        known = {key.key_id for key in self._trusted or ()}
        roles = [("auditor", key) for key in signers] + [("site", site_key)]
        exception = verdict.predicate.exception
        return BundleReport(
            trusted=trusted,
            checks=tuple(self.checks),
            signers=tuple(
                Signer(role=role, key_id=key.key_id, trusted=key.key_id in known) for role, key in roles
            ),
            site=manifest.site,
            study_digest=manifest.study_digest,
            manifest_digest=manifest.digest,
            tiles=manifest.tile_count,
            verdict=verdict.predicate.verdict,
            audience=verdict.predicate.audience,
            policy_digest=verdict.predicate.auditor.policy_digest,
            exception=exception.reason if exception else None,
            approver=exception.approver if exception else None,
            proven_kinds=verdict.predicate.proven_kinds,
            privacy=manifest.privacy,
            issued_at=verdict.predicate.issued_at,
            expires_at=verdict.predicate.expires_at,
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
        self._files.check_form()
        names = self._files.names()
        for name in names:
            if not is_bundle_name(name):
                raise _refused(
                    f"The bundle holds {ascii(name)[1:-1][:120]}, which no bundle may hold.", "foreign-file"
                )
        for name in (LISTING, VERDICT, MANIFEST):
            if name not in names:
                raise _refused(f"The bundle lacks {name}.", "file-missing")
        return names, f"{len(names)} files"

    def _keys(self, names: list[str]) -> tuple[dict[str, VerifyKey], str]:
        keys: dict[str, VerifyKey] = {}
        for name in names:
            if not name.startswith("keys/"):
                continue
            data = self._files.read(name)
            key = VerifyKey.from_pem(data, name=name)
            if key.to_pem() != data or name != key_file_name(key):
                raise _refused(f"{name} is not the key its name says.", "bundle-changed")
            keys[key.key_id] = key
        if not keys:
            raise _refused("The bundle holds no public key.", "file-missing")
        return keys, f"{len(keys)} public keys"

    def _listing(self, keys: dict[str, VerifyKey]) -> tuple[tuple[BundleListing, VerifyKey], str]:
        envelope = Envelope.from_bytes(self._files.read(LISTING), name=LISTING)
        payload = verify_envelope(envelope, keys.values(), payload_type=LISTING_PAYLOAD_TYPE)
        if len(envelope.signatures) != 1:
            raise _refused(f"{LISTING} carries more signatures than the site's.", "bundle-changed")
        listing = parse_document(BundleListing, payload, name=LISTING)
        return (listing, keys[envelope.key_ids[0]]), f"signed by {_short(envelope.key_ids[0])}"

    def _unchanged(self, listing: BundleListing, names: list[str]) -> tuple[None, str]:
        expected = {entry.name: entry.file_digest for entry in listing.files}
        for name in names:
            if name != LISTING and name not in expected:
                raise _refused(f"{name} was added after export.", "file-added")
        for name, wanted in expected.items():
            if name not in names:
                raise _refused(f"{name} was removed after export.", "file-missing")
            if digest(self._files.read(name)) != wanted:
                raise _refused(f"{name} was changed after export.", "bundle-changed")
        return None, f"{len(expected)} digests equal"

    def _manifest(self, listing: BundleListing, site_key: VerifyKey) -> tuple[ReleaseManifest, str]:
        data = self._files.read(MANIFEST)
        manifest = parse_document(ReleaseManifest, data, name=MANIFEST)
        if manifest.to_bytes() != data:
            raise _refused(f"{MANIFEST} is not in canonical form.", "bundle-changed")
        if listing.manifest_digest != manifest.digest or listing.site != manifest.site:
            raise _refused("The site's signature is about another manifest.", "wrong-manifest")
        if manifest.site_key_id != site_key.key_id:
            raise _refused(
                "The bundle was exported with another key than its manifest names.", "wrong-site-key"
            )
        for name, wanted in ((SHEET, manifest.sample_sheet_digest), (README, manifest.readme_digest)):
            if digest(self._files.read(name)) != wanted:
                raise _refused(f"{name} is not the one that was sealed.", "bundle-changed")
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
            raise _refused("The signed verdict is not in canonical form.", "bundle-changed")
        signers = valid_signers(envelope, keys.values())
        idle = set(keys) - {key.key_id for key in signers} - {site_key.key_id}
        if idle:
            raise _refused(
                f"The key {_short(min(idle))} lies in the bundle but signed nothing.", "foreign-file"
            )
        return (verdict, signers), f"{count} of {count} signatures on the verdict are true"

    def _permits(self, verdict: Verdict, manifest: ReleaseManifest) -> tuple[None, str]:
        require_permission(verdict, manifest)
        predicate = verdict.predicate
        by = f", released by {predicate.exception.approver}" if predicate.exception else ""
        return None, f"{predicate.verdict}{by}, about exactly these {manifest.tile_count} tiles"

    def _current(self, verdict: Verdict) -> tuple[None, str]:
        require_current(verdict, self._now)
        return None, f"until {verdict.predicate.expires_at:%Y-%m-%d}"

    def _tiles(
        self, manifest: ReleaseManifest, names: list[str], on_tile: Callable[[], None]
    ) -> tuple[None, str]:
        present = {name for name in names if name.startswith("tiles/")}
        if present != {f"tiles/{tile.name}" for tile in manifest.tiles}:
            raise _refused("The tiles in the bundle are not the tiles of the manifest.", "wrong-tiles")
        for tile in manifest.tiles:
            data = self._files.read(f"tiles/{tile.name}")
            pixels = decode_tile(data, name=tile.name)
            if digest(data) != tile.file_digest or pixel_digest(pixels) != tile.pixel_digest:
                raise _refused(f"{tile.name} is not the tile that was sealed.", "bundle-changed")
            if pixels.shape[:2] != (manifest.height, manifest.width):
                raise _refused(f"{tile.name} has another size than the manifest says.", "wrong-tiles")
            on_tile()
        return None, f"{manifest.tile_count} tiles: bytes, pixels and synthetic mark"

    def _report(self, verdict: Verdict, manifest: ReleaseManifest) -> tuple[None, str]:
        predicate = verdict.predicate
        for name, wanted in ((REPORT, predicate.audit_report_digest), (PAGE, predicate.audit_page_digest)):
            if digest(self._files.read(name)) != wanted:
                raise _refused(f"{name} is not the one the verdict rests on.", "bundle-changed")
        report = parse_json(self._files.read(REPORT), name=REPORT, max_bytes=MAX_FILE_BYTES)
        said = report.get("verdict") if isinstance(report, dict) else None
        if said != predicate.verdict:
            raise _refused(
                f"{REPORT} says {said!r}, the signed verdict {predicate.verdict}.", "bundle-changed"
            )
        return None, f"the evidence the verdict on {_short(manifest.digest)} rests on"

    def _origin(self, signers: tuple[VerifyKey, ...]) -> tuple[bool, str]:
        if self._trusted is None:
            return (
                False,
                "NOT PROVEN: no key was given; the bundle's own keys prove it whole, not whose it is",
            )
        known = {key.key_id for key in self._trusted}
        found = [key for key in signers if key.key_id in known]
        if len(found) < self._threshold:
            raise _refused(
                f"{len(found)} of the keys you trust signed the verdict; {self._threshold} needed.",
                "untrusted-signer",
                hint="Compare the signers' key ids with their owners over another channel.",
            )
        return True, f"signed by {len(found)} of the keys you trust"


def verify_bundle(
    files: BundleFiles, *, trusted_keys: Sequence[VerifyKey] | None, now: datetime, threshold: int = 1
) -> BundleReport:
    """Check a bundle whole; raises :class:`BundleRefusedError` naming the first thing that is wrong."""
    return BundleVerifier(files, trusted_keys=trusted_keys, threshold=threshold, now=now).run()


def key_file_name(key: VerifyKey) -> str:
    """Where a public key lies in a bundle."""
    return f"keys/{key.key_id.removeprefix('sha256:')}.pub"


def require_permission(verdict: Verdict, manifest: ReleaseManifest) -> None:
    """Refuse unless the verdict is about exactly this manifest and lets it leave."""
    difference = verdict.difference_from(manifest)
    if difference is not None:
        raise _refused(
            f"The verdict does not belong to these tiles: {difference}.",
            "verdict-of-other-tiles",
            hint="Audit exactly the sealed tiles, and sign that audit.",
        )
    if not verdict.predicate.permits_release:
        raise _refused(
            f"The verdict is {verdict.predicate.verdict}: these tiles may not leave.",
            "verdict-forbids",
            hint="REVIEW needs a named approver's reason; FAIL and INVALID need other tiles and a new audit.",
        )


def require_current(verdict: Verdict, now: datetime) -> None:
    """Refuse a verdict that is not yet, or no longer, valid."""
    if not verdict.is_current(now):
        predicate = verdict.predicate
        raise _refused(
            f"The verdict holds from {predicate.issued_at:%Y-%m-%d %H:%M} UTC to "
            f"{predicate.expires_at:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} UTC.",
            "verdict-expired",
            hint="Ask for a new audit: attacks improve with time. Check this machine's clock too.",
        )


def _short(text: str) -> str:
    return text.removeprefix("sha256:")[:16]


def _refused(message: str, code: str, *, hint: str = "") -> BundleRefusedError:
    return BundleRefusedError(
        message,
        hint=hint or "Do not use this bundle. Fetch it again from the site that released it.",
        code=code,
    )
