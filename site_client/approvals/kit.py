"""Installs the kit a coordinator returned: only one of this consortium, for this site's keys, valid now, and newer."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import BaseModel

from pixcell_core.contracts.atomic import write_atomically
from pixcell_core.contracts.canonical import load_document, read_bounded
from pixcell_core.contracts.enrolment import EnrolmentRequest, Kit
from pixcell_core.errors import BadInputError
from pixcell_core.trust.certificates import read_authority, read_certificate
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.expiry import days_left
from pixcell_core.trust.kits import KitError, check_times, open_kit
from site_client.approvals.act_log import KIT_INSTALLED, note_act
from site_client.approvals.enrolment import MAX_REQUEST_BYTES, load_tls_key
from site_client.approvals.site_folder import SiteFolder

MAX_KIT_BYTES = 262_144


class KitInstalled(BaseModel):
    """What `pixcell site install-kit` did."""

    site: str
    role: str
    version: int
    hub: str
    expires_at: datetime
    days_left: int

    def __str__(self) -> str:
        return (
            f"Kit of {self.site} ({self.role}, version {self.version}) installed; hub {self.hub}.\n"
            f"Its certificate is valid until {self.expires_at:%Y-%m-%d} ({self.days_left} days)."
        )


def install_kit(folder: SiteFolder, kit_file: Path, now: datetime | None = None) -> KitInstalled:
    """Verify a kit and put its certificate in place. The same kit again changes nothing.

    Raises `KitError` with the codes `kit-of-another-consortium`, `kit-inconsistent`, `kit-of-another-site`,
    `kit-of-other-keys`, `kit-expired`, `clock-wrong`, `kit-older`; or the errors of a damaged envelope.
    """
    identity = folder.identity()
    moment = now or datetime.now(UTC)
    envelope = Envelope.from_bytes(read_bounded(kit_file, MAX_KIT_BYTES), name=kit_file.name)
    kit = open_kit(envelope, _authority(folder))
    if kit.party != identity.site:
        raise KitError(
            f"This kit is for {kit.party}; this site is {identity.site}.",
            hint="Ask the coordinator for your own kit.",
            code="kit-of-another-site",
        )
    key_file = _key_for(folder, kit)
    check_times(kit, moment)
    before = installed_kit(folder) if folder.kit.is_file() else None
    if before is not None and kit.digest != before.digest and kit.version <= before.version:
        raise KitError(
            f"Version {before.version} of the kit is installed; this is version {kit.version}.",
            hint="Keep the newer one. The coordinator's latest: pixcell kit show NAME.",
            code="kit-older",
        )
    if before is None or kit.digest != before.digest:
        note_act(folder, KIT_INSTALLED, {"version": kit.version, "kit": kit.digest}, now=now)
    write_atomically(folder.tls_certificate, kit.certificate.encode("ascii"))
    if key_file != folder.tls_key:
        key_file.replace(folder.tls_key)
    if kit.hub is not None and kit.hub != identity.hub:
        identity = identity.model_copy(update={"hub": kit.hub})
        write_atomically(folder.identity_file, identity.to_bytes())
    write_atomically(folder.kit, envelope.to_bytes())
    return KitInstalled(
        site=kit.party,
        role=kit.role,
        version=kit.version,
        hub=identity.hub,
        expires_at=kit.expires_at,
        days_left=days_left(kit.expires_at, moment),
    )


def installed_kit(folder: SiteFolder) -> Kit:
    """The kit of this site, verified again from the disk; `no-kit` where none is installed. Says nothing about time."""
    if not folder.kit.is_file() or not folder.tls_certificate.is_file():
        raise BadInputError(
            f"{folder.root} has no kit yet.",
            hint="Send the request to the coordinator; when the kit comes: pixcell site install-kit KIT",
            code="no-kit",
        )
    return open_kit(Envelope.from_bytes(read_bounded(folder.kit, MAX_KIT_BYTES)), _authority(folder))


def _authority(folder: SiteFolder) -> x509.Certificate:
    return read_authority(read_bounded(folder.hub_ca, 65_536), folder.hub_ca.name)


def _key_for(folder: SiteFolder, kit: Kit) -> Path:
    """The private key that the kit's certificate belongs to; refuses a kit for any other keys than this site's."""
    request = load_document(EnrolmentRequest, folder.request, MAX_REQUEST_BYTES)
    wanted = read_certificate(kit.certificate.encode("ascii")).public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    if (kit.node_key, kit.approval_key) == (request.node_key, request.approval_key):
        for path in (folder.next_tls_key, folder.tls_key):
            if path.is_file() and _spki(path) == wanted:
                return path
    raise KitError(
        f"The kit of {kit.party} was made for other keys than those of this site.",
        hint="It answers an older request, or another folder's. Send this folder's request.json and compare its "
        "fingerprint over the phone.",
        code="kit-of-other-keys",
    )


def _spki(path: Path) -> bytes:
    return load_tls_key(path).public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
