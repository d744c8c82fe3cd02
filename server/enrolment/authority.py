"""The opened certificate authority: signs certificates, kits and revocation lists while a command runs, then is gone."""

from __future__ import annotations

import ipaddress
import secrets
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.contracts.enrolment import Role
from pixcell_core.errors import BadInputError
from pixcell_core.trust.certificates import NODE_KEY_URN, authority_key, party_urn, read_authority
from pixcell_core.trust.keys import SigningKey
from pixcell_core.trust.kits import CLOCK_SLACK
from server.enrolment.sealed_key import seal, unseal

CA_DAYS = 3650
CA_KEY_FILE = "ca.key"


class Authority:
    """A CA certificate together with its private key."""

    def __init__(self, certificate: x509.Certificate, key: Ed25519PrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def make(cls, now: datetime) -> Authority:
        """A new authority with a random name, valid for ten years."""
        key = Ed25519PrivateKey.generate()
        name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"pixcell consortium {secrets.token_hex(4)}")]
        )
        public = key.public_key()
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(now + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, None)
        )
        return cls(certificate, key)

    @classmethod
    def open(cls, certificate_file: Path, key_folder: Path, passphrase: bytes) -> Authority:
        """The authority of a consortium, its key taken from `key_folder`.

        Raises `no-ca-key`, `key-file-exposed`, `wrong-passphrase`, or `bad-ca-key` for the key of another CA.
        """
        certificate = read_authority(read_bounded(certificate_file, 65_536), certificate_file.name)
        key = unseal(key_folder / CA_KEY_FILE, passphrase)
        if SigningKey(key).verify_key != authority_key(certificate):
            raise BadInputError(
                f"The key in {key_folder} belongs to another consortium.",
                hint="Give the folder that was named when this consortium was made.",
                code="bad-ca-key",
            )
        return cls(certificate, key)

    def save_key(self, folder: Path, passphrase: bytes) -> None:
        """Seal the private key into `folder`."""
        seal(self._key, passphrase, folder / CA_KEY_FILE)

    @property
    def signing_key(self) -> SigningKey:
        """The same key, for envelopes."""
        return SigningKey(self._key)

    def certify_party(
        self,
        party: str,
        role: Role,
        key: ec.EllipticCurvePublicKey,
        node_key: str | None,
        now: datetime,
        end: datetime,
    ) -> x509.Certificate:
        """A client certificate: identity and, for a site, the digest of its node key as URIs."""
        uris = [party_urn(role, party)] + ([NODE_KEY_URN + node_key] if node_key else [])
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        return self._certify(party, key, names, ExtendedKeyUsageOID.CLIENT_AUTH, now, end)

    def certify_server(
        self, key: ec.EllipticCurvePublicKey, hosts: list[str], now: datetime, end: datetime
    ) -> x509.Certificate:
        """The hub's certificate for these names and addresses."""
        names = [general_name(host) for host in hosts]
        return self._certify("hub", key, names, ExtendedKeyUsageOID.SERVER_AUTH, now, end)

    def _certify(
        self,
        common_name: str,
        key: ec.EllipticCurvePublicKey,
        names: list[x509.GeneralName],
        purpose: x509.ObjectIdentifier,
        now: datetime,
        end: datetime,
    ) -> x509.Certificate:
        own = self._key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False)
            .sign(self._key, None)
        )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def general_name(host: str) -> x509.GeneralName:
    """A host name or an IP address as a certificate names it; an input error for anything else."""
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not host or any(c.isspace() or c in "/:@" for c in host):
        raise BadInputError(
            f"'{host}' is neither a host name nor an IP address.",
            hint="Give the names under which sites reach the hub: --host hub.example.org",
        )
    return x509.DNSName(host)
