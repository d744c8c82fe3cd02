"""Verification of kits and revocation lists: signed by this consortium's authority, whole, and valid now. Offline."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509

from pixcell_core.contracts.canonical import parse_document
from pixcell_core.contracts.enrolment import (
    KIT_PAYLOAD_TYPE,
    REVOCATIONS_PAYLOAD_TYPE,
    Kit,
    RevocationList,
)
from pixcell_core.errors import RefusedError
from pixcell_core.trust.certificates import (
    authority_key,
    fingerprint,
    issued_by,
    node_public_key,
    party_of,
    public_key_digest,
    read_certificate,
)
from pixcell_core.trust.dsse import Envelope, sign_envelope, verify_envelope
from pixcell_core.trust.keys import SigningKey

CLOCK_SLACK = timedelta(minutes=5)
"""Certificates begin this much before they are made: clocks of honest machines differ a little."""


class KitError(RefusedError):
    """A kit cannot be used here."""

    default_code = "kit-refused"


def sign_kit(kit: Kit, key: SigningKey) -> Envelope:
    """The envelope in which a kit travels."""
    return sign_envelope(KIT_PAYLOAD_TYPE, kit.to_bytes(), [key])


def sign_revocations(revocations: RevocationList, key: SigningKey) -> Envelope:
    """The envelope in which a revocation list travels."""
    return sign_envelope(REVOCATIONS_PAYLOAD_TYPE, revocations.to_bytes(), [key])


def open_kit(envelope: Envelope, ca: x509.Certificate) -> Kit:
    """The kit, if this consortium's authority signed it and everything in it agrees. Says nothing about time.

    Raises `KitError`, or the errors of `verify_envelope`.
    """
    key = authority_key(ca)
    if envelope.payloadType == KIT_PAYLOAD_TYPE and key.key_id not in envelope.key_ids:
        raise KitError(
            "This kit was signed by another consortium than the one this folder trusts.",
            hint="Ask your coordinator for your kit, and compare the fingerprint of the CA over the phone.",
            code="kit-of-another-consortium",
        )
    kit = parse_document(Kit, verify_envelope(envelope, [key], payload_type=KIT_PAYLOAD_TYPE), name="the kit")
    certificate = read_certificate(kit.certificate.encode("ascii"), "The kit's certificate")
    named = party_of(certificate)
    node = public_key_digest(node_public_key(kit.node_key, kit.party)) if kit.role == "site" else None
    agrees = (
        kit.consortium == fingerprint(ca) == fingerprint(read_certificate(kit.ca.encode("ascii"), "The CA"))
        and issued_by(certificate, ca)
        and (named.party, named.role, named.node_key) == (kit.party, kit.role, node)
        and named.not_after == kit.expires_at
    )
    if not agrees:
        raise KitError(
            f"The kit of {kit.party} and the certificate in it do not agree.",
            hint="Ask the coordinator for the kit again.",
            code="kit-inconsistent",
        )
    return kit


def check_times(kit: Kit, now: datetime | None = None) -> None:
    """Refuse a kit that is over (`kit-expired`) or not valid yet (`clock-wrong`), or whose authority is (`ca-expired`)."""
    moment = now or datetime.now(UTC)
    ca = read_certificate(kit.ca.encode("ascii"), "The CA")
    if moment >= ca.not_valid_after_utc + CLOCK_SLACK:
        raise KitError(
            f"The authority that signed the kit of {kit.party} expired on {ca.not_valid_after_utc:%Y-%m-%d}.",
            hint="Nothing it signed counts any more. Ask the coordinator for a kit of the consortium's new authority.",
            code="ca-expired",
        )
    begun = (
        (f"The authority that signed the kit of {kit.party} is of", ca.not_valid_before_utc),
        ("The kit was made on", kit.issued_at),
    )
    for what, start in begun:
        if moment < start - CLOCK_SLACK:
            raise KitError(
                f"{what} {start:%Y-%m-%d %H:%M} UTC, but this machine's clock says {moment:%Y-%m-%d %H:%M} UTC.",
                hint="Set this machine's clock (or ask the coordinator to look at theirs), then try again.",
                code="clock-wrong",
            )
    if moment >= kit.expires_at:
        raise KitError(
            f"The kit of {kit.party} expired on {kit.expires_at:%Y-%m-%d}.",
            hint="Ask the coordinator for a renewed one: pixcell kit renew NAME. If it should be valid, "
            "look at this machine's clock.",
            code="kit-expired",
        )


def open_revocations(envelope: Envelope, ca: x509.Certificate) -> RevocationList:
    """The list, if this consortium's authority signed it; raises the errors of `verify_envelope`, or `KitError`."""
    payload = verify_envelope(envelope, [authority_key(ca)], payload_type=REVOCATIONS_PAYLOAD_TYPE)
    revocations = parse_document(RevocationList, payload, name="the revocation list")
    if revocations.consortium != fingerprint(ca):
        raise KitError(
            "The revocation list is of another consortium.",
            hint="Put back this consortium's pki/revoked.json.",
            code="revocations-of-another-consortium",
        )
    return revocations
