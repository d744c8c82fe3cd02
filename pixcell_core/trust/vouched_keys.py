"""A site's working key, vouched for by the key in its kit: so it is good as long as the kit, and not a day longer.

A kit names a party's approval key. That key signs, once for each working key, whose and for what it is. With the kit
inside, the statement leads from the consortium's authority to the signature on a bundle, offline.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from cryptography import x509
from pydantic import StringConstraints

from pixcell_core.contracts.canonical import Document, Moment, parse_document
from pixcell_core.contracts.enrolment import Kit, RevocationList
from pixcell_core.contracts.study import SiteName
from pixcell_core.trust.certificates import read_authority
from pixcell_core.trust.dsse import Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.keys import SigningKey, VerifyKey
from pixcell_core.trust.kits import check_times, open_kit
from pixcell_core.trust.signer_certificates import (
    SignerCertificate,
    SignerCertificateError,
    require_unrevoked,
)

VOUCHED_KEY_PAYLOAD_TYPE = "application/vnd.pixcell.vouched-key.v1+json"

Purpose = Literal["release", "ledger"]
"""What a vouched key is for: signing what a site releases, or its privacy ledger."""


class VouchedKey(Document):
    """That `public_key` is a working key of `party`, by the approval key in its `kit`."""

    schema_version: Literal["vouched-key/v1"] = "vouched-key/v1"
    party: SiteName
    purpose: Purpose
    public_key: Annotated[
        str, StringConstraints(pattern=r"^-----BEGIN PUBLIC KEY-----\n[\n\r -~]*$", max_length=400)
    ]
    kit: Envelope
    vouched_at: Moment


def vouch(
    kit: Envelope,
    party: str,
    key: VerifyKey,
    approval_key: SigningKey,
    *,
    now: datetime,
    purpose: Purpose = "release",
) -> Envelope:
    """The statement about `key`, signed by the approval key that the kit names."""
    statement = VouchedKey(
        party=party,
        purpose=purpose,
        public_key=key.to_pem().decode("ascii"),
        kit=kit,
        vouched_at=now.astimezone(UTC).replace(microsecond=0),
    )
    return sign_envelope(VOUCHED_KEY_PAYLOAD_TYPE, statement.to_bytes(), [approval_key])


def authority_of_vouched(envelope: Envelope) -> x509.Certificate:
    """The authority that the statement's own kit names: it proves the statement whole, not whose it is."""
    claimed = parse_document(VouchedKey, envelope.unsafe_unverified_payload(), name="the site's certificate")
    kit = parse_document(Kit, claimed.kit.unsafe_unverified_payload(), name="the site's kit")
    return read_authority(kit.ca.encode("ascii"), "the authority in the site's kit")


def open_vouched_key(
    envelope: Envelope,
    key: VerifyKey,
    party: str,
    *,
    ca: x509.Certificate | None,
    moments: Sequence[datetime],
    revocations: RevocationList | None = None,
    purpose: Purpose = "release",
) -> SignerCertificate:
    """The kit behind a site's key, if it is this site's, good at every moment given, and not revoked.

    Without `ca` the authority in the kit is used. Raises the errors of `open_kit`, `check_times` and `verify_envelope`,
    or `SignerCertificateError` (`signer-certificate-role`, `-key`, `-refused`, `signer-revoked`).
    """
    authority = ca or authority_of_vouched(envelope)
    claimed = parse_document(VouchedKey, envelope.unsafe_unverified_payload(), name="the site's certificate")
    kit = open_kit(claimed.kit, authority)
    approval_key = VerifyKey.from_pem(kit.approval_key.encode("ascii"), name=f"the key of {kit.party}")
    payload = verify_envelope(envelope, [approval_key], payload_type=VOUCHED_KEY_PAYLOAD_TYPE)
    stated = parse_document(VouchedKey, payload, name="the site's certificate")
    if kit.role != "site":
        raise SignerCertificateError(
            f"The certificate of {kit.party} is an {kit.role}'s, not a site's.",
            hint="A site exports with the kit of role site that the coordinator signed for it.",
            code="signer-certificate-role",
        )
    if (stated.party, kit.party, stated.purpose) != (party, party, purpose):
        raise SignerCertificateError(
            f"The certificate behind the site's key is {kit.party}'s, and the release is {party}'s.",
            hint="Do not use this bundle. A site exports under the name it enrolled with.",
        )
    if VerifyKey.from_pem(stated.public_key.encode("ascii"), name="the vouched key") != key:
        raise SignerCertificateError(
            f"The certificate of {party} vouches for another key than {key.key_id}.",
            hint="Export again at the site: it vouches for the release key it has.",
            code="signer-certificate-key",
        )
    for moment in moments:
        check_times(kit, moment)
    if revocations is not None:
        require_unrevoked(kit, revocations)
    return SignerCertificate(kit, authority, key)
