"""Attacks on a bundle by those who may sign: what a site, or a stranger with a site, tries on the recipient."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from pixcell_core.contracts.canonical import canonical_bytes
from pixcell_core.contracts.release import TileFormat
from pixcell_core.errors import PixcellError, RefusedError
from pixcell_core.trust.bundle import LISTING_PAYLOAD_TYPE, BundleReport, Known, verify_bundle
from pixcell_core.trust.bundle_files import LISTING, VERDICT, open_bundle
from pixcell_core.trust.dsse import IN_TOTO_PAYLOAD_TYPE, Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.tile_jpeg import encode_as
from site_client.release import draft, seal
from site_client.release.export import export_release
from tests.site_client.release.conftest import AUDITOR
from tests.site_client.release.test_bundle_tampering import resigned

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room, Sample


def verified(
    room: Room, bundle: Path, *trusted: VerifyKey, threshold: int = 1, known: Known | None = None
) -> BundleReport:
    with open_bundle(bundle) as files:
        return verify_bundle(
            files, trusted_keys=trusted or None, now=room.now, threshold=threshold, known=known
        )


def exported(room: Room, out: Path, auditor: SigningKey) -> Path:
    release = room.draft()
    room.sign(release, room.audit(release), auditor)
    return export_release(room.workspace, out, now=room.now).path


def test_a_site_with_an_auditor_of_its_own_making_is_not_trusted(room: Room, tmp_path: Path) -> None:
    """The recipient trusts a site and an auditor. The site signs with a key it made a minute ago as "the auditor"."""
    bundle = exported(room, tmp_path / "b.zip", SigningKey.generate())
    site = room.workspace.site_key().verify_key
    with pytest.raises(RefusedError) as refused:
        verified(room, bundle, site, AUDITOR.verify_key)
    assert refused.value.code == "auditor-not-trusted"


def test_a_threshold_counts_the_site_beside_its_auditor(room: Room, tmp_path: Path) -> None:
    bundle = exported(room, tmp_path / "b.zip", AUDITOR)
    site, stranger = room.workspace.site_key().verify_key, SigningKey.generate().verify_key
    assert verified(room, bundle, AUDITOR.verify_key).trusted
    assert verified(room, bundle, site, AUDITOR.verify_key, threshold=2).trusted
    with pytest.raises(RefusedError) as refused:
        verified(room, bundle, AUDITOR.verify_key, stranger, threshold=2)
    assert refused.value.code == "untrusted-signer"


def test_a_pinned_document_says_who_audits(room: Room, tmp_path: Path) -> None:
    """Then a site's key may be the only one given: the document names its auditors."""
    release = room.requested(signers_file=room.rule(2))
    room.sign(release, room.audit(release), AUDITOR)
    room.countersign(release, room.workspace.site_key())
    bundle = export_release(room.workspace, tmp_path / "b.zip", now=room.now).path
    signers = release.signers()
    assert signers is not None
    site = room.workspace.site_key().verify_key
    assert verified(room, bundle, site, known=Known(signers_digest=signers.digest)).trusted


def chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def laden(pixels: Any, form: TileFormat) -> bytes:
    """A tile as the project writes it, with bytes that no picture reader shows."""
    data = encode_as(pixels, form)
    if form == "jpg":
        return data[:-2] + b"patient 7;" * 700 + data[-2:]
    return data[:-12] + chunk(b"IDAT", bytes(range(256)) * 70) + data[-12:]


def as_a_reader_shows(data: bytes, name: str) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


@pytest.mark.parametrize("form", ["png", "jpg"])
def test_bytes_hidden_in_sealed_tiles(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: TileFormat
) -> None:
    """A site that wrote its own tiles and seal learns it before anyone signs; signed all the same, no bundle stands."""
    with monkeypatch.context() as patched:
        patched.setattr(draft, "encode_as", laden)
        patched.setattr(draft, "decode_named", as_a_reader_shows)
        release = room.draft(tile_format=form)
    audit = room.audit(release)
    with pytest.raises(PixcellError) as refused:
        room.sign(release, audit)
    assert refused.value.code == "bad-tile-file"
    monkeypatch.setattr(seal, "require_named_form", lambda data, name: (0, 0))
    room.sign(release, audit)
    with pytest.raises(PixcellError) as refused:
        export_release(room.workspace, tmp_path / "b.zip", now=room.now)
    assert "tile" in refused.value.message and not (tmp_path / "b.zip").exists()


def signed_again(sample: Sample, **changes: Any) -> dict[str, bytes]:
    """The bundle with other words in its verdict, signed by its true auditor and listed by its true site."""
    statement = json.loads(Envelope.from_bytes(sample.files[VERDICT]).unsafe_unverified_payload())
    statement["predicate"] |= changes
    envelope = sign_envelope(IN_TOTO_PAYLOAD_TYPE, canonical_bytes(statement), [sample.auditor_key])
    return resigned(sample, {**sample.files, VERDICT: envelope.to_bytes()}, sample.site_key)


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "1969-12-31T23:59:59Z"]
)
def test_a_verdict_of_the_first_day_is_refused_by_name(sample: Sample, tmp_path: Path, moment: str) -> None:
    files = signed_again(sample, issued_at=moment)
    assert sample.refuses(sample.written(tmp_path / "b", files)).code == "bad-document"


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-12:00"])
def test_an_export_of_the_last_day_is_refused_by_name(sample: Sample, tmp_path: Path, moment: str) -> None:
    files = listed_again(sample, exported_at=moment)
    assert sample.refuses(sample.written(tmp_path / "b", files)).code == "bad-document"


def listed_again(sample: Sample, indent: int | None = None, **changes: Any) -> dict[str, bytes]:
    """The bundle with other words in its list of files, signed by its true site."""
    listing = json.loads(Envelope.from_bytes(sample.files[LISTING]).unsafe_unverified_payload()) | changes
    data = canonical_bytes(listing) if indent is None else json.dumps(listing, indent=indent).encode()
    return {**sample.files, LISTING: sign_envelope(LISTING_PAYLOAD_TYPE, data, [sample.site_key]).to_bytes()}


def test_a_list_of_files_in_another_byte_form(sample: Sample, tmp_path: Path) -> None:
    folder = sample.written(tmp_path / "b", listed_again(sample))
    sample.verify(folder)
    refused = sample.refuses(sample.written(tmp_path / "b", listed_again(sample, indent=1)))
    assert refused.code == "bundle-changed" and "canonical" in refused.message


def test_a_list_that_names_a_file_twice(sample: Sample, tmp_path: Path) -> None:
    listing = json.loads(Envelope.from_bytes(sample.files[LISTING]).unsafe_unverified_payload())
    twice = [{**listing["files"][0], "file_digest": "sha256:" + "0" * 64}, *listing["files"]]
    refused = sample.refuses(sample.written(tmp_path / "b", listed_again(sample, files=twice)))
    assert refused.code == "bad-document" and "twice" in refused.message
