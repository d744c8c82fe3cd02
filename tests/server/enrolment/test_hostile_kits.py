"""Certificates and kits that a stranger wrote: each is refused by name, none ends a program."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from pixcell_core.contracts.canonical import canonical_bytes, parse_json
from pixcell_core.contracts.enrolment import KIT_PAYLOAD_TYPE
from pixcell_core.trust.certificates import issued_by, party_of, read_authority, read_certificate, to_pem
from pixcell_core.trust.dsse import Envelope, sign_envelope
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.kits import CLOCK_SLACK, check_times
from pixcell_core.trust.signer_certificates import own_authority
from server.enrolment.authority import CA_DAYS, Authority
from site_client.approvals.kit import install_kit
from tests.server.enrolled import Enrolment, make_enrolment
from tests.server.enrolment.refusals import code_of, read_kit


@pytest.fixture
def made(tmp_path: Path) -> Enrolment:
    """A new consortium."""
    return make_enrolment(tmp_path)


def twice_constrained(der: bytes) -> bytes:
    """The identifier of the key usage (2.5.29.15) made that of the basic constraints (2.5.29.19), which then stand twice."""
    assert der.count(b"\x06\x03\x55\x1d\x0f") == 1
    return der.replace(b"\x06\x03\x55\x1d\x0f", b"\x06\x03\x55\x1d\x13")


def of_version_nine(der: bytes) -> bytes:
    assert der.count(b"\xa0\x03\x02\x01\x02") == 1
    return der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x09")


def armoured(der: bytes) -> bytes:
    """PEM of bytes that need be no certificate."""
    lines = base64.encodebytes(der).decode("ascii")
    return f"-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n".encode("ascii")


@pytest.mark.parametrize("change", [twice_constrained, of_version_nine])
def test_authorities_that_only_look_like_one(made: Enrolment, change: Callable[[bytes], bytes]) -> None:
    der = made.authority.certificate.public_bytes(serialization.Encoding.DER)
    assert code_of(read_authority, armoured(change(der))) == "bad-ca"


def test_a_party_that_is_named_twice(made: Enrolment) -> None:
    kit = read_kit(made.party("north").kit, made.ca)
    der = read_certificate(kit.certificate.encode("ascii")).public_bytes(serialization.Encoding.DER)
    # The subject key identifier (2.5.29.14) made a second alternative name (2.5.29.17).
    twice = der.replace(b"\x06\x03\x55\x1d\x0e", b"\x06\x03\x55\x1d\x11")
    assert twice != der
    certificate = read_certificate(armoured(twice))
    assert code_of(party_of, certificate) == "bad-certificate"
    assert not issued_by(certificate, made.authority.certificate)


@pytest.mark.parametrize("field", ["ca", "certificate", "approval_key"])
@pytest.mark.parametrize("more", ["\u00e9", "\U0001f600", "\0"])
def test_a_kit_with_other_characters_after_the_head(made: Enrolment, field: str, more: str) -> None:
    envelope = Envelope.load(made.party("north").kit)
    words = parse_json(envelope.unsafe_unverified_payload())
    head, _, rest = words[field].partition("\n")
    words[field] = f"{head}\n{more}{rest}"
    forged = sign_envelope(KIT_PAYLOAD_TYPE, canonical_bytes(words), [SigningKey.generate()])
    assert code_of(own_authority, forged) == "bad-document"


def test_a_kit_outlives_no_authority(made: Enrolment) -> None:
    """The certificate's own dates are good; the authority that stands behind it is over."""
    kit = read_kit(made.party("north").kit, made.ca)
    now = datetime.now(UTC)  # of this moment: the kit was made after the tests were collected
    end = now - timedelta(days=1)
    old = Authority.make(end - timedelta(days=CA_DAYS))
    ended = kit.model_copy(update={"ca": to_pem(old.certificate)})
    check_times(kit, now)
    assert code_of(check_times, ended, now) == "ca-expired"
    assert code_of(check_times, ended, end + CLOCK_SLACK) == "ca-expired"
    check_times(ended.model_copy(update={"issued_at": end - timedelta(days=9)}), end + CLOCK_SLACK / 2)


def test_a_site_installs_no_kit_of_an_ended_authority(
    made: Enrolment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, with a kit that says it lasts longer than its authority does."""
    folder = made.request("north")
    path = made.approve(folder).kit
    kit = read_kit(path, made.ca)
    late = made.authority.certificate.not_valid_after_utc + CLOCK_SLACK
    assert kit.expires_at < late
    assert code_of(install_kit, folder, path, late) == "ca-expired"
    assert not folder.kit.is_file()
