"""Who may sign at this site, for which role, and whether a certificate of the consortium stands behind an auditor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509

from pixcell_core.contracts.canonical import read_bounded
from pixcell_core.contracts.gate import SignerRole
from pixcell_core.errors import BadInputError, RefusedError
from pixcell_core.trust.certificates import fingerprint, read_authority
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.durable import write_whole
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.kits import open_revocations
from pixcell_core.trust.quorum import role_of
from pixcell_core.trust.signer_certificates import (
    SignerCertificate,
    open_signer_certificate,
    own_authority,
    revocations_of,
)
from pixcell_core.trust.vouched_keys import authority_of_vouched, open_vouched_key, vouch
from site_client.approvals.site_folder import SiteFolder
from site_client.release.seal import Seal
from site_client.release.workspace import CERTIFICATES, REVOCATIONS, ReleaseFolder, ReleaseWorkspace

_MAX_CERTIFICATE_BYTES = 65_536


class SignerRefusedError(RefusedError):
    """This key may not sign here."""

    default_code = "unknown-signer"


@dataclass(frozen=True)
class Credentials:
    """What a signer brings beside the key: a kit of the consortium, its authority, and the lists of kits taken back."""

    certificate: Envelope | None = None
    ca: x509.Certificate | None = None
    revocations: Sequence[Envelope] = field(default_factory=tuple)

    @classmethod
    def load(
        cls, certificate: Path | None, ca: Path | None, revocations: Sequence[Path] = ()
    ) -> Credentials | None:
        """From files; None where none was given."""
        if certificate is None and ca is None and not revocations:
            return None
        return cls(
            certificate=None if certificate is None else Envelope.load(certificate),
            ca=None if ca is None else read_authority(read_bounded(ca, _MAX_CERTIFICATE_BYTES), ca.name),
            revocations=tuple(Envelope.load(path) for path in revocations),
        )


def require_signer(
    workspace: ReleaseWorkspace, seal: Seal, key: VerifyKey, role: SignerRole, now: datetime
) -> None:
    """Refuse a key that may not sign, or not for this role.

    Codes: `auditor-is-site`, `unknown-auditor`, `unknown-signer`, `wrong-role`, `signer-key-expired`.
    """
    own = workspace.site_key().key_id
    if role == "auditor" and key.key_id == own:
        raise SignerRefusedError(
            "The site's own release key cannot sign the verdict on its own release.",
            hint="The auditor signs with a key of their own: pixcell key new FILE.",
            code="auditor-is-site",
        )
    if seal.signers is None:
        if role == "data-protection" or (role == "site" and key.key_id != own):
            raise SignerRefusedError(
                f"Without a signers' document only the site's release key signs for the site, and an auditor; not {role}.",
                hint="Name the signers when you ask: pixcell release request --signers FILE",
            )
    else:
        named = role_of(key.key_id, seal.signers, own, at=now)
        if named.role != role:
            raise SignerRefusedError(
                f"{named.name} may sign as {named.role}, not as {role}.",
                hint="Give the role of the signers' document: --role.",
                code="wrong-role",
            )
    accepted = workspace.accepted_auditors()
    if role == "auditor" and accepted is not None and key.key_id not in accepted:
        raise SignerRefusedError(
            f"{key.key_id} is not among the auditors this site accepts.",
            hint=f"Accepted auditors' public keys lie in {workspace.auditors}.",
            code="unknown-auditor",
        )


def check_credentials(
    workspace: ReleaseWorkspace,
    release: ReleaseFolder,
    seal: Seal,
    key: VerifyKey,
    role: SignerRole,
    credentials: Credentials | None,
    now: datetime,
) -> SignerCertificate | None:
    """The certificate behind an auditor's key: good now, unrevoked, of the consortium the signers' document names."""
    given = credentials or Credentials()
    named = seal.signers.consortium if seal.signers is not None else None
    if given.certificate is None:
        if role == "auditor" and named is not None:
            raise SignerRefusedError(
                "The signers' document asks for a certificate of the consortium behind an auditor's key.",
                hint="Give the auditor's kit: --certificate KIT.json",
                code="signer-certificate-missing",
            )
        if role == "site":
            check_site_certificate(workspace, seal, key, credentials, now)
        elif given.revocations:
            raise BadInputError(
                "A revocation list was given without a certificate.",
                hint="Give --certificate KIT.json too.",
                code="nothing-to-revoke",
            )
        return None
    if role != "auditor":
        raise BadInputError(
            f"A certificate stands behind an auditor's key, not behind the {role}'s.",
            hint="Leave --certificate out.",
            code="signer-certificate-role",
        )
    ca = authority_for(workspace, given.certificate, given.ca)
    if named is not None and named != fingerprint(ca):
        raise SignerRefusedError(
            "The certificate is of another consortium than the signers' document names.",
            hint="Use the kit that this consortium's coordinator signed.",
            code="signer-certificate-refused",
        )
    kept = release.revocations()
    lists = (*given.revocations, *(() if kept is None else (kept,)))
    return open_signer_certificate(
        given.certificate, key, ca=ca, moments=[now], revocations=revocations_of(lists, ca)
    )


def site_certificate(workspace: ReleaseWorkspace, site: str, now: datetime) -> dict[str, Envelope]:
    """What stands behind the site's release key, by its key id: its installed kit; empty at a site without one.

    Only made here; whether it is good at its moment and unrevoked is looked at where it is used.
    """
    folder = SiteFolder(workspace.site_dir)
    if not folder.kit.is_file():
        return {}
    key, approval_key = workspace.site_key().verify_key, SigningKey.load(folder.approval_key)
    return {key.key_id: vouch(Envelope.load(folder.kit), site, key, approval_key, now=now)}


def check_site_certificate(
    workspace: ReleaseWorkspace,
    seal: Seal,
    key: VerifyKey,
    credentials: Credentials | None,
    now: datetime,
) -> None:
    """Refuse the site's own signature where its kit is over or revoked, as an auditor's is refused."""
    given = credentials or Credentials()
    for key_id, envelope in site_certificate(workspace, seal.manifest.site, now).items():
        if key_id == key.key_id:
            ca = given.ca or enrolled_authority(workspace) or authority_of_vouched(envelope)
            revoked = revocations_of(given.revocations, ca)
            site = seal.manifest.site
            open_vouched_key(envelope, key, site, ca=ca, moments=[now], revocations=revoked)


def authority_for(
    workspace: ReleaseWorkspace, certificate: Envelope, given: x509.Certificate | None
) -> x509.Certificate:
    """The authority a kit is checked against: as given, else the one this site enrolled with, else the kit's own."""
    return given or enrolled_authority(workspace) or own_authority(certificate)


def enrolled_authority(workspace: ReleaseWorkspace) -> x509.Certificate | None:
    """The authority of the consortium this site enrolled with; None at a site that is not enrolled."""
    pinned = SiteFolder(workspace.site_dir).hub_ca
    if not pinned.is_file():
        return None
    return read_authority(read_bounded(pinned, _MAX_CERTIFICATE_BYTES), pinned.name)


def require_enrolled_authority(
    workspace: ReleaseWorkspace,
    certificates: Mapping[str, Envelope],
    site_key: VerifyKey,
    credentials: Credentials | None,
) -> None:
    """Refuse, where no authority is given, certificates of another than the one this site enrolled with.

    They lie in the release's folder, and an authority is quickly made. Whether there must be a certificate is another
    question: the signers' document answers it, or who gives an authority.
    """
    pinned = enrolled_authority(workspace)
    if pinned is None or (credentials is not None and credentials.ca is not None):
        return
    for key_id, envelope in certificates.items():
        own = authority_of_vouched(envelope) if key_id == site_key.key_id else own_authority(envelope)
        if fingerprint(own) != fingerprint(pinned):
            raise SignerRefusedError(
                f"The certificate behind {key_id} is of another consortium than the one this site enrolled with.",
                hint="If it is the right one, give its authority: --ca CA.crt. Otherwise have another auditor sign.",
                code="kit-of-another-consortium",
            )


def keep_credentials(release: ReleaseFolder, key: VerifyKey, credentials: Credentials) -> None:
    """Keep the kit with the release, and the newest revocation list, so that export looks at both again."""
    if credentials.certificate is None:
        return
    folder = release.path / CERTIFICATES
    folder.mkdir(exist_ok=True)
    write_whole(folder / f"{key.key_id.removeprefix('sha256:')}.json", credentials.certificate.to_bytes())
    ca = credentials.ca or own_authority(credentials.certificate)  # checked before against the enrolled one
    kept = release.revocations()
    lists = [*credentials.revocations, *([] if kept is None else [kept])]
    if lists:
        newest = max(lists, key=lambda envelope: open_revocations(envelope, ca).number)
        write_whole(release.path / REVOCATIONS, newest.to_bytes())


def known_keys(
    workspace: ReleaseWorkspace, release: ReleaseFolder, more: Sequence[VerifyKey] = ()
) -> dict[str, VerifyKey]:
    """Every key whose signature can be checked here: who signed here, accepted auditors, the site's own."""
    accepted = workspace.accepted_auditors() or {}
    recorded = (*workspace.recorded_signers(release), *more, workspace.site_key().verify_key)
    return accepted | {key.key_id: key for key in recorded}
