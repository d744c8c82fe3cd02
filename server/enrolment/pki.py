"""Makes a consortium: its certificate authority, the hub's TLS certificate and its renewals, and the secrets."""

from __future__ import annotations

import os
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.contracts.enrolment import RevocationList
from pixcell_core.errors import RefusedError
from pixcell_core.trust.certificates import fingerprint, read_certificate, to_pem
from pixcell_core.trust.kits import sign_revocations
from server.enrolment.authority import CA_KEY_FILE, Authority, general_name
from server.enrolment.revocations import revocations_file
from server.layout import ServerLayout

SERVER_DAYS = 365
SECRET_BYTES = 32


class Consortium(BaseModel):
    """What `pixcell init` made."""

    folder: Path
    ca_certificate: Path
    ca_key: Path
    ca_fingerprint: str
    server_expires_at: datetime

    def __str__(self) -> str:
        return (
            f"Consortium made in {self.folder}.\n"
            f"CA certificate, to give to the sites: {self.ca_certificate}\n"
            f"Fingerprint to read to the sites: {self.ca_fingerprint}\n"
            f"CA key, sealed by your passphrase: {self.ca_key}\n"
            "  The hub never needs it: keep it on a medium of its own, and a copy in a safe.\n"
            f"Server certificate valid until {self.server_expires_at:%Y-%m-%d}."
        )


class HubRenewed(BaseModel):
    """A new server certificate of the hub."""

    certificate: Path
    hosts: list[str]
    expires_at: datetime

    def __str__(self) -> str:
        return (
            f"New server certificate for {', '.join(self.hosts)}, valid until {self.expires_at:%Y-%m-%d}.\n"
            "A running hub takes it up within seconds; kits of the sites stay as they are."
        )


def initialise(
    layout: ServerLayout,
    hosts: list[str],
    passphrase: bytes,
    *,
    ca_dir: Path | None = None,
    now: datetime | None = None,
) -> Consortium:
    """Make the folder, the CA, a server certificate for `hosts`, an empty revocation list, the executor's secret.

    The CA's key goes to `ca_dir` (the folder `pki` where none is given), sealed by `passphrase`. Refuses to write
    over an existing consortium: a new CA would invalidate every site's kit.
    """
    if (layout.pki / "ca.crt").exists():
        raise RefusedError(
            f"{layout.root} already holds a consortium.",
            hint="Use it, or choose another --dir. A new CA would cut off every enrolled site.",
            code="already-initialised",
        )
    for host in hosts:
        general_name(host)
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    for folder in (layout.root, layout.pki, layout.secrets, layout.hub):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    layout.requests.mkdir(exist_ok=True, mode=0o700)
    key_folder = ca_dir or layout.pki
    key_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Without ca.crt these are what an interrupted `init` left in this folder; nothing was ever signed by them.
    for left in (layout.pki / CA_KEY_FILE, layout.secrets / "executor.secret"):
        left.unlink(missing_ok=True)
    authority = Authority.make(moment)
    authority.save_key(key_folder, passphrase)
    certificate = _new_server_pair(layout, authority, hosts, moment)
    _write_private(layout.secrets / "executor.secret", secrets.token_bytes(SECRET_BYTES))
    empty = RevocationList(consortium=fingerprint(authority.certificate), number=0, issued_at=moment)
    write_atomically(revocations_file(layout), sign_revocations(empty, authority.signing_key).to_bytes())
    # Last, because its presence says that the consortium is whole.
    write_atomically(layout.pki / "ca.crt", to_pem(authority.certificate).encode("ascii"))
    return Consortium(
        folder=layout.root,
        ca_certificate=layout.pki / "ca.crt",
        ca_key=key_folder / CA_KEY_FILE,
        ca_fingerprint=fingerprint(authority.certificate),
        server_expires_at=certificate.not_valid_after_utc,
    )


def renew_hub(
    layout: ServerLayout, authority: Authority, hosts: list[str] | None = None, now: datetime | None = None
) -> HubRenewed:
    """A new key and certificate for the hub from the same CA, for `hosts` or the names it has."""
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    names = hosts or hosts_of(read_certificate(read_bounded(layout.pki / "server.crt", 65_536), "server.crt"))
    certificate = _new_server_pair(layout, authority, names, moment)
    return HubRenewed(
        certificate=layout.pki / "server.crt", hosts=names, expires_at=certificate.not_valid_after_utc
    )


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses a server certificate stands for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _new_server_pair(
    layout: ServerLayout, authority: Authority, hosts: list[str], now: datetime
) -> x509.Certificate:
    """Key and certificate in one file each; a hub that reads between the two writes keeps the pair it has."""
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = authority.certify_server(key.public_key(), hosts, now, now + timedelta(days=SERVER_DAYS))
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    fresh = layout.pki / "server.key.new"
    fresh.unlink(missing_ok=True)
    _write_private(fresh, pem)
    fresh.replace(layout.pki / "server.key")
    write_atomically(layout.pki / "server.crt", to_pem(certificate).encode("ascii"))
    return certificate


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
