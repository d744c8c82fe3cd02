"""Makes a site's keys on the site and the request that asks the coordinator to add them."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ValidationError

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document, read_bounded
from pixcell_core.contracts.enrolment import EnrolmentRequest
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.keys import SigningKey
from site_client.approvals.site_folder import SiteFolder, SiteIdentity


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
            f"Fingerprint of the hub's CA (compare it likewise): {self.hub_ca_fingerprint}"
        )


def enrol(folder: SiteFolder, site: str, hub: str, ca_file: Path, now: datetime | None = None) -> Enrolled:
    """Make keys (once), keep the hub's CA, write the request. Running it again with the same answers is fine."""
    try:
        identity = SiteIdentity(site=site, hub=hub)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise BadInputError(
            f"The {'hub address' if where == 'hub' else 'site name'} cannot be used.",
            hint="A name has lower-case letters, digits and hyphens; an address is host:port.",
            code="bad-enrolment",
        ) from error
    ca = _read_ca(ca_file)
    if folder.identity_file.is_file() and folder.identity().site != site:
        raise RefusedError(
            f"{folder.root} is already the site {folder.identity().site}.",
            hint="Choose another --site-dir: one folder is one site.",
            code="site-exists",
        )
    for place in (folder.root, folder.keys, folder.approvals, folder.logs, folder.agent):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.keys.chmod(0o700)
    node_key = _node_key(folder.node_key)
    approval_key = SigningKey.load_or_create(folder.approval_key)
    write_atomically(folder.hub_ca, ca.public_bytes(serialization.Encoding.PEM))
    request = EnrolmentRequest(
        site=site,
        node_key=node_key,
        approval_key=approval_key.verify_key.to_pem().decode("ascii"),
        created_at=(now or datetime.now(UTC)).replace(microsecond=0),
    )
    if folder.request.is_file():
        before = load_document(EnrolmentRequest, folder.request)
        if before.model_copy(update={"created_at": request.created_at}) == request:
            request = before
    write_atomically(folder.request, request.to_bytes())
    write_atomically(folder.identity_file, identity.to_bytes())
    return Enrolled(
        site=site,
        hub=hub,
        request=folder.request,
        fingerprint=request.fingerprint,
        hub_ca_fingerprint="sha256:" + ca.fingerprint(hashes.SHA256()).hex(),
    )


def _read_ca(path: Path) -> x509.Certificate:
    data = read_bounded(path, 65_536)
    try:
        ca = x509.load_pem_x509_certificate(data)
        constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise BadInputError(
            f"{path.name} is not a certificate of an authority.",
            hint="Ask the coordinator for pki/ca.crt.",
            code="bad-ca",
        ) from error
    if not constraints.ca:
        raise BadInputError(
            f"{path.name} is a certificate, but not of an authority.",
            hint="Ask for pki/ca.crt.",
            code="bad-ca",
        )
    return ca


def _node_key(path: Path) -> str:
    """The public text of the node key at `path`, made there if it is missing."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text)
    try:
        loaded = serialization.load_ssh_private_key(read_bounded(path, 65_536), password=None)
    except ValueError as error:
        raise BadInputError(
            f"{path} is not a private key.", hint="Move it away and enrol again.", code="bad-key-file"
        ) from error
    public = loaded.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return " ".join(public.decode("ascii").split()[:2])
