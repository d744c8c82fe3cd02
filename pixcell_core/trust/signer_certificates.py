"""Whether an auditor's signing key is vouched for by a consortium: its kit, unexpired and unrevoked. Pure and offline.

A kit binds a party's signing key (its approval key) and its role to a certificate of the consortium's authority. It
holds no secret, so it may lie in a bundle beside the verdict it stands behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.enrolment import Kit, RevocationList
from pixcell_core.errors import RefusedError
from pixcell_core.trust.certificates import (
    fingerprint,
    party_of,
    read_authority,
    read_certificate,
)
from pixcell_core.trust.dsse import Envelope
from pixcell_core.trust.keys import VerifyKey
from pixcell_core.trust.kits import check_times, open_kit, open_revocations


class SignerCertificateError(RefusedError):
    """An auditor's certificate does not stand behind this signature."""

    default_code = "signer-certificate-refused"


@dataclass(frozen=True)
class SignerCertificate:
    """A certificate that was checked: the kit, the authority that signed it, and the signing key it vouches for."""

    kit: Kit
    ca: x509.Certificate
    key: VerifyKey

    @property
    def consortium(self) -> str:
        """Fingerprint of the authority."""
        return fingerprint(self.ca)

    def __str__(self) -> str:
        return f"{self.kit.party} of consortium {self.consortium.removeprefix('sha256:')[:16]}"


def own_authority(envelope: Envelope) -> x509.Certificate:
    """The authority that a kit itself names: it proves the kit whole, not whose it is."""
    claimed = parse_document(Kit, envelope.unsafe_unverified_payload(), name="the signer's certificate")
    return read_authority(claimed.ca.encode("ascii"), "the authority in the signer's certificate")


def open_signer_certificate(
    envelope: Envelope,
    key: VerifyKey,
    *,
    ca: x509.Certificate | None,
    moments: Sequence[datetime],
    revocations: RevocationList | None = None,
) -> SignerCertificate:
    """The certificate, if it is an auditor's, of this key, good at every moment given, and not revoked.

    Without `ca` the authority in the kit is used. Raises the errors of `open_kit` and `check_times`, or
    `SignerCertificateError`.
    """
    authority = ca or own_authority(envelope)
    kit = open_kit(envelope, authority)
    if kit.role != "auditor":
        raise SignerCertificateError(
            f"The certificate of {kit.party} is a {kit.role}'s, not an auditor's.",
            hint="The coordinator signs a kit of role auditor for who audits: pixcell kit approve --role auditor.",
            code="signer-certificate-role",
        )
    if VerifyKey.from_pem(kit.approval_key.encode("ascii"), name=f"the key of {kit.party}") != key:
        raise SignerCertificateError(
            f"The certificate of {kit.party} is for another signing key than {key.key_id}.",
            hint="Sign with the key whose request the coordinator approved (keys/approval of that party).",
            code="signer-certificate-key",
        )
    for moment in moments:
        check_times(kit, moment)
    if revocations is not None:
        require_unrevoked(kit, revocations)
    return SignerCertificate(kit, authority, key)


def require_unrevoked(kit: Kit, revocations: RevocationList) -> None:
    """Refuse a kit whose certificate stands on the revocation list: `signer-revoked`, whenever it was taken back."""
    certificate = read_certificate(kit.certificate.encode("ascii"), "The signer's certificate")
    serial = party_of(certificate).serial
    taken = next((entry for entry in revocations.revoked if entry.serial == serial), None)
    if taken is not None:
        raise SignerCertificateError(
            f"The certificate of {kit.party} was revoked on {taken.revoked_at:%Y-%m-%d}"
            f"{f': {taken.reason}' if taken.reason else ''}.",
            hint="A signature whose certificate was taken back opens nothing: have another auditor sign.",
            code="signer-revoked",
        )


def revocations_of(envelopes: Sequence[Envelope], ca: x509.Certificate) -> RevocationList | None:
    """The newest of several revocation lists of one consortium; None for none."""
    lists = [open_revocations(envelope, ca) for envelope in envelopes]
    return max(lists, key=lambda found: found.number, default=None)
