"""Kits at the site: installed when the right authority signed them for these keys, and refused otherwise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pixcell_core.contracts.enrolment import Kit, RevocationList
from pixcell_core.trust.certificates import (
    public_key_digest,
    read_authority,
    read_certificate,
)
from pixcell_core.trust.expiry import days_left
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.kits import sign_kit, sign_revocations
from site_client.approvals.enrolment import enrol
from site_client.approvals.kit import install_kit, installed_kit
from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import Enrolment, make_enrolment
from tests.server.enrolment.refusals import NOW, code_of, read_kit


def test_a_site_installs_its_kit_and_what_it_refuses(made: Enrolment, tmp_path: Path) -> None:
    east = made.request("east")
    assert code_of(installed_kit, east) == "no-kit"
    signed = made.approve(east, hub="hub.example.org:9443", days=20)
    done = install_kit(east, signed.kit)
    assert (done.site, done.version, done.hub) == ("east", 1, "hub.example.org:9443")
    assert east.identity().hub == "hub.example.org:9443"
    install_kit(east, signed.kit)
    assert public_key_digest(read_certificate(east.tls_certificate.read_bytes()).public_key())
    assert days_left(installed_kit(east).expires_at, datetime.now(UTC)) == 19

    west = made.request("west")
    assert code_of(install_kit, east, made.approve(west).kit) == "kit-of-another-site"
    other = make_enrolment(tmp_path / "elsewhere", "theirs")
    foreign = other.approve(other.request("east")).kit
    assert code_of(install_kit, east, foreign) == "kit-of-another-consortium"
    assert installed_kit(east).version == 1


def test_expired_wrong_clock_and_older_kits_are_told_apart(made: Enrolment) -> None:
    now = datetime.now(UTC).replace(
        microsecond=0
    )  # of this moment: the authority was made after the tests were collected
    east = made.request("east")
    first = made.approve(east, days=10, now=now).kit
    assert code_of(install_kit, east, first, now + timedelta(days=10)) == "kit-expired"
    assert code_of(install_kit, east, first, now - timedelta(days=1)) == "clock-wrong"
    assert not east.tls_certificate.exists()
    install_kit(east, first, now - timedelta(minutes=4))
    second = made.book.renew("east", made.authority, now=now).kit
    assert install_kit(east, second, now).version == 2
    before = east.tls_certificate.read_bytes()
    assert code_of(install_kit, east, first, now) == "kit-older"
    assert east.tls_certificate.read_bytes() == before


def test_a_kit_for_other_keys_is_refused(made: Enrolment, tmp_path: Path) -> None:
    east = made.request("east")
    kit = made.approve(east).kit
    twin = SiteFolder(tmp_path / "twin")
    enrol(twin, "east", "h:1", made.ca)
    assert code_of(install_kit, twin, kit) == "kit-of-other-keys"
    assert not twin.tls_certificate.exists()


def test_no_changed_kit_is_installed(made: Enrolment, tmp_path: Path) -> None:
    east = made.request("east")
    data = made.approve(east).kit.read_bytes()
    for position in range(0, len(data), 97):
        changed = bytearray(data)
        changed[position] ^= 1
        (tmp_path / "changed").write_bytes(bytes(changed))
        code_of(install_kit, east, tmp_path / "changed")
    assert not east.tls_certificate.exists() and not east.kit.exists()


def test_a_kit_whose_parts_disagree_is_refused_although_the_ca_signed_it(
    made: Enrolment, tmp_path: Path
) -> None:
    east, west = made.request("east"), made.request("west")
    kit = read_kit(made.approve(east).kit, made.ca)
    theirs = read_kit(made.approve(west).kit, made.ca)
    key = made.authority.signing_key
    for change in (
        {"certificate": theirs.certificate},
        {"role": "coordinator"},
        {"party": "west"},
        {"node_key": theirs.node_key},
        {"expires_at": kit.expires_at + timedelta(days=1)},
        {"consortium": "sha256:" + "0" * 64},
    ):
        wrong = Kit.model_validate(kit.model_dump() | change)
        (tmp_path / "wrong").write_bytes(sign_kit(wrong, key).to_bytes())
        assert code_of(install_kit, east, tmp_path / "wrong") == "kit-inconsistent", change
    stranger = sign_kit(kit, SigningKey.generate())
    (tmp_path / "wrong").write_bytes(stranger.to_bytes())
    assert code_of(install_kit, east, tmp_path / "wrong") == "kit-of-another-consortium"
    # A revocation list is no kit, although the same key signs both.
    empty = RevocationList(consortium=kit.consortium, number=1, issued_at=NOW)
    (tmp_path / "wrong").write_bytes(sign_revocations(empty, key).to_bytes())
    assert code_of(install_kit, east, tmp_path / "wrong") == "wrong-payload-type"


def test_the_ca_must_be_the_one_that_was_read_aloud(made: Enrolment, tmp_path: Path) -> None:
    other = make_enrolment(tmp_path / "elsewhere", "theirs")
    spoken = "sha256:" + read_authority(made.ca.read_bytes()).fingerprint(x509_sha256()).hex()
    folder = SiteFolder(tmp_path / "east")
    assert code_of(enrol, folder, "east", "h:1", other.ca, ca_fingerprint=spoken) == "ca-differs"
    assert not folder.root.exists()
    enrol(folder, "east", "h:1", made.ca, ca_fingerprint=spoken.upper())
    install_kit(folder, made.approve(folder).kit)
    assert code_of(enrol, folder, "east", "h:1", other.ca) == "another-consortium"


def x509_sha256() -> Any:
    """The hash of fingerprints."""
    from cryptography.hazmat.primitives import hashes

    return hashes.SHA256()
