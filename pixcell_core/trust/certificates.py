"""X.509 certificates of a consortium: who a certificate names, in which role, with which node key. Pure and offline.

A party's certificate carries its identity as URIs (RFC 5280, 4.2.1.6) that the CA signed:
    urn:pixcell:<role>:<name>
    urn:pixcell:node-key:<hex>    for a site: SHA-256 of its node key, DER SubjectPublicKeyInfo
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from pixcell_core.contracts.enrolment import EnrolmentRequest, Role
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.keys import VerifyKey

NODE_KEY_URN = "urn:pixcell:node-key:"
_PARTY = re.compile(rf"urn:pixcell:({'|'.join(get_args(Role))}):([a-z0-9][a-z0-9-]{{0,39}})")
_NODE_KEY = re.compile(r"urn:pixcell:node-key:([0-9a-f]{64})")
TLS_CURVES = ("secp256r1", "secp384r1")
_MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What the X.509 library raises for a stranger's certificate, at once or when a part of it is first looked at."""


class CertificateError(RefusedError):
    """A certificate is not one of a party of this consortium."""

    default_code = "bad-certificate"


@dataclass(frozen=True)
class PartyCertificate:
    """What a party's certificate says. `serial` is hexadecimal, `node_key` the SHA-256 of a site's node key in hex."""

    party: str
    role: Role
    serial: str
    not_before: datetime
    not_after: datetime
    node_key: str | None


def party_urn(role: Role, party: str) -> str:
    """The URI by which a certificate names its party."""
    return f"urn:pixcell:{role}:{party}"


def party_of(certificate: x509.Certificate) -> PartyCertificate:
    """Who the certificate names. Says nothing about who signed it; raises `CertificateError` where it names nobody."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, *_MALFORMED) as error:
        raise _nobody() from error
    parties = [found for uri in uris if (found := _PARTY.fullmatch(uri))]
    nodes = [found for uri in uris if (found := _NODE_KEY.fullmatch(uri))]
    if len(parties) != 1 or len(nodes) > 1 or len(parties) + len(nodes) != len(uris):
        raise _nobody()
    role: Role = parties[0][1]  # type: ignore[assignment]
    return PartyCertificate(
        party=parties[0][2],
        role=role,
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        node_key=nodes[0][1] if nodes else None,
    )


def _nobody() -> CertificateError:
    return CertificateError(
        "The certificate names no party of a consortium.", hint="Use the certificate from the party's kit."
    )


def fingerprint(certificate: x509.Certificate) -> str:
    """`sha256:<hex>` of the DER form: what two people compare aloud."""
    return "sha256:" + certificate.fingerprint(hashes.SHA256()).hex()


def to_pem(certificate: x509.Certificate) -> str:
    """PEM text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def read_certificate(data: bytes, name: str = "certificate") -> x509.Certificate:
    """One PEM certificate; an input error for anything else."""
    try:
        return x509.load_pem_x509_certificate(data)
    except _MALFORMED as error:
        raise BadInputError(
            f"{name} is not a certificate.", hint="Ask its author for the file again.", code="bad-certificate"
        ) from error


def read_authority(data: bytes, name: str = "ca.crt") -> x509.Certificate:
    """The certificate of a consortium's authority: self-signed, a CA, with an Ed25519 key; else `bad-ca`."""
    try:
        ca = x509.load_pem_x509_certificate(data)
        is_ca = ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        ca.verify_directly_issued_by(ca)
        fits = is_ca and isinstance(ca.public_key(), Ed25519PublicKey)
    except (x509.ExtensionNotFound, InvalidSignature, *_MALFORMED) as error:
        raise _no_authority(name) from error
    if not fits:
        raise _no_authority(name)
    return ca


def _no_authority(name: str) -> BadInputError:
    return BadInputError(
        f"{name} is not the certificate of a consortium's authority.",
        hint="Ask the coordinator for pki/ca.crt.",
        code="bad-ca",
    )


def authority_key(ca: x509.Certificate) -> VerifyKey:
    """The key that signs certificates, kits and revocation lists of this consortium."""
    key = ca.public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise _no_authority("The authority")
    return VerifyKey(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


def issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether `ca` signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, *_MALFORMED):
        return False
    return True


def public_key_digest(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 (hex) of the DER SubjectPublicKeyInfo of a public key."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def node_public_key(text: str, party: str) -> ec.EllipticCurvePublicKey:
    """A site's P-384 node key from its OpenSSH text; an input error if the text is not one."""
    try:
        key = serialization.load_ssh_public_key(text.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInputError(
            f"The node key of {party} is damaged.", hint="Ask the site for its request file again."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise BadInputError(f"The node key of {party} is not P-384.", hint="Ask for a new request file.")
    return key


def tls_public_key(request: EnrolmentRequest) -> ec.EllipticCurvePublicKey:
    """The TLS key of a request, whose holder signed the PKCS#10 part in the party's name; else an input error."""
    if request.tls_request is None:
        raise BadInputError(
            f"The request of {request.site} carries no TLS key.",
            hint="It was made by an older version. The site runs `pixcell site enroll` again and sends the new request.",
            code="request-without-tls",
        )
    try:
        csr = x509.load_pem_x509_csr(request.tls_request.encode("ascii"))
        key, true = csr.public_key(), csr.is_signature_valid
        names = [attribute.value for attribute in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, TypeError, UnsupportedAlgorithm, UnicodeError) as error:
        raise _damaged(request) from error
    if not true or names != [request.site]:
        raise _damaged(request)
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in TLS_CURVES:
        raise BadInputError(
            f"The TLS key of {request.site} is neither P-256 nor P-384.",
            hint="The site runs `pixcell site enroll` and sends the request it makes.",
            code="bad-request",
        )
    return key


def _damaged(request: EnrolmentRequest) -> BadInputError:
    return BadInputError(
        f"The TLS request of {request.site} is damaged, or was made for another name.",
        hint="Ask the site for its request file again.",
        code="bad-request",
    )
