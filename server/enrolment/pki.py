"""The consortium's certificate authority and the hub's TLS certificate."""

from __future__ import annotations

import ipaddress
import os
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import BaseModel

from pixcell_core.errors import BadInputError, RefusedError
from server.layout import ServerLayout

CA_DAYS = 3650
SERVER_DAYS = 365
CLOCK_SLACK = timedelta(minutes=5)
SECRET_BYTES = 32


class Consortium(BaseModel):
    """What `pixcell init` made."""

    folder: Path
    ca_certificate: Path
    ca_fingerprint: str
    server_expires_at: datetime

    def __str__(self) -> str:
        return (
            f"Consortium made in {self.folder}.\n"
            f"CA certificate: {self.ca_certificate}\n"
            f"Fingerprint to read to the sites: {self.ca_fingerprint}\n"
            f"Server certificate valid until {self.server_expires_at:%Y-%m-%d}."
        )


def initialise(layout: ServerLayout, hosts: list[str], now: datetime | None = None) -> Consortium:
    """Make the folder, the CA, a server certificate for `hosts`, and the executor's secret.

    Refuses to write over an existing consortium: a new CA would invalidate every site's kit.
    """
    if (layout.pki / "ca.crt").exists():
        raise RefusedError(
            f"{layout.root} already holds a consortium.",
            hint="Use it, or choose another --dir. A new CA would cut off every enrolled site.",
            code="already-initialised",
        )
    moment = now or datetime.now(UTC)
    for folder in (layout.root, layout.pki, layout.secrets, layout.hub):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    layout.requests.mkdir(exist_ok=True, mode=0o700)
    ca_key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"consortium {secrets.token_hex(4)}")])
    ca = _ca_certificate(ca_key, name, moment)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = _server_certificate(key, ca_key, name, hosts, moment)
    _write_private(layout.pki / "ca.key", _pem(ca_key))
    _write_private(layout.pki / "server.key", _pem(key))
    _write_private(layout.secrets / "executor.secret", secrets.token_bytes(SECRET_BYTES))
    (layout.pki / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    # Last, because its presence says that the consortium is whole.
    (layout.pki / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    return Consortium(
        folder=layout.root,
        ca_certificate=layout.pki / "ca.crt",
        ca_fingerprint="sha256:" + ca.fingerprint(hashes.SHA256()).hex(),
        server_expires_at=certificate.not_valid_after_utc,
    )


def _ca_certificate(key: ec.EllipticCurvePrivateKey, name: x509.Name, now: datetime) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(name, name, key.public_key(), now, CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server_certificate(
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    hosts: list[str],
    now: datetime,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub")])
    return (
        _builder(subject, issuer, key.public_key(), now, SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName([_general_name(h) for h in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + timedelta(days=days))
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or any(c.isspace() or c in "/:@" for c in host):
        raise BadInputError(
            f"'{host}' is neither a host name nor an IP address.",
            hint="Give the names under which sites reach the hub: --host hub.example.org",
        )
    return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
