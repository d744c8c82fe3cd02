"""A recipient against a dishonest site: every paper, term and list is held by a signature the site does not have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pixcell_core.contracts.canonical import canonical_bytes, parse_document
from pixcell_core.contracts.gate import (
    WITHDRAWALS_PAYLOAD_TYPE,
    ReleaseRequest,
    Signers,
    Withdrawals,
    WithdrawnRelease,
)
from pixcell_core.contracts.release import BundleListing, ReleaseManifest
from pixcell_core.contracts.verdict import Verdict
from pixcell_core.errors import PixcellError
from pixcell_core.trust.bundle import LISTING_PAYLOAD_TYPE, BundleReport, Known, verify_bundle
from pixcell_core.trust.bundle_files import DATASHEET_PAGE, LISTING, MANIFEST, REQUEST, SIGNERS, VERDICT
from pixcell_core.trust.bundle_rules import papers_of_old
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.quorum import NamedSignature
from site_client.release.export import export_release
from site_client.release.other_forms import OtherForms
from site_client.release.request import request_release
from site_client.release.signing import sign_release
from site_client.release.workspace import ReleaseWorkspace
from tests.site_client.release.conftest import AUDITOR, NOW, InMemory, Room, Sample, write_surrogates
from tests.site_client.release.test_bundle_tampering import resigned


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A bundle with everything in it: signers' document, request, DICOM; two of four signed."""
    place = tmp_path_factory.mktemp("full")
    (place / "site").mkdir()
    room = Room(ReleaseWorkspace(place / "site"), write_surrogates(place / "surrogates"), place / "audits")
    release = room.requested(signers_file=room.rule(2))
    room.sign(release, room.audit(release))
    room.countersign(release, room.workspace.site_key())
    for out in ("folder", "one.zip"):
        export_release(room.workspace, place / out, now=NOW, forms=OtherForms(dicom=True))
    return Sample(place / "folder", place / "one.zip", AUDITOR, NOW, room.workspace.site_key())


def verify(files: dict[str, bytes], now: datetime = NOW, **known: Any) -> BundleReport:
    return verify_bundle(InMemory(files), trusted_keys=None, now=now, known=Known(**known))


def code_of(files: dict[str, bytes], now: datetime = NOW, **known: Any) -> str:
    with pytest.raises(PixcellError) as refused:
        verify(files, now, **known)
    assert refused.value.hint and refused.value.message
    return refused.value.code


def test_the_full_bundle_verifies(full: Sample) -> None:
    report = verify(full.files)
    assert [check.name for check in report.checks] == [
        *("form", "keys", "file list", "nothing changed", "manifest", "signatures", "verdict"),
        *("auditing code", "signers", "still valid", "withdrawals", "certificates", "tiles"),
        *("audit report", "request", "datasheet", "origin"),
    ]
    assert "DICOM" in {check.name: check.detail for check in report.checks}["tiles"]
    assert report.signed == "signed 2 of 2"


# --- the site signs its list anew -------------------------------------------------------------------------------------


def edit(name: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        assert old in files[name], name
        files[name] = files[name].replace(old, new)

    return change


def remove(*names: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        for name in names:
            del files[name]

    return change


def lower_needed(files: dict[str, bytes]) -> None:
    rule = parse_document(Signers, files[SIGNERS])
    files[SIGNERS] = rule.model_copy(update={"needed": 3}).to_bytes()


def spaced_signers(files: dict[str, bytes]) -> None:
    files[SIGNERS] = json.dumps(json.loads(files[SIGNERS]), indent=1).encode()


def other_dicom(files: dict[str, bytes]) -> None:
    files["dicom/00002.dcm"] = files["dicom/00001.dcm"]


def identified_dicom(files: dict[str, bytes]) -> None:
    files["dicom/00002.dcm"] = files["dicom/00002.dcm"].replace(b"SYNTHETIC-00002", b"MRN 7654321    ")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (
            edit("datasheet.md", b"No differential privacy is claimed", b"Differentially private"),
            "bundle-changed",
        ),
        (edit("datasheet.md", b"**PASS**", b"**PASS!**"), "bundle-changed"),
        (edit("ro-crate-metadata.json", b"Terms of these tiles", b"Public domain"), "bundle-changed"),
        (remove("datasheet.md"), "file-missing"),
        (remove("datasheet.html"), "file-missing"),
        (edit("datasheet.html", b"</body>", b"<script>alert(1)</script></body>"), "bundle-changed"),
        (edit("datasheet.html", b"50 to 99", b"5"), "bundle-changed"),
        (remove("ro-crate-metadata.json"), "file-missing"),
        (remove(SIGNERS), "wrong-signers"),
        (remove(REQUEST), "wrong-request"),
        (lower_needed, "wrong-signers"),
        (spaced_signers, "wrong-signers"),
        (remove("dicom/00003.dcm"), "wrong-tiles"),
        (other_dicom, "bundle-changed"),
        (identified_dicom, "bundle-changed"),
    ],
)
def test_what_the_site_cannot_change(
    full: Sample, change: Callable[[dict[str, bytes]], None], code: str
) -> None:
    files = dict(full.files)
    change(files)
    assert code_of(files) in {code, "file-missing", "bundle-changed"}
    assert code_of(resigned(full, files, full.site_key)) == code


def test_a_request_of_another_key_or_for_other_terms(full: Sample) -> None:
    envelope = Envelope.from_bytes(full.files[REQUEST])
    payload = envelope.unsafe_unverified_payload()
    other = sign_envelope(envelope.payloadType, payload, [SigningKey.generate()])
    public = sign_envelope(
        envelope.payloadType, payload.replace(b'"agreement"', b'"public"'), [full.site_key]
    )
    for forged, code in ((other, "signature-refused"), (public, "wrong-request")):
        files = resigned(full, {**full.files, REQUEST: forged.to_bytes()}, full.site_key)
        assert code_of(files) == code


def test_a_request_for_another_purpose(full: Sample) -> None:
    """Everything the verdict repeats is equal; the words the site signed are not."""
    envelope = Envelope.from_bytes(full.files[REQUEST])
    request = parse_document(ReleaseRequest, envelope.unsafe_unverified_payload())
    other = request.model_copy(update={"purpose": "Training a commercial model."})
    signed = sign_envelope(envelope.payloadType, other.to_bytes(), [full.site_key])
    assert (
        code_of(resigned(full, {**full.files, REQUEST: signed.to_bytes()}, full.site_key)) == "wrong-request"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"audience": "public"},
        {"policy_digest": "sha256:" + "8" * 64},
        {"tiles_root": "sha256:" + "8" * 64},
        {"manifest_digest": "sha256:" + "8" * 64},
        {"signers_digest": None},
        {"site": "south"},
    ],
)
def test_a_verdict_that_answers_a_request_and_says_something_else(
    full: Sample, change: dict[str, Any]
) -> None:
    """Even where auditor and site both sign it: a verdict gives nothing that its request did not ask for."""
    envelope = Envelope.from_bytes(full.files[REQUEST])
    request = parse_document(ReleaseRequest, envelope.unsafe_unverified_payload()).model_copy(update=change)
    signed = sign_envelope(envelope.payloadType, request.to_bytes(), [full.site_key])
    old = parse_document(Verdict, Envelope.from_bytes(full.files[VERDICT]).unsafe_unverified_payload())
    predicate = old.predicate.model_copy(update={"request_digest": request.digest})
    verdict = old.model_copy(update={"predicate": predicate})
    again = sign_envelope(IN_TOTO_PAYLOAD_TYPE, verdict.to_bytes(), [AUDITOR, full.site_key])
    files = {**full.files, REQUEST: signed.to_bytes(), VERDICT: again.to_bytes()}
    assert code_of(resigned(full, files, full.site_key)) == "wrong-request"


def test_too_few_signatures(full: Sample) -> None:
    """The site strips the auditor's signature, or its own: k of n is counted anew by everyone."""
    envelope = Envelope.from_bytes(full.files[VERDICT])
    for kept in envelope.signatures:
        left = envelope.model_copy(update={"signatures": (kept,)}).to_bytes()
        files = resigned(full, {**full.files, VERDICT: left}, full.site_key)
        assert code_of(files) == "signatures-missing"


def test_a_signature_by_somebody_not_named(full: Sample) -> None:
    envelope = Envelope.from_bytes(full.files[VERDICT])
    payload = envelope.unsafe_unverified_payload()
    stranger = SigningKey.generate()
    signed = sign_envelope(IN_TOTO_PAYLOAD_TYPE, payload, [AUDITOR, full.site_key, stranger])
    files = {**full.files, VERDICT: signed.to_bytes()}
    name = f"keys/{stranger.key_id.removeprefix('sha256:')}.pub"
    files[name] = stranger.verify_key.to_pem()
    assert code_of(resigned(full, files, full.site_key)) == "unknown-signer"


def test_auditor_alone_is_not_enough_under_the_standing_rule(sample: Sample) -> None:
    envelope = Envelope.from_bytes(sample.files[VERDICT])
    site = sample.site_key.key_id
    only = tuple(one for one in envelope.signatures if one.keyid != site)
    assert len(only) == len(envelope.signatures) - 1 == 2
    left = envelope.model_copy(update={"signatures": only}).to_bytes()
    files = resigned(sample, {**sample.files, VERDICT: left}, sample.site_key)
    assert code_of(files) == "signatures-missing"


# --- clocks -----------------------------------------------------------------------------------------------------------


def exported_at(sample: Sample, moment: datetime) -> dict[str, bytes]:
    old = Envelope.from_bytes(sample.files[LISTING])
    listing = parse_document(BundleListing, old.unsafe_unverified_payload())
    changed = listing.model_copy(update={"exported_at": moment})
    signed = sign_envelope(LISTING_PAYLOAD_TYPE, changed.to_bytes(), [sample.site_key])
    return {**sample.files, LISTING: signed.to_bytes()}


def test_clocks(full: Sample) -> None:
    assert code_of(full.files, NOW - timedelta(hours=1)) == "clock-wrong"
    assert code_of(full.files, NOW + timedelta(days=366)) == "verdict-expired"
    assert verify(full.files, NOW - timedelta(minutes=4)).site == "north", "honest clocks differ a little"
    tomorrow = exported_at(full, NOW + timedelta(days=1))
    assert code_of(tomorrow) == "clock-wrong"
    assert code_of(exported_at(full, NOW - timedelta(days=1))) == "verdict-expired"
    assert code_of(exported_at(full, NOW + timedelta(days=400)), NOW) == "clock-wrong"


# --- withdrawals ------------------------------------------------------------------------------------------------------


def withdrawals(
    manifest_digest: str, key: SigningKey, *, site: str = "north", kind: str = WITHDRAWALS_PAYLOAD_TYPE
) -> Envelope:
    entry = WithdrawnRelease(manifest_digest=manifest_digest, reason="consent", withdrawn_at=NOW)
    listed = Withdrawals(site=site, number=3, issued_at=NOW, withdrawn=(entry,))
    return sign_envelope(kind, listed.to_bytes(), [key])


def test_withdrawals(full: Sample) -> None:
    ours = verify(full.files).manifest_digest
    other = "sha256:" + "0" * 64
    clean = verify(full.files, withdrawals=[withdrawals(other, full.site_key)])
    assert "number 3" in {check.name: check.detail for check in clean.checks}["withdrawals"]
    cases = [
        ([withdrawals(ours, full.site_key)], "release-withdrawn"),
        ([withdrawals(ours, AUDITOR)], "release-withdrawn"),
        ([withdrawals(other, full.site_key), withdrawals(ours, full.site_key)], "release-withdrawn"),
        ([withdrawals(ours, SigningKey.generate())], "withdrawals-of-another"),
        ([withdrawals(ours, full.site_key, site="south")], "withdrawals-of-another"),
        ([withdrawals(ours, full.site_key, kind="text/plain")], "wrong-payload-type"),
    ]
    for lists, code in cases:
        assert code_of(full.files, withdrawals=lists) == code
    broken = sign_envelope(WITHDRAWALS_PAYLOAD_TYPE, canonical_bytes({"site": "north"}), [full.site_key])
    assert code_of(full.files, withdrawals=[broken]) == "bad-document"


# --- other forms ------------------------------------------------------------------------------------------------------


def test_a_release_of_jpeg_tiles(room: Room, tmp_path: Path) -> None:
    release = room.draft(tile_format="jpg")
    assert {path.suffix for path in release.tiles.glob("0*")} == {".jpg"}
    room.sign(release, room.audit(release))
    out = export_release(room.workspace, tmp_path / "b", now=room.now, forms=OtherForms(dicom=True))
    assert out.report.tiles == 6 and "JPEG" in (out.path / "datasheet.md").read_text()
    swapped = shutil.copytree(out.path, tmp_path / "c")
    (swapped / "tiles" / "00001.jpg").write_bytes((swapped / "tiles" / "00002.jpg").read_bytes())
    with pytest.raises(PixcellError):
        Sample(swapped, _zip_of(tmp_path, swapped), AUDITOR, NOW, room.workspace.site_key()).verify(swapped)


def _zip_of(place: Path, folder: Path) -> Path:
    path = place / "any.zip"
    path.write_bytes((folder / MANIFEST).read_bytes())
    return path


def test_the_verdict_binds_what_it_judged(room: Room, tmp_path: Path) -> None:
    """Tiles, model, base, policy, study, code, ledger, terms, expiry: each stands in the signed statement."""
    draft = room.draft()
    request_release(room.workspace, now=room.now, signers_file=room.rule(2))
    audit = room.audit(draft)
    signed = sign_release(room.workspace, audit, AUDITOR, now=room.now, check_audit=lambda a, t: None)
    predicate, manifest = signed.verdict.predicate, draft.manifest()
    assert predicate.tiles_root == manifest.tiles_root
    assert predicate.base_digest == manifest.generator.base_digest
    assert predicate.adapter_digest == manifest.generator.adapter_digest
    assert predicate.study_digest == manifest.study_digest
    assert predicate.ledger_head == manifest.ledger_head
    assert predicate.auditor.policy_digest.startswith("sha256:")
    assert predicate.auditor.code_digest is not None
    assert predicate.request_digest is not None and predicate.signers_digest is not None
    assert predicate.expires_at - predicate.issued_at == timedelta(days=365)


def test_bundles_of_the_first_datasheet_stay_good_and_mixtures_are_refused(full: Sample) -> None:
    """Bundles live longer than programs: what was exported with the older papers verifies, whole or not at all."""
    report = verify(full.files)
    envelope = Envelope.from_bytes(full.files[VERDICT])
    judged = parse_document(Verdict, envelope.unsafe_unverified_payload())
    made = parse_document(ReleaseManifest, full.files[MANIFEST])
    signatures = [
        NamedSignature(one.key_id, one.role, one.name)  # type: ignore[arg-type]
        for one in report.signers
    ]
    names = [name for name in full.files if name != DATASHEET_PAGE]
    old = papers_of_old(made, judged, signatures, names, report.exported_at)
    files = {name: full.files[name] for name in names} | old
    assert verify(resigned(full, files, full.site_key)).signed == report.signed
    mixed = files | {DATASHEET_PAGE: full.files[DATASHEET_PAGE]}
    assert code_of(resigned(full, mixed, full.site_key)) == "bundle-changed"
    without = {name: full.files[name] for name in names}
    assert code_of(resigned(full, without, full.site_key)) == "file-missing"
