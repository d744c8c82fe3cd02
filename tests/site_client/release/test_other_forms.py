"""Content credentials beside the audited tiles: taken out, the sealed file comes back; anything else is refused."""

from __future__ import annotations

import io
import json
import struct
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pixcell_core.errors import BadInputError, PixcellError
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.tile_c2pa import MAX_CREDENTIAL_BYTES, without_credential
from pixcell_core.trust.tile_png import TilePngError
from site_client.release.export import export_release
from site_client.release.other_forms import ContentCredentials, OtherForms
from tests.site_client.release.conftest import InMemory, Sample
from tests.site_client.release.test_bundle_tampering import resigned

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room


def chunk(body: bytes, kind: bytes = b"caBX") -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def credited(png: bytes, *bodies: bytes) -> bytes:
    """The PNG with chunks after its header."""
    return png[:33] + b"".join(chunk(body) for body in bodies) + png[33:]


class Claimed(ContentCredentials):
    """A signer that writes a chunk of its own, so that the bundle's rules are tested without the library."""

    def sign(self, png: bytes, title: str) -> bytes:
        return credited(png, b"claim of " + title.encode())


def test_only_the_credential_comes_out(sample: Sample) -> None:
    png = sample.files["tiles/00001.png"]
    assert without_credential(credited(png, b"claim"), name="t") == png
    for bad in (
        png,
        credited(png, b"a", b"b"),
        credited(png, b"x" * (MAX_CREDENTIAL_BYTES + 1)),
        credited(png, b"claim")[:-1],
        credited(png, b"claim")[:45],
        png + chunk(b"claim"),
    ):
        with pytest.raises(TilePngError):
            without_credential(bad, name="t")
    other = png[:33] + chunk(b"claim") + chunk(b"Comment\0patient 7", b"tEXt") + png[33:]
    assert without_credential(other, name="t") != png


def exported(room: Room, tmp_path: Path) -> Sample:
    room.signed()
    forms = OtherForms(dicom=True, credentials=Claimed("", Ed25519PrivateKey.generate()))
    for out in ("folder", "one.zip"):
        export_release(room.workspace, tmp_path / out, now=room.now, forms=forms)
    return Sample(
        tmp_path / "folder", tmp_path / "one.zip", room.auditor, room.now, room.workspace.site_key()
    )


def test_a_bundle_with_every_form(room: Room, tmp_path: Path) -> None:
    made = exported(room, tmp_path)
    for path in (tmp_path / "folder", tmp_path / "one.zip"):
        checks = {check.name: check.detail for check in made.verify(path).checks}
        assert "content credentials" in checks["tiles"] and "DICOM" in checks["tiles"]
    crate = json.loads(made.files["ro-crate-metadata.json"])
    assert {"tiles/", "dicom/", "c2pa/"} <= {entity["@id"] for entity in crate["@graph"]}


def test_a_credential_on_another_picture(room: Room, tmp_path: Path) -> None:
    made = exported(room, tmp_path)
    swapped = {**made.files, "c2pa/00001.png": made.files["c2pa/00002.png"]}
    bare = {**made.files, "c2pa/00001.png": made.files["tiles/00001.png"]}
    fewer = {name: data for name, data in made.files.items() if name != "c2pa/00001.png"}
    for files, code in ((swapped, "bundle-changed"), (bare, "bad-tile-file"), (fewer, "wrong-tiles")):
        with pytest.raises(PixcellError) as refused:
            verify_bundle(InMemory(resigned(made, files, made.site_key)), trusted_keys=None, now=room.now)
        assert refused.value.code == code


def test_nothing_hides_in_the_dicom_form(room: Room, tmp_path: Path) -> None:
    """Bytes behind the pixels, a private element and a message in the preamble: the form follows from the tile alone."""
    made = exported(room, tmp_path)
    data = made.files["dicom/00001.dcm"]
    private = struct.pack("<HH2sH", 0x7FE1, 0x0010, b"LO", 10) + b"patient 7 "
    for laden in (data + b"patient 7", data + private, b"patient 7".ljust(128, b"\0") + data[128:]):
        files = resigned(made, {**made.files, "dicom/00001.dcm": laden}, made.site_key)
        with pytest.raises(PixcellError) as refused:
            verify_bundle(InMemory(files), trusted_keys=None, now=room.now)
        assert refused.value.code == "bundle-changed" and "DICOM" in refused.value.message


def test_jpeg_tiles_take_no_credential(room: Room, tmp_path: Path) -> None:
    release = room.draft(tile_format="jpg")
    room.sign(release, room.audit(release))
    forms = OtherForms(credentials=Claimed("", Ed25519PrivateKey.generate()))
    with pytest.raises(BadInputError) as error:
        export_release(room.workspace, tmp_path / "b", now=room.now, forms=forms)
    assert error.value.code == "no-content-credentials"
    assert not (tmp_path / "b").exists()


def certified(folder: Path) -> tuple[Path, Path]:
    """A chain of two and its key, as files."""
    now = datetime.now(UTC)
    authority, key = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()

    def certificate(subject: str, ca: bool) -> bytes:
        public = (authority if ca else key).public_key()
        named = [
            x509.Name(
                [
                    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "hospital"),
                    x509.NameAttribute(NameOID.COMMON_NAME, name),
                ]
            )
            for name in (subject, "authority")
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(named[0])
            .issuer_name(named[1])
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca, None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False)
            .add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), True)
        )
        if not ca:
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(usage, False)
        return builder.sign(authority, None).public_bytes(serialization.Encoding.PEM)

    chain, path = folder / "chain.pem", folder / "c2pa.key"
    chain.write_bytes(certificate("release desk", False) + certificate("authority", True))
    SigningKey(key).save(path)
    return chain, path


def test_the_real_library_signs_and_reads(room: Room, sample: Sample, tmp_path: Path) -> None:
    import c2pa

    credentials = ContentCredentials.load(*certified(tmp_path))
    png = sample.files["tiles/00001.png"]
    signed = credentials.sign(png, "00001.png")
    assert without_credential(signed, name="t") == png
    assert len(signed) - len(png) < MAX_CREDENTIAL_BYTES
    with c2pa.Reader("image/png", io.BytesIO(signed)) as reader:
        found = json.loads(reader.json())
    assert found["validation_state"] == "Valid"
    assert "trainedAlgorithmicMedia" in json.dumps(found)
    room.signed()
    out = export_release(
        room.workspace, tmp_path / "b", now=room.now, forms=OtherForms(credentials=credentials)
    )
    with open_bundle(out.path) as files:
        assert verify_bundle(files, trusted_keys=None, now=room.now).tiles == 6
    other = ContentCredentials(credentials.chain, Ed25519PrivateKey.generate())
    with pytest.raises(PixcellError):
        other.sign(png, "00001.png")
    with pytest.raises(BadInputError):
        ContentCredentials("no chain", credentials.key).sign(png, "00001.png")


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(BadInputError) as error:
        ContentCredentials.load(*certified(tmp_path)).sign(b"", "00001.png")
    assert error.value.code == "c2pa-not-installed" and "pixcell[c2pa]" in error.value.hint
