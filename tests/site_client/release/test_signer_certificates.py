"""An auditor's certificate of the consortium: checked at signing, at export and by the recipient, against real kits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.trust.bundle import BundleReport, Known, verify_bundle
from pixcell_core.trust.bundle_files import open_bundle
from pixcell_core.trust.certificates import fingerprint, read_authority
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import SigningKey
from server.enrolment.revocations import revocations_file
from site_client.approvals.enrolment import enrol
from site_client.approvals.kit import install_kit
from site_client.approvals.site_folder import SiteFolder
from site_client.release.export import export_release
from site_client.release.signers import Credentials
from tests.server.enrolled import make_enrolment

if TYPE_CHECKING:
    from tests.site_client.release.conftest import Room

NOW = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=2)
"""After every kit that these tests make by the true clock, however late in a long run they come."""


class Consortium:
    """A real consortium with an auditor, beside a site's room."""

    def __init__(self, room: Room, root: Path, which: str = "ours") -> None:
        self.room, self.made = room, make_enrolment(root, which)
        room.now = NOW
        site = SiteFolder(room.workspace.site_dir)
        if not site.kit.is_file():
            enrol(site, "north", "127.0.0.1:1", self.made.ca)
            install_kit(site, self.made.approve(site).kit)
        self.auditor = self.made.party("auditor-a", "auditor")
        self.key = SigningKey.load(self.auditor.approval_key)
        self.ca = read_authority(self.made.ca.read_bytes())

    def credentials(self, party: SiteFolder | None = None, *, revocations: bool = False) -> Credentials:
        lists = (Envelope.load(revocations_file(self.made.layout)),) if revocations else ()
        return Credentials(Envelope.load((party or self.auditor).kit), self.ca, lists)

    def sign(self, **options: Any) -> Any:
        release = self.room.workspace.find(None)
        options = {"now": NOW, "credentials": self.credentials(), **options}
        return self.room.sign(release, self.room.audit(release), options.pop("key", self.key), **options)

    def revoke(self) -> Envelope:
        self.made.book.revoke("auditor-a", self.made.authority, reason="key lost")
        return Envelope.load(revocations_file(self.made.layout))

    def verify(self, bundle: Path, now: datetime = NOW, **known: Any) -> BundleReport:
        with open_bundle(bundle) as files:
            return verify_bundle(files, trusted_keys=None, now=now, known=Known(**known))


@pytest.fixture
def consortium(room: Room, tmp_path: Path) -> Consortium:
    found = Consortium(room, tmp_path / "consortium")
    room.draft()
    return found


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(PixcellError) as refused:
        act()
    assert refused.value.hint
    return refused.value.code


def test_a_certified_auditor_from_signing_to_the_recipient(consortium: Consortium, tmp_path: Path) -> None:
    consortium.sign(credentials=consortium.credentials(revocations=True))
    out = tmp_path / "b.zip"
    export_release(consortium.room.workspace, out, now=NOW)
    current = Envelope.load(revocations_file(consortium.made.layout))
    report = consortium.verify(out, ca=consortium.ca, revocations=[current])
    auditor = next(signer for signer in report.signers if signer.role == "auditor")
    assert auditor.certificate is not None and auditor.certificate.startswith("auditor-a of consortium")
    assert report.trusted and [signer.trusted for signer in report.signers if signer.role == "site"] == [True]
    unproven = consortium.verify(out)
    assert not unproven.trusted
    detail = {check.name: check.detail for check in unproven.checks}["certificates"]
    assert "was not checked (--ca)" in detail and "revocations not checked" in detail


def test_certificates_that_do_not_stand_behind_the_key(
    consortium: Consortium, room: Room, tmp_path: Path
) -> None:
    site = consortium.made.party("hospital-a", "site")
    other = consortium.made.party("auditor-b", "auditor")
    elsewhere = Consortium(room, tmp_path / "other", "theirs")
    as_site = SigningKey.load(site.approval_key)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("signer-certificate-role", {"key": as_site, "credentials": consortium.credentials(site)}),
        ("signer-certificate-key", {"credentials": consortium.credentials(other)}),
        ("kit-expired", {"now": NOW + timedelta(days=366)}),
        ("clock-wrong", {"now": NOW - timedelta(days=1)}),
        (
            "kit-of-another-consortium",
            {"credentials": Credentials(Envelope.load(elsewhere.auditor.kit), consortium.ca)},
        ),
    ]
    for code, options in cases:
        room.refused(code, lambda options=options: consortium.sign(**options))  # type: ignore[misc]
    assert room.workspace.find(None).verdict() is None
    assert not (room.workspace.find(None).path / "certificates").exists()


def test_the_enrolled_sites_own_authority_is_the_default(
    consortium: Consortium, room: Room, tmp_path: Path
) -> None:
    """A kit that vouches for itself by another authority opens nothing at a site that enrolled with one."""
    elsewhere = Consortium(room, tmp_path / "other", "theirs")
    theirs = Credentials(Envelope.load(elsewhere.auditor.kit))
    assert (
        room.refusal(lambda: consortium.sign(key=elsewhere.key, credentials=theirs))
        == "kit-of-another-consortium"
    )
    consortium.sign(credentials=Credentials(Envelope.load(consortium.auditor.kit)))


def test_a_certificate_of_an_authority_of_ones_own_opens_no_export(
    consortium: Consortium, room: Room, tmp_path: Path
) -> None:
    """Whoever can write into the release's folder can make an authority, an auditor of it, and its kit."""
    elsewhere = Consortium(room, tmp_path / "other", "theirs")
    consortium.sign(key=elsewhere.key, credentials=None)
    certificates = room.workspace.find(None).path / "certificates"
    certificates.mkdir()
    name = elsewhere.key.key_id.removeprefix("sha256:") + ".json"
    (certificates / name).write_bytes(elsewhere.auditor.kit.read_bytes())
    room.refused("kit-of-another-consortium", lambda: export_release(room.workspace, tmp_path / "b", now=NOW))
    assert not (tmp_path / "b").exists()
    # Under the authority that a person names, the site's own certificate must be of it too.
    given = Credentials(None, elsewhere.ca)
    room.refused(
        "kit-of-another-consortium",
        lambda: export_release(room.workspace, tmp_path / "b", now=NOW, credentials=given),
    )


def test_revoked_before_signing(consortium: Consortium, room: Room) -> None:
    consortium.revoke()
    assert (
        room.refusal(lambda: consortium.sign(credentials=consortium.credentials(revocations=True)))
        == "signer-revoked"
    )


def test_revoked_between_signing_and_export(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    consortium.sign()
    revoked = consortium.revoke()
    given = Credentials(None, None, (revoked,))
    room.refused(
        "signer-revoked",
        lambda: export_release(room.workspace, tmp_path / "b", now=NOW, credentials=given),
    )
    assert not (tmp_path / "b").exists()


def test_an_older_list_does_not_hide_a_newer_one(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    old = Envelope.load(revocations_file(consortium.made.layout))
    consortium.sign()
    new = consortium.revoke()
    (room.workspace.find(None).path / "revocations.dsse.json").write_bytes(new.to_bytes())
    given = Credentials(None, None, (old,))
    assert (
        room.refusal(lambda: export_release(room.workspace, tmp_path / "b", now=NOW, credentials=given))
        == "signer-revoked"
    )


def test_revoked_after_export(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    consortium.sign()
    export_release(room.workspace, tmp_path / "b", now=NOW)
    revoked = consortium.revoke()
    assert consortium.verify(tmp_path / "b", ca=consortium.ca).checks
    assert (
        code_of(lambda: consortium.verify(tmp_path / "b", ca=consortium.ca, revocations=[revoked]))
        == "signer-revoked"
    )


def test_expired_at_export(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    consortium.sign(days=800)
    late = NOW + timedelta(days=400)
    room.refused("kit-expired", lambda: export_release(room.workspace, tmp_path / "b", now=late))
    export_release(room.workspace, tmp_path / "b", now=NOW)
    assert consortium.verify(tmp_path / "b", late).checks, "what was good at export stays good"


def test_a_recipient_who_names_a_consortium_needs_its_certificate(
    consortium: Consortium, room: Room, tmp_path: Path
) -> None:
    consortium.sign(credentials=None)
    export_release(room.workspace, tmp_path / "b", now=NOW)
    assert (
        code_of(lambda: consortium.verify(tmp_path / "b", ca=consortium.ca)) == "signer-certificate-missing"
    )
    current = Envelope.load(revocations_file(consortium.made.layout))
    assert code_of(lambda: consortium.verify(tmp_path / "b", revocations=[current])) == "nothing-to-revoke"


def test_a_recipient_of_another_consortium(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    consortium.sign()
    export_release(room.workspace, tmp_path / "b", now=NOW)
    elsewhere = Consortium(room, tmp_path / "other", "theirs")
    assert code_of(lambda: consortium.verify(tmp_path / "b", ca=elsewhere.ca)) == "kit-of-another-consortium"
    theirs = elsewhere.revoke()
    assert code_of(lambda: consortium.verify(tmp_path / "b", revocations=[theirs])) == "signature-refused"


def test_a_document_that_names_the_consortium(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    room.auditor = consortium.key
    rule = room.rule(2, consortium=fingerprint(consortium.ca))
    (room.source / "generation.json").write_text((room.source / "generation.json").read_text() + " ")
    room.workspace.find(None)
    from site_client.release.request import request_release

    request_release(room.workspace, now=NOW, signers_file=rule)
    room.refused("signer-certificate-missing", lambda: consortium.sign(credentials=None))
    elsewhere = Consortium(room, tmp_path / "other", "theirs")
    theirs = Credentials(Envelope.load(elsewhere.auditor.kit), elsewhere.ca)
    room.refused("signer-certificate-refused", lambda: consortium.sign(credentials=theirs))
    consortium.sign()
    room.countersign(room.workspace.find(None), room.workspace.site_key())
    certificates = room.workspace.find(None).path / "certificates"
    kept = next(certificates.iterdir())
    data = kept.read_bytes()
    kept.unlink()
    room.refused(
        "signer-certificate-missing", lambda: export_release(room.workspace, tmp_path / "b", now=NOW)
    )
    kept.write_bytes(data)
    export_release(room.workspace, tmp_path / "b", now=NOW)
    assert consortium.verify(tmp_path / "b", ca=consortium.ca).signed == "signed 2 of 2"


def test_credentials_that_make_no_sense(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    current = Envelope.load(revocations_file(consortium.made.layout))
    with pytest.raises(BadInputError) as error:
        consortium.sign(credentials=Credentials(None, None, (current,)))
    assert error.value.code == "nothing-to-revoke"
    with pytest.raises(PixcellError):
        Credentials.load(tmp_path / "absent.json", None)
    (tmp_path / "ca.crt").write_bytes(b"not a certificate")
    with pytest.raises(PixcellError):
        Credentials.load(None, tmp_path / "ca.crt")
    assert Credentials.load(None, None) is None
    kit = consortium.auditor.kit.read_bytes()
    (tmp_path / "kit.json").write_bytes(kit.replace(b'"payload":"ey', b'"payload":"eA', 1))
    with pytest.raises(PixcellError):
        consortium.sign(credentials=Credentials.load(tmp_path / "kit.json", consortium.made.ca))


def test_a_stray_certificate_in_a_bundle(consortium: Consortium, room: Room, tmp_path: Path) -> None:
    """Somebody else's certificate beside a verdict they did not sign is refused, even under the site's signature."""
    consortium.sign()
    release = room.workspace.find(None)
    stray = release.path / "certificates" / ("0" * 64 + ".json")
    stray.write_bytes(consortium.auditor.kit.read_bytes())
    with pytest.raises(RefusedError) as refused:
        export_release(room.workspace, tmp_path / "b", now=NOW)
    assert refused.value.code == "foreign-file"
