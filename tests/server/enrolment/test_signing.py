"""Kits: signed for whom was heard on the phone, for keys nobody shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from pixcell_core.contracts.canonical import load_document
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.trust.certificates import (
    party_of,
    read_certificate,
)
from server.enrolment.sites import SiteBook
from site_client.approvals.enrolment import enrol
from site_client.approvals.site_folder import SiteFolder
from tests.server.enrolled import Enrolment
from tests.server.enrolment.refusals import code_of, read_kit


@pytest.mark.parametrize("role", ["site", "auditor", "coordinator"])
def test_a_kit_carries_identity_role_and_node_key(made: Enrolment, role: str) -> None:
    folder = made.request("east")
    signed = made.approve(folder, role, days=100, hub="hub.example.org:9443")
    kit = read_kit(signed.kit, made.ca)
    certificate = read_certificate(kit.certificate.encode())
    named = party_of(certificate)
    assert (named.party, named.role, kit.version, signed.days_left) == ("east", role, 1, 100)
    assert (named.node_key is not None) == (role == "site")
    assert made.book.state("east").revoked is False
    assert SiteBook(made.layout.registry()).names() == (["east"] if role == "site" else [])
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_approving_the_same_request_again_gives_the_same_kit(made: Enrolment) -> None:
    folder = made.request("east")
    first, second = made.approve(folder), made.approve(folder)
    assert first.kit == second.kit and second.version == 1 and len(made.book.kits("east")) == 1


def test_digits_that_differ_sign_nothing(made: Enrolment) -> None:
    folder = made.request("east")
    true = load_document(EnrolmentRequest, folder.request).fingerprint
    for spoken in ("", true[:-1], "0000 " * 8, true.replace(true[0], "x")):
        assert (
            code_of(made.book.approve, folder.request, spoken, "site", made.authority)
            == "fingerprint-differs"
        )
    assert made.book.parties() == [] and SiteBook(made.layout.registry()).names() == []
    made.book.approve(folder.request, true.upper().replace(" ", ""), "site", made.authority)


def exchanged(request: EnrolmentRequest, **changes: Any) -> EnrolmentRequest:
    """The request with other parts."""
    return EnrolmentRequest.model_validate(request.model_dump() | changes)


def test_two_parties_never_share_a_key_or_a_name(made: Enrolment, tmp_path: Path) -> None:
    east, west = (load_document(EnrolmentRequest, made.request(n).request) for n in ("east", "west"))
    made.approve(SiteFolder(tmp_path / "east"))

    def answer(request: EnrolmentRequest, role: Any = "site") -> str:
        (tmp_path / "request.json").write_bytes(request.to_bytes())
        return code_of(
            made.book.approve, tmp_path / "request.json", request.fingerprint, role, made.authority
        )

    assert answer(exchanged(west, node_key=east.node_key)) == "shared-identity"
    assert answer(exchanged(west, approval_key=east.approval_key)) == "shared-identity"
    # Another's TLS request is signed for another name already.
    assert answer(exchanged(west, tls_request=east.tls_request)) == "bad-request"
    assert answer(exchanged(west, site="east")) == "bad-request"
    imposter = SiteFolder(tmp_path / "imposter")
    enrol(imposter, "east", "h:1", made.ca)
    assert answer(load_document(EnrolmentRequest, imposter.request)) == "site-exists"
    assert answer(east, "auditor") == "role-differs"
    assert made.book.parties() == ["east"]


def test_a_shared_tls_key_is_seen(made: Enrolment, tmp_path: Path) -> None:
    made.party("east")
    copied = SiteFolder(tmp_path / "west")
    copied.keys.mkdir(parents=True)
    copied.tls_key.write_bytes((tmp_path / "east" / "keys" / "tls.key").read_bytes())
    copied.tls_key.chmod(0o600)
    enrol(copied, "west", "h:1", made.ca)
    assert code_of(made.approve, copied) == "shared-identity"


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("tls_request", None, "request-without-tls"),
        (
            "tls_request",
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
            "bad-request",
        ),
        ("node_key", "ecdsa-sha2-nistp384 " + "A" * 120, "bad-input"),
        ("approval_key", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "bad-key-file"),
        ("site", "../east", "bad-document"),
        ("surprise", 1, "bad-document"),
    ],
)
def test_a_damaged_request_is_one_clear_error(
    made: Enrolment, tmp_path: Path, field: str, value: Any, code: str
) -> None:
    document = json.loads(made.request("east").request.read_bytes()) | {field: value}
    (tmp_path / "bad.json").write_text(json.dumps(document))
    assert code_of(made.book.approve, tmp_path / "bad.json", "", "site", made.authority) == code
    assert made.book.parties() == []


def test_a_request_whose_proof_of_possession_is_false_is_refused(made: Enrolment, tmp_path: Path) -> None:
    """Mutant: the public key in the PKCS#10 part is exchanged, its signature kept."""
    from cryptography.hazmat.primitives import hashes, serialization

    request = load_document(EnrolmentRequest, made.request("east").request)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "east")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    mine, theirs = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    der = serialization.Encoding.DER
    signed = builder.sign(mine, hashes.SHA384()).public_bytes(der)
    point = (serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    forged = signed.replace(mine.public_key().public_bytes(*point), theirs.public_key().public_bytes(*point))
    assert forged != signed
    text = x509.load_der_x509_csr(forged).public_bytes(serialization.Encoding.PEM).decode()
    (tmp_path / "bad.json").write_bytes(exchanged(request, tls_request=text).to_bytes())
    assert code_of(made.book.approve, tmp_path / "bad.json", "", "site", made.authority) == "bad-request"
