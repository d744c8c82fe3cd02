"""The site's own key is held to what an auditor's is: a kit of the consortium, of that key, unexpired and unrevoked."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.trust.bundle import verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from pixcell_core.trust.bundle_rules import certificate_file_name
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.vouched_keys import (
    VOUCHED_KEY_PAYLOAD_TYPE,
    VouchedKey,
    open_vouched_key,
    vouch,
)
from server.enrolment.revocations import revocations_file
from site_client.approvals.site_folder import SiteFolder
from site_client.release.export import export_release
from site_client.release.signers import Credentials
from site_client.release.signing import sign_release
from tests.site_client.release.conftest import InMemory
from tests.site_client.release.test_bundle_tampering import resigned
from tests.site_client.release.test_signer_certificates import NOW, Consortium, code_of, consortium

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

__all__ = ["consortium"]


def revoke_site(consortium: Consortium) -> Envelope:
    consortium.made.book.revoke("north", consortium.made.authority, reason="broken into")
    return Envelope.load(revocations_file(consortium.made.layout))


def files_of(bundle: Path) -> dict[str, bytes]:
    with open_bundle(bundle) as files:
        return {name: files.read(name) for name in files.names()}


def test_the_certificate_is_in_the_bundle_and_named(
    consortium: Consortium, room: Room, tmp_path: Path
) -> None:
    consortium.sign()
    export_release(room.workspace, tmp_path / "b.zip", now=NOW)
    report = consortium.verify(tmp_path / "b.zip", ca=consortium.ca)
    site = next(one for one in report.signers if one.role == "site")
    assert (
        site.trusted and site.certificate is not None and site.certificate.startswith("north of consortium")
    )
    detail = {check.name: check.detail for check in report.checks}
    assert "the site certified" in detail["origin"]


def test_revoked_or_over_at_export(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    consortium.sign(days=800)
    late = NOW + timedelta(days=400)
    # The auditor's certificate comes first; without it the site's alone is over.
    release = room.workspace.find(None)
    (release.path / "certificates").rename(tmp_path / "aside")
    room.refused("kit-expired", lambda: export_release(room.workspace, tmp_path / "b", now=late))
    given = Credentials(None, None, (revoke_site(consortium),))
    room.refused(
        "signer-revoked",
        lambda: export_release(room.workspace, tmp_path / "b", now=NOW, credentials=given),
    )
    assert not (tmp_path / "b").exists()


def test_over_or_revoked_when_the_site_signs(consortium: Consortium, room: Room) -> None:
    from site_client.release.request import request_release

    room.auditor = consortium.key
    request_release(room.workspace, now=NOW, signers_file=room.rule(2))
    consortium.sign(days=800)
    release, key = room.workspace.find(None), room.workspace.site_key()

    def sign(now: Any = NOW, credentials: Any = None) -> object:
        return sign_release(room.workspace, None, key, now=now, role="site", credentials=credentials)

    room.refused("kit-expired", lambda: sign(NOW + timedelta(days=400)))
    given = Credentials(None, None, (revoke_site(consortium),))
    room.refused("signer-revoked", lambda: sign(credentials=given))
    envelope = release.verdict()
    assert envelope is not None and len(envelope.signatures) == 1
    sign()


def test_revoked_after_export(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    consortium.sign()
    export_release(room.workspace, tmp_path / "b", now=NOW)
    revoked = revoke_site(consortium)
    assert consortium.verify(tmp_path / "b", ca=consortium.ca).trusted
    for known in ({"ca": consortium.ca, "revocations": [revoked]}, {"revocations": [revoked]}):
        assert code_of(lambda known=known: consortium.verify(tmp_path / "b", **known)) == "signer-revoked"


def test_a_site_without_a_kit_where_one_is_asked_for(
    consortium: Consortium, room: Room, tmp_path: Path
) -> None:
    consortium.sign()
    kit = SiteFolder(room.workspace.site_dir).kit
    kit.rename(tmp_path / "kit.json")
    room.refused(
        "site-certificate-missing",
        lambda: export_release(
            room.workspace, tmp_path / "b", now=NOW, credentials=Credentials(None, consortium.ca)
        ),
    )
    export_release(room.workspace, tmp_path / "b", now=NOW)
    assert consortium.verify(tmp_path / "b").checks
    assert code_of(lambda: consortium.verify(tmp_path / "b", ca=consortium.ca)) == "site-certificate-missing"


def test_a_document_that_names_the_consortium_holds_the_site_too(
    consortium: Consortium, room: Room, tmp_path: Path
) -> None:
    from pixcell_core.trust.certificates import fingerprint
    from site_client.release.request import request_release

    room.auditor = consortium.key
    request_release(room.workspace, now=NOW, signers_file=room.rule(2, consortium=fingerprint(consortium.ca)))
    consortium.sign()
    room.countersign(room.workspace.find(None), room.workspace.site_key())
    kit = SiteFolder(room.workspace.site_dir).kit
    data = kit.read_bytes()
    kit.unlink()
    assert (
        room.refusal(lambda: export_release(room.workspace, tmp_path / "b", now=NOW))
        == "site-certificate-missing"
    )
    kit.write_bytes(data)
    export_release(room.workspace, tmp_path / "b", now=NOW)
    assert consortium.verify(tmp_path / "b", ca=consortium.ca).trusted


def test_statements_that_do_not_stand_behind_the_key(
    consortium: Consortium, room: Room, tmp_path: Path
) -> None:
    consortium.sign()
    export_release(room.workspace, tmp_path / "b", now=NOW)
    files, site_key = files_of(tmp_path / "b"), room.workspace.site_key()
    name = certificate_file_name(site_key.key_id)
    key, folder = site_key.verify_key, SiteFolder(room.workspace.site_dir)
    kit, approval = Envelope.load(folder.kit), SigningKey.load(folder.approval_key)
    stranger = SigningKey.generate()
    south = consortium.made.party("south")
    theirs = Consortium(room, tmp_path / "other", "theirs").made.party("north")
    auditor = consortium.auditor

    def by(party: SiteFolder, who: str = "north") -> Envelope:
        return vouch(Envelope.load(party.kit), who, key, SigningKey.load(party.approval_key), now=NOW)

    statement = parse_document(VouchedKey, Envelope.from_bytes(files[name]).unsafe_unverified_payload())
    cases: dict[str, tuple[Envelope, str]] = {
        "for another key": (vouch(kit, "north", stranger.verify_key, approval, now=NOW), "signer-certificate-key"),
        "signed by a stranger": (vouch(kit, "north", key, stranger, now=NOW), "signature-refused"),
        "signed by the vouched key itself": (vouch(kit, "north", key, site_key, now=NOW), "signature-refused"),
        "another site's, under its own name": (by(south, "south"), "signer-certificate-refused"),
        "another site's, under this name": (by(south), "signer-certificate-refused"),
        "an auditor's": (by(auditor), "signer-certificate-role"),
        "another consortium's": (by(theirs), "kit-of-another-consortium"),
        "of another kind": (
            sign_envelope("text/plain", statement.to_bytes(), [approval]), "wrong-payload-type",
        ),
        "a bare kit": (kit, "bad-document"),
    }  # fmt: skip
    for what, (envelope, code) in cases.items():
        site_made = type(
            "S", (), {"files": files, "auditor_key": consortium.key, "now": NOW, "site_key": site_key}
        )()
        changed = resigned(site_made, {**files, name: envelope.to_bytes()}, site_key)
        found = code_of(
            lambda changed=changed: verify_bundle(
                InMemory(changed), trusted_keys=None, now=NOW, known=_known(consortium)
            )
        )
        # The research-object metadata lists files and no bytes, so that the certificate alone decides.
        assert found == code, what


def _known(consortium: Consortium) -> Any:
    from pixcell_core.trust.bundle import Known

    return Known(ca=consortium.ca)


def test_the_statement_is_good_exactly_as_long_as_the_kit(consortium: Consortium, room: Room) -> None:
    folder, key = SiteFolder(room.workspace.site_dir), room.workspace.site_key().verify_key
    envelope = vouch(Envelope.load(folder.kit), "north", key, SigningKey.load(folder.approval_key), now=NOW)
    opened = open_vouched_key(envelope, key, "north", ca=consortium.ca, moments=[NOW])
    end = opened.kit.expires_at
    open_vouched_key(envelope, key, "north", ca=consortium.ca, moments=[end - timedelta(seconds=1)])
    for moment, code in ((end, "kit-expired"), (opened.kit.issued_at - timedelta(days=1), "clock-wrong")):
        assert (
            code_of(
                lambda moment=moment: open_vouched_key(
                    envelope, key, "north", ca=consortium.ca, moments=[NOW, moment]
                )
            )
            == code
        )
    assert envelope.payloadType == VOUCHED_KEY_PAYLOAD_TYPE


@pytest.mark.parametrize("file", ["kit.json", "keys/approval"])
def test_a_damaged_kit_or_key_exports_nothing(
    consortium: Consortium, room: Room, tmp_path: Path, file: str
) -> None:
    from pixcell_core.errors import PixcellError

    consortium.sign()
    path = room.workspace.site_dir / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PixcellError):
        export_release(room.workspace, tmp_path / "b", now=NOW)
    assert not (tmp_path / "b").exists()
