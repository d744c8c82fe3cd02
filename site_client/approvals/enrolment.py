"""Makes a site's keys on the site and the request that asks the coordinator to add them."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ValidationError

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document, read_bounded
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.errors import BadInputError, PixcellError, RefusedError
from pixcell_core.trust.certificates import (
    fingerprint,
    public_key_digest,
    read_authority,
    tls_public_key,
    to_pem,
)
from pixcell_core.trust.keys import KeyFileError, SigningKey
from site_client.approvals.act_log import ENROLLED, note_act
from site_client.approvals.site_folder import SiteFolder, SiteIdentity

MAX_REQUEST_BYTES = 65_536


class Enrolled(BaseModel):
    """What `pixcell site enroll` made."""

    site: str
    hub: str
    request: Path
    fingerprint: str
    hub_ca_fingerprint: str

    def __str__(self) -> str:
        return (
            f"Keys of {self.site} made; the private halves stay here.\n"
            f"Send to the coordinator: {self.request}\n"
            f"Fingerprint of your keys (read it over the phone):  {self.fingerprint}\n"
            f"Fingerprint of the hub's CA (compare it likewise): {self.hub_ca_fingerprint}\n"
            "When the coordinator sends your kit: pixcell site install-kit KIT"
        )


def enrol(
    folder: SiteFolder,
    site: str,
    hub: str,
    ca_file: Path,
    now: datetime | None = None,
    *,
    ca_fingerprint: str | None = None,
    new_tls_key: bool = False,
) -> Enrolled:
    """Make keys (once), keep the hub's CA, write the request. Running it again with the same answers is fine.

    `ca_fingerprint` is what the coordinator read aloud; another CA is then refused. `new_tls_key` makes a new TLS
    key beside the one in use, which stays until the kit for the new one is installed.
    """
    identity = _identity(folder, site, hub)
    ca = read_authority(read_bounded(ca_file, 65_536), ca_file.name)
    _compare_authority(folder, ca, ca_fingerprint)
    for place in (folder.root, folder.keys, folder.approvals, folder.logs, folder.agent):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.keys.chmod(0o700)
    node_key = _node_key(folder.node_key)
    approval_key = SigningKey.load_or_create(folder.approval_key)
    waiting = new_tls_key or folder.next_tls_key.exists()
    tls_key = load_tls_key(folder.next_tls_key if waiting else folder.tls_key, make=True)
    write_atomically(folder.hub_ca, to_pem(ca).encode("ascii"))
    request = EnrolmentRequest(
        site=site,
        node_key=node_key,
        approval_key=approval_key.verify_key.to_pem().decode("ascii"),
        tls_request=_tls_request(tls_key, site),
        created_at=(now or datetime.now(UTC)).replace(microsecond=0),
    )
    before = None
    if folder.request.is_file():
        before = load_document(EnrolmentRequest, folder.request, MAX_REQUEST_BYTES)
        if _same_keys(before, request):
            request = before
    if request is not before:
        facts = {"site": site, "request": request.digest, "consortium": fingerprint(ca)}
        note_act(folder, ENROLLED, facts, now=now)
    write_atomically(folder.request, request.to_bytes())
    write_atomically(folder.identity_file, identity.to_bytes())
    return Enrolled(
        site=site,
        hub=hub,
        request=folder.request,
        fingerprint=request.fingerprint,
        hub_ca_fingerprint=fingerprint(ca),
    )


def load_tls_key(path: Path, *, make: bool = False) -> ec.EllipticCurvePrivateKey:
    """The site's P-384 TLS key, made there if it is missing and `make` says so; a file others can read is refused."""
    if make and not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private(path, key, serialization.PrivateFormat.PKCS8)
    data = read_bounded(path, 65_536)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise KeyFileError(
            f"{path} can be read by other users.",
            hint="Make a new TLS key (pixcell site enroll --new-tls-key), and tell the coordinator to revoke this one.",
            code="key-file-exposed",
        )
    try:
        loaded = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise _no_key(path) from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise _no_key(path)
    return loaded


def _identity(folder: SiteFolder, site: str, hub: str) -> SiteIdentity:
    try:
        identity = SiteIdentity(site=site, hub=hub)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise BadInputError(
            f"The {'hub address' if where == 'hub' else 'site name'} cannot be used.",
            hint="A name has lower-case letters, digits and hyphens; an address is host:port.",
            code="bad-enrolment",
        ) from error
    if not folder.identity_file.is_file():
        return identity
    before = folder.identity()
    if before.site != site:
        raise RefusedError(
            f"{folder.root} is already the site {before.site}.",
            hint="Choose another --site-dir: one folder is one site.",
            code="site-exists",
        )
    return before.model_copy(update={"hub": hub})


def _compare_authority(folder: SiteFolder, ca: x509.Certificate, spoken: str | None) -> None:
    found = fingerprint(ca)
    if spoken is not None and "".join(spoken.lower().split()).removeprefix("sha256:") != found[7:]:
        raise RefusedError(
            f"The CA certificate has another fingerprint than the one you were read: {found}.",
            hint="Do not go on. Call the coordinator on a number you know and ask for ca.crt again.",
            code="ca-differs",
        )
    if folder.kit.is_file() and folder.hub_ca.is_file():
        before = fingerprint(read_authority(read_bounded(folder.hub_ca, 65_536), "hub-ca.crt"))
        if before != found:
            raise RefusedError(
                f"{folder.root} holds a kit of another consortium.",
                hint="Use another --site-dir: one folder is one site of one consortium.",
                code="another-consortium",
            )


def _same_keys(before: EnrolmentRequest, now: EnrolmentRequest) -> bool:
    if (before.site, before.node_key, before.approval_key) != (now.site, now.node_key, now.approval_key):
        return False
    try:
        # A signature of a request is random: the keys are compared, not the texts.
        return public_key_digest(tls_public_key(before)) == public_key_digest(tls_public_key(now))
    except PixcellError:
        return False


def _tls_request(key: ec.EllipticCurvePrivateKey, site: str) -> str:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _node_key(path: Path) -> str:
    """The public text of the node key at `path`, made there if it is missing."""
    if not path.exists():
        _write_private(path, ec.generate_private_key(ec.SECP384R1()), serialization.PrivateFormat.OpenSSH)
    try:
        loaded = serialization.load_ssh_private_key(read_bounded(path, 65_536), password=None)
    except ValueError as error:
        raise _no_key(path) from error
    public = loaded.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return " ".join(public.decode("ascii").split()[:2])


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    text = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _no_key(path: Path) -> BadInputError:
    return BadInputError(
        f"{path} is not a private key.", hint="Move it away and enrol again.", code="bad-key-file"
    )
